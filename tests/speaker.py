"""A tiny model that speaks: a trained tokenizer of 320 tokens and random weights of the same vocabulary."""

import time
from dataclasses import replace
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


def speaker_model(seed: int = 0, positions: int = 512) -> GLM5:
    """Random weights, wide enough that the distribution is far from flat."""
    return tiny_model(seed, **{**_changes(), "max_position_embeddings": positions})


class ScriptedModel(torch.nn.Module):
    """Stands in for a `GLM5` in server tests: says one prepared text, then ends its turn.

    The engine runs it by recomputation (`glm5/engine/recompute.py`), since it has no layers to cache.
    """

    def __init__(self, text: str, positions: int = 512) -> None:
        super().__init__()
        self.config = replace(speaker_config(), max_position_embeddings=positions)
        tokenizer = speaker_tokenizer()
        self.script = [*tokenizer.encode(text), tokenizer.token_to_id("<|user|>")]
        self.delay = 0.0

    def forward(self, ids_1T, *, attention):
        """Logits that leave no doubt about the next token: what follows the longest beginning of the script."""
        time.sleep(self.delay)
        ids, logits_1TV = ids_1T[0].tolist(), torch.zeros(*ids_1T.shape, VOCABULARY)
        said = next(n for n in range(min(len(self.script), len(ids)), -1, -1) if ids[len(ids) - n :] == self.script[:n])
        logits_1TV[:, -1, self.script[min(said, len(self.script) - 1)]] = 50.0
        return SimpleNamespace(logits=logits_1TV)
