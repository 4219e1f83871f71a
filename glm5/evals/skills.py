"""Skills measured on what was never trained: `glm5 eval DIR --suite skills --world WORLD`.

| group | what is asked | right when |
|---|---|---|
| facts | taught facts in held-out wordings, by exposure; not practised ones; train wordings | the value or an alias |
| sums | sums with a number that no training problem adds; sums of trained numbers for comparison | the number |
| tools | held-out wordings, numbers and names | one call, valid under the schema; the right tool; the right arguments |
| unknown | strangers, relations that an entity lacks, never-taught entities of the world | "I don't know" |
| known | the held-out questions about facts again | *not* "I don't know" |
| stops | every answer of all groups | it ends by itself within the limit |

Beside the facts stands the best constant answer per relation, which needs no knowledge. All is greedy and a function of
the config. The bars are what `recipes/nano.py` has to meet after `sft`.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from glm5.data.addition import Sum, sums
from glm5.data.corpus import Split
from glm5.data.instruct import Strangers
from glm5.data.tool_chats import ToolRequest, ToolRequests
from glm5.data.tools import problem_with
from glm5.data.world import EXPOSURES, Fact, World
from glm5.data.world_text import Question, questions
from glm5.engine import Engine, SamplingParams
from glm5.errors import ConfigError, InputError
from glm5.files import replacing, write_json
from glm5.scoring import Accuracy, abstains, grade_exact, grade_number, proportion
from glm5.text import parse_assistant

Message = Mapping[str, Any]
BARS = {
    "facts, held-out wording": 0.8,
    "sums, unseen numbers": 0.8,
    "tools, well-formed call": 0.9,
    "stops by itself": 0.95,
}


@dataclass(frozen=True, kw_only=True)
class SkillsConfig:
    """How much is asked."""

    facts: int = 240
    """Questions about facts, in each of the groups of facts."""
    sums: int = 100
    """Questions with numbers."""
    tools: int = 50
    """Questions that need a tool call."""
    unknown: int = 60
    """Questions in each of the groups that are not facts."""
    digits: int = 2
    """Most digits of a number that is added."""
    max_tokens: int = 64
    """Of one answer."""
    thinking_facts: bool = False
    """Let the model reason before it answers about facts."""
    seed: int = 1_000_003
    """Of the questions; an instruct set uses small seeds."""

    def __post_init__(self) -> None:
        for name in ("facts", "sums", "tools", "unknown", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; ask at least one question.")


@dataclass(frozen=True)
class Asked:
    """One prompt, how its answer is judged, and the groups that each judgement counts for."""

    question: str
    expected: str
    judge: Callable[[Message], dict[str, bool]]
    """From the parsed answer to (group, whether it is right) pairs."""
    thinking: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Skill:
    """One line of the result."""

    name: str
    share: Accuracy
    bar: float | None = None
    """What the share has to reach; None where nothing is demanded."""

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.share.value >= self.bar


@dataclass(frozen=True)
class SkillsResult:
    """All skills of one model, in a fixed order."""

    config: SkillsConfig
    skills: tuple[Skill, ...]
    best_constant: float
    """Share of the held-out questions about facts that the commonest value of each relation answers."""

    @property
    def met(self) -> bool:
        """Whether every bar is met."""
        return all(skill.met is not False for skill in self.skills)

    def __getitem__(self, name: str) -> Accuracy:
        return next(skill.share for skill in self.skills if skill.name == name)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        lines = [
            {"name": skill.name, **asdict(skill.share), "value": None if math.isnan(v := skill.share.value) else v,
             "bar": skill.bar, "met": skill.met}
            for skill in self.skills
        ]  # fmt: skip
        return {"kind": "skills", "met": self.met, "config": asdict(self.config),
                "best_constant": self.best_constant, "skills": lines}  # fmt: skip


def evaluate_skills(
    engine: Engine, world: World, config: SkillsConfig | None = None
) -> tuple[SkillsResult, list[dict[str, Any]]]:
    """Asks everything once, greedily; gives the result and one record per answer."""
    config = config or SkillsConfig()
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InputError("The skills are asked in words; give a model directory that holds a tokenizer.")
    asked = [*_about_facts(world, config), *_about_sums(config), *_about_tools(world, config), *_unknown(world, config)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one.question}], one.tools, enable_thinking=one.thinking, escape_special=True
        )
        for one in asked
    ]
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=config.max_tokens, seed=0))
    tally: dict[str, list[bool]] = {}
    records = []
    for one, output in zip(asked, outputs, strict=True):
        message = parse_assistant(output.text, tools=one.tools, thinking=one.thinking)
        judged = one.judge(message) | {"stops by itself": output.finish_reason == "stop"}
        for group, right in judged.items():
            tally.setdefault(group, []).append(right)
        records.append({"question": one.question, "expected": one.expected, "text": output.text, "judged": judged})
    skills = tuple(Skill(name, proportion(sum(found), len(found)), BARS.get(name)) for name, found in tally.items())
    return SkillsResult(config, skills, _best_constant(world)), records


def write_skills(directory: Path, result: SkillsResult, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes `result.json` and `samples.jsonl` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "samples.jsonl") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    write_json(directory / "result.json", result.to_json())


def _about_facts(world: World, config: SkillsConfig) -> Iterator[Asked]:
    practised = list(world.practised())
    reserved = [fact for fact in world.part("taught") if not fact.practised]
    yield from _fact_group("facts, held-out wording", practised, "heldout", config, by_exposure=True)
    yield from _fact_group("facts, train wording", practised, "train", config)
    yield from _fact_group("facts, not practised", reserved, "heldout", config, by_exposure=True)


def _fact_group(
    group: str, facts: list[Fact], phrasing: Split, config: SkillsConfig, *, by_exposure: bool = False
) -> Iterator[Asked]:
    """Questions in equal numbers for each exposure, chosen by the seed."""
    draw = random.Random(f"skills {config.seed} {group}")
    each = max(1, config.facts // (len(EXPOSURES) - 1))
    for exposure in EXPOSURES[1:]:
        pool = [question for fact in facts if fact.exposure == exposure for question in questions(fact, phrasing)]
        for question in draw.sample(pool, min(each, len(pool))):
            groups = [group, *([f"{group}, exposure {exposure}"] if by_exposure else [])]
            if by_exposure and question.direction == "inverse":
                groups.append(f"{group}, inverse")
            known = "known, answered" if phrasing == "heldout" and question.fact.practised else None
            yield Asked(question.text, question.answer, _fact_judge(question, groups, known), config.thinking_facts)


def _fact_judge(question: Question, groups: list[str], known: str | None) -> Callable[[Message], dict[str, bool]]:
    def judge(message: Message) -> dict[str, bool]:
        content = message.get("content") or ""
        right = any(grade_exact(content, answer).correct for answer in (question.answer, *question.aliases))
        return dict.fromkeys(groups, right) | ({} if known is None else {known: not abstains(content)})

    return judge


def _about_sums(config: SkillsConfig) -> Iterator[Asked]:
    splits: tuple[tuple[Split, str], ...] = (("heldout", "sums, unseen numbers"), ("train", "sums, trained numbers"))
    for split, group in splits:
        for one in islice(sums(config.seed, split=split, digits=config.digits), config.sums):
            yield Asked(one.question, one.answer, _sum_judge(one, group), thinking=True)


def _sum_judge(one: Sum, group: str) -> Callable[[Message], dict[str, bool]]:
    return lambda message: {group: grade_number(message.get("content") or "", one.answer).correct}


def _about_tools(world: World, config: SkillsConfig) -> Iterator[Asked]:
    requests = ToolRequests(config.seed, [town.name for town in world.of("town")], "heldout")
    for _ in range(config.tools):
        request = requests.request()
        expected = json.dumps({"name": request.name, "arguments": request.arguments}, ensure_ascii=False)
        yield Asked(request.question, expected, _tool_judge(request), tools=request.tools)


def _tool_judge(request: ToolRequest) -> Callable[[Message], dict[str, bool]]:
    offered = {tool["function"]["name"]: tool for tool in request.tools}

    def judge(message: Message) -> dict[str, bool]:
        calls = [call["function"] for call in message.get("tool_calls") or []]
        name = calls[0]["name"] if len(calls) == 1 else ""
        arguments = json.loads(calls[0]["arguments"]) if name in offered else None
        valid = name in offered and problem_with(offered[name], arguments) is None
        return {
            "tools, well-formed call": valid,
            "tools, right tool": name == request.name,
            "tools, right arguments": name == request.name and arguments == request.arguments,
        }

    return judge


def _unknown(world: World, config: SkillsConfig) -> Iterator[Asked]:
    strangers = Strangers(world, config.seed, "heldout")
    draw = random.Random(f"skills {config.seed} never taught")
    never = [q for fact in world.part("never_taught") for q in questions(fact, "heldout") if q.direction == "forward"]
    texts = {
        "unknown, strangers": [strangers.stranger()[0] for _ in range(config.unknown)],
        "unknown, missing relation": [strangers.missing()[0] for _ in range(config.unknown)],
        "unknown, never taught": [q.text for q in draw.sample(never, min(config.unknown, len(never)))],
    }
    for group, asked in texts.items():
        for text in asked:
            yield Asked(text, "I don't know.", _abstention_judge(group), config.thinking_facts)


def _abstention_judge(group: str) -> Callable[[Message], dict[str, bool]]:
    return lambda message: {group: abstains(message.get("content") or "")}


def _best_constant(world: World) -> float:
    """Share of practised facts whose value is the commonest one of their relation."""
    values: dict[str, Counter[str]] = {}
    for fact in world.practised():
        values.setdefault(f"{fact.entity.kind} {fact.relation.name}", Counter())[fact.value] += 1
    return sum(max(counts.values()) for counts in values.values()) / sum(map(Counter.total, values.values()))
