"""Stored vectors, read and checked: their heads in blocks, and all else in rows.

The heads of 256 chunk numbers each are a block, with bits that say which of these are live.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import Damage, block_crc32, head_crc32, vector_crc32
from egemma.index.codes import Layout, decode
from egemma.index.facts import BLOCK_ROWS, LIVE_BYTES, State

VECTOR_COLUMNS = "v.crc32, v.scales, v.rest, v.floats"


# Heads


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


def damaged_block(block: int, prefix: str = "") -> Damage:
    """Return the error for a block that is not what was stored."""
    new = "new " if prefix else ""
    return Damage(f"block {block} of the {new}vectors is not what was stored")


# Vectors


def vector_is_sound(
    layout: Layout,
    keeps_floats: bool,
    number: int,
    head: bytes,
    crc: object,
    scales: object,
    rest: object,
    floats: object,
) -> bool:
    """Return whether the columns of a vector have their types, their lengths and their checksum."""
    return (
        isinstance(scales, bytes)
        and len(scales) == 4 * layout.scales
        and isinstance(rest, bytes)
        and len(rest) == layout.rest_bytes
        and (
            isinstance(floats, bytes) and len(floats) == 4 * layout.dim
            if keeps_floats
            else floats is None
        )
        and vector_crc32(number, head, scales, rest, floats) == crc  # type: ignore[arg-type]
    )


def read_vector(connection: sqlite3.Connection, state: State, number: int) -> NDArray[np.float32]:
    """Return (D,) a stored vector, as near to its floats as the file has it."""
    block, slot = divmod(number, BLOCK_ROWS)
    start, stop = slot * state.scan_width, (slot + 1) * state.scan_width
    codes = np.frombuffer(read_heads(connection, block)[1][start:stop], np.int8)[None]
    vectors = read_vectors(connection, state, codes, np.array([number])).astype(np.float32)
    return vectors.reshape(-1)


def read_vectors(
    connection: sqlite3.Connection,
    state: State,
    codes: NDArray[np.int8],
    numbers: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return (n, D) stored vectors: floats where the file keeps them, else codes.

    Args:
        codes: (n, W) their heads, as they are in memory.
        numbers: (n,) rising numbers of chunks.
    """
    rows = connection.execute(
        f"SELECT v.number, {VECTOR_COLUMNS} FROM json_each(?) AS j CROSS JOIN vectors AS v "
        "ON v.number = j.value",
        (json.dumps(numbers.tolist()),),
    ).fetchall()
    if [row[0] for row in rows] != numbers.tolist():
        raise Damage(f"{len(numbers)} vectors are looked up, {len(rows)} are there")
    check_rows(state, codes, rows)
    return unpacked(state, codes, rows).astype(np.float64, copy=False)


def check_rows(state: State, codes: NDArray[np.int8], rows: Sequence[Sequence[Any]]) -> None:
    """Check rows of `vectors`, given with their (n, W) heads."""
    layout, keeps_floats, width = state.layout, state.floats, state.scan_width
    heads = codes.tobytes()
    start = 0
    for number, crc, scales, rest, floats in rows:
        head = heads[start : start + width]
        if not vector_is_sound(layout, keeps_floats, number, head, crc, scales, rest, floats):
            raise Damage(f"vector {number} is not what was stored")
        start += width


def unpacked(
    state: State, codes: NDArray[np.int8], rows: Sequence[Sequence[Any]]
) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return (n, D) vectors of rows that were checked, and their heads."""
    layout = state.layout
    if state.floats:
        return np.frombuffer(b"".join(row[4] for row in rows), "<f4").reshape(-1, layout.dim)
    return decode(
        codes,
        np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(-1, layout.scales),
        np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, layout.rest_bytes),
        layout,
    )
