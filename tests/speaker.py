"""A tiny model that speaks: a trained tokenizer of 320 tokens and random weights of the same vocabulary."""

import time
from functools import lru_cache
from types import SimpleNamespace

import torch
from tiny import tiny_config, tiny_model

from glm5 import GLM5, ModelConfig, Tokenizer

VOCABULARY = 320


@lru_cache
def speaker_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with GLM-5's special tokens."""
    return Tokenizer.train(
        ["What is 12 + 30? The answer is 42. " * 4, "the quick brown fox jumps over the lazy dog"], VOCABULARY
    )


def _changes() -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 512,
        "eos_token_id": speaker_tokenizer().eos_ids,
    }


def speaker_config() -> ModelConfig:
    """The tiny configuration with this vocabulary, its end-of-turn ids and 512 positions."""
    return tiny_config(**_changes())


def speaker_model(seed: int = 0) -> GLM5:
    """Random weights, wide enough that the distribution is far from flat."""
    return tiny_model(seed, **_changes())


class ScriptedModel(torch.nn.Module):
    """Stands in for a `GLM5` in server tests: says one prepared text, then ends its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.config = speaker_config()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(VOCABULARY, 1)
        tokenizer = speaker_tokenizer()
        self.script = [*tokenizer.encode(text), tokenizer.token_to_id("<|user|>")]
        self.delay = 0.0

    def forward(self, ids_BT, *, cache, attention, logits_to_keep):
        """Logits that leave no doubt about the next token of the script."""
        time.sleep(self.delay)
        said = 0 if cache.length == 0 else cache.length - cache.prompt + 1
        if cache.length == 0:
            cache.prompt = ids_BT.shape[1]
        cache.length += ids_BT.shape[1]
        logits_B1V = torch.zeros(len(ids_BT), 1, VOCABULARY)
        logits_B1V[:, :, self.script[min(said, len(self.script) - 1)]] = 50.0
        return SimpleNamespace(logits=logits_B1V)
