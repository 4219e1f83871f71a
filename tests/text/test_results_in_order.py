"""Results of tools stand in the order of the calls that they answer."""

import pytest

from glm5.errors import TextError
from glm5.text.messages import results_in_order

USER = {"role": "user", "content": "go"}


def calls(*ids):
    return {"role": "assistant", "tool_calls": [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ids]}


def result(name):
    return {"role": "tool", "tool_call_id": name, "content": f"of {name}"}


SAYS = {"role": "assistant", "content": "one is here"}
BARE = {"role": "tool", "content": "no id"}


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ([USER, calls("a", "b"), result("b"), result("a")], [0, 1, 3, 2]),
        ([calls("a", "b"), result("a"), result("b")], [0, 1, 2]),
        ([calls("a"), calls("b"), result("b"), result("a"), USER], [0, 1, 3, 2, 4]),
        ([calls("a"), result("a"), calls("b"), result("b")], [0, 1, 2, 3]),
        ([calls("a"), USER, result("a")], [0, 1, 2]),
        ([calls("a", "a"), result("a"), result("a")], [0, 1, 2]),
        ([calls(None, None), BARE, BARE], [0, 1, 2]),
        ([USER], [0]),
        ([calls("a"), calls("b"), result("a"), SAYS, result("b")], [0, 1, 2, 3, 4]),
        ([calls("a"), USER, calls("b"), result("b"), result("a")], [0, 1, 2, 4, 3]),
        ([calls("a"), result("a"), calls("b"), result("a")], [0, 1, 2, 3]),
        ([calls("a", "b"), result("a"), result("b"), calls("b", "a"), result("a"), result("b")], [0, 1, 2, 3, 5, 4]),
    ],
)
def test_runs_are_sorted_by_the_calls_before_them(given, ordered):
    assert results_in_order(given) == [given[i] for i in ordered]


@pytest.mark.parametrize(
    "given",
    [[USER, result("a")], [calls("a"), result("b")], [USER, result("a"), calls("a")], [calls("a"), result(["a"])]],
)
def test_a_result_without_its_call_is_refused(given):
    with pytest.raises(TextError, match="answers no call before it"):
        results_in_order(given)


@pytest.mark.parametrize("given", [[calls("a"), result("a"), BARE], [calls(None, "a"), BARE, result("a")]])
def test_a_result_without_an_id_beside_one_that_has_it_is_refused(given):
    with pytest.raises(TextError, match="has no tool_call_id and stands beside results that have one"):
        results_in_order(given)
