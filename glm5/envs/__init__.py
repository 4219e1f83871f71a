"""Environments: tasks, episodes and their rewards."""

from glm5.envs.arithmetic import Arithmetic
from glm5.envs.protocol import (
    Environment,
    EnvironmentFailure,
    Episode,
    EpisodeLimits,
    FailureKind,
    Message,
    Observation,
    Questions,
    Reward,
    Task,
    Tool,
    UniformGroups,
)
from glm5.envs.single_turn import SingleTurn
from glm5.envs.sums import Sums

__all__ = [
    "Arithmetic", "Environment", "EnvironmentFailure", "Episode", "EpisodeLimits", "FailureKind", "Message",
    "Observation", "Questions", "Reward", "SingleTurn", "Sums", "Task", "Tool", "UniformGroups",
]  # fmt: skip
