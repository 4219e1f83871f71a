"""Engine: sequences, sampler and the loop that turns prompts into tokens."""

from glm5.engine.engine import Engine, TokenStream
from glm5.engine.outputs import CompletionOutput, RequestOutput, TokenDelta
from glm5.engine.sampling_params import SamplingParams, StructuredOutputs

__all__ = [
    "CompletionOutput",
    "Engine",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenDelta",
    "TokenStream",
]
