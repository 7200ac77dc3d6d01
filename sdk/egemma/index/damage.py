"""What can be wrong inside an index file, and how it is found: checksums of rows, and counts that
must agree.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from egemma.index.codes import Layout, squares
from egemma.index.heads import BLOCK_ROWS, block_crc32, head_crc32, live_numbers

if TYPE_CHECKING:
    from egemma.index.file import State


def fields_crc32(*fields: str | int | None) -> int:
    """Of a row of `documents` or `chunks`: numbers in decimal, NULL as empty, NUL between each two,
    UTF-8.
    """
    # A text stays as it is: str() of an enumeration's member, which is stored as its text, would be
    # its name.
    return zlib.crc32(
        "\0".join(
            "" if field is None else field if isinstance(field, str) else str(field)
            for field in fields
        ).encode()
    )


def facts_crc32(facts: Mapping[str, str | None]) -> str:
    """Of the names and values of all facts that are there, by name; in decimal, as facts are
    texts.
    """
    return str(
        fields_crc32(
            *(
                part
                for name, value in sorted(facts.items())
                if value is not None
                for part in (name, value)
            )
        )
    )


def document_crc32(id_: str, title: str | None, metadata: str | None, source: str | None) -> int:
    return fields_crc32(id_, title, metadata, source)


def chunk_crc32(
    number: int,
    document: int,
    position: int,
    start: int,
    stop: int,
    num_tokens: int,
    truncated: int,
    title: str | None,
    text: str,
) -> int:
    return fields_crc32(number, document, position, start, stop, num_tokens, truncated, title, text)


def vector_crc32(number: int, head: bytes, scales: bytes, rest: bytes, floats: bytes | None) -> int:
    """Of the chunk's number and all that is stored of its vector, the head too, so that no vector
    can stand at another's number.
    """
    crc = zlib.crc32(
        rest,
        zlib.crc32(scales, zlib.crc32(head, zlib.crc32(number.to_bytes(8, "little", signed=True)))),
    )
    return crc if floats is None else zlib.crc32(floats, crc)


def fits(layout: Layout, keeps_floats: bool, scales: object, rest: object, floats: object) -> bool:
    """Whether the columns of a vector have their types and lengths."""
    whole = (
        isinstance(floats, bytes) and len(floats) == 4 * layout.dim
        if keeps_floats
        else floats is None
    )
    return (
        isinstance(scales, bytes)
        and len(scales) == 4 * layout.scales
        and isinstance(rest, bytes)
        and len(rest) == layout.rest_bytes
        and whole
    )


def chunk_hash(title: str | None, text: str) -> bytes:
    """Of what is embedded: 16 bytes. Equal ones of one document share a vector."""
    return hashlib.sha256("\0".join((title or "", text)).encode()).digest()[:16]


def find_damage(connection: sqlite3.Connection, state: State) -> str | None:
    """Read everything and compare it with its checksums and with everything else; the first that
    does not fit, or None.

    Call inside a transaction, so that all of it is of one moment.
    """
    return next(all_damage(connection, state), None)


def all_damage(connection: sqlite3.Connection, state: State) -> Iterator[str]:
    """As `find_damage`, everything that does not fit.

    SQLite's own errors come as they are: a damaged page can end the reading.
    """
    for (found,) in connection.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield str(found)
    yield from _damaged_documents(connection)
    yield from _damaged_blocks(connection, state)
    yield from _damaged_chunks(connection, state)
    yield from _damaged_tilings(connection)
    yield from _damaged_words(connection)


def find_document_damage(connection: sqlite3.Connection, num_chunks: int) -> str | None:
    """What would make a filter, or a list of ids, pass a document over without a word: its row, or
    its place in an index of SQLite's.
    """
    found = next(_documents_of_another_checksum(connection), None)
    if found is not None:
        return found
    documents = connection.execute("SELECT count(*) FROM documents").fetchone()[0]
    chunks, with_chunks = connection.execute(
        "SELECT count(*), count(DISTINCT c.document) FROM chunks c JOIN documents d ON d.number = "
        "c.document"
    ).fetchone()
    return (
        None
        if (chunks, with_chunks) == (num_chunks, documents)
        else f"{num_chunks} chunks of {documents} documents are counted, {chunks} of {with_chunks} "
        "can be found"
    )


def _documents_of_another_checksum(connection: sqlite3.Connection) -> Iterator[str]:
    for id_, title, metadata, source, crc in connection.execute(
        "SELECT id, title, metadata, source, crc32 FROM documents NOT INDEXED"
    ):
        if not isinstance(id_, str) or document_crc32(id_, title, metadata, source) != crc:
            yield f"document {id_!r} is not what was stored"


def _damaged_documents(connection: sqlite3.Connection) -> Iterator[str]:
    yield from _documents_of_another_checksum(connection)
    for table, column, other in (
        ("chunks", "document", "documents"),
        ("vectors", "number", "chunks"),
    ):
        for (number,) in connection.execute(
            f"SELECT number FROM {table} WHERE {column} NOT IN (SELECT number FROM {other})"
        ):
            yield f"row {number} of {table} belongs to nothing in {other}"
    for (id_,) in connection.execute(
        "SELECT id FROM documents WHERE number NOT IN (SELECT document FROM chunks)"
    ):
        yield f"document {id_!r} has no chunks"


def _damaged_blocks(connection: sqlite3.Connection, state: State) -> Iterator[str]:
    blocks = connection.execute(
        "SELECT b.number, b.changed, b.live, b.crc32, h.squares, h.codes, h.crc32 FROM blocks b "
        "LEFT JOIN heads h ON h.block = b.number ORDER BY b.number"
    )
    expected = 0
    for expected, (block, changed, live, crc, head_squares, codes, head_crc) in enumerate(
        blocks, start=1
    ):
        sound = (
            isinstance(live, bytes)
            and isinstance(head_squares, bytes)
            and isinstance(codes, bytes)
            and block == expected - 1
        )
        if (
            not sound
            or block_crc32(block, live) != crc
            or head_crc32(block, head_squares, codes) != head_crc
        ):
            yield f"block {block} of the vectors is not what was stored"
            continue
        if not isinstance(changed, int) or not 0 <= changed <= state.generation:
            yield (
                f"block {block} of the vectors was changed in write {changed}, the file has seen "
                f"{state.generation}"
            )
        heads = np.frombuffer(codes, np.int8)
        if (
            len(heads) != min(BLOCK_ROWS, state.next_number - BLOCK_ROWS * block) * state.scan_width
            or squares(heads.reshape(-1, state.scan_width)).astype("<i4").tobytes() != head_squares
        ):
            yield (
                f"block {block} of the vectors has squares that are not those of its codes, or "
                "codes of too many or too few chunks"
            )
        numbers = [
            row[0]
            for row in connection.execute(
                "SELECT number FROM chunks WHERE number >= ? AND number < ? ORDER BY number",
                (BLOCK_ROWS * block, BLOCK_ROWS * (block + 1)),
            )
        ]
        if numbers != live_numbers(block, live).tolist():
            yield (
                f"block {block} of the vectors disagrees with the table chunks on what was deleted"
            )
    if (
        expected != -(-state.next_number // BLOCK_ROWS)
        or connection.execute("SELECT count(*) FROM heads").fetchone()[0] != expected
    ):
        yield f"there are {expected} blocks of vectors for {state.next_number} numbers"


def _damaged_chunks(connection: sqlite3.Connection, state: State) -> Iterator[str]:
    counted = 0
    heads: dict[int, bytes] = {}
    rows = connection.execute(
        "SELECT c.number, c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, "
        "c.title, c.text, c.hash, c.crc32, "
        "v.scales, v.rest, v.floats, v.crc32 FROM chunks c LEFT JOIN vectors v ON v.number = "
        "c.number ORDER BY c.number"
    )
    for (
        number,
        document,
        position,
        start,
        stop,
        num_tokens,
        truncated,
        title,
        text,
        hash_,
        crc,
        scales,
        rest,
        floats,
        vector_crc,
    ) in rows:
        counted += 1
        if (
            chunk_crc32(number, document, position, start, stop, num_tokens, truncated, title, text)
            != crc
            or chunk_hash(title, text) != hash_
        ):
            yield f"chunk {number} is not what was stored"
        block, slot = divmod(number, BLOCK_ROWS)
        if block not in heads:
            row = connection.execute("SELECT codes FROM heads WHERE block = ?", (block,)).fetchone()
            heads = {block: row[0] if row is not None and isinstance(row[0], bytes) else b""}
        head = heads[block][slot * state.scan_width : (slot + 1) * state.scan_width]
        if (
            not fits(state.layout, state.floats, scales, rest, floats)
            or vector_crc32(number, head, scales, rest, floats) != vector_crc
        ):
            yield f"vector {number} is not what was stored"
    if counted != state.chunks:
        yield f"{state.chunks} chunks are counted, {counted} can be read"


def _damaged_tilings(connection: sqlite3.Connection) -> Iterator[str]:
    """What no checksum of a row sees: a document that lacks a chunk, or has one twice."""
    rows = connection.execute(
        "SELECT d.id, c.position, c.start, c.stop, length(c.text) FROM chunks c JOIN documents d "
        "ON d.number = c.document "
        "ORDER BY c.document, c.position, c.number"
    )
    for id_, chunks in groupby(rows, key=itemgetter(0)):
        read = 0
        for expected, (_, position, start, stop, characters) in enumerate(chunks):
            if position != expected or not 0 <= start <= read or stop - start != characters:
                yield (
                    f"document {id_!r} is not whole: its chunk {position} spans {start} to "
                    f"{stop}, where chunk {expected} from {read} on is wanted"
                )
                break
            read = max(read, stop)


# Every instance of every word, summed up by word: the same sums from the same instances, and hardly
# from others.
_INSTANCES = (
    "SELECT term, count(*), sum((doc % 1000003 * 7919 + (col = 'text') * 104729 + offset * 31) % "
    "1000003), "
    "sum(doc % 999983 * (offset + 1) % 999983) FROM temp.{} GROUP BY term"
)
# What reads all instances passes over the index by which one word is found, so each word is looked
# up as well.
_LOOKED_UP = (
    "SELECT again.term FROM temp.again_words again LEFT JOIN temp.stored_words stored ON "
    "stored.term = again.term "
    "WHERE stored.cnt IS NOT again.cnt OR stored.doc IS NOT again.doc LIMIT 1"
)
_AGAIN = ("again", "again_instances", "stored_instances", "again_words", "stored_words")


def _damaged_words(connection: sqlite3.Connection) -> Iterator[str]:
    """The full-text table keeps no text of its own, so it is made again beside the file, and the
    two are compared.
    """
    documents = connection.execute("SELECT count(*) FROM words").fetchone()[0]
    chunks = connection.execute("SELECT count(*) FROM chunks").fetchone()[0]
    if documents != chunks:
        yield f"the full-text table knows {documents} chunks, there are {chunks}"
        return
    for name in _AGAIN:
        connection.execute(f"DROP TABLE IF EXISTS temp.{name}")
    try:
        connection.execute(
            "CREATE VIRTUAL TABLE temp.again USING fts5(title, text, content='', "
            "tokenize='unicode61 remove_diacritics 2')"
        )
        connection.execute(
            "INSERT INTO temp.again (rowid, title, text) SELECT number, coalesce(title, ''), text "
            "FROM chunks ORDER BY number"
        )
        connection.execute(
            "CREATE VIRTUAL TABLE temp.again_instances USING fts5vocab('temp', 'again', 'instance')"
        )
        connection.execute(
            "CREATE VIRTUAL TABLE temp.stored_instances USING fts5vocab('main', 'words', "
            "'instance')"
        )
        differs = _first_difference(
            *(
                connection.execute(_INSTANCES.format(table))
                for table in ("again_instances", "stored_instances")
            )
        )
        if differs is not None:
            yield f"the full-text table finds {differs[0]!r} in other chunks than have it"
        connection.execute(
            "CREATE VIRTUAL TABLE temp.again_words USING fts5vocab('temp', 'again', 'row')"
        )
        connection.execute(
            "CREATE VIRTUAL TABLE temp.stored_words USING fts5vocab('main', 'words', 'row')"
        )
        missed = connection.execute(_LOOKED_UP).fetchone()
        if missed is not None:
            yield f"the full-text table does not find {missed[0]!r} where it looks it up"
        # Lengths by chunk and of all chunks together: what BM25 weighs words with.
        # an emptied table notes its zeros, a new one nothing
        for table in ("docsize", "data WHERE id = 1") if chunks else ("docsize",):
            if (
                _first_difference(
                    *(
                        connection.execute(f"SELECT * FROM {where}_{table}")
                        for where in ("temp.again", "main.words")
                    )
                )
                is not None
            ):
                yield "the full-text table has other lengths of texts than there are"
                break
    finally:
        for name in _AGAIN:
            connection.execute(f"DROP TABLE IF EXISTS temp.{name}")


def _first_difference(one: sqlite3.Cursor, other: sqlite3.Cursor) -> tuple[Any, ...] | None:
    """The first row that only one of them has, or has at that place; None where all rows are the
    same.
    """
    try:
        return next(
            (left or right for left, right in zip_longest(one, other) if left != right), None
        )
    finally:
        one.close()
        other.close()
