"""`load_part`: what each process holds is its part of the whole, in every form on disk, and nothing else is read."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import TINY, build_model

import glm5
from glm5.checkpoint import load_part
from glm5.checkpoint.tensor_files import TensorFiles
from glm5.parallel import InferencePlan
from glm5.parallel.inference import Groups
from glm5.parallel.inference_plan import Part

CONFIG = dataclasses.replace(TINY, intermediate_size=144, n_routed_experts=8)
WIDE = dataclasses.replace(
    TINY, hidden_size=128, qk_nope_head_dim=40, qk_rope_head_dim=24, v_head_dim=64, intermediate_size=512,
    moe_intermediate_size=512, n_routed_experts=4, index_head_dim=32,
)  # fmt: skip
"""Half of its matrices begin and end with FP8 blocks of 128 x 128, but for kv_b_proj, which is cut through one."""


def groups(plan: InferencePlan, rank: int) -> Groups:
    """A process that only loads has nobody to talk to."""
    return Groups(Part(plan, rank), torch.device("cpu"), *[None] * 4)  # type: ignore[arg-type]


def save(form, path):
    model = build_model(WIDE if form == "fp8" else CONFIG)
    if form == "stacked":
        glm5.save_model(model, path / "saved")
        path = path / "stacked"
        path.mkdir()
        shutil.copy(path.parent / "saved" / "config.json", path)
        state = {n.replace("mtp.0.", "model.layers.3."): t.clone() for n, t in model.state_dict().items()}
        save_file(state, path / "model.safetensors")
        return path
    quantization = form if form in ("fp8", "int4") else None
    glm5.save_model(model, path, quantization=quantization, max_shard_bytes=100_000)
    return path


def by_hand(name, whole, tensor, expert, column, world):
    """The part of a weight, written once more."""
    piece = lambda x, dim, which: x.chunk(which[1], dim)[which[0]]
    if name.endswith("gate_up_proj"):
        gate, up = piece(whole, 0, expert).chunk(2, dim=1)
        return torch.cat((piece(gate, 1, column), piece(up, 1, column)), dim=1)
    if name.endswith("experts.down_proj"):
        return piece(piece(whole, 0, expert), 2, column)
    for ends, dim, which in (
        (("q_b_proj.weight", "kv_b_proj.weight"), 0, tensor),
        (("o_proj.weight",), 1, tensor),
        (("gate_proj.weight", "up_proj.weight", "embed_tokens.weight", "lm_head.weight"), 0, world),
        (("down_proj.weight",), 1, world),
    ):
        if name.endswith(ends):
            return piece(whole, dim, which)
    return whole


@pytest.mark.parametrize("form", ["float32", "stacked", "fp8", "int4"])
def test_every_process_holds_its_part_of_the_whole(form, tmp_path):
    directory = save(form, tmp_path)
    whole = glm5.load_model(directory, torch.float32).state_dict()
    for tensor, expert in ((2, 1), (1, 2), (2, 2), (4, 2), (2, 4)):
        plan = InferencePlan(tensor=tensor, expert=expert)
        world = plan.processes
        for rank in range(world):
            mine = load_part(directory, groups(plan, rank), torch.float32).state_dict()
            assert mine.keys() == whole.keys()
            columns = world // expert
            place = (rank % tensor, tensor), (rank // columns, expert), (rank % columns, columns), (rank, world)
            for name, values in mine.items():
                assert torch.equal(values, by_hand(name, whole[name], *place)), (name, tensor, expert, rank)


@pytest.mark.parametrize("form", ["float32", "stacked"])
def test_a_process_reads_what_it_holds_and_no_more(form, tmp_path, monkeypatch):
    directory, counted = save(form, tmp_path), [0]
    read = TensorFiles.read

    def counting(self, name, part=()):
        found = read(self, name, part)
        counted[0] += found.numel()
        return found

    monkeypatch.setattr(TensorFiles, "read", counting)
    for rank in range(2):
        counted[0] = 0
        model = load_part(directory, groups(InferencePlan(expert=2), rank), torch.float32)
        assert counted[0] == sum(tensor.numel() for tensor in model.state_dict().values())


def test_pieces_of_whole_fp8_blocks_are_read_alone(tmp_path, monkeypatch):
    directory, wholes = save("fp8", tmp_path), []
    read = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, name, part=(): (part or wholes.append(name), read(self, name, part))[1]
    )
    load_part(directory, groups(InferencePlan(tensor=2, expert=2), 1), torch.float32)
    whole = {name for name in wholes if "_scale_inv" not in name and "experts" in name}
    assert all(".2." in name or ".3." in name or "shared" in name for name in whole)
    cut = [name for name in wholes if name.endswith(("shared_experts.down_proj.weight", "q_b_proj.weight"))]
    assert not cut
