"""The tables of a migration: new vectors beside the old ones, until they take their place.

Every function below is called inside a transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index.bulk_reads import chunks_with_new_counts
from egemma.index.checksums import Damage, chunk_crc32, vector_crc32
from egemma.index.codes import Layout, encode
from egemma.index.facts import (
    BLOCK_ROWS,
    FACTS_OF_MIGRATION,
    NEXT_TABLES,
    State,
    read_state,
    write_state,
)
from egemma.index.rows import append_heads

_CHUNKS_TOGETHER = 1024  # whose counts are updated at a time


def make_tables(connection: sqlite3.Connection, identity: ModelIdentity, width: int) -> None:
    """Make the tables of a migration to a model, whose heads have `width` channels."""
    for statement in NEXT_TABLES.values():
        connection.execute(statement)
    _write_facts(connection, identity, width)


def drop_tables(connection: sqlite3.Connection) -> None:
    """Give a migration up: its vectors go, the old ones stay."""
    for table in NEXT_TABLES:
        connection.execute(f"DROP TABLE {table}")
    _forget_facts(connection)


def count_vectors(connection: sqlite3.Connection) -> int:
    """Return how many chunks have a new vector."""
    return int(connection.execute("SELECT count(*) FROM next_vectors").fetchone()[0])


def filled_below(connection: sqlite3.Connection, width: int) -> int:
    """Return below which number every chunk has its new vector, of heads of `width` channels."""
    row = connection.execute(
        "SELECT block, length(codes) FROM next_heads ORDER BY block DESC LIMIT 1"
    ).fetchone()
    return 0 if row is None else BLOCK_ROWS * int(row[0]) + int(row[1]) // width


def add_vectors(
    connection: sqlite3.Connection,
    layout: Layout,
    numbers: Sequence[int],
    vectors: NDArray[np.float32],
    num_tokens: Sequence[int],
    truncated: Sequence[bool],
) -> int:
    """Store new vectors behind those that are there.

    Args:
        numbers: rising, of the chunks; those that were deleted meanwhile get none.
        vectors: (N, D), checked.

    Returns:
        How many were stored.
    """
    heads, scales, rests = encode(vectors, layout)
    first, stop = filled_below(connection, layout.head), numbers[-1] + 1
    keeps_floats = read_state(connection).floats
    alive = {
        row[0]
        for row in connection.execute(
            "SELECT number FROM chunks WHERE number >= ? AND number < ?", (first, stop)
        )
    }
    # a number that is dead keeps zeros
    new_heads = np.zeros((max(0, stop - first), layout.head), np.int8)
    rows, counts = [], []
    for row, number in enumerate(numbers):
        if number in alive:
            new_heads[number - first] = heads[row]
            floats = vectors[row].astype("<f4").tobytes() if keeps_floats else None
            parts = scales[row].astype("<f4").tobytes(), rests[row].tobytes(), floats
            rows.append((number, vector_crc32(number, heads[row].tobytes(), *parts), *parts))
            counts.append((number, int(num_tokens[row]), int(truncated[row])))
    connection.executemany(
        "INSERT INTO next_vectors (number, crc32, scales, rest, floats) VALUES (?, ?, ?, ?, ?)",
        rows,
    )
    connection.executemany(
        "INSERT INTO next_tokens (number, num_tokens, truncated) VALUES (?, ?, ?)", counts
    )
    append_heads(connection, first, new_heads, "next_")
    return len(rows)


def take_the_place(
    connection: sqlite3.Connection, state: State, identity: ModelIdentity, width: int
) -> None:
    """Put the new vectors, which all chunks have, into the place of the old ones."""
    for table in ("next_vectors", "next_tokens"):  # of chunks that were deleted meanwhile
        connection.execute(f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM chunks)")
        count = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        if count != state.chunks:
            raise Damage(f"{state.chunks} chunks are counted, {table} has {count}")
    _update_counts(connection)
    filled = filled_below(connection, width)
    rest = np.zeros((state.next_number - filled, width), np.int8)
    append_heads(connection, filled, rest, "next_")
    for table in ("vectors", "heads"):
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"ALTER TABLE next_{table} RENAME TO {table}")
    connection.execute("DROP TABLE next_tokens")
    _forget_facts(connection)
    connection.execute("UPDATE blocks SET changed = ?", (state.generation + 1,))
    write_state(
        connection,
        replace(
            state,
            identity=identity,
            scan_width=width,
            generation=state.generation + 1,
            model_path=None,
            tuned=None,
        ),
    )


def _update_counts(connection: sqlite3.Connection) -> None:
    """Store what the new model's tokenizer counted, where it differs."""
    last = -1
    while rows := chunks_with_new_counts(connection, last, _CHUNKS_TOGETHER):
        changed = []
        for chunk, num_tokens, truncated in rows:
            new = chunk._replace(num_tokens=num_tokens, truncated=truncated)
            changed.append((num_tokens, truncated, chunk_crc32(*new), chunk.number))
        connection.executemany(
            "UPDATE chunks SET num_tokens = ?, truncated = ?, crc32 = ? WHERE number = ?", changed
        )
        last = rows[-1][0].number


def _write_facts(connection: sqlite3.Connection, identity: ModelIdentity, width: int) -> None:
    """Note which model the vectors in the tables of a migration are of."""
    facts = {
        "next_fingerprint": identity.fingerprint,
        "next_model": identity.name,
        "next_dims": json.dumps(list(identity.dims)),
        "next_parts": json.dumps(dict(identity.parts)),
        "next_scan_width": str(width),
    }
    connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())


def _forget_facts(connection: sqlite3.Connection) -> None:
    """Delete the facts of a migration."""
    connection.execute(f"DELETE FROM facts WHERE {FACTS_OF_MIGRATION}")
