"""Rollouts as JSON values and back, without loss: the form in which the journal and recorded sessions hold them.

Prompts of later turns repeat what was said before, so a turn is stored as the number of tokens that it shares with the
turn before it (prompt and output) and the rest. Trajectories follow from the turns and are made again.
"""

from __future__ import annotations

import dataclasses
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm5.engine import ExpertChoices
from glm5.envs import Message, Reward, Task
from glm5.rl.records import Branch, Rollout, Ticket, Turn
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade

Json = Any


def ticket_to_json(ticket: Ticket) -> Json:
    """As a list: environment, task, attempt, sample."""
    return [ticket.environment, ticket.task_index, ticket.attempt, ticket.sample]


def ticket_from_json(value: Json) -> Ticket:
    """What `ticket_to_json` was given."""
    return Ticket(*value)


def turns_to_json(turns: Sequence[Turn]) -> Json:
    """One object for each turn."""
    found: list[Json] = []
    before: tuple[int, ...] = ()
    for turn in turns:
        shared = shared_tokens(before, turn.prompt_ids)
        found.append(
            {
                "shared": shared,
                "prompt": turn.prompt_ids[shared:],
                "output": turn.output_ids,
                "logprobs": turn.logprobs,
                "versions": turn.versions,
                "finish": turn.finish_reason,
                "seconds": round(turn.seconds, 4),
                "cached": turn.cached_tokens,
            }
        )
        if turn.experts is not None:
            found[-1]["experts"] = experts_to_json(turn.experts)
        before = turn.prompt_ids + turn.output_ids
    return found


def turns_from_json(values: Json) -> tuple[Turn, ...]:
    """What `turns_to_json` was given."""
    turns: list[Turn] = []
    for value in values:
        before = turns[-1].prompt_ids + turns[-1].output_ids if turns else ()
        turns.append(
            Turn(
                prompt_ids=before[: value["shared"]] + tuple(value["prompt"]),
                output_ids=tuple(value["output"]),
                logprobs=tuple(value["logprobs"]),
                versions=tuple(value["versions"]),
                finish_reason=value["finish"],
                seconds=value["seconds"],
                cached_tokens=value["cached"],
                experts=experts_from_json(value.get("experts")),
            )
        )
    return tuple(turns)


def experts_to_json(experts: ExpertChoices) -> Json:
    """The numbers in base 64, unsigned and little-endian, behind the sizes that give them their shape."""
    array = experts.array
    numbers = array.astype(array.dtype.newbyteorder("<"))
    return [experts.start, experts.layers, experts.per_token, experts.item_bytes, b64encode(numbers.tobytes()).decode()]


def experts_from_json(value: Json) -> ExpertChoices | None:
    """What `experts_to_json` was given; None for None."""
    if value is None:
        return None
    start, layers, per_token, item_bytes, text = value
    numbers = np.frombuffer(b64decode(text), dtype=f"<u{item_bytes}")
    return ExpertChoices.of(start, numbers.astype(numbers.dtype.newbyteorder("=")).reshape(-1, layers, per_token))


def rollout_to_json(rollout: Rollout) -> Json:
    """All of it but the trajectories."""
    reward = rollout.reward
    branches = {"branches": branches_to_json(rollout.branches)} if rollout.branches else {}
    return {
        "ticket": ticket_to_json(rollout.ticket),
        "task": dataclasses.asdict(rollout.task),
        "outcome": rollout.outcome,
        "reward": None if reward is None else {"value": reward.value, "grade": dataclasses.asdict(reward.grade)},
        "turns": turns_to_json(rollout.turns),
        "messages": rollout.messages,
        "failure": rollout.failure,
        "seconds": round(rollout.seconds, 4),
        "tool_seconds": round(rollout.tool_seconds, 4),
        **branches,
    }


def rollout_from_json(value: Json) -> Rollout:
    """What `rollout_to_json` was given."""
    task, reward, turns = value["task"], value["reward"], turns_from_json(value["turns"])
    return Rollout(
        ticket=ticket_from_json(value["ticket"]),
        task=Task(**{**task, "messages": tuple(task["messages"])}),
        trajectories=EpisodeTree(turns).trajectories(),
        outcome=value["outcome"],
        reward=None if reward is None else Reward(reward["value"], Grade(**reward["grade"])),
        messages=tuple(value["messages"]),
        turns=turns,
        failure=value["failure"],
        seconds=value["seconds"],
        tool_seconds=value["tool_seconds"],
        branches=branches_from_json(value.get("branches", ())),
    )


def branches_to_json(branches: Sequence[Branch]) -> Json:
    """One object for each: how many messages it begins with that the one before begins with too, and the rest."""
    found: list[Json] = []
    before: list[tuple[Message, int | None]] = []
    for branch in branches:
        said = list(zip(branch.messages, branch.turns, strict=True))
        shared = leading(before, said)
        messages, turns = branch.messages[shared:], branch.turns[shared:]
        found.append({"shared": shared, "messages": list(map(dict, messages)), "turns": list(turns)})
        before = said
    return found


def branches_from_json(values: Json) -> tuple[Branch, ...]:
    """What `branches_to_json` was given."""
    branches: list[Branch] = []
    for value in values:
        before, shared = branches[-1] if branches else Branch((), ()), value["shared"]
        messages, turns = (*before.messages[:shared], *value["messages"]), (*before.turns[:shared], *value["turns"])
        branches.append(Branch(messages, turns))
    return tuple(branches)


def leading(earlier: Sequence[Any], later: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = zip(earlier, later, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(earlier), len(later)))


def shared_tokens(before: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """Leading tokens that both have."""
    if prompt[: len(before)] == before:
        return len(before)
    return leading(before, prompt)
