"""A run in virtual time: the scheduler is the real one, engines, environments and trainer are numbers.

    print(comparison(sweep(SimulationConfig(), max_staleness=(1, 2, 4))))

Predicts, before anything is paid for, how many steps an hour a run makes, how long trainer and sampler wait for each
other (the bubble), how old the samples are that are learnt from, and what is thrown away. An engine shares its speed
equally among the sequences that it makes; new weights are taken between two tokens. The random numbers of a rollout
belong to its ticket, so that two settings are compared on the same tasks.

Left out: prompts (part of the engine's measured speed), the engine's cache and preemption, engines that differ.
"""

from glm5.rl.simulation.config import NothingTeaches, Simulation, SimulationConfig
from glm5.rl.simulation.machine import simulate, sweep
from glm5.rl.simulation.measured import Measured, rollout_record
from glm5.rl.simulation.observe import RunSettings, records_of, settings_of
from glm5.rl.simulation.report import comparison, write_page
from glm5.rl.simulation.spread import Spreads, shortness, spread_of
from glm5.rl.simulation.workload import (
    AssumedWorkload,
    EngineSpeed,
    LongTail,
    MeasuredWorkload,
)

__all__ = [
    "AssumedWorkload", "EngineSpeed", "LongTail", "Measured", "MeasuredWorkload", "NothingTeaches", "RunSettings",
    "Simulation", "SimulationConfig", "Spreads", "comparison", "records_of", "rollout_record", "settings_of",
    "shortness", "simulate", "spread_of", "sweep", "write_page",
]  # fmt: skip
