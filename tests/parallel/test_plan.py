"""Parallel plans: what divides, what does not, and a world of another size."""

import dataclasses
import re

import pytest

from glm5.config import ModelConfig
from glm5.errors import InputError
from glm5.parallel import ParallelPlan
from glm5.parallel.mesh import open_mesh
from glm5.parallel.plan import stage_layers

NANO = ModelConfig.from_preset("nano")


def test_devices_and_shards():
    plan = ParallelPlan(data_replicate=2, data_shard=4, context=2, tensor=2, pipeline=4, expert=8)
    plan.check(NANO, length=256)
    assert (plan.devices, plan.data, plan.shards) == (128, 8, 8)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data_shard": 0}, "data_shard is 0; it must be a whole number of at least 1"),
        ({"tensor": 2.0}, "tensor is 2.0"),
        ({"tensor": 3}, "4 heads do not divide over tensor=3"),
        ({"pipeline": 5}, "4 layers cannot fill pipeline=5"),
        ({"expert": 3, "data_shard": 3}, "16 experts do not divide over expert=3"),
        ({"expert": 4, "data_shard": 2}, "expert=4 does not divide the 2 devices of data_shard=2 x context=1"),
        ({"context": 257}, "256 tokens cannot be cut over context=257"),
        ({"tensor": 8}, "4 heads do not divide over tensor=8"),
    ],
)
def test_plans_that_do_not_divide_are_refused(sizes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ParallelPlan(**sizes).check(NANO, length=256)


def test_a_plan_may_cut_more_than_heads():
    for changes, words in (
        ({"vocab_size": 4098}, "4,098 tokens of the vocabulary do not divide over tensor=4"),
        ({"intermediate_size": 386}, "386 columns of the dense feed-forward (intermediate_size)"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            ParallelPlan(tensor=4).check(dataclasses.replace(NANO, **changes))


def test_stages_begin_where_a_layer_selects_for_itself():
    glm52 = ModelConfig.from_preset("glm-5.2")
    for stages in (2, 4, 16):
        layers = stage_layers(glm52, stages)
        assert [i for part in layers for i in part] == list(range(78))
        assert all(glm52.indexer_types[part.start] == "full" for part in layers)
    assert max(len(part) for part in stage_layers(glm52, 4)) <= 22
    assert sorted(len(part) for part in stage_layers(ModelConfig.from_preset("glm-5"), 4)) == [19, 19, 20, 20]
    with pytest.raises(InputError, match="only 21 of 78 do"):
        stage_layers(glm52, 22)


def test_a_world_of_another_size_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=re.escape("but 1 run; start 4 with `torchrun --nproc-per-node 4`")):
        open_mesh(ParallelPlan(data_shard=4))
    with pytest.raises(InputError, match=re.escape("but 2 run; give a plan, such as --parallel.data-shard 2")):
        ParallelPlan().check_world(2)


def test_one_process_needs_no_group():
    mesh = open_mesh(ParallelPlan())
    assert (mesh.size("data"), mesh.index("tokens"), mesh.group("tensor"), mesh.any(True)) == (1, 0, None, True)
