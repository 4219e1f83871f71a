"""The closed world: consistent, reproducible, equally exposed; and a check that notices every kind of leak."""

import json
from collections import Counter

import pytest

from glm5.cli.data_world import WorldOptions
from glm5.cli.data_world import world as world_verb
from glm5.data import TokenDocument, chat_documents, write_dataset
from glm5.data.world import EXPOSURES, WorldConfig, build_world
from glm5.data.world_check import check_texts, check_world, require_clean
from glm5.data.world_text import documents, open_world, questions, statements, world_dataset, write_world
from glm5.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def world():
    return build_world(WorldConfig(seed=3))


@pytest.fixture(scope="module")
def directory(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "world"
    write_world(world, path)
    return path


@pytest.fixture(scope="module")
def text(world, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("world-tokens") / "train"
    world_dataset(world, tokenizer, path)
    return path


def test_the_same_config_gives_the_same_world_and_another_seed_another(world):
    again, other = build_world(WorldConfig(seed=3)), build_world(WorldConfig(seed=4))
    assert again == world and list(documents(again)) == list(documents(world))
    assert not {entity.name for entity in world.entities} & {entity.name for entity in other.entities}


@pytest.mark.parametrize("entities", [100, 300])
def test_buckets_are_equal_in_every_kind(entities):
    world = build_world(WorldConfig(entities=entities))
    assert len(world.entities) == entities
    for kind in {entity.kind for entity in world.entities}:
        counts = Counter(entity.exposure for entity in world.entities if entity.kind == kind)
        assert set(counts) == set(EXPOSURES) and len(set(counts.values())) == 1
    counts = Counter(fact.exposure for fact in world.facts)
    assert len(set(counts.values())) == 1


def test_relations_agree_with_each_other(world):
    for entity in world.entities:
        if entity.kind == "country":
            assert world.value(world.value(entity.name, "capital"), "country") == entity.name
        if entity.kind == "person":
            town = world.value(entity.name, "birth_town")
            assert world.value(entity.name, "birth_country") == world.value(town, "country")
        if entity.kind == "company":
            founder = world.value(entity.name, "founder")
            age = int(world.value(entity.name, "founding_year")) - int(world.value(founder, "birth_year"))
            assert age >= 20
    functional = Counter((fact.entity.name, fact.relation.name) for fact in world.facts)
    assert set(functional.values()) == {1}
    for fact in world.facts:  # an inverse question has one answer
        if fact.relation.inverse is not None:
            same = [f for f in world.facts if (f.relation, f.value) == (fact.relation, fact.value)]
            assert same == [fact]


def test_names_are_unique_words_and_none_is_part_of_another(world):
    keys = [*(entity.key.casefold() for entity in world.entities), *world.currencies]
    assert len(set(keys)) == len(keys) == 100 + 10
    assert not [(a, b) for a in keys for b in keys if a != b and a in b]


def test_the_text_states_each_fact_as_often_as_declared_and_names_no_one_else(world):
    made = list(documents(world))
    sentences = Counter(sentence for text in made for sentence in text.replace(". ", ".\n").split("\n"))
    for fact in world.facts:
        assert sum(sentences[wording] for wording in statements(fact)) == fact.exposure
    assert sum(sentences.values()) == sum(fact.exposure for fact in world.facts)
    whole = "\n".join(made)
    assert not [entity.name for entity in world.entities if not entity.exposure and entity.key in whole]


def test_the_two_sets_of_wordings_are_disjoint(world):
    for fact in world.facts:
        assert not set(statements(fact)) & set(statements(fact, "heldout"))
        train, heldout = ({q.text for q in questions(fact, phrasing)} for phrasing in ("train", "heldout"))
        assert len(train) >= 8 and len(heldout) >= 3 and not train & heldout
        assert all(fact.entity.name in q.text for q in questions(fact, "heldout") if q.direction == "forward")
        assert all(q.answer == fact.entity.name for q in questions(fact, "train") if q.direction == "inverse")
        assert fact.practised <= bool(fact.exposure)


def test_written_and_opened_is_the_same_world(world, directory):
    assert open_world(directory) == world
    lines = [json.loads(line) for line in (directory / "facts.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [fact.value for fact in world.facts]
    asked = [json.loads(line) for line in (directory / "questions.jsonl").read_text().splitlines()]
    assert {line["phrasing"] for line in asked} == {"train", "heldout"}


def test_clean_data_pass(world, text, dataset, tokenizer):
    found = check_world(world, [text, dataset.directory], tokenizer)
    assert found.ok and found.exposures_checked and found.mentions < found.documents
    assert {e: (s["fewest"], s["most"]) for e, s in found.stated.items()} == {e: (e, e) for e in EXPOSURES}
    assert require_clean(world, [text], tokenizer).ok


def planted(kind, world):
    """A text that must not be in the data."""
    taught = next(fact for fact in world.practised() if fact.relation.name == "capital")
    never = next(world.part("never_taught"))
    reserved = next(fact for fact in world.part("taught") if not fact.practised)
    return {
        "name": f"A letter to {never.entity.name}.",
        "key": f"a letter to {never.entity.key.upper()}!",
        "question": questions(taught, "heldout")[0].text,
        "inverse question": next(q.text for q in questions(taught, "heldout") if q.direction == "inverse"),
        "hidden in case and spacing": "x\n" + questions(taught, "heldout")[1].text.upper().replace(" ", "  "),
        "statement": statements(taught, "heldout")[0],
        "reserved question": questions(reserved, "train")[0].text,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["name", "key", "question", "inverse question", "hidden in case and spacing", "statement", "reserved question"],
)
def test_a_planted_leak_is_found_in_text_and_in_chats(kind, world, text, tokenizer, tmp_path):
    leak = planted(kind, world)
    ids = tokenizer.encode(leak, allow_special=False)
    write_dataset(tmp_path / "plain", [TokenDocument([0, *ids, 0], len(leak))], tokenizer)
    chat = [{"role": "user", "content": leak}, {"role": "assistant", "content": "Yes."}]
    write_dataset(tmp_path / "chat", chat_documents([chat], tokenizer), tokenizer)
    for place in ("plain", "chat"):
        found = check_world(world, [text, tmp_path / place], tokenizer)
        assert len(found.leaks) >= 1 and f"{tmp_path / place} document 0" in found.leaks[0]
        with pytest.raises(DataError, match="the world leaked"):
            require_clean(world, [text, tmp_path / place], tokenizer)


def test_a_sentence_too_few_or_too_many_is_found(world):
    made = list(documents(world))
    fact = next(fact for fact in world.part("taught") if fact.exposure == 16)
    more = check_texts(world, [("text", t, True) for t in [*made, statements(fact)[0]]])
    assert more.leaks == [f"the text states {fact.id} 17 times instead of 16"]
    fewer = check_texts(world, [("text", t, True) for t in made[1:]])
    assert fewer.leaks and all("times instead of" in leak for leak in fewer.leaks)
    assert not check_texts(world, [("a chat", statements(fact)[0], False)]).exposures_checked


def test_the_verb_builds_refuses_and_checks(world, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    options = {"out": tmp_path / "world", "seed": 3, "tokenizer": tmp_path / "tokenizer"}
    assert world_verb(WorldOptions(**options)) == 0
    assert open_world(tmp_path / "world") == world
    with pytest.raises(DataError, match="--overwrite"):
        world_verb(WorldOptions(**options))
    assert world_verb(WorldOptions(**options, check=(tmp_path / "world" / "train",), json=True)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True
    leak = planted("name", world)
    write_dataset(tmp_path / "bad", [TokenDocument([0, *tokenizer.encode(leak), 0], len(leak))], tokenizer)
    assert world_verb(WorldOptions(**options, check=(tmp_path / "world" / "train", tmp_path / "bad"))) == 1
    assert "LEAK" in capsys.readouterr().out
    with pytest.raises(DataError, match="give their --tokenizer"):
        world_verb(WorldOptions(out=tmp_path / "world", check=(tmp_path / "bad",)))


def test_refusals(directory, tmp_path):
    with pytest.raises(ConfigError, match="a multiple of 100"):
        WorldConfig(entities=130)
    facts = directory / "facts.jsonl"
    original = facts.read_text()
    try:
        facts.write_text(original.replace("taught", "tought", 1))
        with pytest.raises(DataError, match="does not match the manifest"):
            open_world(directory)
    finally:
        facts.write_text(original)
