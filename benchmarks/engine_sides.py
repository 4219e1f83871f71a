"""The sides of `benchmarks.engine`: our engine, `transformers`' generate and llama.cpp on one checkpoint.

All hold a prompt of T random tokens per row in their cache and go on from there: ours finds it in the prefix cache,
transformers is given the filled cache, llama.cpp cuts its cache back. So a decode run costs no prefill, and the sides
can take turns.
"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache, GlmMoeDsaForCausalLM
from transformers.utils import logging

import glm5
from benchmarks.forward import THEIR_CHUNK, their_bytes_per_token
from benchmarks.llama_cpp import CLOCKS, Clock, Kind
from benchmarks.measure import timed
from glm5.engine import SamplingParams
from glm5.engine.pool import Storage
from glm5.model import initialize_

THEIR_ROWS = 8
"""Prompts that transformers computes side by side."""


def checkpoint(directory: Path, seed: int, *, llama: bool = False) -> Path:
    """A `nano` model with random weights. `llama`: of the nearest shape that llama.cpp runs.

    llama.cpp rotates indexer keys by a Hadamard matrix of at least 64 x 64, so heads of 32 values as in `nano` abort
    ("ggml_can_mul_mat") and 64 is the least; and it has one epsilon for all RMSNorms, where transformers takes 1e-6
    inside MLA.
    """
    config = glm5.ModelConfig.from_preset("nano")
    if llama:
        config = dataclasses.replace(config, index_head_dim=64, rms_norm_eps=config.latent_norm_eps)
    model = glm5.GLM5(config).eval()
    initialize_(model, 0.05, seed)
    glm5.save_model(model, directory)
    return directory


def prompts(rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random token ids; another seed, another first token, so nothing of it is in a prefix cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 4096, (rows, tokens), generator=generator).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


class Peer(Protocol):
    """Another engine that holds the same weights."""

    def fill(self, ids: list[list[int]]) -> None:
        """Takes prompts of one length into its cache."""

    def decode(self, steps: int) -> float:
        """Seconds of `steps` tokens of every row, its prompt being in the cache."""

    def first_token(self, ids: list[list[int]]) -> float:
        """Seconds from a new prompt, one row, to its first token."""

    @property
    def bytes_per_token(self) -> float:
        """Of its cache."""

    @property
    def peak(self) -> int:
        """Peak resident bytes of its process."""

    def close(self) -> None: ...


class Ours:
    """The engine as `glm5 serve` makes it, with room for `tokens` tokens of cache."""

    def __init__(
        self,
        directory: Path,
        tokens: int,
        *,
        storage: Storage | None = None,
        strict: bool = False,
        clock: Clock = "wall",
    ) -> None:
        self.clock = CLOCKS[clock]
        self.engine = glm5.Engine(
            directory, max_num_seqs=32, storage=storage, strict=strict, num_blocks=-(-tokens // 64) + 64
        )  # fmt: skip

    def fill(self, ids: list[list[int]]) -> float:
        """Computes the prompts into the prefix cache; seconds until every row has its first token."""
        return timed(lambda: self.engine.generate(ids, greedy(1)), self.clock)

    def decode(self, ids: list[list[int]], steps: int) -> float:
        """Seconds of `steps` tokens of every row after the first, its prompt being in the cache."""
        first = timed(lambda: self.engine.generate(ids, greedy(1)), self.clock)
        return timed(lambda: self.engine.generate(ids, greedy(1 + steps)), self.clock) - first

    @property
    def bytes_per_token(self) -> float:
        return self.engine.limits.bytes_per_token


class Transformers:
    """`GlmMoeDsaForCausalLM.generate`, in this process."""

    def __init__(self, directory: Path, clock: Clock = "wall") -> None:
        self.clock = CLOCKS[clock]
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
        return timed(lambda: self.model.generate(torch.tensor(ids), max_new_tokens=1, do_sample=False), self.clock)

    @torch.inference_mode()
    def fill(self, ids: list[list[int]]) -> None:
        """Computes the prompts into a cache, in parts: in one, 8k tokens take 8 GiB.

        More than `THEIR_ROWS` are copies of the first but for their last token: 32 prompts of 8k take 18 GiB in parts.
        """
        self.ids, self.cache = torch.tensor(ids), DynamicCache(config=self.model.config)
        copies = len(ids) if len(ids) > THEIR_ROWS else 1
        if copies > 1:
            self.ids[:, :-1] = self.ids[0, :-1]
        for part in self.ids[::copies, :-1].split(THEIR_CHUNK, dim=1):
            self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)

    @torch.inference_mode()
    def decode(self, steps: int) -> float:
        """Seconds of `steps` tokens of every row; the cache of this model cannot be cut, so it grows by a few a run."""
        start = self.clock()
        self.ids = self.model.generate(self.ids, past_key_values=self.cache, max_new_tokens=steps, do_sample=False)
        return self.clock() - start

    @property
    def bytes_per_token(self) -> float:
        assert self.cache is not None
        rows = self.ids.shape[0]
        return their_bytes_per_token(self.cache, self.ids.shape[1] - 1) / rows

    @property
    def peak(self) -> int:
        return peak_of("self")

    def close(self) -> None:
        self.cache = None


class LlamaCpp:
    """`benchmarks.llama_cpp` in a process of its own. `root` is the unpacked `llama-cpp-python`, `file` the model."""

    def __init__(
        self, root: Path, file: Path, *, rows: int, tokens: int, threads: int, clock: Clock = "wall",
        exact: bool = False,
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.llama_cpp"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send((root, file, rows, tokens, threads, clock, exact))

    def fill(self, ids: list[list[int]]) -> None:
        self._call("fill", ids)

    def decode(self, steps: int) -> float:
        return self._call("decode", steps)

    def first_token(self, ids: list[list[int]]) -> float:
        return self._call("first_token", ids)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, V] of a prompt of at most 2,048 tokens."""
        return torch.from_numpy(self._call("logits", ids))

    @property
    def bytes_per_token(self) -> float:
        return self._call("bytes_per_token")

    @property
    def peak(self) -> int:
        return peak_of(self.process.pid)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _call(self, name: str, *arguments: object) -> Any:
        assert self.process.stdout is not None
        self._send((name, arguments))
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):  # an abort writes its own text there
            raise RuntimeError(f"llama.cpp's process ended with {self.process.wait()}; see its message above") from None

    def _send(self, thing: object) -> None:
        assert self.process.stdin is not None
        pickle.dump(thing, self.process.stdin)
        self.process.stdin.flush()


def as_gguf(root: Path, directory: Path, kind: Kind) -> Path:
    """The model of a directory in llama.cpp's format, by the conversion script of the distribution."""
    file = directory / f"{kind}.gguf"
    if not file.is_file():
        command = [sys.executable, "-m", "benchmarks.llama_cpp", str(root), str(directory), str(file), kind]
        subprocess.run(command, check=True, capture_output=True)
    return file


def peak_of(process: int | str) -> int:
    """Peak resident bytes of a process (VmHWM: unlike ru_maxrss it does not start at the parent's peak)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def peak_alone(side: str, directory: Path, tokens: int, threads: int) -> int:
    """Peak resident bytes of ours or transformers in a process of its own that answers T tokens with 16."""
    command = [sys.executable, "-m", "benchmarks.engine_sides", side, str(directory), str(tokens), str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _answer_one(side: str, directory: Path, tokens: int, threads: int) -> None:
    torch.set_num_threads(threads)
    ids = prompts(1, tokens, seed=1)
    if side == "ours":
        Ours(directory, tokens + 16).engine.generate(ids, greedy(16))
    else:
        theirs = Transformers(directory)
        theirs.fill(ids)
        theirs.decode(16)
    print(peak_of("self"))


if __name__ == "__main__":
    _answer_one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
