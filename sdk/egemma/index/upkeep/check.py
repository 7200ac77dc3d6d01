"""Read all of an index, and compare it with its checksums and with everything else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from egemma.index.checksums import Damage, chunk_crc32, chunk_hash
from egemma.index.codes import squares
from egemma.index.facts import BLOCK_ROWS, State, read_state
from egemma.index.file import opened, transaction
from egemma.index.records import unsound_documents
from egemma.index.vectors import heads_are_sound, live_is_sound, live_numbers, vector_is_sound

MAX_FINDINGS = 100


def check(path: str | Path) -> list[str]:
    """Read everything, and compare it with its checksums and with everything else.

    The full-text table is made anew beside the file, and compared too.

    Returns:
        What does not fit, at most MAX_FINDINGS; empty for a sound index.

    Raises:
        IndexFileError: no file, no index, or so damaged that it cannot be opened.
    """
    found: list[str] = []
    with opened(path, "check", write=False) as connection:
        try:
            with transaction(connection):
                for finding in findings(connection, read_state(connection)):
                    found.append(finding)
                    if len(found) == MAX_FINDINGS:
                        break
        except (sqlite3.Error, UnicodeDecodeError, Damage) as error:
            found.append(f"{error}; what comes after it was not checked")
    return found


def findings(connection: sqlite3.Connection, state: State) -> Iterator[str]:
    """Yield everything in the file that does not fit; call it inside a transaction.

    SQLite's own errors come as they are: a damaged page can end the reading.
    """
    for (found,) in connection.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield str(found)
    yield from _damaged_documents(connection)
    yield from _damaged_blocks(connection, state)
    yield from _damaged_chunks(connection, state)
    yield from _incomplete_documents(connection)
    yield from _damaged_words(connection)


def _damaged_documents(connection: sqlite3.Connection) -> Iterator[str]:
    yield from unsound_documents(connection)
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
        sound = live_is_sound(block, live, crc) and heads_are_sound(
            block, head_squares, codes, head_crc
        )
        if block != expected - 1 or not sound:
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
    counted, width, layout = 0, state.scan_width, state.layout
    heads: dict[int, bytes] = {}  # of the block that the last chunk is in
    rows = connection.execute(
        "SELECT c.number, c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, "
        "c.title, c.text, c.hash, c.crc32, v.crc32, v.scales, v.rest, v.floats "
        "FROM chunks c LEFT JOIN vectors v ON v.number = c.number ORDER BY c.number"
    )
    for row in rows:
        counted += 1
        chunk, hash_, crc, vector = row[:9], row[9], row[10], row[11:]
        number, (title, text) = chunk[0], chunk[7:]
        if chunk_crc32(*chunk) != crc or chunk_hash(title, text) != hash_:
            yield f"chunk {number} is not what was stored"
        block, slot = divmod(number, BLOCK_ROWS)
        if block not in heads:
            found = connection.execute("SELECT codes FROM heads WHERE block = ?", (block,))
            codes = (found.fetchone() or (None,))[0]
            heads = {block: codes if isinstance(codes, bytes) else b""}
        head = heads[block][slot * width : (slot + 1) * width]
        if not vector_is_sound(layout, state.floats, number, head, *vector):
            yield f"vector {number} is not what was stored"
    if counted != state.chunks:
        yield f"{state.chunks} chunks are counted, {counted} can be read"


def _incomplete_documents(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what no checksum of a row sees: documents that lack a chunk, or have one twice."""
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
                    f"{stop}, where chunk {expected} must begin at {read} or before"
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
    """Yield where the full-text table differs from one that is made again beside the file.

    The table keeps no text of its own, so its rows have no checksums.
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
    """Return the first row in which two tables differ, or None where they are the same."""
    try:
        return next(
            (left or right for left, right in zip_longest(one, other) if left != right), None
        )
    finally:
        one.close()
        other.close()
