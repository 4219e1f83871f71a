"""Environments: tasks and their rewards."""

from glm5.envs.arithmetic import Arithmetic
from glm5.envs.protocol import Environment, EnvironmentFailure, Message, Reward, Task
from glm5.envs.sums import Sums

__all__ = ["Arithmetic", "Environment", "EnvironmentFailure", "Message", "Reward", "Sums", "Task"]
