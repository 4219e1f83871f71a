"""slime: reinforcement learning, asynchronous unless told otherwise. docs/slime.md is its page."""

from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import Learner
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.replay import replay_step
from glm5.rl.report import write_rl_report
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import TaskSource

__all__ = [
    "Learner", "LearnerConfig", "RLRunConfig", "RolloutConfig", "SchedulerConfig", "TaskSource", "replay_step",
    "train_in_lockstep", "train_rl", "write_rl_report",
]  # fmt: skip
