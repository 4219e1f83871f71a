"""Peak memory of prefill and training on long rows, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY_SCRIPT = """
import sys, torch, glm5
from glm5.model import LatentCache

def peak_kib():  # VmHWM: unlike ru_maxrss it does not start at the peak of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
torch.manual_seed(0)
tokens, chunk = int(sys.argv[1]), int(sys.argv[2])
config = glm5.ModelConfig.from_preset("nano")
model = glm5.GLM5(config).eval()
ids = torch.randint(0, config.vocab_size, (1, tokens))
with torch.no_grad():
    model(ids[:, :300], logits_to_keep=1)
    before = peak_kib()
    if chunk:
        cache = LatentCache(config, batch=1, capacity=tokens)
        for part in ids.split(chunk, dim=1):
            model(part, cache=cache, logits_to_keep=1)
    else:
        model(ids, logits_to_keep=1)
print((peak_kib() - before) / 1024)
"""


def extra_mib(tokens: int, chunk: int = 0, script: str = MEMORY_SCRIPT) -> float:
    result = subprocess.run(
        [sys.executable, "-c", script, str(tokens), str(chunk)], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@needs_proc
def test_prefill_memory_grows_with_t_and_not_with_its_square():
    """Peak memory of a one-shot prefill of `nano`; a T x T matrix of one layer would take 1 GiB at 16k tokens."""
    small, large = extra_mib(8_000), extra_mib(16_000)
    assert large < 300
    assert large < 2.5 * small + 30


TRAINING_SCRIPT = (
    MEMORY_SCRIPT.split("tokens, chunk")[0]
    + """
tokens, chunk = int(sys.argv[1]), int(sys.argv[2])
model = glm5.GLM5(glm5.ModelConfig.from_preset("nano"))
segments = torch.arange(tokens)[None] // 600 if chunk else None
def step(tokens):
    ids = torch.randint(0, 4096, (1, tokens))
    packed = None if segments is None else segments[:, :tokens]
    model(ids, None, packed, attention="dense", logits_to_keep=1).logits.sum().backward()
step(300)
before = peak_kib()
step(tokens)
print((peak_kib() - before) / 1024)
"""
)


@needs_proc
def test_training_on_packed_rows_keeps_no_mask_of_t_squared():
    """A mask of 8k x 8k in fp32 would take 256 MiB in each of four layers, on top of what plain rows take."""
    plain, packed = (extra_mib(8_000, chunk, TRAINING_SCRIPT) for chunk in (0, 1))
    assert packed < plain + 300


@needs_proc
@pytest.mark.soak
@pytest.mark.parametrize("chunk", [0, 8192])
def test_prefill_of_200k_tokens_fits_in_3_gib(chunk):
    assert extra_mib(200_000, chunk) < 3 * 1024
