"""Tensors as bytes and back, and what changed between two versions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speaker import speaker_model

from glm5.errors import WeightsError
from glm5.rl.weights import Layout, delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool]


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{i}": (torch.randn(shape, generator=generator) * 3).to(DTYPES[i % len(DTYPES)])
        for i, shape in enumerate(shapes)
    }


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=9))
def test_any_tensors_come_back(shapes):
    tensors = random_tensors(shapes)
    layout = Layout.of(tensors)
    assert Layout.from_bytes(layout.to_bytes()) == layout
    back = layout.unpack(layout.pack(tensors))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].contiguous().view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


def test_a_model_and_what_does_not_fit():
    state = speaker_model().state_dict()
    layout = Layout.of(state)
    back = layout.unpack(layout.pack({name: t.t() if t.dim() == 2 else t for name, t in state.items()} and state))
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    name = next(iter(state))
    for wrong in ({**state, name: state[name].half()}, {**state, name: state[name][1:]}, dict(list(state.items())[1:])):
        with pytest.raises(WeightsError, match="do not fit those published before"):
            layout.pack(wrong)
    with pytest.raises(WeightsError, match="no tensors"):
        Layout.of({})


def test_strided_tensors_are_packed_by_value():
    whole = torch.arange(24.0).view(4, 6)
    layout = Layout.of({"t": whole.t()})
    assert torch.equal(layout.unpack(layout.pack({"t": whole.t()}))["t"], whole.t())


@given(st.integers(1, 50), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_delta_leads_from_base_to_new(blocks, seed, share):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(256, (64 * blocks,), dtype=torch.uint8, generator=generator)
    other = torch.randint(256, (64 * blocks,), dtype=torch.uint8, generator=generator)
    new = other.where(torch.rand(len(base), generator=generator) < share, base)
    assert torch.equal(delta.apply(delta.encode(new, base), base), new)


def test_deltas_of_small_steps_are_small():
    base, generator = torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    step = base + 1e-5 * torch.randn(len(base), generator=generator)
    as_bytes = lambda t: t.contiguous().view(torch.uint8)
    assert len(delta.encode(as_bytes(step), as_bytes(base))) < 0.5 * 4 * len(base)
    half, stepped = base.bfloat16(), step.bfloat16()
    assert len(delta.encode(as_bytes(stepped), as_bytes(half))) < 0.05 * 2 * len(base)


def test_broken_deltas_are_refused():
    base = torch.zeros(256, dtype=torch.uint8)
    good = delta.encode(base + 1, base)
    for wrong in (b"", b"nothing", good[: len(good) // 2], delta.encode(torch.ones(64, dtype=torch.uint8), base[:64])):
        with pytest.raises(WeightsError, match=r"cannot be read|publish a whole version"):
            delta.apply(wrong, base)
