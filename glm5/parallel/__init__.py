"""Many processes: the parallel plan, the mesh, and what lays them over a single-device model from outside.

Only the plan is imported here: the planner reads it without loading PyTorch.
"""

from glm5.parallel.plan import ParallelPlan

__all__ = ["ParallelPlan"]
