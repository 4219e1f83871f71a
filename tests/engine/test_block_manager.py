"""Blocks: owned, shared, published, evicted; and no sequence of operations that loses one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from glm5.engine.block_manager import BlockManager, OutOfBlocks, chain, chain_root


def digests(tokens, size=2, version=0, salt=None):
    parent, found = chain_root(version, salt), []
    for start in range(0, len(tokens) - size + 1, size):
        parent = chain(parent, tokens[start : start + size])
        found.append(parent)
    return found


def filled(blocks, tokens):
    """A table over computed tokens whose full blocks are published."""
    table = []
    blocks.extend(table, len(tokens))
    for block, digest in zip(table, digests(tokens, blocks.block_size), strict=False):
        blocks.publish(block, digest)
    return table


def test_a_digest_depends_on_tokens_everything_before_them_version_and_salt():
    base = digests([1, 2, 3, 4])
    others = [digests([1, 2, 3, 5]), digests([9, 2, 3, 4]), digests([1, 2, 3, 4], version=1),
              digests([1, 2, 3, 4], salt="a"), digests([1, 2, 3, 4], salt="shared")]  # fmt: skip
    assert len({base[1], *(other[1] for other in others)}) == 6
    assert base[0] == others[0][0] and base == digests([1, 2, 3, 4])


def test_blocks_are_taken_shared_and_given_back():
    blocks = BlockManager(4, 2)
    table = []
    blocks.extend(table, 5)
    assert (len(table), blocks.used, blocks.free) == (3, 3, 1)
    with pytest.raises(OutOfBlocks):
        blocks.extend(table, 9)
    assert len(table) == 3
    twin = blocks.fork(table)
    assert (twin, blocks.used) == (table, 3)
    copies = blocks.make_writable(twin, 4)
    assert copies == [(table[2], twin[2])] and twin[:2] == table[:2] and twin[2] != table[2]
    assert blocks.make_writable(twin, 4) == []
    with pytest.raises(OutOfBlocks):
        blocks.make_writable(twin, 0)
    blocks.check([table, twin])
    blocks.release(table)
    blocks.release(twin)
    assert (table, blocks.used) == ([], 0)
    blocks.check([])


def test_a_published_prefix_is_found_until_its_room_is_needed():
    blocks = BlockManager(4, 2)
    first = filled(blocks, [1, 2, 3, 4, 5])
    kept = first[:2]
    blocks.release(first)
    assert blocks.match(digests([1, 2, 3, 4, 9, 9])) == kept
    again = blocks.match(digests([1, 2, 9, 9]))
    assert again == kept[:1]
    blocks.check([kept, again])
    blocks.release(again)
    blocks.release(kept)
    blocks.extend(table := [], 6)  # two empty blocks and the cached one that was used longest ago
    assert len(blocks.match(digests([1, 2, 3, 4]))) == 1, "the end of a prefix goes before its beginning"
    assert table


def test_the_least_recently_used_prefix_is_evicted_first():
    blocks = BlockManager(4, 2)
    old, new = filled(blocks, [1, 2]), filled(blocks, [3, 4])
    blocks.release(old)
    blocks.release(new)
    blocks.release(blocks.match(digests([1, 2])))  # used again
    blocks.extend([], 6)
    assert blocks.match(digests([3, 4])) == []
    assert len(blocks.match(digests([1, 2]))) == 1


def test_of_equal_contents_one_block_is_kept_and_forgotten_ones_are_not_found():
    blocks = BlockManager(4, 2)
    one, two = filled(blocks, [1, 2]), filled(blocks, [1, 2])
    blocks.release(two)
    assert blocks.match(digests([1, 2])) == one
    blocks.release(list(one))
    blocks.forget()
    assert blocks.match(digests([1, 2])) == []
    blocks.check([one])
    without = BlockManager(4, 2, prefix_caching=False)
    without.release(filled(without, [1, 2]))
    assert without.match(digests([1, 2])) == []


class Machine(RuleBasedStateMachine):
    """Sequences that come, grow, fork, are written and go, over a pool that is often too small.

    Beside each table lies what its blocks must hold; a dictionary stands in for the cache. So a block that were given
    to two writers, or found under the wrong tokens, would show as a wrong token.
    """

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(7, 2)
        self.rows = {}
        self.live = []
        self.version = 0

    def _write(self, sequence, tokens):
        table, have = sequence
        start = len(have)
        try:
            copies = self.blocks.make_writable(table, start)
            for old, new in copies:
                for slot in range(2):
                    self.rows[new * 2 + slot] = self.rows.get(old * 2 + slot)
            self.blocks.extend(table, start + len(tokens))
        except OutOfBlocks:
            return
        have += tokens
        for position in range(start, len(have)):
            self.rows[table[position // 2] * 2 + position % 2] = (self.version, have[position])
        if all(self._read(sequence)[i][0] == self.version for i in range(len(have))):
            for block, digest in zip(table, digests(have, version=self.version), strict=False):
                self.blocks.publish(block, digest)

    def _read(self, sequence):
        table, have = sequence
        return [self.rows[table[p // 2] * 2 + p % 2] for p in range(len(have))]

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def start(self, tokens):
        found = self.blocks.match(digests(tokens, version=self.version)[: (len(tokens) - 1) // 2])
        sequence = (found, tokens[: 2 * len(found)])
        assert self._read(sequence) == [(self.version, token) for token in sequence[1]]
        self.live.append(sequence)
        self._write(sequence, tokens[len(sequence[1]) :])
        return sequence

    @rule(sequence=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, sequence, tokens):
        self._write(sequence, list(tokens))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        twin = (self.blocks.fork(sequence[0]), list(sequence[1]))
        self.live.append(twin)
        return twin

    @rule(target=sequences, sequence=consumes(sequences))
    def stop(self, sequence):
        self.live = [other for other in self.live if other is not sequence]
        self.blocks.release(sequence[0])
        return multiple()

    @rule()
    def new_weights(self):
        self.version += 1
        self.blocks.forget()

    @invariant()
    def nothing_is_lost(self):
        self.blocks.check([table for table, _ in self.live])
        for sequence in self.live:
            assert [token for _, token in self._read(sequence)] == sequence[1]


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
