"""Whole runs on two processes under each axis that cuts the model itself, against a run on one."""

import dataclasses

from small_runs import pretrain_config
from spawned import run
from test_processes import assert_near

from glm5.parallel import ParallelPlan
from glm5.train import RunDirectory
from glm5.train.job import perform
from glm5.train.stages import job_of, with_plan

PLANS = {
    "tensor": ParallelPlan(tensor=2),
    "context": ParallelPlan(context=2),
    "pipeline": ParallelPlan(pipeline=2),
}


def config_of(tiny):
    config = pretrain_config(tiny, steps=3, evaluate_every=0, micro_rows=1)
    return dataclasses.replace(config, rows=3, prompts=())


def finish(config, plans, place):
    for name, plan in plans.items():
        perform(job_of(with_plan(config, plan)), place / name)


def test_runs_equal_that_of_one_process(tiny, tmp_path):
    config = config_of(tiny)
    finish(config, {"one": ParallelPlan()}, tmp_path)
    run(2, finish, config, PLANS, tmp_path)
    one = RunDirectory.open(tmp_path / "one")
    for name in PLANS:
        two = RunDirectory.open(tmp_path / name)
        # A model in stages is evaluated when it is put together again.
        assert_near(one, two, without={"heldout_bits_per_byte"} if name == "pipeline" else set())
        assert two.finished
        assert (two.path / "evaluation.json").exists()
