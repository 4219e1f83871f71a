"""Stop strings over any split of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.engine import SamplingParams
from glm5.engine.stop_strings import StopStrings
from glm5.errors import InputError


def run(pieces, stops, *, include=False, begin=()):
    matcher = StopStrings(tuple(stops), include=include, begin=tuple(begin))
    text = ""
    for piece in pieces:
        new, stop = matcher.feed(piece)
        text += new
        if stop is not None:
            return text, stop
    return text + matcher.finish(), None


@given(
    st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.booleans(), st.data()
)
def test_any_split_gives_the_same_text_and_stop(text, stops, include, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, stops, include=include) == run(list(text), stops, include=include)
    found, stop = run(pieces, stops)
    assert (stop is not None) == any(s in text for s in stops)
    assert stop is None or text.startswith(found + stop)
    assert stop is not None or found == text


def test_text_goes_out_as_soon_as_it_is_certain():
    matcher = StopStrings(("###",))
    assert matcher.feed("ab#") == ("ab", None)
    assert matcher.feed("#c") == ("##c", None)
    assert matcher.feed("##") == ("", None)
    assert matcher.feed("#d") == ("", "###")


@given(
    st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=2), st.data(),
)  # fmt: skip
def test_from_a_text_on_they_are_looked_for(text, stops, begin, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = run(pieces, stops, begin=begin)
    assert found == run(list(text), stops, begin=begin)
    ends = [(text.find(one) + len(one), -len(one)) for one in begin if one in text]
    place = sum(min(ends)) if ends else len(text)
    passed, (rest, stop) = text[:place], run([text[place:]], stops)
    assert found == (passed + rest, stop)


def test_what_is_skipped_may_hold_the_text_from_which_on_they_are_looked_for():
    for pieces in (["a#</t", "h>b"], ["a#", "</th>b"]):
        matcher = StopStrings(("#",), begin=("</th>",))
        assert "".join(map(matcher.skip, pieces)) == "a#</th>b"
        assert matcher.feed("c#") == ("c", "#")
    matcher = StopStrings(("#",), begin=("</th>",))
    assert matcher.skip("a</t") == "a" and matcher.feed("h>#") == ("</th>", "#")


def test_stop_strings_and_where_they_begin_may_be_one_text_each_or_none():
    assert SamplingParams(stop="a", stop_from="</think>") == SamplingParams(stop=["a"], stop_from=["</think>"])
    assert SamplingParams().stop_from == ()
    for wrong in (None, [""], [1]):
        with pytest.raises(InputError, match="stop_from"):
            SamplingParams(stop_from=wrong)
