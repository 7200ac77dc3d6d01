"""What can be wrong inside an index file, and how it is found: checksums of rows, and counts that must agree."""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from typing import TYPE_CHECKING

import numpy as np

from egemma.index.codes import Layout, squares
from egemma.index.heads import BLOCK_ROWS, block_crc32, head_crc32, live_numbers

if TYPE_CHECKING:
    from egemma.index.file import State


def fields_crc32(*fields: str | int | None) -> int:
    """Of a row of `documents` or `chunks`: numbers in decimal, NULL as empty, NUL between each two, UTF-8."""
    return zlib.crc32("\0".join("" if field is None else str(field) for field in fields).encode())


def document_crc32(id_: str, title: str | None, metadata: str | None, source: str | None) -> int:
    return fields_crc32(id_, title, metadata, source)


def chunk_crc32(number: int, document: int, position: int, start: int, stop: int, num_tokens: int, truncated: int,
                title: str | None, text: str) -> int:
    return fields_crc32(number, document, position, start, stop, num_tokens, truncated, title, text)


def vector_crc32(number: int, head: bytes, scales: bytes, rest: bytes, floats: bytes | None) -> int:
    """Of the chunk's number and all that is stored of its vector, the head too, so that no vector can stand at another's number."""
    crc = zlib.crc32(rest, zlib.crc32(scales, zlib.crc32(head, zlib.crc32(number.to_bytes(8, "little")))))
    return crc if floats is None else zlib.crc32(floats, crc)


def fits(layout: Layout, keeps_floats: bool, scales: object, rest: object, floats: object) -> bool:
    """Whether the columns of a vector have their types and lengths."""
    whole = isinstance(floats, bytes) and len(floats) == 4 * layout.dim if keeps_floats else floats is None
    return (isinstance(scales, bytes) and len(scales) == 4 * layout.scales and isinstance(rest, bytes) and len(rest) == layout.rest_bytes
            and whole)


def chunk_hash(title: str | None, text: str) -> bytes:
    """Of what is embedded: 16 bytes. Equal ones of one document share a vector."""
    return hashlib.sha256(f"{title or ''}\0{text}".encode()).digest()[:16]


def find_damage(connection: sqlite3.Connection, state: State) -> str | None:
    """Read everything and compare it with its checksums and with everything else; the first that does not fit, or None.

    Call inside a transaction, so that all of it is of one moment.
    """
    for (found,) in connection.execute("PRAGMA integrity_check(1)"):
        if found != "ok":
            return str(found)
    return _damaged_document(connection) or _damaged_block(connection, state) or _damaged_chunk(connection, state) or _damaged_words(connection)


def _damaged_document(connection: sqlite3.Connection) -> str | None:
    for id_, title, metadata, source, crc in connection.execute("SELECT id, title, metadata, source, crc32 FROM documents"):
        if not isinstance(id_, str) or document_crc32(id_, title, metadata, source) != crc:
            return f"document {id_!r} is not what was stored"
    for table, column, other in (("chunks", "document", "documents"), ("vectors", "number", "chunks")):
        row = connection.execute(f"SELECT number FROM {table} WHERE {column} NOT IN (SELECT number FROM {other}) LIMIT 1").fetchone()
        if row is not None:
            return f"row {row[0]} of {table} belongs to nothing in {other}"
    row = connection.execute("SELECT id FROM documents WHERE number NOT IN (SELECT document FROM chunks) LIMIT 1").fetchone()
    return None if row is None else f"document {row[0]!r} has no chunks"


def _damaged_block(connection: sqlite3.Connection, state: State) -> str | None:
    blocks = connection.execute("SELECT b.number, b.live, b.crc32, h.squares, h.codes, h.crc32 FROM blocks b LEFT JOIN heads h ON h.block = b.number "
                                "ORDER BY b.number")
    expected = 0
    for expected, (block, live, crc, head_squares, codes, head_crc) in enumerate(blocks, start=1):
        sound = isinstance(live, bytes) and isinstance(head_squares, bytes) and isinstance(codes, bytes) and block == expected - 1
        if not sound or block_crc32(block, live) != crc or head_crc32(block, head_squares, codes) != head_crc:
            return f"block {block} of the vectors is not what was stored"
        heads = np.frombuffer(codes, np.int8)
        if len(heads) % state.scan_width or squares(heads.reshape(-1, state.scan_width)).astype("<i4").tobytes() != head_squares:
            return f"block {block} of the vectors has squares that are not those of its codes"
        numbers = [row[0] for row in connection.execute("SELECT number FROM chunks WHERE number >= ? AND number < ? ORDER BY number",
                                                        (BLOCK_ROWS * block, BLOCK_ROWS * (block + 1)))]
        if numbers != live_numbers(block, live).tolist():
            return f"block {block} of the vectors disagrees with the table chunks on what was deleted"
    if expected != -(-state.next_number // BLOCK_ROWS) or connection.execute("SELECT count(*) FROM heads").fetchone()[0] != expected:
        return f"there are {expected} blocks of vectors for {state.next_number} numbers"
    return None


def _damaged_chunk(connection: sqlite3.Connection, state: State) -> str | None:
    counted = 0
    heads: dict[int, bytes] = {}
    rows = connection.execute("SELECT c.number, c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, c.title, c.text, c.hash, c.crc32, "
                              "v.scales, v.rest, v.floats, v.crc32 FROM chunks c LEFT JOIN vectors v ON v.number = c.number ORDER BY c.number")
    for number, document, position, start, stop, num_tokens, truncated, title, text, hash_, crc, scales, rest, floats, vector_crc in rows:
        counted += 1
        if chunk_crc32(number, document, position, start, stop, num_tokens, truncated, title, text) != crc or chunk_hash(title, text) != hash_:
            return f"chunk {number} is not what was stored"
        block, slot = divmod(number, BLOCK_ROWS)
        if block not in heads:
            heads = {block: connection.execute("SELECT codes FROM heads WHERE block = ?", (block,)).fetchone()[0]}
        head = heads[block][slot * state.scan_width : (slot + 1) * state.scan_width]
        if not fits(state.layout, state.floats, scales, rest, floats) or vector_crc32(number, head, scales, rest, floats) != vector_crc:
            return f"vector {number} is not what was stored"
    return None if counted == state.chunks else f"{state.chunks} chunks are counted, {counted} can be read"


def _damaged_words(connection: sqlite3.Connection) -> str | None:
    """The full-text table keeps no text of its own, so what is compared is what can be found."""
    documents = connection.execute("SELECT count(*) FROM words").fetchone()[0]
    chunks = connection.execute("SELECT count(*) FROM chunks").fetchone()[0]
    return None if documents == chunks else f"the full-text table knows {documents} chunks, there are {chunks}"
