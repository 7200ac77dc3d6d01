"""Stored vectors, read and checked, and made into numbers again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from egemma.index.blocks import HeadReader, heads_between
from egemma.index.checksums import Damage, vector_crc32
from egemma.index.codes import Layout, decode
from egemma.index.facts import BLOCK_ROWS, State
from egemma.index.records import CHUNK_COLUMNS, StoredChunk, checked_chunk

BLOCKS_TOGETHER = 16  # blocks whose vectors are read at a time
_VECTOR = "v.crc32, v.scales, v.rest, v.floats"


class StoredVector(NamedTuple):
    """All that is stored of one vector, in bytes."""

    head: bytes
    scales: bytes
    rest: bytes
    floats: bytes | None


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


def chunks_with_vectors_of(
    connection: sqlite3.Connection, state: State, heads: HeadReader, document: int
) -> Iterator[tuple[StoredChunk, StoredVector]]:
    """Yield the chunks of a document by position, each with its vector."""
    return _with_vectors(
        connection, state, heads, "c.document = ? ORDER BY c.position, c.number", (document,)
    )


def chunks_with_vectors_after(
    connection: sqlite3.Connection, state: State, heads: HeadReader, last: int, limit: int
) -> list[tuple[StoredChunk, StoredVector]]:
    """Return the next chunks after a number, each with its vector."""
    after = "c.number > ? ORDER BY c.number LIMIT ?"
    return list(_with_vectors(connection, state, heads, after, (last, limit)))


def check_vectors_from(
    connection: sqlite3.Connection, layout: Layout, first: int, *, keeps_floats: bool
) -> None:
    """Read the vectors of a migration from a number on, to check them."""
    heads = HeadReader(connection, layout.head, "next_")
    for number, *columns in connection.execute(
        f"SELECT v.number, {_VECTOR} FROM next_vectors v WHERE v.number >= ? ORDER BY v.number",
        (first,),
    ):
        if not vector_is_sound(layout, keeps_floats, number, heads.head(number), *columns):
            raise Damage(f"the new vector {number} is not what was stored")


def read_vector(connection: sqlite3.Connection, state: State, number: int) -> NDArray[np.float32]:
    """Return (D,) a stored vector, as near to its floats as the file has it."""
    head = HeadReader(connection, state.scan_width).head(number)
    codes = np.frombuffer(head, np.int8)[None]
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
        f"SELECT v.number, {_VECTOR} FROM json_each(?) AS j CROSS JOIN vectors AS v "
        "ON v.number = j.value",
        (json.dumps(numbers.tolist()),),
    ).fetchall()
    if [row[0] for row in rows] != numbers.tolist():
        raise Damage(f"{len(numbers)} vectors are looked up, {len(rows)} are there")
    _check_vectors(state, codes, rows)
    return _unpacked(state, codes, rows).astype(np.float64, copy=False)


def all_vectors(
    connection: sqlite3.Connection, state: State
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield all chunks' numbers and (n, D) vectors, some blocks at a time.

    Nothing is held open between two parts, so the caller may write to what was read.
    """
    width, blocks, seen = state.scan_width, BLOCKS_TOGETHER, 0
    for first in range(0, state.next_number, BLOCK_ROWS * blocks):
        heads = b"".join(heads_between(connection, first // BLOCK_ROWS, blocks, width))
        rows = connection.execute(
            f"SELECT v.number, {_VECTOR} FROM vectors v WHERE v.number >= ? AND v.number < ? "
            "ORDER BY v.number",
            (first, first + BLOCK_ROWS * blocks),
        ).fetchall()
        if rows:
            numbers = np.array([row[0] for row in rows])
            stored = np.frombuffer(heads, np.int8).reshape(-1, width)
            if numbers[-1] - first >= len(stored):
                raise Damage(f"vector {numbers[-1]} is not what was stored")
            codes = stored[numbers - first]
            _check_vectors(state, codes, rows)
            yield numbers, _unpacked(state, codes, rows).astype(np.float32)
        seen += len(rows)
    if seen != state.chunks:
        raise Damage(f"{state.chunks} chunks are counted, {seen} vectors are there")


def _with_vectors(
    connection: sqlite3.Connection,
    state: State,
    heads: HeadReader,
    condition: str,
    parameters: Sequence[object],
) -> Iterator[tuple[StoredChunk, StoredVector]]:
    rows = connection.execute(
        f"SELECT c.crc32, {CHUNK_COLUMNS}, {_VECTOR} FROM chunks c LEFT JOIN vectors v "
        f"ON v.number = c.number WHERE {condition}",
        tuple(parameters),
    ).fetchall()
    layout = state.layout
    for row in rows:
        chunk, (crc, *parts) = checked_chunk(row[0], row[1:10]), row[10:]
        head = heads.head(chunk.number)
        if not vector_is_sound(layout, state.floats, chunk.number, head, crc, *parts):
            raise Damage(f"vector {chunk.number} is not what was stored")
        yield chunk, StoredVector(head, *parts)


def _check_vectors(state: State, codes: NDArray[np.int8], rows: Sequence[Sequence[Any]]) -> None:
    """Check rows of `vectors`, given with their (n, W) heads."""
    layout, keeps_floats, width = state.layout, state.floats, state.scan_width
    heads = codes.tobytes()
    start = 0
    for number, crc, scales, rest, floats in rows:
        head = heads[start : start + width]
        if not vector_is_sound(layout, keeps_floats, number, head, crc, scales, rest, floats):
            raise Damage(f"vector {number} is not what was stored")
        start += width


def _unpacked(
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
