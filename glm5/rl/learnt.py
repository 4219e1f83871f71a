"""`learnt.json`: a run has ended before its last step, because all that it was given was right (`vain.py`).

The file is written before the model, so that a run killed between them ends at once when it is resumed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from glm5.files import write_json
from glm5.rl.vain import Vain

FILE = "learnt.json"


@dataclass(frozen=True)
class Learnt:
    """Such an end."""

    step: int
    """Batches that were learnt from."""
    steps: int
    """That the run was to make."""
    groups: int
    """In a row, since one taught something."""
    rewards: dict[str, int]
    """Of their samples, and how often."""
    sentence: str

    @classmethod
    def of(cls, vain: Vain, step: int, steps: int) -> Learnt:
        """The end of a run that stands there."""
        rewards: Counter[str] = Counter()
        for value, count in vain.rewards.most_common():
            rewards[f"{value:g}"] += count
        return cls(step, steps, vain.groups, dict(rewards), f"{vain.learnt()}; stopped after step {step} of {steps}.")

    @classmethod
    def read(cls, run_directory: Path) -> Learnt | None:
        """That of the run; None where it has had none."""
        path = run_directory / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, run_directory: Path) -> None:
        """Notes it."""
        write_json(run_directory / FILE, asdict(self))


def ended(run_directory: Path, steps: int) -> bool:
    """Whether the run has ended so, and is not to make more steps than it was then."""
    learnt = Learnt.read(run_directory)
    return learnt is not None and steps <= learnt.steps
