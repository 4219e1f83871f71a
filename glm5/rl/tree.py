"""The tree of an episode: which turn goes on from which, and the trajectories that its tokens are trained in.

The parent of a turn is the turn whose tokens, prompt and output together, are the longest that its own prompt begins
with. So an agent that only ever adds to its conversation makes a chain. Whatever does not extend what was said (a
thought that is dropped, a history that is compacted, a sub-agent, an answer that was edited) begins another branch,
from the turn that still is whole in it, or from nothing.

Each leaf gives one trajectory, its own prompt and output. A turn on the way to several leaves is trained with the
first of them and is context in the others; tokens that a prompt holds without the whole of their turn (an answer that
was cut) are context there as well. So each sampled token is trained exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from glm5.engine.choices import ExpertChoices, joined
from glm5.rl.records import Trajectory, Turn


class EpisodeTree:
    """The turns of one episode, in the order in which they ended."""

    def __init__(self, turns: Iterable[Turn] = ()) -> None:
        self.turns: list[Turn] = []
        self.parents: list[int | None] = []
        """Of each turn; None for one that extends no other."""
        self._by_length: list[int] = []  # the turns, the longest first and of equal ones the newest
        for turn in turns:
            self.add(turn)

    def add(self, turn: Turn) -> int | None:
        """Adds a turn and gives its parent's number. A turn is added after all that it may go on from."""
        parent = self.extended_by(turn.prompt_ids)
        self.turns.append(turn)
        self.parents.append(parent)
        self._by_length.append(len(self.turns) - 1)
        self._by_length.sort(key=lambda number: (-_length(self.turns[number]), -number))
        return parent

    def extended_by(self, prompt_ids: tuple[int, ...]) -> int | None:
        """The turn with the most tokens, prompt and output, that this prompt begins with; the newest of equal ones."""
        for number in self._by_length:
            turn = self.turns[number]
            start, end = len(turn.prompt_ids), _length(turn)
            # The output differs most often, and a chain ends at its first candidate.
            if prompt_ids[start:end] == turn.output_ids and prompt_ids[:start] == turn.prompt_ids:
                return number
        return None

    @property
    def leaves(self) -> list[int]:
        """The turns that no other goes on from, in order."""
        inner = set(self.parents)
        return [number for number in range(len(self.turns)) if number not in inner]

    def chain(self, number: int | None) -> Iterator[int]:
        """A turn and all before it, up to its root."""
        while number is not None:
            yield number
            number = self.parents[number]

    def trajectories(self) -> tuple[Trajectory, ...]:
        """One for each leaf that has a token to train, in the order of the leaves."""
        trained: set[int] = set()
        made = []
        for leaf in self.leaves:
            turns = [number for number in self.chain(leaf) if number not in trained]
            trained.update(turns)
            if any(self.turns[number].output_ids for number in turns):
                made.append(self._trajectory(leaf, turns))
        return tuple(made)

    def _trajectory(self, leaf: int, trained: list[int]) -> Trajectory:
        """The tokens of the leaf, in which the outputs of `trained` count: they all are in its prompt, whole."""
        token_ids = self.turns[leaf].prompt_ids + self.turns[leaf].output_ids
        sampled, logprobs, versions = [False] * len(token_ids), [0.0] * len(token_ids), [-1] * len(token_ids)
        for number in trained:
            turn = self.turns[number]
            where = slice(len(turn.prompt_ids), _length(turn))
            sampled[where] = [True] * len(turn.output_ids)
            logprobs[where], versions[where] = turn.logprobs, turn.versions
        return Trajectory(token_ids, tuple(sampled), tuple(logprobs), tuple(versions), self.experts(leaf))

    def experts(self, number: int | None) -> ExpertChoices | None:
        """Of a turn's tokens, each as the first turn of its chain told of it: there it was sampled, or read."""
        return joined(self.turns[i].experts for i in reversed(list(self.chain(number))))


def _length(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.output_ids)
