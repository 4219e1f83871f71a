"""The first instruct set: conversations about the taught world, sums, tool calls and honest ignorance.

* facts: practised facts in train wordings, a part of them with one line of reasoning, a part as two questions in a row;
* sums: `glm5.data.addition`, reasoning in `<think>`;
* tools: `glm5.data.tool_chats`;
* copies: "Repeat ..." with names and numbers never seen before; cheap practice for the arguments of tool calls;
* tables and gym: real countries and reasoning-gym's problems, where their packages are installed;
* unknown: "I don't know." to questions whose premise is missing: names that nobody bears, drawn anew each time, and
  relations that an entity does not have (the capital of a person). Never-taught entities do not occur: whether the
  model abstains on them is what the evaluation asks.

Shares count conversations. Everything is a function of the config and the world.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glm5.data.addition import number_is_held_out, sums
from glm5.data.chat import Chat
from glm5.data.corpus import is_held_out
from glm5.data.gym_chats import gym_chats
from glm5.data.real_tables import table_chats
from glm5.data.tool_chats import ToolRequests
from glm5.data.world import Fact, World
from glm5.data.world_names import NameDrawer
from glm5.data.world_phrasings import GENERAL_QUESTIONS, RELATIONS
from glm5.data.world_text import Phrasing, questions
from glm5.errors import ConfigError

SKILLS = ("facts", "sums", "tools", "copies", "unknown", "tables", "gym")
UNKNOWN = "I don't know."
COPY_PHRASINGS = ("Repeat {x}.", "Say {x}.", "Write down {x}.", "Please repeat: {x}.", "Copy {x}, please.")
MISSING = {
    "capital": "country", "currency": "country", "birth year": "person", "profession": "person",
    "founder": "company", "product": "company", "colour": "mineral", "discoverer": "mineral",
}  # fmt: skip
"""Nouns of relations that only one kind has."""
MISSING_HELD_OUT_PER_THOUSAND = 200


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """What an instruct set consists of."""

    conversations: int = 20_000
    seed: int = 0
    facts: float = 0.48
    sums: float = 0.26
    tools: float = 0.05
    copies: float = 0.09
    unknown: float = 0.12
    tables: float = 0.0
    """Real countries (`glm5.data.real_tables`, extra `tables`)."""
    gym: float = 0.0
    """Problems of reasoning-gym (`glm5.data.gym_chats`, extra `envs`). All shares add up to 1."""
    thinking_facts: float = 0.3
    """Of the fact questions, the share that is answered behind a line of reasoning."""
    second_question: float = 0.2
    """Of the fact conversations, the share with two questions."""
    wrong_calls: float = 0.1
    """Of the requests to tools, the share with a masked wrong call in front."""
    tool_requests: int = 2
    """Requests in a tool conversation."""
    digits: int = 2
    """Most digits of a number that is added."""

    def __post_init__(self) -> None:
        if self.conversations < 1 or not 1 <= self.digits <= 4:
            raise ConfigError("an instruct set has at least one conversation, and sums of 1 to 4 digits.")
        shares = self.shares
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"the shares {shares} must be at least 0 and add up to 1.")

    @property
    def shares(self) -> tuple[float, ...]:
        """In the order of `SKILLS`."""
        return self.facts, self.sums, self.tools, self.copies, self.unknown, self.tables, self.gym


def instruct_chats(world: World, config: InstructConfig | None = None) -> Iterator[Chat]:
    """`config.conversations` conversations in an order that the seed fixes."""
    config = config or InstructConfig()
    draw = random.Random(f"instruct {config.seed}")
    facts = list(world.practised())
    additions = sums(config.seed, digits=config.digits)
    requests = ToolRequests(config.seed, [town.name for town in world.of("town")])
    strangers = Strangers(world, config.seed)
    tables, gym = table_chats(config.seed), gym_chats(config.seed)  # nothing is imported before the first draw
    for _ in range(config.conversations):
        skill = draw.choices(SKILLS, config.shares)[0]
        if skill == "facts":
            yield _fact_chat(facts, draw, config)
        elif skill == "sums":
            yield Chat(next(additions).messages(), skill="sums")
        elif skill == "tools":
            yield requests.chat(config.wrong_calls, config.tool_requests)
        elif skill in ("tables", "gym"):
            yield next(tables if skill == "tables" else gym)
        elif skill == "copies":
            yield _copy_chat(strangers.names, draw)
        else:
            thinking = draw.random() < config.thinking_facts
            question, subject = strangers.question()
            yield Chat(_asked(question, UNKNOWN, f"{subject}?" if thinking else None), skill="unknown")


class Strangers:
    """Draws questions whose premise is missing; other seeds and wordings draw other names."""

    def __init__(self, world: World, seed: int, phrasing: Phrasing = "train") -> None:
        self._draw = random.Random(f"strangers {seed} {phrasing}")
        self.names = NameDrawer(f"strangers {seed} {phrasing}", avoid=world.names)
        self._entities = [entity for entity in world.entities if entity.exposure]
        self._practised = {fact.entity.name for fact in world.practised()}
        self._phrasing: Phrasing = phrasing

    def question(self) -> tuple[str, str]:
        """A question, and what it is about ("capital of X"): a stranger in two of three."""
        return self.stranger() if self._draw.random() < 2 / 3 else self.missing()

    def stranger(self) -> tuple[str, str]:
        """A question that fits, about a name that nobody bears."""
        relation = self._draw.choice(RELATIONS)
        name = self.names.person() if relation.kind == "person" else self.names.name(relation.kind)
        frames = (*getattr(relation.questions, self._phrasing), *getattr(GENERAL_QUESTIONS, self._phrasing))
        text = self._draw.choice(frames).format(e=name, noun=relation.noun)
        return text[0].upper() + text[1:], f"{relation.noun} of {name}"

    def missing(self) -> tuple[str, str]:
        """A relation that a known entity does not have. By the hash of both, one in five is never asked in training."""
        noun, kind = self._draw.choice(list(MISSING.items()))
        held_out = self._phrasing == "heldout"
        others = [
            e for e in self._entities
            if e.kind != kind and e.name in self._practised and missing_is_held_out(noun, e.name) == held_out
        ]  # fmt: skip
        name = self._draw.choice(others).name
        text = self._draw.choice(getattr(GENERAL_QUESTIONS, self._phrasing)).format(e=name, noun=noun)
        return text[0].upper() + text[1:], f"{noun} of {name}"


def missing_is_held_out(noun: str, name: str) -> bool:
    """Whether only evaluations ask for this relation of this entity."""
    return is_held_out(hashlib.sha256(f"missing {noun} of {name}".encode()).hexdigest(), MISSING_HELD_OUT_PER_THOUSAND)


def _fact_chat(facts: list[Fact], draw: random.Random, config: InstructConfig) -> Chat:
    messages: tuple[dict[str, Any], ...] = ()
    for _ in range(2 if draw.random() < config.second_question else 1):
        fact = draw.choice(facts)
        question = draw.choice(questions(fact, "train"))
        subject = f"{fact.relation.noun} of {fact.entity.name}"
        if question.direction == "inverse":
            subject = f"{fact.relation.noun} {fact.value}"
        thinking = draw.random() < config.thinking_facts
        messages += _asked(question.text, question.answer, f"{subject}?" if thinking else None)
    return Chat(messages, skill="facts")


def _copy_chat(names: NameDrawer, draw: random.Random) -> Chat:
    """One or two fresh names, or numbers that sums may use, to be said again."""
    numbers = [number for number in (draw.randrange(1000) for _ in range(8)) if not number_is_held_out(number)]
    things = [names.name(draw.choice(("town", "company", "country"))), *map(str, numbers)]
    said = " ".join(draw.sample(things[:3], 2 if draw.random() < 0.5 else 1))
    return Chat(_asked(draw.choice(COPY_PHRASINGS).format(x=said), said, None), skill="copies")


def _asked(question: str, answer: str, reasoning: str | None) -> tuple[dict[str, Any], ...]:
    said = {"role": "assistant", "content": answer}
    return (
        {"role": "user", "content": question},
        said if reasoning is None else {**said, "reasoning_content": reasoning},
    )
