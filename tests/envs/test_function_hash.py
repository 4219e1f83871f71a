"""Functions by what they do."""

import linecache

import pytest

from glm5.envs.function_hash import function_hash

PLAIN = """
def judge(task, said, least=3):
    if len(said) < least:
        return 0.0
    return 1.0
"""
COMMENTED = """

def judge(task, said,
          least=3):  # of messages

    if len(said)  <  least:
      return 0.0
    # enough
    return 1.0
"""


def made(source, name, **known):
    """The function of a source file, which need not be there."""
    file = f"<{hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), known)
    return known[name]


def test_comments_and_the_width_of_lines_are_no_change():
    assert function_hash(made(PLAIN, "judge")) == function_hash(made(COMMENTED, "judge"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.0", "0.5"), ("    return 1.0", "        return 1.0"), ("least=3", "least=4"), ("< least", "> least")],
)
def test_what_changes_what_it_does_is(old, new):
    assert function_hash(made(PLAIN, "judge")) != function_hash(made(PLAIN.replace(old, new), "judge"))


def test_bound_values_count():
    def scaled(value):
        def judge(task, said):
            return value * len(said)

        return judge

    def late(value):
        return lambda task, said, value=value: value

    for make in (scaled, late):
        assert function_hash(make(1)) == function_hash(make(1)) != function_hash(make(2))
        assert function_hash(make(object())) is None


def test_where_the_source_does_not_tell():
    first, second = (lambda task, said: 0.0), (lambda task, said: 1.0)
    assert function_hash(first) is None and function_hash(second) is None
    assert function_hash(len) is None
    assert function_hash(eval("lambda task, said: 0.0")) is None
