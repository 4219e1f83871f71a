"""The tree of an episode: parents, branches, and that every sampled token is trained exactly once."""

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.engine import ExpertChoices
from glm5.rl.records import Turn
from glm5.rl.tree import EpisodeTree


class Sampling:
    """An engine that gives every token it samples a log-probability and a version of its own."""

    def __init__(self):
        self.serial = count(1)
        self.turns = []

    def turn(self, prompt, output, finish="stop"):
        serials = [next(self.serial) for _ in output]
        turn = Turn(tuple(prompt), tuple(output), tuple(-float(s) for s in serials), tuple(serials), finish)
        self.turns.append(turn)
        return turn


def full(turn):
    return turn.prompt_ids + turn.output_ids


def trained(tree):
    """(token id, log-probability, version) of everything that counts in a loss."""
    return [
        entry
        for trajectory in tree.trajectories()
        for *entry, sampled in zip(
            trajectory.token_ids, trajectory.logprobs, trajectory.versions, trajectory.sampled, strict=True
        )
        if sampled
    ]


def check(tree):
    """Everything sampled is trained once, as it was sampled; everything else is context."""
    emitted = [
        list(token) for turn in tree.turns for token in zip(turn.output_ids, turn.logprobs, turn.versions, strict=True)
    ]
    assert sorted(trained(tree)) == sorted(emitted)
    for trajectory in tree.trajectories():
        assert trajectory.num_sampled
        for sampled, logprob, version in zip(trajectory.sampled, trajectory.logprobs, trajectory.versions, strict=True):
            assert sampled or (logprob, version) == (0.0, -1)


def test_a_conversation_that_only_grows_is_one_trajectory():
    sampling = Sampling()
    first = sampling.turn([1, 2], [3, 4])
    second = sampling.turn([*full(first), 9, 9], [5])
    tree = EpisodeTree([first, second])
    assert tree.parents == [None, 0] and tree.leaves == [1]
    (only,) = tree.trajectories()
    assert only.token_ids == (1, 2, 3, 4, 9, 9, 5)
    assert only.sampled == (False, False, True, True, False, False, True)
    assert only.versions == (-1, -1, 1, 2, -1, -1, 3) and only.logprobs[2:4] == (-1.0, -2.0)


def test_a_shared_turn_is_trained_with_its_first_leaf_and_is_context_in_the_second():
    sampling = Sampling()
    root = sampling.turn([1], [2, 3])
    left, right = sampling.turn([*full(root), 7], [4]), sampling.turn([*full(root), 8], [5])
    one, two = EpisodeTree([root, left, right]).trajectories()
    assert one.sampled == (False, True, True, False, True)
    assert two.token_ids == (1, 2, 3, 8, 5) and two.sampled == (False, False, False, False, True)


def test_a_stripped_thought_begins_a_branch_and_a_cut_answer_is_context():
    sampling = Sampling()
    thought = sampling.turn([1, 50], [60, 61, 51, 70])  # 50 and 51 stand for the tags of reasoning
    stripped = sampling.turn([1, 51, 70, 9], [80])
    cut = sampling.turn([1, 50, 60, 61, 9], [90])
    tree = EpisodeTree([thought, stripped, cut])
    assert tree.parents == [None, None, None]
    assert [t.num_sampled for t in tree.trajectories()] == [4, 1, 1]
    assert tree.trajectories()[2].sampled == (False,) * 5 + (True,)
    check(tree)


def test_the_longest_beginning_is_the_parent_and_of_equal_ones_the_newest():
    sampling = Sampling()
    first = sampling.turn([1], [2])
    longer = sampling.turn([1, 2, 3], [4])
    twin = sampling.turn([1, 2, 3], [4])
    child = sampling.turn([1, 2, 3, 4, 5], [6])
    tree = EpisodeTree([first, longer, twin, child])
    assert tree.parents == [None, 0, 0, 2]
    check(tree)


def test_a_turn_that_says_nothing_has_no_trajectory_of_its_own():
    sampling = Sampling()
    said = sampling.turn([1], [2])
    silent = [sampling.turn([1, 2, 3], []), sampling.turn([1, 2, 4], [])]
    tree = EpisodeTree([said, *silent])
    (only,) = tree.trajectories()
    assert only.token_ids == (1, 2, 3) and only.num_sampled == 1
    assert EpisodeTree([sampling.turn([1], [])]).trajectories() == ()
    assert EpisodeTree().trajectories() == ()


tokens = st.lists(st.integers(0, 2), max_size=4)  # few different ones, so that beginnings coincide by chance


@st.composite
def episodes(draw):
    """Turns of an agent that extends, strips, compacts, edits, retries and starts sub-agents, in any order."""
    sampling = Sampling()
    for _ in range(draw(st.integers(1, 12))):
        earlier = sampling.turns[draw(st.integers(0, len(sampling.turns) - 1))] if sampling.turns else None
        kind = draw(st.sampled_from(["new", "extend", "extend", "extend", "strip", "cut", "compact", "retry"]))
        added = tuple(draw(tokens))
        if earlier is None or kind == "new":  # a sub-agent with another system prompt
            prompt = (draw(st.integers(0, 2)), *added)
        elif kind == "extend":
            prompt = full(earlier) + added
        elif kind == "strip":  # the head of the output is gone
            prompt = earlier.prompt_ids + earlier.output_ids[draw(st.integers(0, 3)) :] + added
        elif kind == "cut":
            prompt = earlier.prompt_ids + earlier.output_ids[: draw(st.integers(0, 3))] + added
        elif kind == "compact":  # the first token and a tail
            prompt = (earlier.prompt_ids[0], *full(earlier)[draw(st.integers(0, 9)) :], *added)
        else:
            prompt = earlier.prompt_ids
        sampling.turn(prompt, draw(tokens))
    return sampling.turns


@given(episodes())
def test_any_episode_trains_every_sampled_token_exactly_once(turns):
    tree = EpisodeTree(turns)
    check(tree)
    assert max(Counter(map(tuple, trained(tree))).values(), default=1) == 1
    for number, parent in enumerate(tree.parents):
        begins = [n for n in range(number) if turns[number].prompt_ids[: len(full(turns[n]))] == full(turns[n])]
        longest = max((len(full(turns[n])) for n in begins), default=None)
        assert parent == max((n for n in begins if len(full(turns[n])) == longest), default=None)


@given(episodes())
def test_a_trajectory_is_what_its_leaf_saw_and_said(turns):
    tree = EpisodeTree(turns)
    told = [full(turns[leaf]) for leaf in tree.leaves]
    for trajectory in tree.trajectories():
        assert trajectory.token_ids in told
        told.remove(trajectory.token_ids)


def test_experts_are_those_of_the_turn_that_told_first():
    def at(start, *experts):
        return ExpertChoices.of(start, np.array([[[expert, expert + 1]] for expert in experts], np.uint8))

    first = Turn((1, 2), (3, 4), (-1.0, -1.0), (0, 0), "stop", experts=at(0, 10, 11, 12))
    silent = Turn((1, 2, 3, 4, 5), (6,), (-1.0,), (0,), "stop")
    rest = Turn((1, 2, 3, 4, 5), (6,), (-1.0,), (0,), "stop", experts=at(3, 23, 24))
    whole = Turn((1, 2, 3, 4, 5), (6,), (-1.0,), (0,), "stop", experts=at(0, 20, 21, 22, 23, 24))
    branch = Turn((1, 2, 3, 7), (8,), (-1.0,), (0,), "stop", experts=at(0, 30, 31, 32, 37))
    for turns, *expected in (
        ((first, rest), at(0, 10, 11, 12, 23, 24)),
        ((first, whole), at(0, 10, 11, 12, 23, 24)),
        ((first, silent), at(0, 10, 11, 12)),  # the rest routes freely
        ((first, rest, branch), at(0, 10, 11, 12, 23, 24), at(0, 30, 31, 32, 37)),
        ((silent,), None),
    ):
        assert [t.experts for t in EpisodeTree(turns).trajectories()] == expected
    with pytest.raises(ValueError, match="of 6 tokens has experts of 3 to 5"):
        EpisodeTree((rest,)).trajectories()
    with pytest.raises(ValueError, match="of 3 tokens has experts of 0 to 5"):
        EpisodeTree((Turn((1, 2), (3,), (-1.0,), (0,), "stop", experts=whole.experts),)).trajectories()
