"""Groups that teach nothing, one after the other: how many, why, with which rewards, and what that says of the run.

Where all that was scored is right, the task is learnt: the run is finished before its last step. Where answers are
wrong, or rewarded without being right, or mostly fail, it is an error (`NothingLearnt`).
"""

from __future__ import annotations

from collections import Counter

from glm5.errors import RunError
from glm5.rl.events import Accepted, BatchMade, Dropped, Event, Finished, Requeued
from glm5.rl.scheduler_state import NO_TOKENS

UNIFORM = ("all right", "all wrong")
"""Why samples are dropped whose group was scored."""
SHOWN = 4
"""Rewards that are named."""


class NothingLearnt(RunError):
    """A run met nothing to learn from for too long. It is saved and can go on."""


class Vain:
    """What was dropped since a group was accepted: a fold of the events of a run.

    most: samples in vain after which the run ends.
    """

    def __init__(self, group_size: int, most: int) -> None:
        self.group_size, self.most = group_size, most
        self.reasons: Counter[str] = Counter()
        """Why samples were dropped."""
        self.rewards: Counter[float] = Counter()
        """Of those that were scored."""
        self._right = 0
        """Of these, as right."""
        self._scored: dict[str, tuple[float, bool]] = {}
        """Reward and whether it is for a right answer, of rollouts without a fate."""
        self._before = 0
        """Samples in vain that do not count any more: what failed in an earlier sitting of the run may be mended."""

    def note(self, event: Event) -> None:
        """Takes the next event."""
        match event:
            case Finished(rollout) if rollout.reward is not None:
                self._scored[rollout.id] = (rollout.reward.value, rollout.reward.grade.outcome == "correct")
            case Dropped(ticket, reason):
                self.reasons[reason] += 1
                value, right = self._scored.pop(ticket.id, (None, False))
                if value is not None and reason in UNIFORM:
                    self.rewards[value] += 1
                    self._right += right
            case Requeued(ticket):
                self._scored.pop(ticket.id, None)
            case Accepted():
                self.reasons.clear()
                self.rewards.clear()
                self._right = self._before = 0
            case BatchMade(_, selections):
                for selection in selections:
                    for ticket in selection.tickets:
                        self._scored.pop(ticket.id, None)

    def resumed(self, *, go_on: bool) -> None:
        """The events so far are of an earlier sitting. go_on: also where all was right, which else still counts."""
        if go_on or not self.all_right:
            self._before = self.reasons.total()

    @property
    def full(self) -> bool:
        """Whether it was too much."""
        return self.reasons.total() - self._before >= self.most

    @property
    def all_right(self) -> bool:
        """Whether what was scored was right throughout, and that is most of it."""
        scored = self.rewards.total()
        return 0 < scored == self._right and not self.reasons["all wrong"] and 2 * scored >= self.reasons.total()

    @property
    def groups(self) -> int:
        """In vain, since a group was accepted."""
        return self.reasons.total() // self.group_size

    def learnt(self) -> str:
        """What is to be said where all was right, without its end."""
        scored = self.rewards.total()
        which = f"the last {self.groups} groups"
        if scored < self.reasons.total():
            which = f"the {scored:,} scored samples of {which}"
        return f"All of {which} were right ({self._seen()}): the task is learnt"

    def in_vain(self, failure: str) -> str:
        """What is to be said otherwise, and what to do. failure: of the newest rollout that failed."""
        counts = " and ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        seen = f"; {self._seen()}" if self.rewards else ""
        newest = f" The newest failure was in {failure}." if self.reasons["env_failure"] else ""
        cold = " Tokens are learnt from that were sampled with nothing cut off." if self.reasons[NO_TOKENS] else ""
        return (
            f"Nothing could be learnt from the last {self.groups} groups: their samples were dropped ({counts}{seen}). "
            f"Take {self._tasks()} tasks, larger groups, a higher --rollout.temperature or a bonus on entropy "
            "(--learner.entropy), so that the samples of a task differ; keep uniform groups (--uniform-groups keep); "
            f"or mend an environment that fails.{cold}{newest}"
        )

    def _tasks(self) -> str:
        right, wrong = (self.reasons[reason] > 0 for reason in UNIFORM)
        return "easier or harder" if right == wrong else "harder" if right else "easier"

    def _seen(self) -> str:
        """The rewards, the most frequent first."""
        shown = [f"{value:g} ({count:,} times)" for value, count in self.rewards.most_common(SHOWN)]
        more = len(self.rewards) - len(shown)
        return "rewards: " + ", ".join(shown) + (f" and {more} others" if more else "")
