"""Many processes: the parallel plan, the mesh, and what lays them over a single-device model from outside.

Only the plans are imported here: the planner reads it without loading PyTorch.
"""

from glm5.parallel.inference_plan import InferencePlan
from glm5.parallel.plan import ParallelPlan

__all__ = ["InferencePlan", "ParallelPlan"]
