"""llama.cpp with one model, in a process of its own that obeys `benchmarks.engine_sides.LlamaCpp`; and the conversion.

Nothing of llama.cpp is in this repository, and nothing is downloaded here. DIR is the unpacked source distribution of
`llama-cpp-python`: it carries the sources of llama.cpp (`vendor/llama.cpp`, built by the reader in `DIR/build`; the
commands are in docs/results/engine.md), its conversion scripts and Python bindings that fit it (`llama_cpp/`).

Everything but the threads is llama.cpp's own default (flash attention, a cache in fp16, batches of 2048 in pieces of
512), unless it is asked to be exact. This module stays without PyTorch: the peak memory of its process is llama.cpp's.

    python -m benchmarks.llama_cpp DIR MODEL OUT.gguf f32|bf16|q8_0     # a directory of ours as GGUF
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import re
import sys
import time
import types
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["f32", "bf16", "q8_0"]
Clock = Literal["wall", "cpu"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BATCH = 2048


def convert(root: Path, directory: Path, out: Path, kind: Kind) -> None:
    """By llama.cpp's own class for `GlmMoeDsaForCausalLM`, but without a tokenizer: it knows published ones only."""
    source = root / "vendor" / "llama.cpp"
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    glm, gguf = importlib.import_module("conversion.glm"), importlib.import_module("gguf")
    glm.GlmMoeDsaModel.set_vocab = glm.GlmMoeDsaModel._set_vocab_none
    types_of = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    glm.GlmMoeDsaModel(directory, gguf.LlamaFileType[types_of[kind]], out).write()


def bindings(root: Path) -> Any:
    """`llama_cpp.llama_cpp` of the distribution; its package imports more, which is not needed."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(root / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    os.environ["LLAMA_CPP_LIB_PATH"] = str(root / "build" / "bin")
    return importlib.import_module("llama_cpp.llama_cpp")


class Context:
    """A model and a cache for `rows` sequences of `tokens` tokens each. Greedy.

    `exact`: a cache in fp32 and no flash attention, which rounds keys to fp16.
    """

    def __init__(self, root: Path, file: Path, rows: int, tokens: int, threads: int, clock: Clock, exact: bool) -> None:
        self.clock = CLOCKS[clock]
        self.api = api = bindings(root)
        self.log: list[str] = []
        self._listener = api.llama_log_callback(lambda _, text, __: self.log.append(text.decode(errors="replace")))
        api.llama_log_set(self._listener, ctypes.c_void_p())
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = rows * (-(-tokens // 256) * 256), rows, BATCH
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = api.GGML_TYPE_F32
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context:\n" + "".join(self.log[-20:]))
        self.memory = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(BATCH, 0, 1)
        of = lambda field: np.ctypeslib.as_array(field, shape=(BATCH,))
        self.tokens, self.positions, self.wanted = of(self.batch.token), of(self.batch.pos), of(self.batch.logits)
        of(self.batch.n_seq_id)[:] = 1
        self.length, self.last = 0, np.zeros(rows, np.int32)

    def first_token(self, ids: list[list[int]]) -> float:
        """Seconds from a new prompt, one row, to its first token."""
        self.api.llama_memory_clear(self.memory, True)
        start = self.clock()
        self._prompt(ids[0])
        self._logits(1).argmax()
        return self.clock() - start

    def fill(self, ids: list[list[int]]) -> None:
        """Puts prompts into the cache, but for their last tokens. All rows get the first one's text, to save hours:
        what a step costs does not depend on it, and their own last tokens send the rows to different experts."""
        self.api.llama_memory_clear(self.memory, True)
        self.length, self.last = len(ids[0]) - 1, np.array([row[-1] for row in ids], np.int32)
        self._prompt(ids[0][:-1])
        for row in range(1, len(ids)):
            self.api.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    def decode(self, steps: int) -> float:
        """Seconds of `steps` tokens of every row; the cache is as before afterwards."""
        rows, tokens = len(self.last), self.last
        self.batch.n_tokens, self.wanted[:rows] = rows, 1
        for row in range(rows):
            self.batch.seq_id[row][0] = row
        start = self.clock()
        for step in range(steps):
            self.tokens[:rows], self.positions[:rows] = tokens, self.length + step
            self._run()
            tokens = self._logits(rows).argmax(axis=1)
        took = self.clock() - start
        for row in range(rows):
            self.api.llama_memory_seq_rm(self.memory, row, self.length, -1)
        return took

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] of a prompt of at most 2,048 tokens."""
        self.api.llama_memory_clear(self.memory, True)
        self._prompt(ids, every=True)
        return self._logits(len(ids)).copy()

    def bytes_per_token(self) -> float:
        """Of the caches, as llama.cpp reports them when it makes them (to 0.01 MiB)."""
        sizes = re.findall(r"size = +([\d.]+) MiB \( *(\d+) cells, .*?/(\d+) seqs", "".join(self.log))
        return sum(float(size) * 2**20 / (int(cells) * int(streams)) for size, cells, streams in sizes)

    def _prompt(self, ids: list[int], *, every: bool = False) -> None:
        for start in range(0, len(ids), BATCH):
            part = np.array(ids[start : start + BATCH], np.int32)
            self.batch.n_tokens = len(part)
            self.tokens[: len(part)], self.positions[: len(part)] = part, np.arange(start, start + len(part))
            self.wanted[: len(part)] = every
            self.wanted[len(part) - 1] = 1
            for i in range(len(part)):
                self.batch.seq_id[i][0] = 0
            self._run()

    def _run(self) -> None:
        if code := self.api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode says {code}:\n" + "".join(self.log[-20:]))

    def _logits(self, rows: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(rows, self.vocabulary))


def obey() -> None:
    """Reads the arguments of a `Context`, then names of its methods with their arguments; writes what they return."""
    context = Context(*pickle.load(sys.stdin.buffer))
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(context, name)(*arguments), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])  # type: ignore[arg-type]
    else:
        obey()
