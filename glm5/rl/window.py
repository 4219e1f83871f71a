"""What came back between two batches, in numbers. They follow from the journal, so a resumed run has the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from glm5.rl.accounts import Accounts
from glm5.rl.records import Batch, Outcome, Rollout, Ticket


@dataclass(frozen=True, slots=True)
class _Back:
    """What the figures need of a rollout: turns of long episodes are large."""

    ticket: Ticket
    outcome: Outcome
    reward: float | None
    turns: int
    logprobs: tuple[float, ...]


class Window:
    """Collects the rollouts since the last batch; `close` gives their figures when the next one is made."""

    def __init__(self) -> None:
        self._back: list[_Back] = []
        self._settled: Counter[str] = Counter()

    def add(self, rollout: Rollout) -> None:
        """One came back, whatever became of it."""
        value = None if rollout.reward is None else rollout.reward.value
        logprobs = tuple(logprob for turn in rollout.turns for logprob in turn.logprobs)
        self._back.append(_Back(rollout.ticket, rollout.outcome, value, len(rollout.turns), logprobs))

    def close(self, batch: Batch, accounts: Accounts) -> dict[str, Any]:
        """Means over the rollouts that came back, fates of the samples settled meanwhile, ages of what is learnt.

        `reward` and `surprise` are None when nothing was scored or sampled since: that is not a 0.

        `staleness`: tokens of the batch by the versions between the weights that sampled them and those that learn.
        """
        rollouts = sorted(self._back, key=lambda rollout: rollout.ticket)
        self._back = []
        rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        turns = sum(rollout.turns for rollout in rollouts)
        logprobs = [x for rollout in rollouts for x in rollout.logprobs]
        outcomes = Counter(rollout.outcome for rollout in rollouts)
        ages = Counter(batch.version - version for rollout in batch.rollouts for version in rollout.versions)
        return {
            "reward": sum(rewards) / len(rewards) if rewards else None,
            "rewards": {name: sum(some) / len(some) for name, some in sorted(_by_environment(rollouts).items())},
            "scored": len(rewards),
            "truncated": outcomes["truncated"] / len(rollouts) if rollouts else 0.0,
            "outcomes": dict(sorted(outcomes.items())),
            "tokens": len(logprobs),
            "turns": turns / len(rollouts) if rollouts else 0.0,
            "surprise": -sum(logprobs) / len(logprobs) if logprobs else None,
            **self._fates(accounts),
            "staleness": {str(age): count for age, count in sorted(ages.items())},
        }

    def _fates(self, accounts: Accounts) -> dict[str, Any]:
        """Of the samples that were settled since the last batch; they add up to `sampled`."""
        settled: Counter[str] = Counter()
        for entry, count in accounts.settled.items():
            settled[f"{entry.fate}: {entry.reason}"] += count
        since = settled - self._settled
        self._settled = settled
        parts = {
            fate: {name.split(": ", 1)[1]: count for name, count in sorted(since.items()) if name.startswith(fate)}
            for fate in ("trained", "requeued", "dropped")
        }
        return {
            "sampled": since.total(),
            "trained": sum(parts["trained"].values()),
            "requeued": sum(parts["requeued"].values()),
            "requeued_because": parts["requeued"],
            "dropped": parts["dropped"],
        }


def _by_environment(rollouts: list[_Back]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            found.setdefault(rollout.ticket.environment, []).append(rollout.reward)
    return found
