"""Every field of a request that the installed packages of OpenAI and Anthropic know is read, unread or refused here."""

from typing import Literal, get_args, get_origin, get_type_hints

import anthropic.types as claude
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_message_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import ResponseIncludable, response_create_params
from openai.types.shared import ReasoningEffort

from glm5.serve.anthropic_schema import CountTokensRequest, MessagesRequest, OutputConfig, Thinking
from glm5.serve.completions import CompletionRequest
from glm5.serve.responses_schema import Includable, Reasoning, ResponsesRequest
from glm5.serve.schema import ChatRequest

BODIES = [
    (chat_params.CompletionCreateParamsStreaming, ChatRequest),
    (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
    (response_create_params.ResponseCreateParamsStreaming, ResponsesRequest),
    (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
    (message_count_tokens_params.MessageCountTokensParams, CountTokensRequest),
    (beta_message_params.MessageCreateParamsStreaming, MessagesRequest),
    (beta_count_params.MessageCountTokensParams, CountTokensRequest),
]
HEADERS = {"betas"}
"""Parameters that the packages send as headers."""


@pytest.mark.parametrize(("theirs", "ours"), BODIES)
def test_no_field_of_a_package_is_unknown(theirs, ours):
    known = ours.model_fields.keys() | ours.refused.keys() | ours.unread
    assert get_type_hints(theirs).keys() - known - HEADERS == set()


def words(annotation):
    """All literals in a type."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(words, get_args(annotation)))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ReasoningEffort, ChatRequest.model_fields["reasoning_effort"].annotation),
        (ReasoningEffort, Reasoning.model_fields["effort"].annotation),
        (ResponseIncludable, Includable),
        (get_type_hints(claude.OutputConfigParam)["effort"], OutputConfig.model_fields["effort"].annotation),
    ],
)  # fmt: skip
def test_no_word_of_a_package_is_unknown(theirs, ours):
    assert words(theirs) and words(theirs) <= words(ours)


def test_no_kind_of_thinking_is_unknown():
    kinds = [words(get_type_hints(one)["type"]) for one in get_args(claude.ThinkingConfigParam)]
    assert len(kinds) > 3 and set().union(*kinds) <= words(Thinking.model_fields["type"].annotation)
