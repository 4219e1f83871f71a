"""A model without sense that writes calls, tags spelled in plain characters, and texts that read as numbers."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from speaker import VOCABULARY, speaker_config, speaker_tokenizer

TAGS = ("<tool_call>", "</think>", "</tool_call>", "</arg_value>", "<arg_key>", "<arg_value>", "</arg_key>")
SPELLED = (
    "<tool_call>book<arg_key>", "</arg_value></tool_call>", "</arg_value><arg_key>a", "null", "true", "12", "-5",
    '"x"', "</tool_call>\n<tool_call>book",
)  # fmt: skip


class WildModel(torch.nn.Module):
    """Stands in for a `GLM5`: logits drawn from the last tokens, with a liking for what could mislead a reader."""

    def __init__(self, seed: int, positions: int = 4096) -> None:
        super().__init__()
        self.config = replace(speaker_config(), max_position_embeddings=positions)
        self.seed, tokenizer = seed, speaker_tokenizer()
        self.liking_V = torch.zeros(VOCABULARY)
        for character in '"{}[]:,0123456789-<>/_truefalsn\\ ':
            self.liking_V[tokenizer.encode(character, allow_special=False)] += 1.5
        self.liking_V[[tokenizer.token_to_id(tag) for tag in TAGS]] = 3.5
        self.liking_V[list(tokenizer.eos_ids)] = -2.0
        self.spelled = [tokenizer.encode(text, allow_special=False) for text in SPELLED]

    def forward(self, ids_1T, *, attention):
        """Goes on with a spelling that it has begun, likely."""
        ids = ids_1T[0].tolist()
        seed = hash((self.seed, len(ids), *ids[-8:])) % 2**40
        logits_V = 1.5 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) + self.liking_V
        for text in self.spelled:
            begun = next(n for n in range(len(text) - 1, -1, -1) if not n or ids[-n:] == text[:n])
            logits_V[text[begun]] += 4.0 if begun else 1.5
        logits_1TV = torch.zeros(1, len(ids), VOCABULARY)
        logits_1TV[0, -1] = logits_V
        return SimpleNamespace(logits=logits_1TV)
