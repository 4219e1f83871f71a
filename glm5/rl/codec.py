"""Rollouts as JSON values and back, without loss: the form in which the journal and recorded sessions hold them.

Prompts of later turns repeat what was said before, so a turn is stored as the number of tokens that it shares with an
earlier turn (prompt and output) and the rest: with the one that shares the most, because the turns of sub-agents that
work at once come in any order. Branches of a conversation are stored likewise, by messages. Trajectories follow from
the turns and are made again.
"""

from __future__ import annotations

import dataclasses
from base64 import b64decode, b64encode
from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
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


class Alike:
    """Turns in the order of their tokens: the one that shares the most with a prompt is beside the prompt's place."""

    def __init__(self, tokens: Callable[[int], tuple[int, ...]]) -> None:
        """tokens: of a turn by its number, prompt and output."""
        self._tokens = tokens
        self._ordered: list[int] = []

    def add(self) -> None:
        """The next one."""
        insort(self._ordered, len(self._ordered), key=self._tokens)

    def most(self, prompt_ids: tuple[int, ...]) -> tuple[int, int]:
        """How many tokens the prompt begins with that a turn, prompt and output, begins with too; and that turn."""
        place = bisect(self._ordered, prompt_ids, key=self._tokens)
        near = self._ordered[max(place - 1, 0) : place + 1]
        return max(((shared_tokens(self._tokens(n), prompt_ids), n) for n in near), default=(0, 0))


def turns_to_json(turns: Sequence[Turn]) -> Json:
    """One object for each turn; `like` is the number of the earlier turn that shares its first tokens."""
    found: list[Json] = []
    earlier = Alike(lambda number: turns[number].prompt_ids + turns[number].output_ids)
    for turn in turns:
        shared, like = earlier.most(turn.prompt_ids)
        found.append(
            {
                "like": like,
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
        earlier.add()
    return found


def turns_from_json(values: Json) -> tuple[Turn, ...]:
    """What `turns_to_json` was given. Earlier versions wrote each turn as the rest of the one before it."""
    turns: list[Turn] = []
    for value in values:
        like = turns[value.get("like", -1)] if turns else None
        before = () if like is None else like.prompt_ids + like.output_ids
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
    """One object for each: how many messages it begins with that an earlier one, `like`, begins with too, and the rest.

    No earlier one shares more. A message is shared where its answer's turn is the same.
    """
    found: list[Json] = []
    said: list[tuple[Message, int | None]] = []
    """Each message once for each beginning that it goes on from: a tree, whose root is -1."""
    told_by: list[int] = []
    """The first branch with that message there."""
    after: defaultdict[int, list[int]] = defaultdict(list)
    for number, branch in enumerate(branches):
        messages = list(zip(branch.messages, branch.turns, strict=True))
        at, shared = -1, 0
        for message in messages:
            following = next((place for place in after[at] if said[place] == message), None)
            if following is None:
                break
            at, shared = following, shared + 1
        like = told_by[at] if shared else 0
        for message in messages[shared:]:
            after[at].append(len(said))
            at = len(said)
            said.append(message)
            told_by.append(number)
        rest, turns = list(map(dict, branch.messages[shared:])), list(branch.turns[shared:])
        found.append({"like": like, "shared": shared, "messages": rest, "turns": turns})
    return found


def branches_from_json(values: Json) -> tuple[Branch, ...]:
    """What `branches_to_json` was given."""
    branches: list[Branch] = []
    for value in values:
        like, shared = branches[value["like"]] if branches else Branch((), ()), value["shared"]
        messages, turns = (*like.messages[:shared], *value["messages"]), (*like.turns[:shared], *value["turns"])
        branches.append(Branch(messages, turns))
    return tuple(branches)


def leading(earlier: Sequence[Any], later: Sequence[Any]) -> int:
    """How many items both begin with; found by halves, which are compared as a whole."""
    earlier, later = tuple(earlier), tuple(later)
    low, high = 0, min(len(earlier), len(later))
    while low < high:
        middle = (low + high + 1) // 2
        if earlier[low:middle] == later[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_tokens(before: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """Leading tokens that both have."""
    if prompt[: len(before)] == before:
        return len(before)
    return leading(before, prompt)
