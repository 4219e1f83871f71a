"""A tiny model that speaks: a trained tokenizer of 320 tokens and random weights of the same vocabulary."""

from functools import lru_cache

from conftest import tiny_config, tiny_model

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
