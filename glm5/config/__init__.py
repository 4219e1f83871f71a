"""Model configurations: fields, presets, exact parameter counts."""

from glm5.config.model_config import ModelConfig
from glm5.config.parameters import ParameterCount, count_parameters
from glm5.config.presets import PRESETS

__all__ = ["PRESETS", "ModelConfig", "ParameterCount", "count_parameters"]
