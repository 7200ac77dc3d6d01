"""Documents of a store in PostgreSQL: written, deleted, read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.where import And, Condition
from egemma_server.stores.postgres_tables import Run, Tables, literal
from egemma_server.stores.postgres_where import filterable, to_postgres
from egemma_server.stores.rows import Row
from egemma_server.words import words_of

_MAX_POSITION = 16383  # the largest of a tsvector
_MAX_POSITIONS = 255  # of one word in a tsvector
_READ = ("id", "title", "text", "metadata", "num_tokens", "truncated")
_WRITTEN = (
    "title",
    "text",
    "metadata",
    "filter",
    "num_tokens",
    "truncated",
    "embedding",
    "words",
)


def store_documents(
    run: Run, tables: Tables, rows: Sequence[Row], vectors: NDArray[np.float32]
) -> None:
    """Write documents; one whose id is stored takes the other's place.

    Args:
        vectors: (N, D), of the rows.

    Raises:
        psycopg.Error: the server refuses; the transaction is to be given up.
    """
    if not rows:
        return
    documents = tables.names.documents
    numbers = run(
        f"SELECT nextval(pg_get_serial_sequence({literal(documents)}, 'number')) "
        "FROM generate_series(1, %s)",
        len(rows),
    ).fetchall()
    packed = packed_vectors(vectors, half=tables.half)
    entries = [
        (
            number,
            row.id,
            row.title,
            row.text,
            row.metadata,
            filterable(row.metadata),
            row.num_tokens,
            row.truncated,
            tables.stored_vector(vector),
            tsvector(f"{row.title or ''} {row.text}"),
        )
        for (number,), row, vector in zip(numbers, rows, packed, strict=True)
    ]
    updates = ", ".join(f"{column} = excluded.{column}" for column in _WRITTEN)
    statement = (
        f"INSERT INTO {documents} (number, id, {', '.join(_WRITTEN)}) "
        "VALUES (%s, %s, %s, %s, %s, %s::jsonb, %s, %s, %s, %s::tsvector) "
        f"ON CONFLICT (id) DO UPDATE SET {updates}"
    )
    with run.connection.cursor() as cursor:
        # In the order of ids, so that two writers of the same documents do not wait for each other.
        by_id = sorted(entries, key=lambda entry: entry[1])
        cursor.executemany(statement.encode(), by_id)


def delete_documents(run: Run, tables: Tables, ids: Sequence[str]) -> int:
    """Delete documents; return how many were there."""
    documents = tables.names.documents
    # Locked in the order in which `store_documents` locks them: two writers must not wait for each
    # other.
    deleted = run(
        f"DELETE FROM {documents} WHERE number IN (SELECT number FROM {documents} "
        'WHERE id = ANY(%s) ORDER BY id COLLATE "C" FOR UPDATE)',
        list(ids),
    )
    return int(deleted.rowcount)


def read_rows(run: Run, tables: Tables, ids: Sequence[str]) -> dict[str, Row]:
    """Return those of these documents that are stored, by id."""
    found = run(
        f"SELECT {', '.join(_READ)} FROM {tables.names.documents} WHERE id = ANY(%s)", list(ids)
    )
    return {values[0]: Row(**dict(zip(_READ, values, strict=True))) for values in found}


def read_ids(run: Run, tables: Tables, condition: Condition | None) -> list[str]:
    """Return the ids of the documents that a filter is true for, in the order of their adding."""
    test, parameters = sql_test(condition)
    found = run(
        f"SELECT id FROM {tables.names.documents} WHERE {test} ORDER BY number", *parameters
    )
    return [id_ for (id_,) in found]


def count_documents(run: Run, tables: Tables, condition: Condition | None = None) -> int:
    """Return how many documents a filter is true for."""
    test, parameters = sql_test(condition)
    found = run(f"SELECT count(*) FROM {tables.names.documents} WHERE {test}", *parameters)
    return int(found.fetchone()[0])


def sql_test(condition: Condition | None) -> tuple[str, list[Any]]:
    """Return a filter as SQL and its parameters; no filter is true for every document."""
    return to_postgres(And(()) if condition is None else condition)


def packed_vectors(vectors: NDArray[Any], *, half: bool) -> list[bytes]:
    """Return vectors in pgvector's binary form.

    That is channels and a zero as 16 bits each, then the channels, all with the high byte first.
    """
    head = struct.pack(">HH", vectors.shape[1], 0)
    return [head + row.tobytes() for row in vectors.astype(">f2" if half else ">f4")]


def tsvector(text: str) -> str:
    """Return the words of a text with their places, as PostgreSQL reads a tsvector.

    No word holds a quote.
    """
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words_of(text), start=1):
        places.setdefault(word, []).append(min(place, _MAX_POSITION))
    return " ".join(
        f"'{word}':{','.join(map(str, numbers[:_MAX_POSITIONS]))}"
        for word, numbers in places.items()
    )
