"""The accounts of a step: every sample ends as exactly one of trained, dropped (with its reason), requeued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from glm5.rl.plain.records import Sample


class Ledger:
    """Opened with the samples of a step; each is settled once, and `metrics` refuses to close while one is not."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._fates: dict[str, str | None] = {}
        for sample in samples:
            if sample.id in self._fates:
                raise RuntimeError(f"sample {sample.id} was sampled twice")
            self._fates[sample.id] = None

    def trained(self, sample: Sample) -> None:
        """The sample's tokens are in a loss that was stepped on."""
        self._settle(sample, "trained")

    def dropped(self, sample: Sample, reason: str) -> None:
        """The sample is not learnt from, for a reason that is counted."""
        self._settle(sample, f"dropped: {reason}")

    def requeued(self, sample: Sample) -> None:
        """The sample is thrown away and its task will be sampled again."""
        self._settle(sample, "requeued")

    def fate(self, sample: Sample) -> str:
        """How the sample ended."""
        return self._fates[sample.id] or "open"

    def metrics(self) -> dict[str, Any]:
        """Counts for the metrics; they add up to `sampled`."""
        unsettled = [name for name, fate in self._fates.items() if fate is None]
        if unsettled:
            raise RuntimeError(f"{len(unsettled)} samples have no fate, the first is {unsettled[0]}")
        counts = Counter(str(fate) for fate in self._fates.values())
        dropped = {
            name.removeprefix("dropped: "): n for name, n in sorted(counts.items()) if name.startswith("dropped")
        }
        return {"sampled": len(self._fates), "trained": counts["trained"], "requeued": counts["requeued"],
                "dropped": dropped}  # fmt: skip

    def _settle(self, sample: Sample, fate: str) -> None:
        if self._fates[sample.id] is not None:
            raise RuntimeError(f"sample {sample.id} is already {self._fates[sample.id]}, it cannot be {fate}")
        self._fates[sample.id] = fate
