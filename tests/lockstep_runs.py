"""Deterministic runs for the tests, in functions that a process of its own can be told to call."""

import copy
import hashlib
import multiprocessing
import os
import random
import signal
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
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import batches_of
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.strict import strict_differences


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


def run_freely(parent: Path, path: Path, resume: bool):
    """The same in real time: an engine and a learner in threads of their own."""
    torch.set_num_threads(1)
    return train_rl(config_of(parent, steps=5), [chat()], path, resume=resume)


def killed(target, parent: Path, path: Path, kills: int, seconds: float, seed: int = 0) -> int:
    """Calls `target` in processes of its own and kills each after a random time, until one comes through.

    Gives the number of those that were killed, at most `kills`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lockstep_runs"])
    chance, died = random.Random(seed), 0
    while True:
        process = context.Process(target=target, args=(parent, path, (path / "run.json").exists()))
        process.start()
        if died < kills:
            process.join(chance.uniform(0.0, seconds))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                died += 1
        process.join()
        if process.exitcode == 0:
            return died
        assert process.exitcode == -signal.SIGKILL


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


def differences(config, run):
    """Over every trained token: sampler minus trainer under the weights that made it. And how many swaps there were
    inside a trajectory."""
    learner = Learner(glm5.load_model(config.parent, dtype=torch.float32), config.learner)
    snapshots, found, swaps = {}, [], 0
    for batch in batches_of(run.path / "journal"):
        snapshots[batch.version] = copy.deepcopy(learner.model).eval()
        snapshots.pop(batch.version - config.scheduler.max_staleness - 1, None)
        trajectories = [t for rollout in batch.rollouts for t in rollout.trajectories]
        found += strict_differences(snapshots.__getitem__, trajectories)
        # Every token that counts has more before it than the indexer keeps, so it selects.
        assert all(t.sampled.index(True) > learner.model.config.index_topk for t in trajectories)
        swaps += sum(len({v for v in t.versions if v >= 0}) > 1 for t in trajectories)
        learner.step(batch)
    return torch.cat(found), swaps
