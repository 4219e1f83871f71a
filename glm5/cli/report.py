"""`glm5 report RUN`: writes the report page of a run again from what its directory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glm5.rl import write_rl_report
from glm5.train import RunDirectory, write_report


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write report.html of a run, finished or not."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory."""


def run(options: ReportOptions) -> int:
    """Prints the path of the page."""
    stage = RunDirectory.open(options.run).description["stage"]
    print(write_rl_report(options.run) if stage == "rl" else write_report(options.run))
    return 0
