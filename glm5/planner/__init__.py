"""Planner: what a model takes, whether it fits, how fast it runs, what a token costs; each number with its formula."""

from glm5.planner.hardware import DEVICES, Device, Hardware, hardware_from
from glm5.planner.host_training import HostTrainingMemory, host_training_memory
from glm5.planner.plan import Estimate, ServingPlan, best_estimate, estimate, plan_serving, smallest_sets
from glm5.planner.quantity import Quantity, derive, given, plain, quantities
from glm5.planner.report import print_formulas, print_serving, print_training
from glm5.planner.serving import Serving, Sharding, sharding_for
from glm5.planner.shape import ModelShape, shape_of
from glm5.planner.training import TrainingMemory, TrainingPlan, training_memory

__all__ = [
    "DEVICES", "Device", "Estimate", "Hardware", "HostTrainingMemory", "ModelShape", "Quantity", "Serving",
    "ServingPlan", "Sharding", "TrainingMemory", "TrainingPlan", "best_estimate", "derive", "estimate", "given",
    "hardware_from", "host_training_memory", "plain", "plan_serving", "print_formulas", "print_serving",
    "print_training", "quantities", "shape_of", "sharding_for", "smallest_sets", "training_memory",
]  # fmt: skip
