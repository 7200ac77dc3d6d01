"""Readers that go through a whole index: for export, compaction, tuning and migration.

Like `records` and `vectors` they check each row, and are called inside a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import Damage
from egemma.index.codes import Layout
from egemma.index.facts import BLOCK_ROWS, State
from egemma.index.records import (
    CHUNK_COLUMNS,
    DOCUMENT_COLUMNS,
    StoredChunk,
    StoredDocument,
    checked_chunk,
    checked_document,
)
from egemma.index.vectors import (
    VECTOR_COLUMNS,
    check_rows,
    damaged_block,
    heads_are_sound,
    read_heads,
    unpacked,
    vector_is_sound,
)

BLOCKS_TOGETHER = 16  # blocks whose vectors are read at a time


def count_truncated(connection: sqlite3.Connection) -> int:
    """Return of how many chunks only the beginning was embedded."""
    return int(connection.execute("SELECT count(*) FROM chunks WHERE truncated").fetchone()[0])


def documents_by_first_chunk(
    connection: sqlite3.Connection,
) -> Iterator[tuple[int, StoredDocument]]:
    """Yield all documents, in the order of their first chunks, which orders equal scores."""
    for number, crc, *fields in connection.execute(
        f"SELECT d.number, d.crc32, {DOCUMENT_COLUMNS} FROM documents d JOIN (SELECT document, "
        "min(number) AS first FROM chunks GROUP BY document) c ON c.document = d.number "
        "ORDER BY c.first"
    ):
        yield number, checked_document(crc, fields)


def chunks_from(
    connection: sqlite3.Connection, first: int, limit: int
) -> list[tuple[str, StoredChunk]]:
    """Return the next chunks from a number on, each with the id of its document."""
    rows = connection.execute(
        f"SELECT d.id, c.crc32, {CHUNK_COLUMNS} FROM chunks c JOIN documents d "
        "ON d.number = c.document WHERE c.number >= ? ORDER BY c.number LIMIT ?",
        (first, limit),
    ).fetchall()
    return [(id_, checked_chunk(crc, fields)) for id_, crc, *fields in rows]


def chunks_with_new_counts(
    connection: sqlite3.Connection, last: int, limit: int
) -> list[tuple[StoredChunk, int, int]]:
    """Return the next chunks after a number that a migration's tokenizer counts differently.

    Each comes with its new number of tokens, and whether it is truncated.
    """
    rows = connection.execute(
        f"SELECT t.num_tokens, t.truncated, c.crc32, {CHUNK_COLUMNS} FROM chunks c "
        "JOIN next_tokens t ON t.number = c.number WHERE c.number > ? AND "
        "(c.num_tokens != t.num_tokens OR c.truncated != t.truncated) ORDER BY c.number LIMIT ?",
        (last, limit),
    ).fetchall()
    return [(checked_chunk(row[2], row[3:]), row[0], row[1]) for row in rows]


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


class StoredVector(NamedTuple):
    """All that is stored of one vector, in bytes."""

    head: bytes
    scales: bytes
    rest: bytes
    floats: bytes | None


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
        f"SELECT v.number, {VECTOR_COLUMNS} FROM next_vectors v WHERE v.number >= ? "
        "ORDER BY v.number",
        (first,),
    ):
        if not vector_is_sound(layout, keeps_floats, number, heads.head(number), *columns):
            raise Damage(f"the new vector {number} is not what was stored")


def all_vectors(
    connection: sqlite3.Connection, state: State
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield all chunks' numbers and (n, D) vectors, some blocks at a time.

    Nothing is held open between two parts, so the caller may write to what was read.
    """
    width, blocks, seen = state.scan_width, BLOCKS_TOGETHER, 0
    for first in range(0, state.next_number, BLOCK_ROWS * blocks):
        heads = b"".join(_heads_between(connection, first // BLOCK_ROWS, blocks, width))
        rows = connection.execute(
            f"SELECT v.number, {VECTOR_COLUMNS} FROM vectors v "
            "WHERE v.number >= ? AND v.number < ? ORDER BY v.number",
            (first, first + BLOCK_ROWS * blocks),
        ).fetchall()
        if rows:
            numbers = np.array([row[0] for row in rows])
            stored = np.frombuffer(heads, np.int8).reshape(-1, width)
            if numbers[-1] - first >= len(stored):
                raise Damage(f"vector {numbers[-1]} is not what was stored")
            codes = stored[numbers - first]
            check_rows(state, codes, rows)
            yield numbers, unpacked(state, codes, rows).astype(np.float32)
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
        f"SELECT c.crc32, {CHUNK_COLUMNS}, {VECTOR_COLUMNS} FROM chunks c LEFT JOIN vectors v "
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


def _heads_between(
    connection: sqlite3.Connection, first: int, count: int, width: int
) -> Iterator[bytes]:
    """Yield the codes of blocks from one on, none of which may be missing."""
    rows = connection.execute(
        "SELECT block, squares, codes, crc32 FROM heads WHERE block >= ? AND block < ? "
        "ORDER BY block",
        (first, first + count),
    )
    for expected, (block, squares, codes, crc) in enumerate(rows, start=first):
        sound = heads_are_sound(block, squares, codes, crc) and len(codes) % width == 0
        if block != expected or not sound:
            raise damaged_block(block)
        yield codes
