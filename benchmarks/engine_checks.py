"""The rows of `benchmarks.engine` that say what the sides compute, not how fast.

`flips`: fast mode against strict mode: the likeliest token and the log-probability of the given one at every position
of prompts (fast computes them in chunks), and whole greedy answers, 32 at once in fast mode.

`agree`: whether llama.cpp holds the same function: its log-probabilities over random tokens against ours, and against
ours with dense attention, which shows whether its selection is on.

`conversation`: how much of a conversation's prompts is computed a second time, thoughts kept and thoughts cleared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import glm5
from benchmarks.engine_sides import LlamaCpp, Ours, as_gguf, greedy, prompts
from benchmarks.llama_cpp import Kind
from glm5.data.addition import sums, worked
from glm5.text import Tokenizer
from glm5.text.splice import Written, spliced_prompt

BLOCK = 64
"""Tokens of a block of the cache, the engine's default."""
EXAMPLES = 8
"""Worked sums in a question, which make it 200 to 300 tokens long."""
BUNDLED = Path(glm5.__file__).parent / "bundled" / "nano"


@dataclass
class Result:
    """One row of the table."""

    task: str
    batch: int
    context: int
    ours: str
    peer: str = ""
    theirs: str = ""
    ratio: str = ""


def flips(directory: Path, seed: int) -> list[Result]:
    """How far fast mode is from strict mode on the same requests."""
    context, answers = 1024, 32
    ids, starts = prompts(4, context, seed), prompts(answers, 64, seed + 1)
    seen = {}
    for strict in (True, False):
        ours = Ours(directory, 4 * context + answers * 128, strict=strict)
        prompt_only = replace(greedy(1), prompt_logprobs=1)
        rows = [output.prompt_logprobs or () for output in ours.engine.generate(ids, prompt_only)]
        said = [output.token_ids for output in ours.engine.generate(starts, greedy(64))]
        seen[strict] = [entry for row in rows for entry in row if entry is not None], said
        ours.engine.close()
    pairs = list(zip(seen[True][0], seen[False][0], strict=True))
    flipped = sum(a[2][0][0] != b[2][0][0] for a, b in pairs)
    apart = [abs(a[1] - b[1]) for a, b in pairs]
    same = sum(a == b for a, b in zip(seen[True][1], seen[False][1], strict=True))
    text = f"{flipped} of {len(pairs):,} likeliest tokens differ; log-probabilities by {statistics.mean(apart):.1e} "
    return [
        Result("fast against strict, prompts", 4, context, text + f"in the mean, {max(apart):.1e} at most"),
        Result(
            "fast against strict, answers", answers, 128, f"{same} of {answers} greedy answers of 64 tokens are equal"
        ),
    ]


@torch.inference_mode()
def agree(directory: Path, root: Path, kinds: list[Kind], seed: int, threads: int) -> list[Result]:
    """llama.cpp's log-probabilities of a random prompt against ours."""
    context = 1024
    ids = prompts(1, context, seed)[0]
    model, given = glm5.load_model(directory), torch.tensor([ids])
    ours = {a: model(given, attention=a).logits[0].float().log_softmax(-1) for a in ("sparse", "dense")}
    results = []
    for kind, exact in [("f32", True), *((kind, False) for kind in kinds)]:
        file = as_gguf(root, directory, kind)
        with closing(LlamaCpp(root, file, rows=1, tokens=context, threads=threads, exact=exact)) as peer:
            theirs = peer.logits(ids).log_softmax(-1)
        apart = (ours["sparse"] - theirs).abs().amax(-1)
        dense = (ours["dense"] - theirs).abs().amax(-1)
        same = int((ours["sparse"].argmax(-1) == theirs.argmax(-1)).sum())
        text = (
            f"largest difference of a log-probability: {apart.max():.1e} at worst, {apart.median():.1e} in the median"
        )
        text += f" position ({dense.median():.1e} from ours with dense attention); {same} of {context} likeliest tokens"
        results.append(Result("the same function", 1, context, text, f"llama.cpp {kind}{', exact' if exact else ''}"))
    return results


def conversation(turns: int = 20) -> list[Result]:
    """A conversation with the bundled model, which thinks before it answers, about sums."""
    results = []
    for clear in (False, True):
        told = list(_turns(clear, turns))
        prompt, again, beyond = (sum(column) for column in zip(*told, strict=True))
        text = f"{again / prompt:.1%} of {prompt:,} prompt tokens computed again"
        text += f", {beyond / prompt:.1%} beyond one block a turn"
        results.append(Result(f"conversation, thoughts {'cleared' if clear else 'kept'}", 1, told[-1][0], text))
    return results


def _turns(clear: bool, turns: int) -> Iterator[tuple[int, int, int]]:
    """Of each turn: tokens of the prompt, those of them that were computed though an earlier turn had them, and how
    many of these are more than the block that is never full."""
    tokenizer, problems = Tokenizer.from_pretrained(BUNDLED), sums(0, split="heldout")
    messages: list[dict[str, object]] = []
    written: dict[int, Written] = {}
    with closing(glm5.Engine(BUNDLED, max_num_seqs=1, block_size=BLOCK)) as engine:
        params = glm5.SamplingParams(temperature=0.0, max_tokens=256)
        for turn in range(turns):
            *shown, asked = (next(problems) for _ in range(EXAMPLES + 1))
            question = "\n".join([*(f"{s.question}\n{worked(s.a, s.b)}\n{s.answer}" for s in shown), asked.question])
            messages.append({"role": "user", "content": question})
            prompt = spliced_prompt(tokenizer, messages, written, clear_thinking=clear)
            output = engine.generate([prompt], params)[0]
            fresh = len(tokenizer.encode(question)) + 3 if turn else len(prompt)  # <|user|> ... <|assistant|><think>
            again = max(len(prompt) - output.cached_tokens - fresh, 0)
            yield len(prompt), again, max(again - BLOCK, 0)
            written[len(messages)] = Written(prompt[-1], output.token_ids)
            messages.append(glm5.parse_assistant(tokenizer.decode(output.token_ids), thinking=True))
