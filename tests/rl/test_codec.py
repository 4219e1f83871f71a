"""Rollouts survive JSON."""

import json

import numpy as np

from glm5.engine import ExpertChoices
from glm5.envs import Reward, Task
from glm5.rl.codec import rollout_from_json, rollout_to_json
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
    failed = Rollout(Ticket("env", 7), Task("t", (), "", ""), (), "env_failure", None, failure="no light")
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(failed)))) == failed
