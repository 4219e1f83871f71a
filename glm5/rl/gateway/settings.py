"""The settings of a run whose episodes are played by outside agents: what they are, and what may not be asked for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from glm5.errors import ConfigError
from glm5.rl.config import RLRunConfig, recorded_concurrency, recorded_scheduler
from glm5.rl.rollout_config import RolloutConfig
from glm5.train import RunDirectory

FOREVER = 365 * 24 * 3600.0


def outside(config: RLRunConfig, *, patience: float) -> RLRunConfig:
    """The settings of a run whose episodes are played elsewhere: nothing can be asked for again, nobody is in a hurry.

    Bound, batch, group size, learner and seed stay; there is a place for every session that the bound lets in.
    """
    if config.rollout.replay_experts:
        raise ConfigError("Sessions of outside agents hold no experts; leave rollout.replay_experts out.")
    if config.rollout.temperature != 1.0:
        raise ConfigError("Outside agents are sampled at temperature 1; leave rollout.temperature at it.")
    if config.rollout.stop or config.rollout.stop_token_ids:
        raise ConfigError("Outside agents say themselves where answers stop; leave rollout.stop and its token ids out.")
    scheduler = config.scheduler
    places = scheduler.groups_per_batch * scheduler.group_size * (scheduler.max_staleness + 1)
    asynchronous = replace(scheduler, mode="async", stale="drop", max_attempts=1, max_running=places)
    return replace(config, scheduler=asynchronous, concurrency=None, patience=patience)


def check_followed(given: RLRunConfig, run_directory: Path, *, patience: float, held_out: bool) -> None:
    """Raises ConfigError for a setting that `outside` sets otherwise, or that nobody would look at; what a resumed run
    has written down, of an earlier version perhaps, may be said again.

    held_out: whether the run plays episodes after all, to measure.
    """
    usual, settings = RLRunConfig(parent=given.parent), outside(given, patience=patience)
    run = RunDirectory.open(run_directory) if (run_directory / "run.json").exists() else None
    recorded = usual.scheduler if run is None else recorded_scheduler(run)
    for name in ("mode", "stale", "max_attempts", "max_running"):
        value, theirs = getattr(given.scheduler, name), getattr(settings.scheduler, name)
        if value not in (getattr(usual.scheduler, name), getattr(recorded, name), theirs):
            raise ConfigError(
                f"scheduler.{name} is {value}, but outside agents come when they come and are not asked again: it is "
                f"always {theirs} here; leave it out."
            )
    if given.concurrency not in (None, None if run is None else recorded_concurrency(run)):
        raise ConfigError("There is a place for every session that the bound lets in; leave concurrency out.")
    played = {} if run is None else run.description["config"].get("rollout", {})
    followed = {"seed", "outage_seconds"} if patience == FOREVER else {"seed"}  # of a gateway's servers
    for name in (one.name for one in fields(RolloutConfig) if one.name not in followed and not held_out):
        default = getattr(usual.rollout, name)
        if getattr(given.rollout, name) not in (default, played.get(name, default)):
            raise ConfigError(
                f"rollout.{name} says how this program plays episodes, but outside agents play theirs themselves; "
                "leave it out."
            )
    if patience == FOREVER and given.patience not in (usual.patience, FOREVER):
        raise ConfigError("A gateway waits for its agents however long they take; leave patience out.")
