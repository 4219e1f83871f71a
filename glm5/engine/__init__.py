"""Engine: sequences, sampler and the loop that turns prompts into tokens."""

from glm5.engine.choices import ExpertChoices
from glm5.engine.engine import Engine
from glm5.engine.leader import follow
from glm5.engine.outputs import CompletionOutput, EngineStats, RequestOutput, TokenDelta
from glm5.engine.sampling_defaults import SamplingDefaults
from glm5.engine.sampling_params import SamplingParams, StructuredOutputs
from glm5.engine.stream import TokenStream

__all__ = [
    "CompletionOutput",
    "Engine",
    "EngineStats",
    "ExpertChoices",
    "RequestOutput",
    "SamplingDefaults",
    "SamplingParams",
    "StructuredOutputs",
    "TokenDelta",
    "TokenStream",
    "follow",
]
