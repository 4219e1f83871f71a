"""Who owns which block of the paged cache: block tables, reference counts and the prefix cache.

A block holds the cache rows of `block_size` tokens. A full block can be *published* under a digest of its token ids and
of everything before them; a later sequence that begins with the same tokens takes it instead of computing it again.
Digests form a chain (parent digest + token ids), whose root names the weight version and the salt, so that rows made by
other weights or for another session are never found (the idea of vLLM's prefix caching).

A published block that nobody uses stays until its room is needed; the least recently used goes first, and of one
sequence its last block before its first, because a block is only found through its parents. Partial blocks are never
published. A block that several sequences share is never written: `make_writable` gives the writer its own.

This file knows numbers of blocks only, no tensors; `PagedCache` owns those.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Digest = bytes


class OutOfBlocks(Exception):
    """There are fewer free blocks than asked for; nothing was taken."""


def chain_root(version: int, salt: str | None, *, experts: bool = False) -> Digest:
    """The parent of a sequence's first block. Cached rows are shared among equal versions and salts only.

    experts: blocks beside which the chosen experts are kept (`choices.py`); they are found apart from the others.
    """
    named = f"{version}/".encode() + b"experts/" * experts
    named += b"shared" if salt is None else b"salted/" + salt.encode()
    return hashlib.sha256(named).digest()


def chain(parent: Digest, token_ids: Sequence[int]) -> Digest:
    """The digest of a block that holds these tokens after the block `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockManager:
    """Hands out blocks `0 .. num_blocks - 1`. A block table is a plain list of block numbers, which the caller keeps.

    Every block is in exactly one state: used (a reference count of at least 1), free and cached (published, can be
    found again), or free and empty. Not thread-safe: one thread schedules.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and published, the least recently used first
        self._block_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    # ---- counts -------------------------------------------------------------------------------------------------
    @property
    def free(self) -> int:
        """Blocks that `extend` can take, the cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that some table holds."""
        return self.num_blocks - self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_size)

    # ---- tables -------------------------------------------------------------------------------------------------
    def extend(self, table: list[int], tokens: int) -> None:
        """Appends blocks until the table covers `tokens` tokens. Raises OutOfBlocks and then changes nothing."""
        needed = self.blocks_for(tokens) - len(table)
        if needed > self.free:
            raise OutOfBlocks
        for _ in range(needed):
            table.append(self._take())

    def make_writable(self, table: list[int], first_token: int) -> list[tuple[int, int]]:
        """Gives the table blocks of its own wherever tokens from `first_token` on would be written.

        Returns the pairs (from, to) whose rows must be copied before anything is written. Raises OutOfBlocks.
        """
        shared = [i for i in range(first_token // self.block_size, len(table)) if self._references[table[i]] > 1]
        if len(shared) > self.free:
            raise OutOfBlocks
        copies = []
        for i in shared:
            old, table[i] = table[i], self._take()
            self._drop(old)
            copies.append((old, table[i]))
        return copies

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks."""
        for block in table:
            self._references[block] += 1
        return list(table)

    def release(self, table: list[int]) -> None:
        """Gives all blocks of a table back and empties it."""
        while table:  # from the end, so that the first blocks are the last to be evicted
            self._drop(table.pop())

    # ---- the prefix cache ---------------------------------------------------------------------------------------
    def match(self, digests: Iterable[Digest]) -> list[int]:
        """A table over the longest run of leading digests that are published; its blocks are taken."""
        table: list[int] = []
        for digest in digests if self.prefix_caching else ():
            block = self._block_of.get(digest)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            table.append(block)
        return table

    def found(self, digest: Digest) -> bool:
        """Whether a block is published under it."""
        return digest in self._block_of

    def publish(self, block: int, digest: Digest) -> None:
        """Lets others find a used block whose rows are all computed. Of equal contents the first block stays."""
        if self.prefix_caching and digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self) -> None:
        """Empties the prefix cache (the weights changed); used blocks stay with their tables."""
        self._empty += self._cached
        self._cached.clear()
        self._block_of.clear()
        self._digest_of.clear()

    # ---- parts --------------------------------------------------------------------------------------------------
    def _take(self) -> int:
        """A free block: an empty one, or the cached one that was used longest ago."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts every invariant, given all tables in use: no block lost, shared unseen or found when it must not."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._references, "reference counts differ from the tables"
        free = [*self._empty, *self._cached]
        assert len(free) == len(set(free)) and set(free) == {b for b in range(self.num_blocks) if held[b] == 0}
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of
        assert set(self._cached) == {block for block in self._digest_of if held[block] == 0}
