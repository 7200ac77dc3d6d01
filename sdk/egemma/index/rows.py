"""What one write does to the tables: the only place that writes rows of content.

Nothing here embeds, locks or commits.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import (
    Damage,
    block_crc32,
    chunk_crc32,
    chunk_hash,
    document_crc32,
    head_crc32,
    vector_crc32,
)
from egemma.index.codes import encode, squares
from egemma.index.facts import BLOCK_ROWS, LIVE_BYTES, read_state, write_state
from egemma.index.records import NewChunk, StoredDocument, chunk_keys, parts_of
from egemma.index.vectors import read_heads, read_live

_YIELD_ROWS = 16  # rows between two moments at which other threads may go on


class Change:
    """One write, and its bookkeeping: blocks that were touched, numbers given out.

    End it with `finish`, then commit.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.state = read_state(connection)
        self._live: dict[int, bytearray] = {}
        self._touched = False

    def put_document(self, document: StoredDocument, number: int | None) -> int:
        """Insert a document, or change the one with this number, and return its number."""
        self._touched = True
        id_, *fields = *document, document_crc32(*document)
        if number is None:
            cursor = self.connection.execute(
                "INSERT INTO documents (id, title, metadata, source, crc32) VALUES (?, ?, ?, ?, ?)",
                (id_, *fields),
            )
            return int(cursor.lastrowid or 0)
        self.connection.execute(
            "UPDATE documents SET title = ?, metadata = ?, source = ?, crc32 = ? WHERE number = ?",
            (*fields, number),
        )
        return number

    def replace_documents(self, documents: Sequence[StoredDocument]) -> list[int]:
        """Put documents, of different ids, in place of what has these; return their numbers.

        They have no chunks yet.
        """
        stored = chunk_keys(self.connection, [document.id for document in documents])
        self.remove_chunks([key.number for _, keys in stored.values() for key in keys])
        return [
            self.put_document(document, stored[document.id][0] if document.id in stored else None)
            for document in documents
        ]

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
        """Store chunks like `add_chunks`, from vectors that are rounded already.

        Args:
            heads, scales, rests: as `encode` gave them for this file's layout.
            vectors: their floats, where the file keeps these.
        """
        first = self.state.next_number
        wide = [None] * len(chunks) if vectors is None else vectors.astype("<f4")
        coded, rows, texts = [], [], []
        for number, (chunk, *parts, exact) in enumerate(
            zip(chunks, heads, scales.astype("<f4"), rests, wide, strict=True), start=first
        ):
            if number % _YIELD_ROWS == 0:
                # a search in another thread would otherwise wait for Python's 5 ms, time and again
                time.sleep(0)
            head, scale, rest = (part.tobytes() for part in parts)
            floats = None if exact is None else exact.tobytes()
            crc = vector_crc32(number, head, scale, rest, floats)
            coded.append((number, crc, scale, rest, floats))
            hash_ = chunk_hash(chunk.title, chunk.text)
            rows.append((number, *chunk, hash_, chunk_crc32(number, *chunk)))
            texts.append((number, chunk.title or "", chunk.text))
        self.connection.executemany(
            "INSERT INTO vectors (number, crc32, scales, rest, floats) VALUES (?, ?, ?, ?, ?)",
            coded,
        )
        self.connection.executemany(
            "INSERT INTO chunks (number, document, position, start, stop, num_tokens, truncated, "
            "title, text, hash, crc32) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        self.connection.executemany(
            "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", texts
        )
        append_heads(self.connection, first, heads)
        for number in range(first, first + len(chunks)):
            self._mark(number, live=True)
        self.state = replace(
            self.state, next_number=first + len(chunks), chunks=self.state.chunks + len(chunks)
        )

    def move_chunk(self, number: int, chunk: NewChunk) -> None:
        """Move a stored chunk within its document; its number, counts and vector stay."""
        self._touched = True
        self.connection.execute(
            "UPDATE chunks SET position = ?, start = ?, stop = ?, crc32 = ? WHERE number = ?",
            (chunk.position, chunk.start, chunk.stop, chunk_crc32(number, *chunk), number),
        )

    def remove_chunks(self, numbers: Sequence[int]) -> None:
        """Delete chunks, given as numbers that are stored, each once."""
        for part in parts_of(numbers):
            marks = ", ".join("?" * len(part))
            texts = self.connection.execute(
                f"SELECT number, coalesce(title, ''), text FROM chunks WHERE number IN ({marks})",
                part,
            ).fetchall()
            if len(texts) != len(part):
                raise Damage(f"{len(part)} chunks are to go, {len(texts)} are there")
            # the full-text table keeps no texts: to delete from it takes the same texts again
            self.connection.executemany(
                "INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)", texts
            )
            self.connection.execute(f"DELETE FROM chunks WHERE number IN ({marks})", part)
            self.connection.execute(f"DELETE FROM vectors WHERE number IN ({marks})", part)
        for number in numbers:
            self._mark(number, live=False)
        self.state = replace(self.state, chunks=self.state.chunks - len(numbers))

    def remove_documents(self, ids: Iterable[str]) -> int:
        """Delete documents with their chunks, and return how many of the ids were stored."""
        removed = 0
        for part in parts_of(list(dict.fromkeys(ids))):
            marks = ", ".join("?" * len(part))
            removing = f"(SELECT number FROM documents WHERE id IN ({marks}))"
            chunks = self.connection.execute(
                f"SELECT number FROM chunks WHERE document IN {removing}", part
            )
            self.remove_chunks([row[0] for row in chunks])
            removed += self.connection.execute(
                f"DELETE FROM documents WHERE number IN {removing}", part
            ).rowcount
        return removed

    def touch_all(self) -> None:
        """Mark all blocks as changed, so that every reader reads them anew."""
        self._touched = True
        self.connection.execute("UPDATE blocks SET changed = ?", (self.state.generation + 1,))

    def finish(self) -> None:
        """Write blocks and facts; readers learn from `blocks.changed` what to read again."""
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
            self._live[block] = bytearray(read_live(self.connection, block) or LIVE_BYTES)
        bit = 1 << slot % 8
        if live:
            self._live[block][slot // 8] |= bit
        else:
            self._live[block][slot // 8] &= ~bit


def append_heads(
    connection: sqlite3.Connection, first: int, heads: NDArray[np.int8], prefix: str = ""
) -> None:
    """Store (N, W) heads of the numbers from `first` on, behind those that are there.

    Args:
        prefix: "next_" for the heads of a migration.
    """
    width = heads.shape[1]
    start = 0
    while start < len(heads):
        block, slot = divmod(first + start, BLOCK_ROWS)
        stop = min(len(heads), start + BLOCK_ROWS - slot)
        codes = np.ascontiguousarray(heads[start:stop])
        old_squares, old_codes = b"", b""
        if slot:
            old_squares, old_codes = read_heads(connection, block, prefix)
            if len(old_codes) != slot * width:
                raise Damage(f"block {block} of the vectors is not what was stored")
        new_squares = old_squares + squares(codes).astype("<i4").tobytes()
        write_heads(connection, block, new_squares, old_codes + codes.tobytes(), prefix)
        start = stop


def write_heads(
    connection: sqlite3.Connection, block: int, squares: bytes, codes: bytes, prefix: str = ""
) -> None:
    """Store the heads of a block in place of what it has."""
    connection.execute(
        f"INSERT OR REPLACE INTO {prefix}heads (block, crc32, squares, codes) VALUES (?, ?, ?, ?)",
        (block, head_crc32(block, squares, codes), squares, codes),
    )
