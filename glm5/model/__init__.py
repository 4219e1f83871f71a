"""The single-device model: tensors in, tensors out."""

from glm5.model.cache import Cache, LatentCache, draft_layers
from glm5.model.head import LOGITS, by_pieces, logits_in, without_head
from glm5.model.initialization import initialize_
from glm5.model.lora import add_adapters, merge_adapters
from glm5.model.output import ModelOutput, Replay, RouterRecord
from glm5.model.transformer import GLM5, keeps_fp32

__all__ = ["GLM5", "LOGITS", "Cache", "LatentCache", "ModelOutput", "Replay", "RouterRecord", "add_adapters",
           "by_pieces", "draft_layers", "initialize_", "keeps_fp32", "logits_in", "merge_adapters",
           "without_head"]  # fmt: skip
