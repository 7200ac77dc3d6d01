"""Older index files: one numbered step per format version, each a transaction of its own, so an
interrupted upgrade begins again.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable

import numpy as np

from egemma.identity import ModelIdentity
from egemma.index.codes import check_vectors
from egemma.index.file import (
    APPLICATION_ID,
    FORMAT_VERSION,
    TABLES,
    State,
    file_version,
    transaction,
    write_state,
)
from egemma.index.heads import Damage
from egemma.index.rows import Change, NewChunk
from egemma_core.errors import ConfigError, InputError

_TOGETHER = 1024  # documents that are read and written at a time


def upgrade(connection: sqlite3.Connection) -> None:
    """Bring an index file that can be written up to FORMAT_VERSION; one that is there, or is none
    of ours, stays as it is.

    Raises:
        Damage: the old file is not what was stored.
    """
    while (
        connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        and file_version(connection) in STEPS
    ):
        with transaction(connection, "BEGIN IMMEDIATE"):
            version = file_version(connection)  # another process may have been faster
            if version in STEPS:
                STEPS[version](connection)
                connection.execute(f"PRAGMA user_version = {version + 1}")


def _one_to_two(connection: sqlite3.Connection) -> None:
    """Version 1 kept each document whole, with a float32 vector, in one table."""
    made = {
        (kind, name)
        for kind, name in connection.execute(
            "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
    }
    if made != {("table", "facts"), ("table", "documents")}:
        raise Damage(
            "version 1 has the tables facts and documents, this has "
            f"{', '.join(sorted(str(name) for _, name in made))}"
        )
    old = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    try:
        identity = ModelIdentity(
            fingerprint=old["fingerprint"],
            name=str(old["model"]),
            dims=tuple(json.loads(old["dims"])),
            parts={},
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise Damage(f"its table `facts` lacks or misspells something ({error})") from error
    connection.execute("ALTER TABLE documents RENAME TO documents_of_version_1")
    for name, statement in TABLES.items():
        if name != "facts":
            connection.execute(statement)
    connection.execute("DELETE FROM facts")
    write_state(
        connection,
        State(
            identity=identity,
            scan_width=identity.dims[-1],
            floats=False,
            generation=0,
            numbering=0,
            next_number=0,
            chunks=0,
            model_path=old.get("model_path"),
            tuned=None,
        ),
    )
    change = Change(connection)
    rows = connection.execute(
        "SELECT id, title, metadata, num_tokens, truncated, text, text_crc32, vector, vector_crc32 "
        "FROM documents_of_version_1 ORDER BY number"
    )
    while some := rows.fetchmany(_TOGETHER):
        chunks, vectors = [], []
        for id_, title, metadata, num_tokens, truncated, text, text_crc, vector, vector_crc in some:
            fields = "\0".join(
                "" if part is None else str(part)
                for part in (id_, title, metadata, num_tokens, truncated, text)
            )
            sound = isinstance(vector, bytes) and len(vector) == 4 * identity.dim
            if (
                not sound
                or zlib.crc32(fields.encode()) != text_crc
                or zlib.crc32(vector, zlib.crc32(id_.encode())) != vector_crc
            ):
                raise Damage(f"document {id_!r} is not what was stored")
            number = change.put_document(id_, title or None, metadata, None, None)
            chunks.append(
                NewChunk(
                    document=number,
                    position=0,
                    start=0,
                    stop=len(text),
                    num_tokens=num_tokens,
                    truncated=bool(truncated),
                    title=title or None,
                    text=text,
                )
            )
            vectors.append(np.frombuffer(vector, "<f4"))
        try:
            change.add_chunks(chunks, check_vectors(np.stack(vectors), identity.dim))
        except InputError as error:
            raise Damage(f"a vector is not what was stored ({error})") from error
    connection.execute("DROP TABLE documents_of_version_1")
    change.finish()


STEPS: dict[int, Callable[[sqlite3.Connection], None]] = {1: _one_to_two}
assert max(STEPS) + 1 == FORMAT_VERSION
