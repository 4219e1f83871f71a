"""One-step-off: each batch is sampled by the weights of the step before, whatever the clock says."""

import asyncio
import copy

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer
from thin_rollouts import rollout, scheduler

import glm5
from glm5.engine import Engine
from glm5.envs import Reward, SingleTurn, Task
from glm5.optim import OptimizerConfig
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.fleet import InProcessFleet
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Batch, Group, Lesson, Ticket
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.scoring import Grade

STEPS, GROUPS, SIZE = 4, 3, 4


class Letters:
    """Reward for an answer that holds an "e"."""

    name = "letters"

    def task(self, seed, index):
        return Task(f"{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        return Reward(float("e" in (response["content"] or "")), Grade("correct", ""))


def strict_engine(model, tokenizer, version=0):
    return Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)


def plain_loop(parent, config):
    """The same without scheduler, journal or fleet; gives the final weights."""
    learner = Learner(glm5.load_model(parent, dtype=torch.float32), config.learner, steps=STEPS)
    engine, env = strict_engine(learner.model, glm5.Tokenizer.from_pretrained(parent)), SingleTurn(Letters())

    async def sampled(step):
        groups = []
        for index in range(GROUPS * step, GROUPS * (step + 1)):
            tickets = [Ticket(env.name, index, 0, sample) for sample in range(SIZE)]
            rollouts = [await play(ticket, env, engine, config.rollout) for ticket in tickets]
            if len({one.reward.value for one in rollouts}) > 1:
                groups.append(Group(tuple(map(Lesson, rollouts))))
        return Batch(step, step, tuple(groups))

    following = asyncio.run(sampled(0))
    for step in range(STEPS):
        batch, following = following, asyncio.run(sampled(step + 1))
        learner.step(batch)
        engine.update_weights(step + 1, learner.weights())
    engine.close()
    return learner.model.state_dict()


@pytest.mark.parametrize("places", [1, 12])
def test_it_is_the_plain_loop_to_the_bit(tmp_path, places):
    parent = tmp_path / "parent"
    glm5.save_model(speaker_model(), parent, speaker_tokenizer())
    optimizer = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    config = RLRunConfig(
        parent=parent, steps=STEPS, rollout=RolloutConfig(max_tokens=6),
        learner=LearnerConfig(optimizer=optimizer, rows=5),
        scheduler=SchedulerConfig(
            mode="one-step-off", groups_per_batch=GROUPS, group_size=SIZE, max_running=places
        ),
    )  # fmt: skip
    run = train_rl(
        config, [SingleTurn(Letters())], tmp_path / "run",
        make_fleet=lambda *given: InProcessFleet([strict_engine(*given)]),
    )  # fmt: skip
    ours, plain = glm5.load_model(run.model_directory, dtype=torch.float32).state_dict(), plain_loop(parent, config)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())
    assert any("grad_norm" in line for line in run.read("metrics"))


@pytest.mark.parametrize("late", range(5))
def test_one_batch_is_of_one_version_however_few_places_there_are(late):
    """late: rollouts that come back before the learner has learnt."""
    it = scheduler(SchedulerConfig(mode="one-step-off", groups_per_batch=2, group_size=2, max_running=1))
    came, learnt, versions = 0, None, []
    while it.step < 5:
        if learnt is not None and came >= late and it.swappable:
            it.published(learnt)
            learnt = None
        batch = it.next_batch() if learnt is None else None
        if batch is not None:
            versions.append({version for one in batch.rollouts for version in one.versions})
            came, learnt = 0, batch.step + 1
        for ticket in it.admit():
            came += it.finished(rollout(ticket, versions=(it.version,)))
    assert versions == [{0}, {0}, {1}, {2}, {3}]
