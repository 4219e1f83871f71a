"""The data of `recipes/nano.py` around the world: what is mixed into which stage, and the instruct set of `sft`.

The numbers come from the experiments in LOG.md ("Facts, sums and tool calls at nano size").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from glm5.data.chat import chat_documents
from glm5.data.instruct import InstructConfig, instruct_chats
from glm5.data.shards import TokenDataset, write_dataset
from glm5.data.tool_chats import ToolRequests
from glm5.data.world import World, WorldConfig
from glm5.data.world_text import documents, questions
from glm5.text import CHAT_TEMPLATE, CONTROL_TOKENS, Tokenizer
from glm5.text.template import render

NANO_WORLD = WorldConfig(entities=100, seed=0)
NANO_DIGITS = 1
"""Digits of one token in nano's tokenizer (`Tokenizer.train(..., digits=NANO_DIGITS)`)."""
NANO_WORLD_SHARE = 0.2
"""Rows of pre-training that come from the world's text, of all rows."""
NANO_INSTRUCT = InstructConfig(conversations=25_000, seed=0)
NANO_SFT_ROWS, NANO_SFT_LENGTH = 5, 448
"""A tool conversation of two requests takes up to 440 tokens and is not to be cut."""
NANO_SFT_STEPS = 450
"""420 steps met the bars (300 of them on an earlier form of the set); with `spike_factor=None`."""


def tokenizer_texts(corpus_texts: Iterable[str], world: World) -> Iterator[str]:
    """What a small tokenizer is trained on: the corpus, the world's text, and what every tool conversation repeats."""
    yield from corpus_texts
    yield from documents(world)
    for fact in world.practised():
        yield from (question.text for question in questions(fact, "train"))
    requests = ToolRequests(-1, [town.name for town in world.of("town")])
    for _ in range(600):
        request = requests.request()
        text = render(
            CHAT_TEMPLATE, {"messages": [{"role": "user", "content": request.question}], "tools": request.tools}
        )
        for token in CONTROL_TOKENS:
            text = text.replace(token, "\n")
        yield text


def build_nano_instruct(
    out: Path, tokenizer: Tokenizer, world: World, config: InstructConfig = NANO_INSTRUCT
) -> TokenDataset:
    """Writes the instruct set of `sft` as a dataset directory."""
    return write_dataset(out, chat_documents(instruct_chats(world, config), tokenizer), tokenizer)
