"""Runs whose environments hang, break or lie: the run goes on, or says why it does not."""

import threading

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import EpisodeLimits, GymEnvironment
from glm5.optim import OptimizerConfig
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.runner import RolloutConfig

FAST = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, steps=2, scheduler=None, rollout=None, **changes):
    return RLRunConfig(
        parent=parent,
        steps=steps,
        rollout=RolloutConfig(**{"max_tokens": 6, "report_every": 2, **(rollout or {})}),
        scheduler=SchedulerConfig(**{"groups_per_batch": 2, "group_size": 4, "max_running": 24, **(scheduler or {})}),
        learner=LearnerConfig(optimizer=FAST, rows=8),
        **{"patience": 60.0, **changes},
    )


class Game:
    """A game of one move, rewarded for an "e"; `hang` is asked at each."""

    def __init__(self, hang=lambda: None):
        self.hang = hang

    def reset(self, *, seed):
        return "?", {}

    def step(self, action):
        self.hang()
        return "", float("e" in action), True, False, {}


def test_calls_that_hang_hold_up_neither_the_learner_nor_the_end(parent, tmp_path):
    release, waited, lock = threading.Event(), [], threading.Lock()
    left = [12]

    def hang():
        with lock:
            left[0] -= 1
            hangs = left[0] >= 0
        if hangs:
            waited.append(release.wait(20))

    environment = GymEnvironment("game", lambda: Game(hang), limits=EpisodeLimits(step_seconds=0.2))
    try:
        run = train_rl(config_of(parent), [environment], tmp_path / "run")
        assert run.finished and left[0] < 0 and not waited
    finally:
        release.set()
