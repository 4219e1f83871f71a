"""What a request must be before any work starts; everything else is refused with a sentence and the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from glm5.config import ModelConfig
from glm5.engine.checks import as_whole, check_number, check_whole
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.outputs import TokenDelta
from glm5.engine.sampler import SampledToken
from glm5.engine.sampling_params import SamplingParams
from glm5.engine.sequence import Sequence, fresh_seed
from glm5.errors import InputError
from glm5.text import Detokenizer, Tokenizer

MOST_PRIORITY = 1000
MOST_SECONDS = 7 * 86_400.0
"""Longest deadline: a week."""


@dataclass(frozen=True)
class Limits:
    """What one engine can hold."""

    vocab_size: int
    max_model_len: int
    """Prompt and new tokens of one sequence."""
    cache_tokens: int
    """Tokens that the whole cache holds; every request must fit into it alone."""
    bytes_per_token: float
    """Of the cache, all layers together."""
    experts: bool = False
    """Whether it can say which experts were chosen."""


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """The tokenizer of a model directory that has one."""
    return Tokenizer.from_pretrained(directory) if (directory / "tokenizer.json").is_file() else None


def end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids that end a turn: the model's, or else the tokenizer's, which must be of the same vocabulary."""
    found = frozenset(config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ()))
    if max(found, default=0) >= config.vocab_size:
        raise InputError(
            f"The tokenizer ends a turn with id {max(found)}, but the model's vocabulary has {config.vocab_size}; "
            "give the model's own tokenizer."
        )
    return found


def one_each(
    prompts: SequenceOf[SequenceOf[int]], params: SamplingParams | SequenceOf[SamplingParams] | None
) -> list[tuple[SequenceOf[int], SamplingParams]]:
    """Every prompt with its settings: those of all, or its own. Raises InputError."""
    if not isinstance(prompts, SequenceOf) or any(isinstance(prompt, int) for prompt in prompts):
        raise InputError("prompts must be a list of lists of token ids; wrap a single prompt in a list.")
    if params is None:
        params = SamplingParams()
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if not isinstance(each, SequenceOf) or len(each) != len(prompts):
        given = f"{len(each)} SamplingParams" if isinstance(each, SequenceOf) else f"a {type(each).__name__}"
        raise InputError(f"There are {len(prompts)} prompts and {given}; give one SamplingParams, or one each.")
    return list(zip(prompts, each, strict=True))


def admit(
    prompt_ids: SequenceOf[int],
    params: SamplingParams,
    limits: Limits,
    *,
    eos_ids: frozenset[int],
    tokenizer: Tokenizer | None,
    grammars: GrammarCompiler | None,
) -> list[Sequence]:
    """The request's `n` sequences, or an InputError that says why it cannot run."""
    if not isinstance(prompt_ids, SequenceOf):
        raise InputError(f"The prompt is a {type(prompt_ids).__name__}; give a list of token ids.")
    if not isinstance(params, SamplingParams):
        raise InputError(f"The sampling settings are a {type(params).__name__}; give a SamplingParams.")
    prompt = _ids("The prompt", prompt_ids, limits.vocab_size)
    if not prompt:
        raise InputError("The prompt is empty; give at least one token id.")
    named = {"stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias or (),
             "bad_sequences": [token for one in params.bad_sequences for token in one]}  # fmt: skip
    for name, ids in named.items():
        _ids(name, ids, limits.vocab_size)
    max_tokens = _max_tokens(len(prompt), params.max_tokens, limits)
    if params.stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this engine has none; use stop_token_ids.")
    if params.experts_from is not None and not limits.experts:
        raise InputError("experts_from (routing replay) needs engines of this program, with experts; leave it out.")
    if params.structured_outputs is not None and grammars is None:
        raise InputError("structured_outputs need a tokenizer, and this engine has none; give it the model's.")
    seed = fresh_seed() if params.seed is None else params.seed
    return [
        Sequence(
            prompt,
            params,
            index=index,
            seed=seed,
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            detokenizer=Detokenizer(tokenizer, skip_special_tokens=True) if tokenizer else None,
            grammar=grammars.compile(params.structured_outputs) if grammars and params.structured_outputs else None,
        )
        for index in range(params.n)
    ]


def _ids(name: str, given: Iterable[object], vocab_size: int) -> tuple[int, ...]:
    """Token ids as ints, or an InputError that names the first which is none."""
    ids = []
    for token in given:
        whole = as_whole(token)
        if whole is None or not 0 <= whole < vocab_size:
            raise InputError(f"{name} holds {token!r}, which is no token id below {vocab_size}.")
        ids.append(whole)
    return tuple(ids)


def go_on(sequences: SequenceOf[Sequence], said: SequenceOf[TokenDelta], vocab_size: int) -> None:
    """Brings fresh sequences to where the same request was elsewhere: they sample what comes after `said`.

    Text, stop strings, penalties, structure and random numbers are functions of the prompt and of the tokens so far.
    Raises InputError for tokens that this request cannot have sampled.
    """
    for delta in said:
        if not 0 <= delta.index < len(sequences) or not 0 <= delta.token_id < vocab_size:
            raise InputError(f"{delta} is no token of a request with n={len(sequences)}; give back what it gave.")
        sequence = sequences[delta.index]
        if sequence.done:
            raise InputError(f"Completion {delta.index} has tokens after its end; give back what the request gave.")
        sequence.append(SampledToken(delta.token_id, delta.logprob, delta.top_logprobs), delta.version)
        if sequence.choices is not None and delta.experts is not None:
            sequence.choices.told = delta.experts.end


def _max_tokens(prompt: int, asked: int | None, limits: Limits) -> int:
    """New tokens at most: what is asked for if it fits, or all that context limit and cache leave."""
    room = limits.max_model_len - prompt
    if room < 1 or (asked or 1) > room:
        needs = f"{prompt} prompt tokens" + (f" + {asked} new" if asked else "")
        raise InputError(
            f"The request needs {needs}, but the context limit is {limits.max_model_len} tokens; "
            "shorten the prompt or max_tokens."
        )
    # The last token is sampled and never put into the cache.
    in_cache = limits.cache_tokens + 1 - prompt
    if (asked or 1) > in_cache:
        tokens = prompt + (asked or 1) - 1
        raise InputError(
            f"The request needs {tokens:,} tokens of cache ({tokens * limits.bytes_per_token / 1e9:,.3f} GB), but this "
            f"engine's holds {limits.cache_tokens:,} ({limits.cache_tokens * limits.bytes_per_token / 1e9:,.3f} GB); "
            "lower max_tokens, shorten the prompt, or make the engine with a larger memory_bytes."
        )
    return min(room, in_cache) if asked is None else asked


def check_queueing(session_id: str | None, priority: int, deadline: float | None) -> None:
    """Refuses what cannot place a request in the queue. `deadline` is in seconds from now."""
    if session_id is not None and not isinstance(session_id, str):
        raise InputError(f"session_id is {session_id!r}; give a text or None.")
    check_whole("priority", priority, -MOST_PRIORITY, MOST_PRIORITY)
    if deadline is not None:
        check_number("deadline", deadline, 0.0, MOST_SECONDS, above=True)
