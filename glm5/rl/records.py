"""What happened, as the trainer needs it: turns, trajectories, rollouts, groups. All immutable, all JSON.

A `Turn` is one generation: ids in, ids out. The turns of an episode form a tree, because a later prompt need not extend
what was said before (a thought is dropped, a history is compacted, a sub-agent starts anew); each path from a root to a
leaf is a `Trajectory`, in which every sampled token is trained exactly once over all trajectories of the episode. An
episode with its reward is a `Rollout`; the rollouts of one task are a `Group`, the unit of the baseline. Sampled tokens
are never tokenised again: ids, log-probabilities and weight versions stay together from the engine to the loss. Text is
a sidecar for people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glm5.engine import ExpertChoices
from glm5.envs import Message, Reward, Task

Outcome = Literal["ok", "truncated", "timeout", "env_failure", "aborted"]
"""How an episode ended. ok: by itself. truncated: by the limit of tokens or turns. timeout: by the clock. env_failure:
the environment broke, or engines failed at its requests alone. aborted: it was called off (stale, or nobody needs it).
Only `ok` and `truncated` are scored."""
SCORED: frozenset[Outcome] = frozenset({"ok", "truncated"})


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """One rollout that is to be made. With the run's seed it fixes every random number of it."""

    environment: str
    """Which of the run's environments; its `name`."""
    task_index: int
    attempt: int = 0
    """How often the group was begun before: a repeat draws other numbers."""
    sample: int = 0
    """Which of the group."""

    @property
    def id(self) -> str:
        """Unique in the run."""
        return f"{self.environment}/{self.task_index}/{self.attempt}/{self.sample}"

    @property
    def session(self) -> str:
        """The session under which its requests reach an engine: a member of the group, whose prompt it shares."""
        return f"{self.environment}/{self.task_index}/{self.attempt}//{self.sample}"

    @property
    def group(self) -> Ticket:
        """The ticket of the group's first sample, which names the group."""
        return Ticket(self.environment, self.task_index, self.attempt)

    def seed(self, run_seed: int, turn: int = 0) -> int:
        """The request seed of one turn: 63 bits of a hash."""
        digest = hashlib.sha256(f"{run_seed}/{self.id}/{turn}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation of an episode. `logprobs` and `versions` have one entry per output token."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    """The stop token is among them."""
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    """The weights that sampled each token."""
    finish_reason: str
    """stop, length or abort."""
    seconds: float = field(default=0.0, compare=False)
    """From request to last token, by the wall clock."""
    cached_tokens: int = field(default=0, compare=False)
    experts: ExpertChoices | None = None
    """What the sampler's routers chose, where the run records it: from the first token that no turn before has told of
    to the last but one of the output (the last was never an input)."""

    def __post_init__(self) -> None:
        if not len(self.output_ids) == len(self.logprobs) == len(self.versions):
            raise ValueError(
                f"a turn has {len(self.output_ids)} output tokens, {len(self.logprobs)} log-probabilities and "
                f"{len(self.versions)} versions"
            )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A path through an episode. All tuples have one entry per token; `sampled` is the loss mask.

    A token that is not sampled here (prompts, tool results, and what another trajectory of the episode trains already)
    has log-probability 0.0 and version -1.
    """

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    experts: ExpertChoices | None = None
    """Of its tokens from the first one on, as far as they are known."""

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.token_ids, self.sampled, self.logprobs, self.versions)}
        if len(lengths) != 1:
            raise ValueError(f"the parts of a trajectory have different lengths: {sorted(lengths)}")
        if self.experts is not None and (self.experts.start or self.experts.end > len(self.token_ids)):
            raise ValueError(
                f"a trajectory of {len(self.token_ids)} tokens has experts of {self.experts.start} to "
                f"{self.experts.end}"
            )
        if self.sampled and self.sampled[0]:
            raise ValueError("the first token of a trajectory cannot be sampled: nothing stands before it")

    @property
    def num_sampled(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.sampled)


@dataclass(frozen=True, slots=True)
class Branch:
    """What was said along one path through an episode, for people."""

    messages: tuple[Message, ...]
    turns: tuple[int | None, ...]
    """Which of the rollout's turns said each message; None for what others said and for what is no turn of it."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished episode."""

    ticket: Ticket
    task: Task
    trajectories: tuple[Trajectory, ...]
    outcome: Outcome
    reward: Reward | None
    """None unless the outcome is scored: a failure is never a reward of 0."""
    messages: tuple[Message, ...] = ()
    """The conversation, for people."""
    turns: tuple[Turn, ...] = ()
    """In the order of their requests; what the trajectories were made of."""
    failure: str = ""
    """Why there is no reward, in a sentence."""
    seconds: float = field(default=0.0, compare=False)
    """From start to score, by the wall clock."""
    tool_seconds: float = field(default=0.0, compare=False)
    """Of these, in the environment."""
    branches: tuple[Branch, ...] = ()
    """Conversations of an episode with several. Empty: `messages` is the only one, and its answers are the turns."""

    def __post_init__(self) -> None:
        if (self.reward is not None) != (self.outcome in SCORED):
            raise ValueError(f"rollout {self.ticket.id} is {self.outcome} and its reward is {self.reward}")

    @property
    def id(self) -> str:
        """That of its ticket."""
        return self.ticket.id

    @property
    def versions(self) -> Iterator[int]:
        """Of all sampled tokens."""
        return (v for t in self.trajectories for v, s in zip(t.versions, t.sampled, strict=True) if s)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens of all trajectories."""
        return sum(trajectory.num_sampled for trajectory in self.trajectories)

    def to_learn(self) -> Rollout:
        """What learning needs of it: without turns and conversation, which the journal has and which, long, are most of
        it."""
        return replace(self, turns=(), messages=(), branches=())

    def staleness(self, version: int) -> int:
        """Versions between the oldest weights that made a token and `version`; 0 for a rollout without tokens."""
        return version - min(self.versions, default=version)


def aborted(ticket: Ticket) -> Rollout:
    """What comes back of a rollout that was called off."""
    task: Any = Task(f"{ticket.environment}/{ticket.task_index}", (), "", "")
    return Rollout(ticket, task, (), "aborted", None, failure="it was called off")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A rollout that is learnt from. In a repaired group (GLM-5 report, section 4.1.2) one may stand for several."""

    rollout: Rollout
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one task that are learnt from together."""

    lessons: tuple[Lesson, ...]

    @property
    def ticket(self) -> Ticket:
        """That names the group."""
        return self.lessons[0].rollout.ticket.group

    @property
    def rewards(self) -> list[float]:
        """One for each rollout, repeats included: what the baseline is taken over."""
        found: list[float] = []
        for lesson in self.lessons:
            assert lesson.rollout.reward is not None
            found += [lesson.rollout.reward.value] * lesson.weight
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    step: int
    version: int
    """Of the weights before the step; no token is older than the bound, counted from here."""
    groups: tuple[Group, ...]

    @property
    def rollouts(self) -> Iterator[Rollout]:
        """Each once."""
        return (lesson.rollout for group in self.groups for lesson in group.lessons)


Fate = Literal["trained", "dropped", "requeued"]
"""Every sample ends as exactly one of these."""
Metrics = dict[str, Any]
