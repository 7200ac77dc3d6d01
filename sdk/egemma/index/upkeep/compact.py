"""Give back the space of what was deleted."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egemma.index.bulk_reads import HeadReader, chunks_with_vectors_after
from egemma.index.checksums import Damage, block_crc32, chunk_crc32, vector_crc32
from egemma.index.facts import BLOCK_ROWS, State, read_migration, read_state, write_state
from egemma.index.file import (
    BUSY_TIMEOUT_S,
    checked_path,
    file_bytes,
    opened,
    transaction,
    wal_of,
)
from egemma.index.rows import append_heads, write_heads
from egemma.index.upkeep.disk import check_room, folder_of_vacuum
from egemma.index.vectors import live_numbers, read_heads, read_live
from egemma_core.errors import IndexFileError

_DEAD_SHARE = 8  # chunks get new numbers when more than one number in so many is dead
_CHUNKS_TOGETHER = 512  # that are renumbered at a time


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What `compact` did."""

    chunks: int
    renumbered: bool  # chunks have new, dense numbers
    bytes_before: int
    bytes_after: int


def compact(path: str | Path) -> CompactReport:
    """Give back the space of what was deleted, and wipe what was left of it.

    Chunks get new numbers where more than one number in eight is dead. Searches go on meanwhile;
    writers wait, and give up after some seconds where this takes longer. A crash at any point
    leaves the index as it was or as it will be. It needs free disk as large as the index twice:
    once beside it, once in SQLite's folder for temporary files.

    Raises:
        IndexFileError: read-only, no room, damaged, or half way through a migration.
    """
    path = checked_path(path, create=False)
    with opened(path, "compact", write=True) as connection:
        before = file_bytes(path) + file_bytes(wal_of(path))
        _check_room(connection, path)
        with transaction(connection, "BEGIN IMMEDIATE"):
            state = read_state(connection)
            if read_migration(connection):
                raise IndexFileError(
                    f"{path} is half way through a migration. Go on with `egemma index migrate`, "
                    "or give it up with `egemma index abandon`; then compact it."
                )
            renumber = (state.next_number - state.chunks) * _DEAD_SHARE > state.next_number
            if renumber:
                _renumber(connection, state)
            else:
                _wipe_dead_heads(connection, state)
            connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        # not where a reader is still in an older state; then the last one does it
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return CompactReport(
            chunks=state.chunks,
            renumbered=renumber,
            bytes_before=before,
            bytes_after=file_bytes(path),
        )


def _renumber(connection: sqlite3.Connection, state: State) -> None:
    """Give chunks the numbers from 0 on, in their old order.

    Everything is checked on the way: damage must not get a new checksum.
    """
    width, generation = state.scan_width, state.generation + 1
    # it keeps the old block, whose row may be written anew before its last chunk is read
    reader = HeadReader(connection, width)
    gathered: list[bytes] = []  # heads of the new block that is being filled
    last, count = -1, 0

    def write_block() -> None:
        heads = np.frombuffer(b"".join(gathered), np.int8).reshape(-1, width)
        append_heads(connection, count - len(gathered), heads)
        gathered.clear()

    while rows := chunks_with_vectors_after(connection, state, reader, last, _CHUNKS_TOGETHER):
        chunks, vectors = [], []
        for chunk, vector in rows:
            last = chunk.number
            chunks.append((count, chunk_crc32(*chunk._replace(number=count)), last))
            vectors.append((count, vector_crc32(count, *vector), last))
            gathered.append(vector.head)
            count += 1
            if len(gathered) == BLOCK_ROWS:
                write_block()
        connection.executemany("UPDATE chunks SET number = ?, crc32 = ? WHERE number = ?", chunks)
        connection.executemany("UPDATE vectors SET number = ?, crc32 = ? WHERE number = ?", vectors)
    if gathered:
        write_block()
    if count != state.chunks:
        raise Damage(f"{state.chunks} chunks are counted, {count} can be read")
    connection.execute("DELETE FROM heads WHERE block * ? >= ?", (BLOCK_ROWS, count))
    connection.execute("DELETE FROM blocks")
    for block in range(-(-count // BLOCK_ROWS)):
        live = np.packbits(
            np.arange(BLOCK_ROWS) < count - BLOCK_ROWS * block, bitorder="little"
        ).tobytes()
        connection.execute(
            "INSERT INTO blocks (number, changed, crc32, live) VALUES (?, ?, ?, ?)",
            (block, generation, block_crc32(block, live), live),
        )
    connection.execute("INSERT INTO words (words) VALUES ('delete-all')")
    connection.execute(
        "INSERT INTO words (rowid, title, text) SELECT number, coalesce(title, ''), text FROM "
        "chunks ORDER BY number"
    )
    write_state(
        connection,
        replace(state, generation=generation, numbering=state.numbering + 1, next_number=count),
    )


def _wipe_dead_heads(connection: sqlite3.Connection, state: State) -> None:
    """Overwrite the heads of deleted chunks, which stay in their blocks and are passed over.

    No reader has to read such a block again.
    """
    for (block,) in connection.execute("SELECT number FROM blocks").fetchall():
        live = read_live(connection, block) or b""
        stored_squares, codes = read_heads(connection, block)
        heads = np.frombuffer(codes, np.int8).reshape(-1, state.scan_width).copy()
        squares = np.frombuffer(stored_squares, "<i4").copy()
        dead: NDArray[np.int64] = np.setdiff1d(
            np.arange(len(heads)), live_numbers(block, live) - BLOCK_ROWS * block
        )
        if heads[dead].any():
            heads[dead], squares[dead] = 0, 0
            write_heads(connection, block, squares.tobytes(), heads.tobytes())


def _check_room(connection: sqlite3.Connection, path: Path) -> None:
    pages = (
        connection.execute("PRAGMA page_count").fetchone()[0]
        - connection.execute("PRAGMA freelist_count").fetchone()[0]
    )
    needed = pages * connection.execute("PRAGMA page_size").fetchone()[0]
    here, there = path.absolute().parent, folder_of_vacuum()
    if there.stat().st_dev == here.stat().st_dev:
        check_room(here, 2 * needed, f"compacting {path}")
    else:
        check_room(here, needed, f"compacting {path}")
        check_room(there, needed, f"compacting {path}")
