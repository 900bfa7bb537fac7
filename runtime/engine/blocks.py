"""The paged KV cache: who holds which block, and which blocks can be found again by their content.

A block is known by a hash chained from the first token of its sequence on, so equal prefixes share
blocks and nothing else does. Free blocks keep their content until they are handed out again, the
longest unused first. Every operation on a block is O(1).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens


def chain_hash(parent: bytes, token_ids: Tokens[int]) -> bytes:
    """The identity of a full block: its own tokens and, through `parent`, all tokens before it."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class BlockTable:
    """One sequence's blocks, in order, and the hashes of those that its tokens fill."""

    __slots__ = ("block_ids", "hashes", "num_registered", "salt")

    def __init__(self, salt: str = "", position_base: int = 0) -> None:
        self.block_ids: list[int] = []
        self.hashes: list[bytes] = []
        self.num_registered = 0
        # Hashed, so that no choice of salt can imitate another tenant's chain.
        base = position_base.to_bytes(16, "little")
        self.salt = hashlib.blake2b(salt.encode(), digest_size=16, person=base).digest()

    def extend_hashes(self, token_ids: list[int], block_size: int) -> None:
        """Hash the blocks that `token_ids` has filled since the last call."""
        for index in range(len(self.hashes), len(token_ids) // block_size):
            parent = self.hashes[-1] if self.hashes else self.salt
            self.hashes.append(chain_hash(parent, token_ids[index * block_size : (index + 1) * block_size]))


class BlockManager:
    """All blocks of one engine."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether or not their content could still be found."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def can_grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether `grow` to this many tokens would succeed."""
        return self.blocks_for(num_tokens) - len(table.block_ids) <= len(self._free)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Give the table blocks for `num_tokens` tokens in all; takes none and says False if they run out."""
        if not self.can_grow(table, num_tokens):
            return False
        for _ in range(self.blocks_for(num_tokens) - len(table.block_ids)):
            block_id, _ = self._free.popitem(last=False)
            self._forget(block_id)
            self._references[block_id] = 1
            table.block_ids.append(block_id)
        return True

    def take_prefix(self, table: BlockTable, token_ids: list[int]) -> int:
        """Give an empty table the blocks that already hold a prefix of `token_ids`; returns its length.

        The last token is never taken from the cache: computing it is what yields the next one.
        """
        if not self.enable_prefix_caching:
            return 0
        table.extend_hashes(token_ids, self.block_size)
        for digest in table.hashes[: (len(token_ids) - 1) // self.block_size]:
            block_id = self._by_hash.get(digest)
            if block_id is None:
                break
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1
            table.block_ids.append(block_id)
        table.num_registered = len(table.block_ids)
        return len(table.block_ids) * self.block_size

    def register(self, table: BlockTable, token_ids: list[int], num_computed: int) -> None:
        """Make the blocks that the first `num_computed` tokens fill findable by their content.

        A block with a token that is still on its way from the device cannot be named yet.
        """
        if not self.enable_prefix_caching:
            return
        full = min(num_computed, len(token_ids)) // self.block_size
        if full <= table.num_registered:
            return
        table.extend_hashes(token_ids, self.block_size)
        for index in range(table.num_registered, full):
            digest, block_id = table.hashes[index], table.block_ids[index]
            if digest not in self._by_hash:
                self._by_hash[digest] = block_id
                self._hash_of[block_id] = digest
        table.num_registered = full

    def release(self, table: BlockTable) -> None:
        """Take the table's blocks back. The end of a sequence is handed out again before its beginning."""
        for block_id in reversed(table.block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    # Nothing to find there: the first to be reused.
                    self._free.move_to_end(block_id, last=False)
        table.block_ids.clear()
        table.num_registered = 0

    def forget_contents(self) -> None:
        """The memory of all blocks has been given back: nothing can be found in them any more."""
        self._by_hash.clear()
        self._hash_of = [None] * self.num_blocks

    def _forget(self, block_id: int) -> None:
        digest = self._hash_of[block_id]
        if digest is not None:
            del self._by_hash[digest]
            self._hash_of[block_id] = None
