"""Batches for tests of the learner, sampled from a tiny model by the real engine."""

from __future__ import annotations

import dataclasses

import torch
from speaker import VOCABULARY, speaker_model, speaker_tokenizer
from tiny import tiny_model

from glm5.engine import Engine, SamplingParams
from glm5.envs import Reward, Task
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.packing import Example, examples_of, judged
from glm5.rl.records import Batch, Group, Lesson, Rollout, Ticket, Trajectory
from glm5.scoring import Grade


def task_of(index: int) -> Task:
    """A task that asks nothing in particular."""
    return Task(f"t-{index}", ({"role": "user", "content": str(index)},), "e", "one")


def reward_of(value: float) -> Reward:
    """A reward of that value."""
    return Reward(value, Grade("correct" if value else "incorrect", "as the test says"))


def sampled(prompt_ids, completion) -> Trajectory:
    """A prompt and what an engine said to it."""
    first, ids = len(prompt_ids), completion.token_ids
    return Trajectory(
        (*prompt_ids, *ids),
        (False,) * first + (True,) * len(ids),
        (0.0,) * first + tuple(completion.logprobs),
        (-1,) * first + tuple(completion.versions),
    )


def rollout_of(ticket: Ticket, trajectories, reward: float) -> Rollout:
    """A rollout that ended by itself."""
    return Rollout(ticket, task_of(ticket.task_index), tuple(trajectories), "ok", reward_of(reward))


def engine_batch(rewards=((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)), *, version=0, max_tokens=7, model=None) -> Batch:
    """One group for each tuple of rewards, sampled by an engine of that version."""
    engine = Engine(model or speaker_model(), speaker_tokenizer(), version=version)
    groups = []
    for index, values in enumerate(rewards):
        prompt = speaker_tokenizer().apply_chat_template(task_of(index).messages, enable_thinking=False)
        params = SamplingParams(n=len(values), temperature=1.0, max_tokens=max_tokens, seed=index)
        [output] = engine.generate([prompt], [params])
        rollouts = [
            rollout_of(Ticket("toy", index, sample=i), [sampled(prompt, c)], value)
            for i, (c, value) in enumerate(zip(output.outputs, values, strict=True))
        ]
        groups.append(Group(tuple(map(Lesson, rollouts))))
    return Batch(version, version, tuple(groups))


def drafting_model(seed: int = 0):
    """A speaker with one MTP module."""
    return tiny_model(
        seed, vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=speaker_tokenizer().eos_ids,
    )  # fmt: skip


def examples_from(batch: Batch, **options) -> list[Example]:
    """The trajectories of a batch with advantages and weights, under these settings of the learner."""
    config = LearnerConfig(**options)
    lessons = judged(batch, config.advantages)
    return examples_of(lessons, config.normalisation, fixed_length=16, version=batch.version)


def copies(weights):
    """Tensors that later steps leave as they are."""
    return {name: tensor.clone() for name, tensor in weights.items()}


def moved(before, after) -> set[str]:
    """Names of the tensors that differ."""
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def at_version(batch: Batch, version: int) -> Batch:
    """The same batch for a later version."""
    return dataclasses.replace(batch, version=version)
