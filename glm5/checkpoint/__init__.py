"""Model directories in the Hugging Face layout: streamed in, written whole or not at all, converted without a model."""

from glm5.checkpoint.checkpoint import Checkpoint
from glm5.checkpoint.convert import Conversion, convert_checkpoint
from glm5.checkpoint.load import load_model, load_part
from glm5.checkpoint.save import save_model
from glm5.checkpoint.staging import staged_directory

__all__ = [
    "Checkpoint",
    "Conversion",
    "convert_checkpoint",
    "load_model",
    "load_part",
    "save_model",
    "staged_directory",
]
