"""The closed world of facts: invented countries, towns, people, companies and minerals whose facts are all known.

Because the world is invented, what a model knows of it can only come from the text that was made from it. Every entity
has an **exposure**: the number of sentences that state each of its facts in the pre-training text (0, 1, 4, 16 or 64,
equally many entities of each kind in each bucket). Exposure 0 is the never-taught part: its names appear nowhere, and
only evaluations ask about it. The rest is the taught part; `practised` facts may also be asked about in conversations
that train a model, the others show what was learned from text alone.

Relations are functions and agree with each other: a capital lies in its country, a person's birth country is the
country of the birth town, a founder was at least twenty when the company opened. A taught entity never has a
never-taught one as a value, so no name leaks. The same config gives the same world. Reference: Allen-Zhu and Li 2023,
"Physics of language models, part 3.1" (many phrasings of each fact; questions about a part of the entities only).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from glm5.data.corpus import is_held_out
from glm5.data.world_names import NameDrawer
from glm5.data.world_phrasings import COLOURS, PRIDES, PRODUCTS, PROFESSIONS, RELATIONS, Relation
from glm5.errors import ConfigError

EXPOSURES = (0, 1, 4, 16, 64)
SHARES = {"country": 2, "town": 4, "person": 8, "company": 3, "mineral": 3}
"""Entities of each kind in twenty."""
NOT_PRACTISED_PER_THOUSAND = 125
BIRTH_YEARS, FOUNDING_YEARS = (1801, 1860), (1881, 1940)

Part = Literal["taught", "never_taught"]


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What a world depends on."""

    entities: int = 100
    """Invented entities that have facts, a multiple of 100 (currencies are names too, but have no facts)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.entities < 100 or self.entities % 100:
            raise ConfigError(f"entities is {self.entities}; give a multiple of 100, so that all buckets are equal.")


@dataclass(frozen=True)
class Entity:
    """One invented thing."""

    kind: str
    name: str
    exposure: int

    @property
    def key(self) -> str:
        """The one word that no other entity's name contains: a family name, or the whole name."""
        return self.name.split()[-1]


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `value`."""

    id: str
    entity: Entity
    relation: Relation
    value: str
    aliases: tuple[str, ...]
    """Other answers that are right."""
    practised: bool
    """Whether conversations that train a model may ask for it; never for the never-taught part."""

    @property
    def exposure(self) -> int:
        """Sentences that state it in the pre-training text."""
        return self.entity.exposure

    @property
    def part(self) -> Part:
        return "taught" if self.exposure else "never_taught"


@dataclass(frozen=True)
class World:
    """All entities and facts; `build_world` makes one."""

    config: WorldConfig
    entities: tuple[Entity, ...]
    currencies: tuple[str, ...]
    facts: tuple[Fact, ...]

    def part(self, part: Part) -> Iterator[Fact]:
        """The facts of the taught or of the never-taught part."""
        return (fact for fact in self.facts if fact.part == part)

    def practised(self) -> Iterator[Fact]:
        """The facts that conversations may train."""
        return (fact for fact in self.facts if fact.practised)

    def value(self, name: str, relation: str) -> str:
        """The value of a relation of the entity with that name; KeyError when there is none."""
        return self._values[name, relation]

    def of(self, kind: str, *, taught: bool = True) -> list[Entity]:
        """The entities of one kind, of the taught or of the never-taught part."""
        return [entity for entity in self.entities if entity.kind == kind and bool(entity.exposure) == taught]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every word that only this world uses, in lower case: the key of each entity, and the currencies."""
        return frozenset(word.casefold() for word in [*(entity.key for entity in self.entities), *self.currencies])

    @cached_property
    def _values(self) -> dict[tuple[str, str], str]:
        return {(fact.entity.name, fact.relation.name): fact.value for fact in self.facts}


def build_world(config: WorldConfig | None = None) -> World:
    """The world of a config: names first, then the relations that make its geography, then the rest."""
    config = config or WorldConfig()
    names = NameDrawer(f"world {config.seed}", avoid=_common_words())
    entities: dict[str, list[Entity]] = {}
    for kind, share in SHARES.items():
        count = config.entities * share // 20
        # The bucket goes round with the index, in every kind: partners of equal index have equal exposure.
        entities[kind] = [
            Entity(kind, names.person() if kind == "person" else names.name(kind), EXPOSURES[i % len(EXPOSURES)])
            for i in range(count)
        ]
    currencies = tuple(names.name("currency") for _ in entities["country"])
    values = _values(entities, currencies, random.Random(f"world {config.seed} facts"))
    facts = []
    for entity in (entity for kind in entities.values() for entity in kind):
        # By entity, not by fact: what conversations do not practise, they do not mention.
        digest = hashlib.sha256(f"{config.seed} {entity.name}".encode()).hexdigest()
        practised = bool(entity.exposure) and not is_held_out(digest, NOT_PRACTISED_PER_THOUSAND)
        for relation in RELATIONS:
            if relation.kind == entity.kind:
                value = values[entity.name, relation.name]
                facts.append(
                    Fact(
                        f"{entity.name}/{relation.name}", entity, relation, value, _aliases(value, relation), practised
                    )
                )
    return World(config, tuple(entity for kind in entities.values() for entity in kind), currencies, tuple(facts))


def _values(
    entities: dict[str, list[Entity]], currencies: tuple[str, ...], draw: random.Random
) -> dict[tuple[str, str], str]:
    """(name, relation) to value."""
    values: dict[tuple[str, str], str] = {}
    countries, towns, people = entities["country"], entities["town"], entities["person"]
    taught_countries = [country for country in countries if country.exposure]
    taught_towns = [town for town in towns if town.exposure]
    for i, country in enumerate(countries):
        values[country.name, "capital"] = towns[i].name
        values[country.name, "currency"] = currencies[i]
    for i, town in enumerate(towns):
        home = countries[i] if i < len(countries) else draw.choice(taught_countries)
        values[town.name, "country"] = home.name
        values[town.name, "pride"] = draw.choice(PRIDES)
    for person in people:
        town = draw.choice(taught_towns)
        values[person.name, "birth_town"] = town.name
        values[person.name, "birth_country"] = values[town.name, "country"]
        values[person.name, "profession"] = draw.choice(PROFESSIONS)
        values[person.name, "birth_year"] = str(draw.randint(*BIRTH_YEARS))
    for i, company in enumerate(entities["company"]):
        values[company.name, "founder"] = people[i].name
        values[company.name, "seat"] = draw.choice(taught_towns).name
        values[company.name, "product"] = draw.choice(PRODUCTS)
        values[company.name, "founding_year"] = str(draw.randint(*FOUNDING_YEARS))
    for i, mineral in enumerate(entities["mineral"], len(entities["company"])):
        values[mineral.name, "discoverer"] = people[i].name
        values[mineral.name, "country"] = draw.choice(taught_countries).name
        values[mineral.name, "colour"] = draw.choice(COLOURS)
    return values


def _aliases(value: str, relation: Relation) -> tuple[str, ...]:
    """The family name alone is a right answer; so is a word with its article."""
    if relation.name in ("founder", "discoverer"):
        return (value.split()[-1],)
    articles = {"currency": "the", "profession": "a"}
    return (f"{articles[relation.name]} {value}",) if relation.name in articles else ()


def _common_words() -> set[str]:
    """The closed sets of values, which no name may repeat."""
    return {*PRIDES, *PROFESSIONS, *PRODUCTS, *COLOURS}
