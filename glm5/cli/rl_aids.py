"""A resumed run has the learner's aids of its beginning, whether the command line names them again or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from glm5.rl.aids_config import AidsConfig, recorded_aids
from glm5.rl.config import RLRunConfig
from glm5.train import RunDirectory


def with_recorded_aids(config: RLRunConfig, out: Path) -> RLRunConfig:
    """Without any aids among the flags, those that the run in `out` was started with."""
    if config.aids != AidsConfig() or not (out / "run.json").exists():
        return config
    return replace(config, aids=recorded_aids(RunDirectory.open(out)))
