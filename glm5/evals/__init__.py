"""Evaluations: a model on an environment, scored, with intervals."""

from glm5.evals.evaluation import EvalConfig, EvalResult, ScoredAnswer, evaluate, summarise, write_evaluation

__all__ = ["EvalConfig", "EvalResult", "ScoredAnswer", "evaluate", "summarise", "write_evaluation"]
