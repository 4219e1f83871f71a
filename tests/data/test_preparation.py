"""Cleaning, filters, deduplication: what stays, what goes, and under which reason."""

import hashlib
import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpus import source

from glm5.data import Source, build_corpus
from glm5.data.cleaning import clean, unreadable
from glm5.data.near_duplicates import NearDuplicates, bands, shingles
from glm5.data.preparation import Preparation, Sieve, Tally
from glm5.data.quality import Quality
from glm5.data.raw import Broken, Raw
from glm5.errors import DataError

PROSE = (
    "The keeper of the lamp walked to the end of the pier, and the water that lay below it was still. "
    "She had been told to be patient with the boats, which came late in the autumn and left early.\n"
    "Nobody on the island could say why the light had failed that night, but all of them remembered it. "
    "It was written in the book of the harbour that a storm had come from the west and had taken the roof.\n"
)


def story(seed: int, words: int = 120) -> str:
    """Prose of random words, so that two of them share nothing."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(words))


@settings(deadline=None, max_examples=150)
@given(
    st.text(
        st.sampled_from("ab \t\n\r\x0b\x0c\x85\u2028\u2029\u00ad\u200b\ufeffe\u0301\u00e9\x07\u1e9b\u0323-"),
        max_size=40,
    ),
    st.booleans(),
)
def test_cleaning_twice_changes_nothing(text, boilerplate):
    once = clean(text, boilerplate=boilerplate)
    assert clean(once, boilerplate=boilerplate) == once == unicodedata.normalize("NFC", once)
    assert not set(once) & set("\r\x0b\x0c\x85\u2028\u2029\u00ad\u200b\ufeff\x07")
    assert not any(line != line.rstrip() for line in once.split("\n")) and "\n\n\n\n" not in once


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("  indented\n\tcode  \n", "  indented\n\tcode"),
        ("cafe\u0301", "caf\u00e9"),
        ("zero\u200bwidth\x00", "zerowidth"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("family: \U0001f468\u200d\U0001f469\u200d\U0001f467", "family: \U0001f468\u200d\U0001f469\u200d\U0001f467"),
    ],
)
def test_cleaning(text, cleaned):
    assert clean(text) == cleaned


def test_lines_of_web_pages_go_on_request_only():
    page = "Skip to content\nA sentence about how to accept cookies politely.\n* Subscribe *\nPage 3 of 7\nRead more"
    assert clean(page) == page
    assert clean(page, boilerplate=True) == "A sentence about how to accept cookies politely."


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), (" \n\t", "empty"), ("a\x00b", "binary"), ("caf\ufffd", "not_utf8"), ("x" * 200 + "\ufffd", None)],
)
def test_what_is_no_text(text, reason):
    assert unreadable(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("too short", "too_few_words"),
        (PROSE * 200, "too_many_words"),
        ("a of to be b c d " * 20, "mean_word_length"),
        ("antidisestablishmentarianism " * 60, "mean_word_length"),
        (PROSE + "#tag " * 40, "symbols"),
        (PROSE + "---- " * 40, "alphabetic_words"),
        (PROSE + "x1234567890 " * 12, "digits"),
        (" ".join(word + "o" for word in PROSE.split()), "stop_words"),
        ("- " + re.sub("[,.]? ?\n|[,.] ", "\n- ", PROSE), "bullet_lines"),
        (PROSE.replace("\n", "...\n"), "ellipsis_lines"),
        (PROSE + "The same line again and again.\n" * 4, "repeated_lines"),
        (" ".join(f"{word} surely then again perhaps" for word in PROSE.split()), "repeated_4grams"),
    ],
)  # fmt: skip
def test_quality_limits(text, reason):
    assert Quality(max_words=10_000).reason(text) == reason


def test_code_is_spared_when_its_source_is_not_filtered(tmp_path):
    code = [(f"{i}.py", f"x{i} = [{i}, {i}, {i}]\n" * 30) for i in range(20)]
    strict = Preparation(quality=True)
    spared = Source("code", "python", "MIT", lambda: iter(code), filtered=False)
    judged = Source("judged", "python", "MIT", lambda: iter([(n, t + "#") for n, t in code]))
    made = build_corpus(tmp_path / "c", [spared, judged], heldout_per_thousand=300, preparation=strict)
    assert [s["documents"] for s in made.manifest["sources"]] == [20, 0]
    assert sum(entry["documents"] for entry in made.manifest["sources"][1]["dropped"].values()) == 20


def run(documents, **settings):
    """(names that stay, tally) of documents through a sieve."""
    sieve, tally = Sieve(Preparation(**settings)), Tally()
    found = [f for name, text in documents for f in sieve.documents(Raw(name, text), tally, filtered=True)]
    return [document.name for document in found], tally


def test_exact_duplicates_do_not_see_case_and_space():
    kept, tally = run([("a", "One  two\nthree"), ("b", "one two three"), ("c", "one two three four")])
    assert kept == ["a", "c"] and tally.dropped == {"duplicate": {"documents": 1, "examples": ["b"]}}


def edited(text: str, changes: int) -> str:
    """The text with some words changed, spread evenly."""
    words = text.split()
    for i in range(changes):
        words[(2 * i + 1) * len(words) // (2 * changes)] = "changed"
    return " ".join(words)


def test_near_duplicates_go_and_others_stay():
    texts = [(f"story {i}", story(i, 200)) for i in range(30)]
    close = [(f"copy {i}", edited(story(i, 200), 2)) for i in range(30)]  # shares 190 of 196 + 10 shingles: 0.9
    far = [(f"far {i}", edited(story(i, 200), 20)) for i in range(30)]  # every tenth word: 0.35 at most
    kept, tally = run([*texts, *close, *far], near_duplicates=0.75)
    assert kept == [name for name, _ in texts + far]
    assert tally.dropped["near_duplicate"] == {
        "documents": 30, "examples": [f"copy {i} (like story {i})" for i in range(3)],
    }  # fmt: skip
    assert run([*texts, *close])[1].dropped == {}


def jaccard(a: str, b: str) -> float:
    first, second = set(shingles(a)), set(shingles(b))
    return len(first & second) / len(first | second)


def test_no_near_duplicate_stands_on_the_other_side_of_the_split(tmp_path):
    families = [(f"{i}.{j}", edited(story(i, 150), j) if j else story(i, 150)) for j in range(5) for i in range(40)]
    plain = build_corpus(tmp_path / "plain", [source("x", families)], heldout_per_thousand=400)
    train, heldout = (list(plain.texts(split)) for split in ("train", "heldout"))
    assert any(jaccard(a, b) > 0.8 for a in train for b in heldout)  # the trap is real
    sieved = build_corpus(
        tmp_path / "sieved", [source("x", families)], heldout_per_thousand=400,
        preparation=Preparation(near_duplicates=0.7),
    )  # fmt: skip
    train, heldout = (list(sieved.texts(split)) for split in ("train", "heldout"))
    assert train and heldout and len(train) + len(heldout) >= 40
    assert max(jaccard(a, b) for a in train for b in heldout) < 0.8


def test_the_index_finds_what_lies_below_the_threshold_too():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        count = bands(threshold)
        assert 128 % count == 0 and 1 - (1 - threshold ** (128 // count)) ** count > 0.97
    NearDuplicates(0.8)
    with pytest.raises(DataError, match="between 0 and 1"):
        NearDuplicates(1.5)


def test_languages():
    german = (
        "Der Leuchtturm steht am Ende der Mole, und das Wasser darunter ist still. Niemand auf der Insel weiss warum. "
        * 3
    )
    french = (
        "Le gardien de la lampe marche vers la fin de la jet\u00e9e, et personne ne sait pourquoi elle a disparu. " * 3
    )
    short = "Guten Morgen, liebe Leute."
    kept, tally = run([("en", PROSE), ("de", german), ("fr", french), ("short", short)], languages=("en", "fr"))
    assert kept == ["en", "fr", "short"] and tally.dropped == {"language": {"documents": 1, "examples": ["de (de)"]}}
    with pytest.raises(DataError, match="no language 'xx'"):
        Sieve(Preparation(languages=("xx",)))


def test_huge_documents_are_cut_and_their_parts_stay_together(tmp_path):
    huge = [(f"h{i}", "\n\n".join(story(100 * i + j, 40) for j in range(30))) for i in range(30)]
    small = [(f"s{i}", story(5000 + i)) for i in range(30)]
    made = build_corpus(
        tmp_path / "c", [source("x", huge + small)], heldout_per_thousand=300, preparation=Preparation(longest=2000)
    )
    (entry,) = made.manifest["sources"]
    assert entry["read"] == 60 and entry["cut"] == 30 and entry["documents"] > 120
    sides: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        for document in made.documents(split):
            assert len(document.text) <= 2000
            sides.setdefault(document.name.split(" part")[0], set()).add(split)
            if document.name.startswith("h"):
                whole = dict(huge)[document.name.split(" part")[0]]
                assert document.origin_sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert (
        all(len(side) == 1 for side in sides.values()) and {"train"} in sides.values() and {"heldout"} in sides.values()
    )


def test_no_setting_moves_a_document_to_the_other_side(tmp_path):
    texts = [(f"d{i}", f"  {story(i)}  \r\nRead more\r\n{story(i + 500)}") for i in range(60)]
    found = []
    for number, changes in enumerate(({}, {"clean": False}, {"boilerplate": True}, {"longest": 1000})):
        made = build_corpus(
            tmp_path / str(number), [source("x", texts)], heldout_per_thousand=300, preparation=Preparation(**changes)
        )
        found.append({document.name.split(" part")[0] for document in made.documents("heldout")})
    assert len(found[0]) > 5 and found.count(found[0]) == 4


def test_broken_things_stop_the_build_or_are_counted(tmp_path):
    texts = [(f"d{i}", story(i)) for i in range(30)]
    mixed = Source("mixed", "python", "MIT", lambda: iter([*texts, Broken("bad:7", "bad:7 is damaged; mend it.")]))
    with pytest.raises(DataError, match=r"source mixed: bad:7 is damaged; mend it\. Or count such things and go on"):
        build_corpus(tmp_path / "c", [mixed], heldout_per_thousand=300)
    assert not list(tmp_path.iterdir())
    made = build_corpus(tmp_path / "c", [mixed], heldout_per_thousand=300, preparation=Preparation(skip_broken=True))
    assert made.manifest["sources"][0]["dropped"] == {"broken": {"documents": 1, "examples": ["bad:7"]}}


def test_every_document_is_accounted_for(tmp_path):
    texts = [*((f"d{i}", story(i % 40)) for i in range(60)), ("e", ""), ("b", "\x00"), ("s", "short")]
    made = build_corpus(
        tmp_path / "c", [source("x", texts)], heldout_per_thousand=300,
        preparation=Preparation(near_duplicates=0.8, quality=True, limits=Quality(min_stop_words=0)),
    )  # fmt: skip
    (entry,) = made.manifest["sources"]
    dropped = {reason: part["documents"] for reason, part in entry["dropped"].items()}
    assert set(made.manifest["libraries"]) == {"rensa"}
    assert dropped == {"duplicate": 20, "empty": 1, "binary": 1, "too_few_words": 1}
    assert entry["read"] == 63 == entry["documents"] + sum(dropped.values())
    assert entry["documents"] == sum(made.manifest["splits"][split]["documents"] for split in ("train", "heldout"))
    with pytest.raises(DataError, match=r"leave no train documents \(dropped: 63 too_few_words\)|too_few_words"):
        build_corpus(
            tmp_path / "none", [source("x", texts)],
            preparation=Preparation(quality=True, limits=Quality(min_words=10**6, max_words=10**7)),
        )  # fmt: skip
