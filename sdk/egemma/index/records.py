"""What an index file holds, read and checked: documents and their chunks.

Together with `vectors` this is the only place that reads rows of content. Every
function is called inside a transaction, so that all it reads is of one moment. A row whose
checksum, type or length does not fit ends the reading with `Damage`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import Damage, chunk_crc32, document_crc32
from egemma.index.facts import State

MAX_PARAMETERS = 500  # of one statement; SQLite takes 999 everywhere

CHUNK_COLUMNS = (
    "c.number, c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, c.title, c.text"
)
DOCUMENT_COLUMNS = "d.id, d.title, d.metadata, d.source"


class StoredDocument(NamedTuple):
    """A row of `documents`, in the order in which its checksum reads it."""

    id: str
    title: str | None
    metadata: str | None  # JSON
    source: str | None  # JSON


class StoredChunk(NamedTuple):
    """A row of `chunks`, in the order in which its checksum reads it."""

    number: int
    document: int
    position: int
    start: int
    stop: int
    num_tokens: int
    truncated: int
    title: str | None
    text: str


class NewChunk(NamedTuple):
    """A chunk on its way into the file: a row of `chunks` that has no number yet."""

    document: int
    position: int
    start: int
    stop: int
    num_tokens: int
    truncated: int  # 0 or 1; the checksum would read True as a word
    title: str | None
    text: str


class ChunkKey(NamedTuple):
    """What a later version of the same document is compared with."""

    number: int
    hash: bytes
    position: int
    start: int
    stop: int
    num_tokens: int
    truncated: bool


def parts_of(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists that are short enough for the parameters of one statement."""
    rest = list(values)
    for start in range(0, len(rest), MAX_PARAMETERS):
        yield rest[start : start + MAX_PARAMETERS]


# Documents


def count_documents(connection: sqlite3.Connection) -> int:
    """Return how many documents there are."""
    return int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])


def find_document(connection: sqlite3.Connection, id_: str) -> tuple[int, StoredDocument] | None:
    """Return a document's number and row, or None where nothing has this id."""
    row = connection.execute(
        f"SELECT d.number, d.crc32, {DOCUMENT_COLUMNS} FROM documents d WHERE d.id = ?", (id_,)
    ).fetchone()
    if row is not None:
        return row[0], checked_document(row[1], row[2:])
    if connection.execute("SELECT 1 FROM documents NOT INDEXED WHERE id = ?", (id_,)).fetchone():
        raise Damage(f"document {id_!r} is there, and SQLite's index of ids does not know it")
    return None


def documents_with_source(connection: sqlite3.Connection) -> Iterator[StoredDocument]:
    """Yield the documents that ingestion put in."""
    for crc, *fields in connection.execute(
        f"SELECT d.crc32, {DOCUMENT_COLUMNS} FROM documents d WHERE d.source IS NOT NULL"
    ):
        yield checked_document(crc, fields)


def ids_where(
    connection: sqlite3.Connection, condition: str, parameters: Sequence[object]
) -> list[str]:
    """Return the ids of the documents that a filter's SQL is true for, in the order of adding."""
    rows = connection.execute(
        f"SELECT id FROM documents WHERE {condition} ORDER BY number", tuple(parameters)
    )
    return [row[0] for row in rows]


def unsound_documents(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is wrong with each document whose row is not what was stored."""
    for crc, *fields in connection.execute(
        f"SELECT d.crc32, {DOCUMENT_COLUMNS} FROM documents d NOT INDEXED"
    ):
        try:
            checked_document(crc, fields)
        except Damage as damage:
            yield str(damage)


def check_documents(connection: sqlite3.Connection, num_chunks: int) -> None:
    """Check what no hit's checksum can see: documents that a filter or a list passes over."""
    for found in unsound_documents(connection):
        raise Damage(found)
    documents = count_documents(connection)
    chunks, with_chunks = connection.execute(
        "SELECT count(*), count(DISTINCT c.document) FROM chunks c JOIN documents d "
        "ON d.number = c.document"
    ).fetchone()
    if (chunks, with_chunks) != (num_chunks, documents):
        raise Damage(
            f"{num_chunks} chunks of {documents} documents are counted, {chunks} of {with_chunks} "
            "can be found"
        )


def checked_document(crc: object, fields: Sequence[Any]) -> StoredDocument:
    """Return the document of a row with DOCUMENT_COLUMNS, when it is what was stored."""
    document = StoredDocument._make(fields)
    if not isinstance(document.id, str) or document_crc32(*document) != crc:
        raise Damage(f"document {document.id!r} is not what was stored")
    return document


# Chunks


def chunk_with_document(
    connection: sqlite3.Connection, number: int
) -> tuple[StoredChunk, StoredDocument]:
    """Return a chunk and the document that it is of."""
    row = connection.execute(
        f"SELECT c.crc32, d.crc32, {CHUNK_COLUMNS}, {DOCUMENT_COLUMNS} FROM chunks c "
        "JOIN documents d ON d.number = c.document WHERE c.number = ?",
        (number,),
    ).fetchone()
    if row is None:
        raise Damage(f"chunk {number} cannot be looked up")
    return checked_chunk(row[0], row[2:11]), checked_document(row[1], row[11:])


def chunks_of(connection: sqlite3.Connection, document: int) -> Iterator[StoredChunk]:
    """Yield the chunks of a document by position."""
    for crc, *fields in connection.execute(
        f"SELECT c.crc32, {CHUNK_COLUMNS} FROM chunks c WHERE c.document = ? "
        "ORDER BY c.position, c.number",
        (document,),
    ):
        yield checked_chunk(crc, fields)


def chunk_keys(
    connection: sqlite3.Connection, ids: Iterable[str]
) -> dict[str, tuple[int, list[ChunkKey]]]:
    """Return, for those of the ids that are stored, the document's number and its chunks' keys."""
    found: dict[str, tuple[int, list[ChunkKey]]] = {}
    for part in parts_of(ids):
        rows = connection.execute(
            "SELECT d.id, d.number, c.number, c.hash, c.position, c.start, c.stop, c.num_tokens, "
            "c.truncated FROM documents d JOIN chunks c ON c.document = d.number WHERE d.id IN "
            f"({', '.join('?' * len(part))}) ORDER BY c.position",
            part,
        )
        for id_, document, *fields, truncated in rows:
            key = ChunkKey._make((*fields, bool(truncated)))
            found.setdefault(id_, (document, []))[1].append(key)
    return found


# The numbers of the chunks whose document passes a filter.
CHUNKS_WHERE = (
    "SELECT chunks.number FROM documents JOIN chunks ON chunks.document = documents.number WHERE {}"
)


def numbers_where(
    connection: sqlite3.Connection, state: State, condition: str, parameters: Sequence[object]
) -> NDArray[np.int64]:
    """Return (n,) the numbers of the chunks whose document a filter's SQL is true for."""
    rows = connection.execute(CHUNKS_WHERE.format(condition), tuple(parameters)).fetchall()
    numbers = np.fromiter((row[0] for row in rows), np.int64, len(rows))
    if len(rows) and not 0 <= numbers.min() <= numbers.max() < state.next_number:
        raise Damage(
            f"chunks have the numbers {numbers.min()} to {numbers.max()}, given out were 0 to "
            f"{state.next_number - 1}"
        )
    return numbers


def checked_chunk(crc: object, fields: Sequence[Any]) -> StoredChunk:
    """Return the chunk of a row with CHUNK_COLUMNS, when it is what was stored."""
    chunk = StoredChunk._make(fields)
    if chunk_crc32(*chunk) != crc:
        raise Damage(f"chunk {chunk.number} is not what was stored")
    return chunk
