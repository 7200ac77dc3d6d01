"""The index file: how it is opened, made and understood, and what its errors mean. So that other languages can read it:

    PRAGMA application_id    0x65474D41 ("eGMA")
    PRAGMA user_version      1, the version of this description
    journal mode             WAL; written with synchronous=FULL

    facts       name TEXT PRIMARY KEY, value TEXT
                  fingerprint   what the model's manifest.json says; decides which model may read and write here
                  model         its name, for people
                  dims          JSON list of the trained widths, falling; vectors are stored at the first
                  model_path    where the bundle was when the file was made; a hint, absent when unknown
    documents   number INTEGER PRIMARY KEY; id TEXT UNIQUE; title TEXT or NULL; metadata TEXT, a JSON object, or NULL
                num_tokens INTEGER, of the whole text with its prompt; truncated INTEGER, 1 if only the beginning was embedded
                vector BLOB, dims[0] little-endian float32 of unit length; text TEXT, without its prompt
                vector_crc32, text_crc32 INTEGER, see the functions of these names: SQLite does not notice a flipped bit

All text is UTF-8 without NUL. `text` stands last, so that reading all vectors never reads the pages of long texts.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from egemma_core.errors import IndexFileError

if TYPE_CHECKING:
    from egemma.embedder import Embedder

APPLICATION_ID = 0x65474D41
FORMAT_VERSION = 1
BUSY_TIMEOUT_S = 10.0

_SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL)",
    "CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT, metadata TEXT, "
    "num_tokens INTEGER NOT NULL, truncated INTEGER NOT NULL, vector_crc32 INTEGER NOT NULL, vector BLOB NOT NULL, "
    "text_crc32 INTEGER NOT NULL, text TEXT NOT NULL)",
)


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What an index file says about itself."""

    path: str
    fingerprint: str
    model: str
    model_path: str | None
    dims: tuple[int, ...]
    documents: int
    truncated_documents: int
    file_bytes: int
    format_version: int
    damage: str | None  # the first that was found; None when there is none, or nobody asked for a check


def describe_index(path: str | Path, *, check: bool = False) -> IndexFacts:
    """What an index file says about itself; needs no model.

    Args:
        check: read the whole file and look for damage.

    Raises:
        IndexFileError: no file, no index, or too damaged to say anything.
    """
    path = checked_path(path, create=False)
    connection, _, _ = connect(path)
    try:
        with typed_errors(path, "read"):
            if is_blank(connection):
                raise IndexFileError(f"{path} is empty: it is not an index yet. Fill it with `egemma add`.")
            return facts_of(connection, path, check=check)
    finally:
        connection.close()


def is_new(path: str | Path) -> bool:
    """No file yet, or one whose maker died before its first commit."""
    path = checked_path(path, create=True)
    if not path.exists():
        return True
    connection, _, _ = connect(path)
    try:
        with typed_errors(path, "read"):
            return is_blank(connection)
    finally:
        connection.close()


def model_name(embedder: Embedder) -> str:
    """What the user may know the model by, made unmistakable by the beginning of its fingerprint."""
    manifest = embedder.manifest
    return f"{manifest.source.get('model', 'an unnamed model')} {manifest.target} ({embedder.fingerprint[:12]})"


REBUILD = "Restore it from a copy, or make it anew with `egemma add`."
# SQLite's words -> what they mean here, and the next step. Python 3.10 has no error codes on its exceptions.
_MEANINGS = {
    "file is not a database": f"it is not an index, or its beginning is damaged. Give the path of an index. {REBUILD}",
    "malformed": f"it is damaged. {REBUILD}",
    "Could not decode": f"it is damaged: a stored text is not UTF-8. {REBUILD}",
    "no such table": f"it is damaged: a table is missing. {REBUILD}",
    "no such column": f"it is damaged: a column is missing. {REBUILD}",
    "is full": "the disk is full. Nothing of this call was stored; free some space and repeat it.",
    "locked": f"another program has been writing to it for {BUSY_TIMEOUT_S:g} s. Wait for it and repeat.",
    "readonly": "it cannot be written here. Check its permissions and those of its folder.",
    "unable to open": "it cannot be opened. Check its permissions and those of its folder.",
    "disk I/O error": "the disk reports an error. Check its free space and health; nothing of this call was stored.",
    "too big": "a text is too long for one row (1 GB). Split it.",
}


@contextmanager
def typed_errors(path: Path, doing: str) -> Iterator[None]:
    """Tell SQLite's errors as ours, with what they mean and the next step."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # Python decodes SQLite's messages, and these may quote damaged bytes
        meanings = [meaning for words, meaning in _MEANINGS.items() if words in str(error)]
        meaning = meanings[0] if meanings else f"it may be damaged. {REBUILD}"
        raise IndexFileError(f"{path}: cannot {doing} ({error}): {meaning}") from error


def checked_path(path: str | Path, *, create: bool) -> Path:
    path = Path(path)
    if "\0" in str(path):
        raise IndexFileError(f"path={str(path)!r} holds a NUL character; no file can have that name.")
    if path.is_dir():
        raise IndexFileError(f"{path} is a folder: an index is one file. Give a file name in it.")
    if not path.exists():
        if not create:
            raise IndexFileError(f"{path}: no such file. Make an index with `egemma add {path} ...`.")
        if not path.parent.is_dir():
            raise IndexFileError(f"{path.parent}: no such folder. Make it first.")
    return path


def connect(path: Path) -> tuple[sqlite3.Connection, bool, bool]:
    """A connection; whether it can only read; whether it reads a file taken for unchanging.

    In a folder that cannot be written SQLite cannot make the `-shm` file that readers of a WAL file share, so the file is then
    read as unchanging, and `Index` compares its time and size before each search.
    """
    read_only = path.exists() and not os.access(path, os.W_OK)
    for mode in ("mode=ro", "mode=ro&immutable=1") if read_only else ("mode=rw" if path.exists() else "mode=rwc",):
        frozen = "immutable" in mode
        if frozen and _file_bytes(_wal(path)):
            raise IndexFileError(f"{path} cannot be read here: {_wal(path).name} beside it holds newer changes. "
                                 "Copy both to a folder of your own, or close the program that writes them.")
        with typed_errors(path, "open"):
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_TIMEOUT_S,
                                         isolation_level=None, check_same_thread=False)
        try:
            with typed_errors(path, "open"):
                connection.execute("PRAGMA trusted_schema = OFF")  # a file from elsewhere gets no say in what SQL does
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA fullfsync = ON")        # what a power cut needs on Apple's systems; no effect elsewhere
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection, read_only, frozen
        except IndexFileError as error:
            connection.close()
            if not read_only or frozen or not any(words in str(error) for words in ("unable to open", "readonly")):
                raise
    raise AssertionError("the loop returns or raises")


def is_blank(connection: sqlite3.Connection) -> bool:
    """Nothing is in the file, not even that it belongs to another program."""
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(tables == 0 and connection.execute("PRAGMA application_id").fetchone()[0] == 0)


def create_tables(connection: sqlite3.Connection, embedder: Embedder) -> None:
    _switch_to_wal(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if is_blank(connection):  # or else another process was faster
            for statement in _SCHEMA:
                connection.execute(statement)
            facts = {"fingerprint": embedder.fingerprint, "model": model_name(embedder), "dims": json.dumps(list(embedder.dims))}
            connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")  # pragmas take no parameters; both are our own integers
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Another process that switches the same new file holds the lock for a moment, and here SQLite does not wait by itself: it
    would have to raise a read lock that both may hold.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def read_facts(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    if application_id != APPLICATION_ID:
        raise IndexFileError(f"{path} is an SQLite file of another program (application_id {application_id:#x}). "
                             "Give the path of an index, or of a file that does not exist yet.")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT_VERSION:
        raise IndexFileError(f"{path} has format version {version}, this egemma reads {FORMAT_VERSION}. Update egemma.")
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    missing = {"fingerprint", "model", "dims"} - facts.keys()
    if missing or not re.fullmatch(r"\[\d+(, \d+)*\]", facts["dims"]):
        raise IndexFileError(f"{path} is damaged: its table `facts` lacks {sorted(missing) or 'a list of widths'}. {REBUILD}")
    return facts


def facts_of(connection: sqlite3.Connection, path: Path, *, check: bool) -> IndexFacts:
    facts = read_facts(connection, path)
    documents, truncated = connection.execute("SELECT count(*), coalesce(sum(truncated), 0) FROM documents").fetchone()
    return IndexFacts(path=str(path), fingerprint=facts["fingerprint"], model=facts["model"], model_path=facts.get("model_path"),
                      dims=tuple(json.loads(facts["dims"])), documents=documents, truncated_documents=truncated,
                      file_bytes=_file_bytes(path) + _file_bytes(_wal(path)), format_version=FORMAT_VERSION,
                      damage=_find_damage(connection) if check else None)


def _find_damage(connection: sqlite3.Connection) -> str | None:
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        return str(found)
    rows = connection.execute("SELECT id, vector, vector_crc32, text_crc32, title, metadata, num_tokens, truncated, text FROM documents")
    for id_, vector, crc_of_vector, crc_of_text, *fields in rows:
        sound = isinstance(id_, str) and isinstance(vector, bytes) and vector_crc32(id_, vector) == crc_of_vector
        if not sound or text_crc32(id_, *fields) != crc_of_text:
            return f"document {id_!r} is not what was stored"
    return None


def vector_crc32(id_: str, vector: bytes) -> int:
    """Of the id and the vector as stored, so that a vector cannot stand at another's id either."""
    return zlib.crc32(vector, zlib.crc32(id_.encode()))


def text_crc32(*fields: str | int | None) -> int:
    """Of id, title, metadata, num_tokens, truncated and text as stored: numbers in decimal, NULL as empty, NUL between each two."""
    return zlib.crc32("\0".join("" if field is None else str(field) for field in fields).encode())


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # SQLite removes a `-wal` file whenever its last writer leaves
        return 0


def stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when somebody writes to a file that this process takes for unchanging; None once it is gone."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, _file_bytes(_wal(path))
