"""The GPU kernels without a GPU: in Triton's interpreter, compiled ahead of time, and chosen only where they fit."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import glm5
from glm5.ops import gpu, reference, selection

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (no wheels for this system)"
)
CONFIGS = {"glm-5": glm5.ModelConfig.from_preset("glm-5"), "nano": glm5.ModelConfig.from_preset("nano")}
SMALLEST_MEMORY = 99 << 10
"""Bytes of shared memory that a program may take on sm_86, sm_89 and sm_120; sm_80, sm_90 and sm_100 give more."""
SPILLS = "glm-5", torch.float32
"""GLM-5's width in fp32 does not fit into the registers of every GPU: slower, and of little use."""


@needs_triton
def test_the_kernels_are_right_in_the_interpreter():
    """TRITON_INTERPRET counts when Triton is imported, so `interpreted/` runs in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 50 and "skipped" not in done.stdout, done.stdout


# ---- compiled ahead of time -----------------------------------------------------------------------------------------
def compiled(kernel, arch: int, storage: str, dtype: torch.dtype, **launch: object):
    """The kernel for sm_`arch`; what is no constant is a pointer or a number by its name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = "*fp32" if dtype == torch.float32 else "*bf16"
    row = {"fp32": "*fp32", "bf16": "*bf16", "fp8": "*u8"}[storage]
    types = {
        "q": given, "rows": row, "scales": row, "values": given if launch.get("WHOLE") else "*fp32",
        "w": "*fp32", "sums": "*fp32", "out": given if "VALUE_TILE" in launch else "*fp32", "scale": "fp32",
        "tables": "*i64", "sequences": "*i64", "lo": "*i64", "hi": "*i64", "selected": "*i64",
    }  # fmt: skip
    names = kernel.arg_names
    constants = {name: value for name, value in launch.items() if name in names}
    options = {name: value for name, value in launch.items() if name not in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's stack: what did not fit into registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def kernels_of(preset: str, storage: str, dtype: torch.dtype):
    """(name, kernel, how its launcher compiles it) for the widths of a preset."""
    from glm5.ops.gpu import attention, scores

    c = CONFIGS[preset]
    groups = lambda width: -(-width // gpu.GROUP) if storage == "fp8" else 0
    index = dtype, c.index_n_heads, c.index_head_dim, groups(c.index_head_dim)
    width = c.kv_lora_rank + c.qk_rope_head_dim
    attend = attention.tiles(dtype, c.num_attention_heads, width, c.kv_lora_rank, groups(width))
    yield "decode", scores._decode, scores.decode_tiles(*index)
    yield "prompt", scores._prompt, scores.prompt_tiles(*index)
    yield "attend", attention._attend, {**attend, "WHOLE": False}
    yield "attend whole", attention._attend, {**attend, "WHOLE": True}
    of_merge = "HEADS", "VALUES", "VALUE_TILE", "enable_fp_fusion"
    yield "merge", attention._merge, {name: attend[name] for name in of_merge}


def check_compiled(preset: str, arch: int, storage: str, dtype: torch.dtype, without: str | None = None) -> None:
    for name, kernel, launch in kernels_of(preset, storage, dtype):
        if name == without:
            continue
        made = compiled(kernel, arch, storage, dtype, **launch)
        assert f".target sm_{arch}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
        assert made.metadata.shared <= SMALLEST_MEMORY, (name, made.metadata.shared)
        assert "tf32" not in made.asm["ptx"], name  # fp32 stays fp32
        on_tensor_cores = re.search(r"\b(mma|wgmma|tcgen05)\b", made.asm["ptx"]) is not None
        assert on_tensor_cores is (dtype == torch.bfloat16 and name != "merge"), name
        stack = spilled(made.asm["cubin"])
        assert stack == 0 or (preset, dtype) == SPILLS, (name, stack)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_for_the_shapes_of_glm5(arch: int):
    """The format with most instructions. Nothing is spilled, and the memory is that of the smallest GPU."""
    check_compiled("glm-5", arch, "fp8", torch.bfloat16, without="attend whole")  # seconds each


@needs_triton
@pytest.mark.soak
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", CONFIGS)
def test_kernels_compile_for_every_format(preset: str, dtype: torch.dtype, storage: str, arch: int):
    check_compiled(preset, arch, storage, dtype)


# ---- where they are chosen ------------------------------------------------------------------------------------------
def test_they_are_not_for_a_cpu_nor_for_what_they_do_not_know(monkeypatch: pytest.MonkeyPatch):
    nano, cpu = CONFIGS["nano"], torch.device("cpu")
    assert gpu.kernels(nano, torch.float32, cpu) is None
    monkeypatch.setattr(gpu, "runs_on", lambda device: True)
    assert gpu.kernels(nano, torch.float16, cpu) is None
    assert gpu.kernels(nano, torch.float64, cpu) is None
    wide = replace(nano, kv_lora_rank=96)  # a group of scales would hold values and rotary part
    assert gpu.kernels(wide, torch.float32, cpu) is None
    assert all(gpu.fits(config, torch.bfloat16) for config in CONFIGS.values())


@pytest.mark.parametrize(
    ("triton", "capability", "hip", "switch", "runs"),
    [
        (True, (9, 0), None, None, True),
        (True, (8, 0), None, "1", True),
        (True, (7, 5), None, None, False),
        (True, (9, 0), "6.4", None, False),
        (True, (9, 0), None, "0", False),
        (False, (9, 0), None, None, False),
    ],
)
def test_which_gpus_run_them(triton, capability, hip, switch, runs, monkeypatch: pytest.MonkeyPatch):
    """Plain PyTorch is what remains: without Triton, on older GPUs, or where the switch says so."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv(gpu.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(gpu.SWITCH, switch)
    assert gpu.runs_on(torch.device("cuda")) is runs


def test_a_model_on_a_cpu_does_not_import_triton():
    code = "import sys, glm5, glm5.engine; assert 'triton' not in sys.modules, 'triton'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is for machines without a GPU")
def test_the_benchmark_says_what_it_needs():
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == (
        "benchmarks.gpu_kernels needs a CUDA GPU from sm_80 on and Triton (`pip install 'glm5[gpu]'`); "
        "this machine has no CUDA GPU."
    )


# ---- the choice among scores ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3, 11, 12, 13])
def test_top_positions_are_those_of_the_reference(k: int):
    """Few values, so most choices are ties; of some rows all is hidden."""
    g = torch.Generator().manual_seed(k)
    scores_TS = torch.randint(0, 4, (300, 12), generator=g).float()
    scores_TS[torch.rand(300, 12, generator=g) < torch.rand(300, 1, generator=g)] = float("-inf")
    scores_TS[0] = float("-inf")
    every = torch.zeros(1, 300, dtype=torch.int64)
    wanted_TK = reference.select(scores_TS[None], every, every + 12, k)[0]
    assert torch.equal(selection.top_positions(scores_TS, k), wanted_TK)
