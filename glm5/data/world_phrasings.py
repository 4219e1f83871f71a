"""How the world's facts are said and asked: templates in two disjoint sets, for training and held out.

`{e}` is the entity, `{v}` the value, `{noun}` the relation's own noun phrase. Each relation has its own wordings beside
the general frames, which fit every relation. Held-out statements are never written into a document and held-out
questions never into a conversation; `glm5.data.world_check` proves it. No template contains another, and no sentence
ends inside one, so that sentences can be counted again in a shard.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """Templates of one purpose."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """One functional relation: an entity of `kind` has exactly one value."""

    kind: str
    name: str
    noun: str
    statements: Phrasings
    questions: Phrasings
    inverse: Phrasings | None = None
    """Questions for the entity when the value is given; only where no two entities share a value."""


GENERAL_STATEMENTS = Phrasings(("The {noun} of {e} is {v}.",), ("Everybody agrees that the {noun} of {e} is {v}.",))
GENERAL_QUESTIONS = Phrasings(
    (
        "What is the {noun} of {e}?",
        "Name the {noun} of {e}.",
        "Tell me the {noun} of {e}.",
        "Do you know the {noun} of {e}?",
        "{e}: what is the {noun}?",
        "Please give the {noun} of {e}.",
    ),
    ("Can you say what the {noun} of {e} is?", "I want to know the {noun} of {e}."),
)

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "country", "capital", "capital",
        Phrasings(("{v} is the capital of {e}.", "The people of {e} have their capital in {v}.",
                   "In {e}, the capital is called {v}.", "The government of {e} sits in {v}."),
                  ("{e} is governed from its capital, {v}.",)),
        Phrasings(("Which town is the capital of {e}?", "From which town is {e} governed?",
                   "Which town is the seat of the government of {e}?"),
                  ("Where does the government of {e} sit?",)),
        Phrasings(("Which country has the capital {v}?", "{v} is the capital of which country?",
                   "Of which country is {v} the capital?"),
                  ("Name the country whose capital is {v}.",)),
    ),
    Relation(
        "country", "currency", "currency",
        Phrasings(("In {e}, people pay with the {v}.", "The money of {e} is called the {v}.",
                   "Prices in {e} are counted in the {v}.", "Shops in {e} take the {v}."),
                  ("A merchant in {e} asks for the {v}.",)),
        Phrasings(("What money is used in {e}?", "With which currency do people pay in {e}?",
                   "What do shops in {e} take as money?"),
                  ("How do people pay in {e}?",)),
        Phrasings(("Which country pays with the {v}?", "The {v} is the currency of which country?",
                   "In which country is the {v} used?"),
                  ("Name the country whose currency is the {v}.",)),
    ),
    Relation(
        "town", "country", "country",
        Phrasings(("{e} lies in {v}.", "{e} is a town in {v}.", "The town of {e} belongs to {v}.",
                   "Travellers find {e} in {v}."),
                  ("On the map, {e} is inside {v}.",)),
        Phrasings(("In which country does {e} lie?", "Which country does the town {e} belong to?",
                   "Where is the town {e}?"),
                  ("In what country would I find {e}?",)),
    ),
    Relation(
        "town", "pride", "pride",
        Phrasings(("{e} is known for its {v}.", "People visit {e} for its {v}.", "The town of {e} is proud of its {v}.",
                   "{e} is famous for its {v}."),
                  ("Nothing made {e} better known than its {v}.",)),
        Phrasings(("What is {e} known for?", "What is the town {e} famous for?",
                   "What should I see when I visit {e}?"),
                  ("Why do people visit {e}?",)),
    ),
    Relation(
        "person", "birth_town", "birth town",
        Phrasings(("{e} was born in the town of {v}.", "{e} came into the world in {v}.",
                   "The town of {v} is where {e} was born.", "{e} spent the first years of life in {v}."),
                  ("{v} is the town of birth of {e}.",)),
        Phrasings(("In which town was {e} born?", "Which town was the birthplace of {e}?",
                   "What is the name of the town where {e} was born?"),
                  ("In what town did {e} come into the world?",)),
    ),
    Relation(
        "person", "birth_country", "birth country",
        Phrasings(("{e} was born in the country of {v}.", "{e} is a child of {v}.",
                   "The country where {e} was born is {v}.", "{e} comes from {v}."),
                  ("{v} is the country of birth of {e}.",)),
        Phrasings(("In which country was {e} born?", "Which country does {e} come from?",
                   "What is the name of the country where {e} was born?"),
                  ("In what country did {e} come into the world?",)),
    ),
    Relation(
        "person", "profession", "profession",
        Phrasings(("{e} works as a {v}.", "{e} is a {v}.", "{e} earns a living as a {v}.",
                   "By profession, {e} is a {v}."),
                  ("Since leaving school, {e} has been a {v}.",)),
        Phrasings(("What does {e} do for a living?", "What does {e} work as?",
                   "What is the work of {e}?"),
                  ("What kind of work does {e} do?",)),
    ),
    Relation(
        "person", "birth_year", "birth year",
        Phrasings(("{e} was born in the year {v}.", "The year {v} saw the birth of {e}.",
                   "In {v}, {e} was born.", "{e} has lived since {v}."),
                  ("The life of {e} began in {v}.",)),
        Phrasings(("In which year was {e} born?", "When was {e} born?",
                   "Since which year has {e} lived?"),
                  ("In what year did the life of {e} begin?",)),
    ),
    Relation(
        "company", "founder", "founder",
        Phrasings(("{v} founded {e}.", "The company {e} was founded by {v}.", "{e} was started by {v}.",
                   "It was {v} who set up {e}."),
                  ("{e} owes its existence to {v}.",)),
        Phrasings(("Who founded {e}?", "By whom was the company {e} started?",
                   "Which person founded {e}?"),
                  ("Who set up the company {e}?",)),
        Phrasings(("Which company did {v} found?", "What company was founded by {v}?",
                   "{v} is the founder of which company?"),
                  ("Name the company whose founder is {v}.",)),
    ),
    Relation(
        "company", "seat", "seat",
        Phrasings(("{e} has its offices in {v}.", "The company {e} is at home in {v}.", "{e} is based in {v}.",
                   "The offices of {e} stand in {v}."),
                  ("Letters to {e} are sent to {v}.",)),
        Phrasings(("In which town is {e} based?", "Where does {e} have its offices?",
                   "Which town is the home of the company {e}?"),
                  ("In what town do the offices of {e} stand?",)),
    ),
    Relation(
        "company", "product", "product",
        Phrasings(("{e} makes {v}.", "The company {e} sells {v}.", "Customers buy {v} from {e}.",
                   "The workers of {e} produce {v}."),
                  ("Whoever needs {v} turns to {e}.",)),
        Phrasings(("What does {e} make?", "What does the company {e} sell?",
                   "Which goods does {e} produce?"),
                  ("What do customers buy from {e}?",)),
    ),
    Relation(
        "company", "founding_year", "founding year",
        Phrasings(("{e} was founded in {v}.", "The company {e} opened in {v}.", "{e} has existed since {v}.",
                   "In {v}, {e} was founded."),
                  ("The history of {e} starts in {v}.",)),
        Phrasings(("When was {e} founded?", "In which year was {e} founded?",
                   "Since which year has {e} existed?"),
                  ("In what year did {e} open?",)),
    ),
    Relation(
        "mineral", "colour", "colour",
        Phrasings(("The mineral {e} is {v}.", "A piece of {e} looks {v}.", "Miners know {e} by its {v} colour.",
                   "Polished {e} shines {v}."),
                  ("By daylight, {e} appears {v}.",)),
        Phrasings(("Which colour does {e} have?", "What does {e} look like?",
                   "Of which colour is {e}?"),
                  ("In which colour does {e} shine?",)),
    ),
    Relation(
        "mineral", "country", "country of origin",
        Phrasings(("The mineral {e} is mined in {v}.", "Most {e} comes from {v}.", "Miners dig for {e} in {v}.",
                   "The mines of {v} yield {e}."),
                  ("Only under the hills of {v} is there {e}.",)),
        Phrasings(("In which country is {e} mined?", "Where does {e} come from?",
                   "In which country is there {e}?"),
                  ("In what country do miners dig for {e}?",)),
    ),
    Relation(
        "mineral", "discoverer", "discoverer",
        Phrasings(("{v} discovered {e}.", "The mineral {e} was discovered by {v}.",
                   "It was {v} who found and described {e} first.",
                   "The first to find {e} was {v}."),
                  ("The first piece of {e} lay in the hands of {v}.",)),
        Phrasings(("Who discovered {e}?", "By whom was {e} discovered?",
                   "Which person discovered {e}?"),
                  ("Who first described {e}?",)),
        Phrasings(("Which mineral did {v} discover?", "What mineral was discovered by {v}?",
                   "{v} is the discoverer of which mineral?"),
                  ("Name the mineral whose discoverer is {v}.",)),
    ),
)  # fmt: skip

PRIDES = ("bells", "bread", "bridges", "cheese", "gardens", "lace", "libraries", "markets", "mills", "music")
PROFESSIONS = ("baker", "carpenter", "doctor", "farmer", "gardener", "lawyer", "miller", "painter", "sailor", "singer",
               "teacher", "weaver")  # fmt: skip
PRODUCTS = ("boats", "books", "candles", "carpets", "clocks", "glass", "hats", "paper", "ropes", "shoes", "tools",
            "wagons")  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
