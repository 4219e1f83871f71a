"""The two sides of `benchmarks.engine`: our engine and `transformers`' generate on one checkpoint, by their own APIs.

Both hold a prompt of T random tokens per row in their cache and go on from there: ours finds it in the prefix cache,
theirs is given the filled cache. So a decode run costs no prefill, and the two sides can take turns.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, GlmMoeDsaForCausalLM
from transformers.utils import logging

import glm5
from benchmarks.forward import THEIR_CHUNK, their_bytes_per_token
from benchmarks.measure import timed
from glm5.engine import SamplingParams
from glm5.model import initialize_


def checkpoint(directory: Path, seed: int) -> Path:
    """A `nano` model with random weights, saved once."""
    if not (directory / "config.json").is_file():
        model = glm5.GLM5(glm5.ModelConfig.from_preset("nano")).eval()
        initialize_(model, 0.05, seed)
        glm5.save_model(model, directory)
    return directory


def prompts(rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random token ids; another seed, another first token, so nothing of it is in a prefix cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 4096, (rows, tokens), generator=generator).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


class Ours:
    """The engine as `glm5 serve` makes it, with room for `tokens` tokens of cache."""

    def __init__(self, directory: Path, tokens: int, *, storage: str | None = None, strict: bool = False) -> None:
        self.engine = glm5.Engine(
            directory, max_num_seqs=32, storage=storage, strict=strict, num_blocks=-(-tokens // 64) + 64
        )  # fmt: skip

    def fill(self, ids: list[list[int]]) -> float:
        """Computes the prompts into the prefix cache; seconds until every row has its first token."""
        return timed(lambda: self.engine.generate(ids, greedy(1)))

    def decode(self, ids: list[list[int]], steps: int) -> float:
        """Seconds of `steps` tokens of every row after the first, its prompt being in the cache."""
        first = timed(lambda: self.engine.generate(ids, greedy(1)))
        return timed(lambda: self.engine.generate(ids, greedy(1 + steps))) - first

    @property
    def bytes_per_token(self) -> float:
        return self.engine.limits.bytes_per_token


class Theirs:
    """`GlmMoeDsaForCausalLM.generate`."""

    def __init__(self, directory: Path) -> None:
        logging.set_verbosity_error()
        self.model = GlmMoeDsaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.cache: DynamicCache | None = None
        self.ids = torch.empty(0)

    @torch.inference_mode()
    def first_token(self, ids: list[list[int]]) -> float:
        """Seconds from a new prompt to its first token."""
        return timed(lambda: self.model.generate(torch.tensor(ids), max_new_tokens=1, do_sample=False))

    @torch.inference_mode()
    def fill(self, ids: list[list[int]]) -> None:
        """Computes the prompts into a cache, in parts: in one, 8k tokens take 8 GiB."""
        self.ids, self.cache = torch.tensor(ids), DynamicCache(config=self.model.config)
        for part in self.ids[:, :-1].split(THEIR_CHUNK, dim=1):
            self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, steps: int) -> float:
        """Seconds of `steps` tokens of every row; the cache of this model cannot be cut, so it grows by a few a run."""
        start = time.perf_counter()
        self.ids = self.model.generate(self.ids, past_key_values=self.cache, max_new_tokens=steps, do_sample=False)
        return time.perf_counter() - start

    @property
    def bytes_per_token(self) -> float:
        assert self.cache is not None
        rows = self.ids.shape[0]
        return their_bytes_per_token(self.cache, self.ids.shape[1] - 1) / rows


def peak_rss(side: str, directory: Path, tokens: int, threads: int) -> int:
    """Peak resident bytes of a process of its own that answers one prompt of T tokens with 16."""
    command = [sys.executable, "-m", "benchmarks.engine_sides", side, str(directory), str(tokens), str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def own_peak() -> int:
    """Peak resident bytes of this process (VmHWM: unlike ru_maxrss it does not start at the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _answer_one(side: str, directory: Path, tokens: int, threads: int) -> None:
    torch.set_num_threads(threads)
    ids = prompts(1, tokens, seed=1)
    if side == "ours":
        Ours(directory, tokens + 16).engine.generate(ids, greedy(16))
    else:
        theirs = Theirs(directory)
        theirs.fill(ids)
        theirs.decode(16)
    print(own_peak())


if __name__ == "__main__":
    _answer_one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
