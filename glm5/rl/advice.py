"""What a person should hear of a run early: its model answers without thinking, and nearly all answers are wrong."""

from __future__ import annotations

from glm5.rl.accounts import Accounts

GROUPS = 8
"""That are looked at before anything is said."""
SHARE = 0.9
"""Of the samples with a fate, of which nothing else is said."""


def think_first(accounts: Accounts, group_size: int) -> str | None:
    """A sentence for a run whose rollouts do not think; None while it has no reason."""
    wrong = sum(count for entry, count in accounts.settled.items() if entry.reason == "all wrong")
    if wrong < GROUPS * group_size or wrong < SHARE * accounts.settled.total():
        return None
    return (
        f"{wrong} of the first {accounts.settled.total()} samples are of groups that are all wrong, from which nothing "
        "is learnt. They were asked for without thinking; a model that was taught to think first, as the bundled one, "
        "answers better in a run with --rollout.thinking (RolloutConfig(thinking=True))."
    )
