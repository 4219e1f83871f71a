"""Samples during training: plain token-by-token decoding with a cache. The engine is the real thing.

Training cannot import the engine (rooms build upwards), and a few lines of text per evaluation need no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glm5.model import GLM5, LatentCache
from glm5.text import Tokenizer


@torch.no_grad()
def sample_ids(
    model: GLM5,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    attention: str = "dense",
) -> list[int]:
    """Up to `max_tokens` token ids after `prompt`; 0 is greedy. Ends before a token of `stop`."""
    generator = torch.Generator().manual_seed(seed)
    cache = LatentCache(model.config, batch=1, capacity=len(prompt) + max_tokens)
    fed, found = list(prompt), []
    for _ in range(max_tokens):
        logits_V = model(torch.tensor([fed]), cache=cache, attention=attention, logits_to_keep=1).logits[0, -1].float()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))
        if token in stop:
            break
        found.append(token)
        fed = [token]
    return found


def sample_text(
    model: GLM5,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 60,
    temperature: float = 0.8,
    seed: int = 0,
    attention: str = "dense",
) -> str:
    """Continuations of `prompts`, each after the mark that begins a document, with a line between them."""
    parts = []
    for prompt in prompts:
        ids = [tokenizer.pad_id, *tokenizer.encode(prompt)]
        found = sample_ids(
            model, ids, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=[tokenizer.pad_id],
            attention=attention,
        )  # fmt: skip
        parts.append(prompt + tokenizer.decode(found))
    return "\n\n---\n\n".join(parts) + "\n"
