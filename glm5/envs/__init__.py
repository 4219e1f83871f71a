"""Environments: tasks and their rewards."""

from glm5.envs.arithmetic import Arithmetic
from glm5.envs.protocol import Environment, EnvironmentFailure, Message, Reward, Task

__all__ = ["Arithmetic", "Environment", "EnvironmentFailure", "Message", "Reward", "Task"]
