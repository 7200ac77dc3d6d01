"""The heads of vectors as they are stored, in blocks of 256 chunk numbers: read and checked."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import Damage, block_crc32, head_crc32
from egemma.index.facts import BLOCK_ROWS, LIVE_BYTES


def live_numbers(block: int, live: bytes) -> NDArray[np.int64]:
    """Return the numbers of a block's chunks that were not deleted.

    Bit i (least significant first) of a block stands for chunk 256 · block + i.
    """
    bits = np.unpackbits(np.frombuffer(live, np.uint8), bitorder="little")
    return np.flatnonzero(bits) + BLOCK_ROWS * block


def live_is_sound(block: int, live: object, crc: object) -> bool:
    """Return whether the bits of a block are what was stored."""
    return isinstance(live, bytes) and len(live) == LIVE_BYTES and block_crc32(block, live) == crc


def heads_are_sound(block: int, squares: object, codes: object, crc: object) -> bool:
    """Return whether the heads of a block are what was stored."""
    both = isinstance(squares, bytes) and isinstance(codes, bytes)
    return both and head_crc32(block, squares, codes) == crc  # type: ignore[arg-type]


def read_live(connection: sqlite3.Connection, block: int) -> bytes | None:
    """Return the bits of a block, or None where there is no such block."""
    row = connection.execute("SELECT live, crc32 FROM blocks WHERE number = ?", (block,)).fetchone()
    if row is None:
        return None
    if not live_is_sound(block, *row):
        raise damaged_block(block)
    return bytes(row[0])


def read_heads(connection: sqlite3.Connection, block: int, prefix: str = "") -> tuple[bytes, bytes]:
    """Return the squares and codes of a block.

    Args:
        prefix: "next_" for the heads of a migration.
    """
    row = connection.execute(
        f"SELECT squares, codes, crc32 FROM {prefix}heads WHERE block = ?", (block,)
    ).fetchone()
    if row is None or not heads_are_sound(block, *row):
        raise damaged_block(block, prefix)
    return row[0], row[1]


def changed_blocks(
    connection: sqlite3.Connection, since: int
) -> Iterator[tuple[int, NDArray[np.int64], bytes, bytes]]:
    """Yield number, live chunks, squares and codes of the blocks written after a generation."""
    changed = connection.execute(
        "SELECT b.number, b.live, b.crc32, h.squares, h.codes, h.crc32 FROM blocks b "
        "LEFT JOIN heads h ON h.block = b.number WHERE b.changed > ?",
        (since,),
    )
    for block, live, crc, squares, codes, head_crc in changed:
        if not live_is_sound(block, live, crc) or not heads_are_sound(
            block, squares, codes, head_crc
        ):
            raise damaged_block(block)
        yield block, live_numbers(block, live), squares, codes


class HeadReader:
    """Reads the heads of single chunks whose numbers mostly rise: it keeps the last block."""

    def __init__(self, connection: sqlite3.Connection, width: int, prefix: str = "") -> None:
        self._connection, self._width, self._prefix = connection, width, prefix
        self._block, self._codes = -1, b""

    def head(self, number: int) -> bytes:
        """Return the head of a chunk."""
        block, slot = divmod(number, BLOCK_ROWS)
        if block != self._block:
            self._codes = read_heads(self._connection, block, self._prefix)[1]
            self._block = block
        return self._codes[slot * self._width : (slot + 1) * self._width]


def damaged_block(block: int, prefix: str = "") -> Damage:
    """Return the error for a block that is not what was stored."""
    new = "new " if prefix else ""
    return Damage(f"block {block} of the {new}vectors is not what was stored")
