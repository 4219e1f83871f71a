"""Forward passes of the learner: every example in one of them, none wider or longer than allowed, in order."""

from hypothesis import given
from hypothesis import strategies as st

from glm5.rl.packing import Example, Passes, micro_batches
from glm5.rl.records import Trajectory


def example(tokens: int) -> Example:
    """Of which the last token alone was sampled."""
    sampled = (*[False] * (tokens - 1), True)
    trajectory = Trajectory((1,) * tokens, sampled, (0.0,) * tokens, (*[-1] * (tokens - 1), 0))
    return Example(trajectory, 1.0, 1.0, 1.0, "sums", (tokens - 1,), (0,))


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    rows=st.integers(1, 6),
    tokens=st.integers(1, 120),
    row_tokens=st.none() | st.integers(1, 60),
)
def test_passes_take_each_example_once_within_their_bounds(lengths, rows, tokens, row_tokens):
    examples = [example(length) for length in lengths]
    passes = list(micro_batches(examples, Passes(attention="sparse", rows=rows, tokens=tokens, row_tokens=row_tokens)))
    taken = [id(e) for one in passes for e in one.examples]
    assert sorted(taken) == sorted(map(id, examples))
    if row_tokens is None:
        assert taken == [*map(id, examples)]
    for one in passes:
        count, width = one.ids_BT.shape
        assert count <= rows and (count == 1 or count * width <= tokens)


def test_a_pass_is_as_full_as_may_be():
    """Five rows of 9 inputs, 20 tokens a pass: two, two and one."""
    passes = micro_batches([example(10)] * 5, Passes(attention="sparse", rows=64, tokens=20, row_tokens=None))
    assert [one.ids_BT.shape for one in passes] == [(2, 9), (2, 9), (1, 9)]
