"""Deterministic runs for the tests, in functions that a process of its own can be told to call."""

import hashlib
from pathlib import Path

import torch
from scripted import Chat

import glm5
from glm5.envs import EpisodeLimits
from glm5.optim import OptimizerConfig
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.journal import read_journal
from glm5.rl.learner import LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.runner import RolloutConfig


def chat():
    """Three answers, rewarded for an "e" in the last; a question and a tool's result lie between."""
    replies = ({"role": "user", "content": "Again?"}, {"role": "tool", "content": "4"})
    reward = lambda said: float("e" in (said[-1]["content"] or ""))
    return Chat(*replies, limits=EpisodeLimits(turns=3), reward=reward)


def config_of(parent: Path, steps: int = 5) -> RLRunConfig:
    """Batches of two groups of three, old by up to three versions; learning takes as long as seven tokens."""
    return RLRunConfig(
        parent=parent,
        steps=steps,
        rollout=RolloutConfig(seed=3, max_tokens=16),
        scheduler=SchedulerConfig(groups_per_batch=2, group_size=3, max_running=15, max_staleness=3),
        learner=LearnerConfig(
            optimizer=OptimizerConfig(name="adamw", lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0), rows=8
        ),
        learning_ticks=7,
        checkpoint_every=2,
    )


def run(parent: Path, path: Path, resume: bool, steps: int = 5):
    """The run, from wherever it is."""
    torch.set_num_threads(1)
    return train_in_lockstep(config_of(parent, steps), [chat()], path, resume=resume)


def consumed(path: Path) -> list:
    """Everything that was learnt from, in order: step, id, weight, tokens, versions."""
    rollouts, found = {}, []
    for record in read_journal(path / "journal"):
        for event in events_of(record):
            if event.kind == "finished":
                rollouts[event.rollout.id] = event.rollout
            if event.kind == "batch":
                for selection in event.selections:
                    for ticket, (_, weight) in zip(selection.tickets, selection.weights, strict=True):
                        rollout = rollouts[ticket.id]
                        found.append((event.step, ticket.id, weight, rollout.trajectories, rollout.reward))
    return found


def fingerprint(path: Path) -> tuple:
    """What two runs that are the same have in common, to the bit."""
    weights = glm5.load_model(path / "model", dtype=torch.float32).state_dict()
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return consumed(path), (path / "metrics.jsonl").read_text(), digest.hexdigest()
