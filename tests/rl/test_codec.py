"""Rollouts survive JSON."""

import json

import numpy as np

from glm5.engine import ExpertChoices
from glm5.envs import Reward, Task
from glm5.rl.codec import leading, rollout_from_json, rollout_to_json
from glm5.rl.records import Branch, Rollout, Ticket, Turn
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade


def test_rollouts_come_back_whole_and_prompts_are_stored_once():
    first = Turn((1, 2, 3), (4, 5), (-0.1, -2.345678806304932), (0, 1), "stop", 0.5, 2)
    longer = Turn((1, 2, 3, 4, 5, 6), (7,), (-1.0,), (1,), "stop")
    experts = ExpertChoices.of(0, np.arange(20, dtype=np.uint16).reshape(5, 2, 2) * 100)
    branch = Turn((1, 2, 3, 9), (8, 8), (-1.0, -0.0), (2, 2), "length", experts=experts)
    turns = (first, longer, branch)
    rollout = Rollout(
        Ticket("env", 7, 1, 2),
        Task("t", ({"role": "user", "content": "ü"},), "4", "one"),
        EpisodeTree(turns).trajectories(),
        "truncated",
        Reward(0.25, Grade("incorrect", "not quite", "5")),
        ({"role": "user", "content": "ü"}, {"role": "assistant", "content": None, "tool_calls": []}),
        turns,
        branches=(
            Branch(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), (None, 0)),
            Branch(({"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}), (None, 2)),
        ),
    )
    value = json.loads(json.dumps(rollout_to_json(rollout)))
    assert rollout_from_json(value) == rollout
    assert [len(turn["experts"][-1]) if "experts" in turn else 0 for turn in value["turns"]] == [0, 0, 56]
    assert [turn["prompt"] for turn in value["turns"]] == [[1, 2, 3], [6], [9]]
    assert [(len(branch["messages"]), branch["shared"]) for branch in value["branches"]] == [(2, 0), (1, 1)]
    older = json.loads(json.dumps(value))  # before turns named the one that they are like
    for turn in older["turns"]:
        del turn["like"]
    older["turns"][2] |= {"shared": 3}
    assert rollout_from_json(older) == rollout
    failed = Rollout(Ticket("env", 7), Task("t", (), "", ""), (), "env_failure", None, failure="no light")
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(failed)))) == failed


def interleaved(count):
    """Sub-agents at work at once, whose client drops thoughts: every turn is a leaf."""
    turns, branches, said = [], [], {"A": ([1], []), "B": ([2], [])}
    for number in range(count):
        for ids, messages in said.values():
            ids.extend(range(len(ids), len(ids) + 20))
            messages.append({"role": "user", "content": f"{number}" * 100})
            thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
            branches.append(Branch((*messages, thought), (*[None] * len(messages), len(turns))))
            turns.append(Turn(tuple(ids), (7, 8, 9), (-0.5,) * 3, (0,) * 3, "stop"))
            ids.extend([8, 9])
            messages.append({"role": "assistant", "content": "Yes."})
    return Rollout(Ticket("env", 0), Task("t", (), "", ""), EpisodeTree(turns).trajectories(), "ok",
                   Reward(1.0, Grade("correct", "")), turns=tuple(turns), branches=tuple(branches))  # fmt: skip


def test_what_interleaved_branches_share_is_stored_once():
    sizes = []
    for count in (20, 40):
        rollout = interleaved(count)
        value = json.loads(json.dumps(rollout_to_json(rollout)))
        assert rollout_from_json(value) == rollout
        assert max(len(turn["prompt"]) for turn in value["turns"]) <= 22
        assert max(len(branch["messages"]) for branch in value["branches"]) <= 3
        sizes.append(len(json.dumps(value)))
    assert sizes[1] < 2.1 * sizes[0]


def test_the_number_of_leading_items_is_that_of_a_plain_walk():
    for length in range(9):
        for differs in range(length + 1):
            later = [place if place != differs else -1 for place in range(length)]
            assert leading(tuple(range(9)), later) == differs == leading(later, range(9))
