"""What one write transaction does to the tables. Nothing here embeds, locks or commits."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from egemma.index.codes import encode, squares
from egemma.index.damage import chunk_crc32, chunk_hash, document_crc32, vector_crc32
from egemma.index.file import read_state, write_state
from egemma.index.heads import BLOCK_ROWS, LIVE_BYTES, Damage, block_crc32, head_crc32

_LET_IN = 16  # rows between two moments at which other threads may go on
_MANY = 500  # parameters of one statement; SQLite takes 999 everywhere


@dataclass(frozen=True, kw_only=True)
class NewChunk:
    """A chunk on its way into the file, its vector beside it in an array."""

    document: int
    position: int
    start: int
    stop: int
    num_tokens: int
    truncated: bool
    title: str | None
    text: str


@dataclass(frozen=True)
class StoredChunk:
    """What a later version of the same document is compared with."""

    number: int
    hash: bytes
    position: int
    start: int
    stop: int
    num_tokens: int
    truncated: bool


class Change:
    """The bookkeeping of one write: blocks that were touched, numbers given out.

    End it with `finish`, then commit.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.state = read_state(connection)
        self._live: dict[int, bytearray] = {}
        self._touched = False

    def put_document(
        self,
        id_: str,
        title: str | None,
        metadata: str | None,
        source: str | None,
        number: int | None,
    ) -> int:
        """Insert a document, or change the one with this number; returns its number."""
        crc = document_crc32(id_, title, metadata, source)
        self._touched = True
        if number is None:
            cursor = self.connection.execute(
                "INSERT INTO documents (id, title, metadata, source, crc32) VALUES (?, ?, ?, ?, ?)",
                (id_, title, metadata, source, crc),
            )
            return int(cursor.lastrowid or 0)
        self.connection.execute(
            "UPDATE documents SET title = ?, metadata = ?, source = ?, crc32 = ? WHERE number = ?",
            (title, metadata, source, crc, number),
        )
        return number

    def add_chunks(self, chunks: Sequence[NewChunk], vectors: NDArray[np.float32]) -> None:
        """Give each chunk the next number and store it with its vector: (N, D) float32, checked."""
        if chunks:
            self.add_coded(
                chunks, *encode(vectors, self.state.layout), vectors if self.state.floats else None
            )

    def add_coded(
        self,
        chunks: Sequence[NewChunk],
        heads: NDArray[np.int8],
        scales: NDArray[np.float32],
        rests: NDArray[np.uint8],
        vectors: NDArray[np.float32] | None,
    ) -> None:
        """As `add_chunks`, for vectors as `encode` gave them for this file's layout, and their
        floats where the file keeps these.
        """
        first = self.state.next_number
        wide = [None] * len(chunks) if vectors is None else vectors.astype("<f4")
        coded, rows, texts = [], [], []
        for number, (chunk, *parts, exact) in enumerate(
            zip(chunks, heads, scales.astype("<f4"), rests, wide, strict=True), start=first
        ):
            if number % _LET_IN == 0:
                # a search in another thread would otherwise wait for Python's 5 ms, time and again
                time.sleep(0)
            head, scale, rest = (part.tobytes() for part in parts)
            floats = None if exact is None else exact.tobytes()
            coded.append(
                (number, vector_crc32(number, head, scale, rest, floats), scale, rest, floats)
            )
            fields = (
                chunk.document,
                chunk.position,
                chunk.start,
                chunk.stop,
                chunk.num_tokens,
                int(chunk.truncated),
                chunk.title,
            )
            rows.append(
                (
                    number,
                    *fields,
                    chunk_hash(chunk.title, chunk.text),
                    chunk_crc32(number, *fields, chunk.text),
                    chunk.text,
                )
            )
            texts.append((number, chunk.title or "", chunk.text))
        self.connection.executemany(
            "INSERT INTO vectors (number, crc32, scales, rest, floats) VALUES (?, ?, ?, ?, ?)",
            coded,
        )
        self.connection.executemany(
            "INSERT INTO chunks (number, document, position, start, stop, num_tokens, truncated, "
            "title, hash, crc32, text) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        self.connection.executemany(
            "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", texts
        )
        append_heads(self.connection, "heads", first, heads)
        for number in range(first, first + len(chunks)):
            self._mark(number, live=True)
        self.state = replace(
            self.state, next_number=first + len(chunks), chunks=self.state.chunks + len(chunks)
        )

    def move_chunk(self, stored: StoredChunk, chunk: NewChunk) -> None:
        """The same words at another place of their document: the number and the vector stay."""
        fields = (
            chunk.document,
            chunk.position,
            chunk.start,
            chunk.stop,
            stored.num_tokens,
            int(stored.truncated),
            chunk.title,
        )
        self._touched = True
        self.connection.execute(
            "UPDATE chunks SET position = ?, start = ?, stop = ?, crc32 = ? WHERE number = ?",
            (
                chunk.position,
                chunk.start,
                chunk.stop,
                chunk_crc32(stored.number, *fields, chunk.text),
                stored.number,
            ),
        )

    def remove_chunks(self, numbers: Sequence[int]) -> None:
        """Numbers of stored chunks, each once."""
        for part in _parts(numbers):
            marks = ", ".join("?" * len(part))
            texts = self.connection.execute(
                f"SELECT number, coalesce(title, ''), text FROM chunks WHERE number IN ({marks})",
                part,
            ).fetchall()
            if len(texts) != len(part):
                raise Damage(f"{len(part)} chunks are to go, {len(texts)} are there")
            # The full-text table keeps no text, so it must be told what it forgets.
            self.connection.executemany(
                "INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)", texts
            )
            self.connection.execute(f"DELETE FROM chunks WHERE number IN ({marks})", part)
            self.connection.execute(f"DELETE FROM vectors WHERE number IN ({marks})", part)
        for number in numbers:
            self._mark(number, live=False)
        self.state = replace(self.state, chunks=self.state.chunks - len(numbers))

    def remove_documents(self, ids: Iterable[str]) -> int:
        """Returns how many were there."""
        removed = 0
        for part in _parts(list(dict.fromkeys(ids))):
            marks = ", ".join("?" * len(part))
            documents = [
                row[0]
                for row in self.connection.execute(
                    f"SELECT number FROM documents WHERE id IN ({marks})", part
                )
            ]
            inner = ", ".join("?" * len(documents))
            self.remove_chunks(
                [
                    row[0]
                    for row in self.connection.execute(
                        f"SELECT number FROM chunks WHERE document IN ({inner})", documents
                    )
                ]
            )
            self.connection.execute(f"DELETE FROM documents WHERE number IN ({inner})", documents)
            removed += len(documents)
        return removed

    def touch_all(self) -> None:
        """All heads are new: every reader reads them anew."""
        self._touched = True
        self.connection.execute("UPDATE blocks SET changed = ?", (self.state.generation + 1,))

    def finish(self) -> None:
        """Write blocks and facts.

        Afterwards every reader finds out what changed by `blocks.changed`.
        """
        if not self._live and not self._touched:
            return
        generation = self.state.generation + 1
        self.connection.executemany(
            "INSERT OR REPLACE INTO blocks (number, changed, crc32, live) VALUES (?, ?, ?, ?)",
            [
                (block, generation, block_crc32(block, bytes(live)), bytes(live))
                for block, live in sorted(self._live.items())
            ],
        )
        self.state = replace(self.state, generation=generation)
        write_state(self.connection, self.state)

    def _mark(self, number: int, *, live: bool) -> None:
        block, slot = divmod(number, BLOCK_ROWS)
        if block not in self._live:
            row = self.connection.execute(
                "SELECT live, crc32 FROM blocks WHERE number = ?", (block,)
            ).fetchone()
            if row is not None and (
                not isinstance(row[0], bytes)
                or len(row[0]) != LIVE_BYTES
                or block_crc32(block, row[0]) != row[1]
            ):
                raise Damage(f"block {block} of the vectors is not what was stored")
            self._live[block] = bytearray(LIVE_BYTES) if row is None else bytearray(row[0])
        bit = 1 << slot % 8
        if live:
            self._live[block][slot // 8] |= bit
        else:
            self._live[block][slot // 8] &= ~bit


def append_heads(
    connection: sqlite3.Connection, table: str, first: int, heads: NDArray[np.int8]
) -> None:
    """Store (N, width) heads of the numbers from `first` on, behind those that the last block has
    already.
    """
    width = heads.shape[1]
    start = 0
    while start < len(heads):
        block, slot = divmod(first + start, BLOCK_ROWS)
        stop = min(len(heads), start + BLOCK_ROWS - slot)
        codes = np.ascontiguousarray(heads[start:stop])
        old_squares, old_codes = b"", b""
        if slot:
            old_squares, old_codes = stored_heads(connection, table, block)
            if len(old_codes) != slot * width:
                raise Damage(f"block {block} of the vectors is not what was stored")
        new_squares, new_codes = (
            old_squares + squares(codes).astype("<i4").tobytes(),
            old_codes + codes.tobytes(),
        )
        connection.execute(
            f"INSERT OR REPLACE INTO {table} (block, crc32, squares, codes) VALUES (?, ?, ?, ?)",
            (block, head_crc32(block, new_squares, new_codes), new_squares, new_codes),
        )
        start = stop


def stored_heads(connection: sqlite3.Connection, table: str, block: int) -> tuple[bytes, bytes]:
    """Squares and codes of a block, checked."""
    row = connection.execute(
        f"SELECT squares, codes, crc32 FROM {table} WHERE block = ?", (block,)
    ).fetchone()
    if (
        row is None
        or not isinstance(row[0], bytes)
        or not isinstance(row[1], bytes)
        or head_crc32(block, row[0], row[1]) != row[2]
    ):
        raise Damage(f"block {block} of the vectors is not what was stored")
    return row[0], row[1]


def stored_chunks(
    connection: sqlite3.Connection, ids: Sequence[str]
) -> dict[str, tuple[int, list[StoredChunk]]]:
    """For those of the ids that are stored: the document's number, and its chunks by position."""
    found: dict[str, tuple[int, list[StoredChunk]]] = {}
    for part in _parts(ids):
        rows = connection.execute(
            "SELECT d.id, d.number, c.number, c.hash, c.position, c.start, c.stop, c.num_tokens, "
            "c.truncated FROM documents d "
            f"JOIN chunks c ON c.document = d.number WHERE d.id IN ({', '.join('?' * len(part))}) "
            "ORDER BY c.position",
            part,
        )
        for id_, document, number, hash_, position, start, stop, num_tokens, truncated in rows:
            found.setdefault(id_, (document, []))[1].append(
                StoredChunk(number, hash_, position, start, stop, num_tokens, bool(truncated))
            )
    return found


def _parts(values: Sequence[object]) -> Iterable[list[object]]:
    for start in range(0, len(values), _MANY):
        yield list(values[start : start + _MANY])
