"""Rewards as plain functions of a task and the assistant's last message.

    def short_and_right(task: Task, message: Message) -> float:
        answer = message["content"] or ""
        return float(answer.strip() == task.answer) - 0.001 * len(answer)

A function may give a number, or a `Reward` with its reason. It raises `EnvironmentFailure` when it cannot tell; any
other exception is taken as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from glm5.envs.protocol import EnvironmentFailure, Message, Reward, Task
from glm5.scoring import Grade, grade_exact, grade_number
from glm5.scoring.grade import Outcome

RewardFunction = Callable[[Task, Message], Reward | float]


def right_number(task: Task, message: Message) -> Reward:
    """1 when the last number of the answer is the expected one, 0 otherwise."""
    grade = grade_number(message.get("content") or "", task.answer)
    return Reward(float(grade.correct), grade)


def right_text(task: Task, message: Message) -> Reward:
    """1 when the answer is the expected text, but for case, spacing and a full stop; 0 otherwise."""
    grade = grade_exact(message.get("content") or "", task.answer)
    return Reward(float(grade.correct), grade)


def rewarded(function: RewardFunction, task: Task, message: Message) -> Reward:
    """Calls a reward function. Raises `EnvironmentFailure` when it raises or gives no finite number."""
    try:
        given = function(task, message)
    except EnvironmentFailure:
        raise
    except Exception as error:
        blank = "" if message.get("content") is not None else '; the answer was blank: message["content"] is None then'
        raise EnvironmentFailure(f"the reward of {task.id} raised {error!r}{blank}", "verifier") from error
    return given if isinstance(given, Reward) else reward_of(given, task)


def reward_of(value: float, task: Task) -> Reward:
    """A bare number as a reward; more than nothing counts as correct, though nobody has judged that."""
    if not math.isfinite(value):
        raise EnvironmentFailure(f"the reward of {task.id} is {value}", "verifier")
    value = float(value)
    outcome: Outcome = "correct" if value > 0 else "incorrect"
    return Reward(value, Grade(outcome, f"the environment gave {value:g}", judged=False))
