"""Words that OpenAI's endpoints have in common: usage, log-probabilities, the weights' fingerprint."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from glm5.engine import TokenDelta
from glm5.serve.generation import Generation
from glm5.text import Tokenizer, token_bytes
from glm5.text.specials import CALL_TAGS

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts of the whole request, all samples together."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
    }


def envelope(generation: Generation, kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The head of every object. `weight_version` names the newest weights that had a part in it, for clients of a
    model in training; the fingerprint says the same to clients that know OpenAI's fields only."""
    version = generation.version
    return {"id": f"{prefix}-{generation.id}", "object": kind, "created": generation.created, "model": model,
            "system_fingerprint": f"glm5-weights-{version}", "weight_version": version}  # fmt: skip


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenDelta], *, as_ids: bool = False) -> dict[str, Any]:
    """The `logprobs` object of chat completions and responses; `as_ids`: tokens are named as `token_id:17`."""
    spelling = cache(partial(_spelling, tokenizer, as_ids=as_ids))
    content = []
    for token in tokens:
        own, *top = (
            {**spelling(token_id), "logprob": max(logprob, LOWEST_LOGPROB)}
            for token_id, logprob in ((token.token_id, token.logprob), *token.top_logprobs)
        )
        content.append({**own, "top_logprobs": top})
    return {"content": content, "refusal": None}


class SpokenTokens:
    """The log-probabilities of a message's own tokens: no reasoning, no calls, no tags. `calls`: whether any may be
    made; where not, their tags are text, as for `AssistantStream`."""

    def __init__(self, tokenizer: Tokenizer, *, calls: bool) -> None:
        self.tokenizer = tokenizer
        text = () if calls else CALL_TAGS
        self._special = frozenset(id for token, id in tokenizer.special_ids.items() if token not in text)
        begin, end = map(tokenizer.token_to_id, ("<tool_call>", "</tool_call>"))
        self._tags = {begin: True, end: False} if calls else {}
        self._calling = False
        self._waiting: list[TokenDelta] = []

    def take(self, token: TokenDelta, *, reasoning: bool) -> None:
        """One more token; `reasoning`: whether the reasoning is still open behind it."""
        if token.token_id in self._tags:
            self._calling = self._tags[token.token_id]
        elif not reasoning and not self._calling and token.token_id not in self._special:
            self._waiting.append(token)

    def give(self) -> list[dict[str, Any]]:
        """The entries of all tokens since the last time."""
        tokens, self._waiting = self._waiting, []
        return list(chat_logprobs(self.tokenizer, tokens)["content"])


def _spelling(tokenizer: Tokenizer, token_id: int, *, as_ids: bool) -> dict[str, Any]:
    """How a token is written. Its bytes are a tuple: the garbage collector need not look at millions of those again."""
    spelling = token_bytes(tokenizer, token_id)
    written = spelling.decode(errors="replace")  # a token may end inside a character
    return {"token": f"token_id:{token_id}" if as_ids else written, "bytes": tuple(spelling)}


def prompt_logprobs(tokenizer: Tokenizer, generation: Generation, prompt: int = 0) -> list[Any] | None:
    """vLLM's `prompt_logprobs`: per prompt token a map from token id to log-probability, the token's own first."""
    found = generation.prompt_logprobs(prompt)
    if found is None:
        return None
    said: list[Any] = []
    for entry in found:
        if entry is None:
            said.append(None)
            continue
        token_id, own, likeliest = entry
        each = {token_id: own, **dict(likeliest)}
        ranks = {token: rank for rank, (token, _) in enumerate(likeliest, 1)}
        said.append({
            str(token): {
                "logprob": max(logprob, LOWEST_LOGPROB),
                "rank": ranks.get(token),
                "decoded_token": token_bytes(tokenizer, token).decode(errors="replace"),
            }
            for token, logprob in each.items()
        })  # fmt: skip
    return said


def finish_reason(engine_reason: str, called_tools: bool) -> str:
    """OpenAI's word for why a sample ended; "abort" is vLLM's, for a request that the server gave up."""
    return "tool_calls" if called_tools and engine_reason == "stop" else engine_reason
