"""Groups that teach nothing, one after the other: how many, why, with which rewards, and what that says of the run.

Where all that was scored is right, in every environment, the task is learnt: the run is finished before its last step.
Right is what a judged grade calls so; a positive number alone does not. Where answers are wrong, or rewarded without
being right, or mostly fail, it is an error (`NothingLearnt`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from glm5.envs import Reward
from glm5.errors import RunError
from glm5.rl.events import Accepted, BatchMade, Dropped, Event, Finished, Requeued
from glm5.rl.scheduler_state import NO_TOKENS

UNIFORM = ("all right", "all wrong")
"""Why samples are dropped whose group was scored."""
SHOWN = 4
"""Rewards that are named."""
STARVING = 16
"""Groups in vain that are told of while the run goes on."""


class NothingLearnt(RunError):
    """A run met nothing to learn from for too long. It is saved and can go on."""


class Vain:
    """What was dropped since a group was accepted: a fold of the events of a run.

    environments: of the run, by name. most: samples in vain after which the run ends.
    """

    def __init__(self, environments: Iterable[str], group_size: int, most: int) -> None:
        self.environments, self.group_size, self.most = tuple(environments), group_size, most
        self.reasons: Counter[str] = Counter()
        """Why samples were dropped."""
        self.rewards: Counter[float] = Counter()
        """Of those that were scored."""
        self._right: Counter[str] = Counter()
        """Of these, as right, by environment."""
        self._bare = 0
        """Of these, by a number alone."""
        self._scored: dict[str, Reward] = {}
        """Of rollouts without a fate."""
        self._told = (0, "")
        """Groups that were told of last, with the newest failure of then."""
        self._before = 0
        """Samples in vain that do not count any more: what failed in an earlier sitting of the run may be mended."""

    def note(self, event: Event) -> None:
        """Takes the next event."""
        match event:
            case Finished(rollout) if rollout.reward is not None:
                self._scored[rollout.id] = rollout.reward
            case Dropped(ticket, reason):
                self.reasons[reason] += 1
                reward = self._scored.pop(ticket.id, None)
                if reward is not None and reason in UNIFORM:
                    self.rewards[reward.value] += 1
                    self._bare += not reward.grade.judged
                    self._right[ticket.environment] += reward.grade.correct and reward.grade.judged
            case Requeued(ticket):
                self._scored.pop(ticket.id, None)
            case Accepted():
                self.reasons.clear()
                self.rewards.clear()
                self._right.clear()
                self._bare, self._before, self._told = 0, 0, (0, "")
            case BatchMade(_, selections):
                for selection in selections:
                    for ticket in selection.tickets:
                        self._scored.pop(ticket.id, None)

    def resumed(self, *, go_on: bool) -> None:
        """The events so far are of an earlier sitting. go_on: also where all was right, which else still counts."""
        if go_on or not self._right_so_far:
            self._before = self.reasons.total()

    @property
    def full(self) -> bool:
        """Whether it was too much."""
        return self.reasons.total() - self._before >= self.most

    def starving(self, failure: str) -> str:
        """What a person should know of a run that meets little to learn from; each time twice as much, else the same.

        Empty for others. failure: of the newest rollout that failed.
        """
        groups = (self.reasons.total() - self._before) // self.group_size
        if groups < STARVING:
            return ""
        told, reasons = 1 << (groups.bit_length() - 1), " and ".join(sorted(self.reasons))
        if told != self._told[0]:
            self._told = told, failure if self._failing else ""
        newest = f"; the newest failure was in {self._told[1]}" if self._told[1] else ""
        return (
            f"nothing could be learnt from the last {told} groups ({reasons}); the run ends after "
            f"{self.most // self.group_size}{newest}"
        )

    @property
    def _failing(self) -> bool:
        return self.reasons["env_failure"] + self.reasons["timeout"] > 0

    @property
    def undecided(self) -> bool:
        """Whether it was too much and speaks for an end as learnt, so that what is under way decides."""
        return self.full and self._right_so_far

    @property
    def all_right(self) -> bool:
        """Whether what was scored was right throughout, and that is most of it, and some of every environment."""
        return self._right_so_far and not self._unscored()

    @property
    def _right_so_far(self) -> bool:
        scored = self.rewards.total()
        right = 0 < scored == self._right.total() and not self.reasons["all wrong"]
        return right and 2 * scored >= self.reasons.total()

    def _unscored(self) -> list[str]:
        """Environments of which nothing was right."""
        return [name for name in self.environments if not self._right[name]]

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

    def in_vain(self, failure: str, *, elsewhere: bool = False) -> str:
        """What is to be said otherwise, and what to do. failure: of the newest rollout that failed.

        elsewhere: whether others play the episodes, whom no setting of the rollouts reaches.
        """
        counts = " and ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        seen = f"; {self._seen()}" if self.rewards else ""
        newest = f" The newest failure was in {failure}." if self._failing else ""
        cold = " Tokens are learnt from that were sampled with nothing cut off." if self.reasons[NO_TOKENS] else ""
        said = (
            f"Nothing could be learnt from the last {self.groups} groups: their samples were dropped ({counts}{seen}). "
        )
        if elsewhere:
            return (
                f"{said}Give the agents {self._tasks()} tasks, or rewards that tell more answers apart; take larger "
                "groups or a bonus on entropy (--learner.entropy), so that the sessions of a group differ; or keep "
                f"uniform groups (--uniform-groups keep).{cold}"
            )
        return (
            f"{said}Take {self._tasks()} tasks, larger groups, a higher --rollout.temperature or a bonus on entropy "
            "(--learner.entropy), so that the samples of a task differ; keep uniform groups (--uniform-groups keep); "
            f"or mend an environment that fails.{self._why_not_learnt()}{cold}{newest}"
        )

    def _why_not_learnt(self) -> str:
        """Where nothing was wrong."""
        if self._right_so_far:
            return f" What was scored was right, but nothing was scored of {', '.join(self._unscored())}."
        if not self._bare or self.reasons["all wrong"]:
            return ""
        return " That a number is positive does not say that an answer is right: a Reward with a Grade does."

    def _tasks(self) -> str:
        right, wrong = (self.reasons[reason] > 0 for reason in UNIFORM)
        return "easier or harder" if right == wrong else "harder" if right else "easier"

    def _seen(self) -> str:
        """The rewards, the most frequent first."""
        shown = [f"{value:g} ({count:,} times)" for value, count in self.rewards.most_common(SHOWN)]
        more = len(self.rewards) - len(shown)
        return "rewards: " + ", ".join(shown) + (f" and {more} others" if more else "")
