"""Environments: tasks, episodes and their rewards, and adapters to other people's environments."""

from glm5.envs.arithmetic import Arithmetic
from glm5.envs.counting import Counting
from glm5.envs.facts import FactRewards, Facts, facts_environment
from glm5.envs.function import single_questions
from glm5.envs.gym import GymEnvironment
from glm5.envs.gymnasium_text import gymnasium_environment
from glm5.envs.openenv import OpenEnv
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
from glm5.envs.reasoning import ReasoningGym
from glm5.envs.rewards import RewardFunction, right_number, right_text
from glm5.envs.single_turn import SingleTurn
from glm5.envs.sums import Sums
from glm5.envs.tasksets import TasksetEnvironment, named_taskset, taskset_environment
from glm5.envs.tool_environment import ToolEnvironment
from glm5.envs.tool_tasks import Calculations, Lookups, calculator, calculator_environment, lookup_environment
from glm5.envs.toolbox import Toolbox
from glm5.envs.wrappers import Delayed, Latency, Retried

__all__ = [
    "Arithmetic", "Calculations", "Counting", "Delayed", "Environment", "EnvironmentFailure", "Episode",
    "EpisodeLimits", "FactRewards", "Facts", "FailureKind", "GymEnvironment", "Latency", "Lookups", "Message",
    "Observation", "OpenEnv", "Questions", "ReasoningGym", "Retried", "Reward", "RewardFunction", "SingleTurn", "Sums",
    "Task", "TasksetEnvironment", "Tool", "ToolEnvironment", "Toolbox", "UniformGroups", "calculator",
    "calculator_environment", "facts_environment", "gymnasium_environment", "lookup_environment", "named_taskset",
    "right_number", "right_text", "single_questions", "taskset_environment",
]  # fmt: skip
