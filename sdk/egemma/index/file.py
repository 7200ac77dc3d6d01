"""The index file: how it is opened, made, brought up to date and understood, and what its errors
mean.

docs/index-format.md describes the file for other languages; the tables below are the same thing in
SQL.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egemma.identity import ModelIdentity
from egemma.index.codes import Layout
from egemma.index.damage import facts_crc32, find_damage
from egemma.index.heads import Damage
from egemma_core.errors import IndexFileError

APPLICATION_ID = 0x65474D41
FORMAT_VERSION = 2
BUSY_TIMEOUT_S = 10.0
_WAIT_UNTOLD_S = 0.25  # a writer that waits longer says so
MAX_WIDTH = 16_384
_PAGE_BYTES = 8192  # eleven 768-wide vectors fit into one, where five fit into 4,096

logger = logging.getLogger("egemma")

TABLES = {
    "facts": "CREATE TABLE facts (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL)",
    "documents": "CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, "
    "title TEXT, metadata TEXT, source TEXT, "
    "crc32 INTEGER NOT NULL)",
    "chunks": "CREATE TABLE chunks (number INTEGER PRIMARY KEY, document INTEGER NOT NULL, "
    "position INTEGER NOT NULL, start INTEGER NOT NULL, "
    "stop INTEGER NOT NULL, num_tokens INTEGER NOT NULL, truncated INTEGER NOT NULL, title TEXT, "
    "hash BLOB NOT NULL, "
    "crc32 INTEGER NOT NULL, text TEXT NOT NULL)",
    "chunks_of_document": "CREATE INDEX chunks_of_document ON chunks (document)",
    "vectors": "CREATE TABLE vectors (number INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL, scales "
    "BLOB NOT NULL, rest BLOB NOT NULL, floats BLOB)",
    "blocks": "CREATE TABLE blocks (number INTEGER PRIMARY KEY, changed INTEGER NOT NULL, crc32 "
    "INTEGER NOT NULL, live BLOB NOT NULL)",
    "blocks_by_change": "CREATE INDEX blocks_by_change ON blocks (changed)",
    "heads": "CREATE TABLE heads (block INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL, squares BLOB "
    "NOT NULL, codes BLOB NOT NULL)",
    "words": "CREATE VIRTUAL TABLE words USING fts5(title, text, content='', tokenize='unicode61 "
    "remove_diacritics 2')",
}
# While a migration to another model is half way: its vectors, and what its tokenizer counted. All
# three are there, or none.
NEXT_TABLES = {
    "next_vectors": TABLES["vectors"].replace("vectors", "next_vectors"),
    "next_heads": TABLES["heads"].replace("heads", "next_heads"),
    "next_tokens": "CREATE TABLE next_tokens (number INTEGER PRIMARY KEY, num_tokens INTEGER NOT "
    "NULL, truncated INTEGER NOT NULL)",
}


@dataclass(frozen=True, kw_only=True)
class State:
    """The table `facts` at one moment: what this file holds, of which model, and how far it has
    come.
    """

    identity: ModelIdentity
    scan_width: int  # channels of a head; one of the model's widths
    floats: bool  # vectors are kept as float32 beside their codes
    generation: int  # rises with every write
    numbering: int  # rises when chunks get new numbers
    next_number: int  # of the next chunk; none below it is given out twice
    chunks: int  # how many there are
    model_path: str | None  # where the bundle was; a hint
    tuned: str | None  # JSON of the last `tune`

    @property
    def layout(self) -> Layout:
        return Layout.of(self.identity.dims, self.scan_width)

    def to_facts(self) -> dict[str, str | None]:
        return {
            "fingerprint": self.identity.fingerprint,
            "model": self.identity.name,
            "dims": json.dumps(list(self.identity.dims)),
            "parts": json.dumps(dict(self.identity.parts)),
            "scan_width": str(self.scan_width),
            "floats": str(int(self.floats)),
            "generation": str(self.generation),
            "numbering": str(self.numbering),
            "next_number": str(self.next_number),
            "chunks": str(self.chunks),
            "model_path": self.model_path,
            "tuned": self.tuned,
        }


def read_state(connection: sqlite3.Connection) -> State:
    """
    Raises:
        Damage: a fact is missing or impossible.
    """
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    try:
        identity = ModelIdentity.from_json(
            json.dumps(
                {
                    "fingerprint": facts["fingerprint"],
                    "name": facts["model"],
                    "dims": json.loads(facts["dims"]),
                    "parts": json.loads(facts["parts"]),
                }
            )
        )
        state = State(
            identity=identity,
            scan_width=int(facts["scan_width"]),
            floats=facts["floats"] == "1",
            generation=int(facts["generation"]),
            numbering=int(facts["numbering"]),
            next_number=int(facts["next_number"]),
            chunks=int(facts["chunks"]),
            model_path=facts.get("model_path"),
            tuned=facts.get("tuned"),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"its table `facts` lacks or misspells something ({error})") from error
    if facts.get("crc32") != facts_crc32(state.to_facts()):
        raise Damage("its table `facts` is not what was stored")
    counts = (state.generation, state.numbering, state.next_number, state.chunks)
    if (
        state.scan_width not in identity.dims
        or min(counts) < 0
        or state.chunks > state.next_number
        or identity.dim > MAX_WIDTH
    ):
        raise Damage(f"its table `facts` does not fit together: {facts}")
    return state


def write_state(connection: sqlite3.Connection, state: State) -> None:
    """Inside a write transaction."""
    facts = state.to_facts()
    for name, value in (facts | {"crc32": facts_crc32(facts)}).items():
        if value is None:
            connection.execute("DELETE FROM facts WHERE name = ?", (name,))
        else:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What an index file says about itself."""

    path: str
    fingerprint: str
    model: str
    model_path: str | None
    dims: tuple[int, ...]
    scan_width: int
    floats: bool
    documents: int
    chunks: int
    truncated_chunks: int
    file_bytes: int
    format_version: int
    migrating_to: str | None  # the model that `migrate` is on its way to
    tuned: Mapping[str, Any] | None  # what `tune` found, and for how many chunks
    # the first that was found; None when there is none, or nobody asked for a check
    damage: str | None


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
                raise IndexFileError(
                    f"{path} is empty: it is not an index yet. Fill it with `egemma add`."
                )
            check_format(connection, path)
            connection.execute("BEGIN")
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


REBUILD = (
    "Look at it with `egemma index check`; restore it from a backup, or make it anew with "
    "`egemma add`."
)
# SQLite's words -> what they mean here, and the next step. Python 3.10 has no error codes on its
# exceptions.
_MEANINGS = {
    "file is not a database": "it is not an index, or its beginning is damaged. Give the path of "
    f"an index. {REBUILD}",
    "malformed": f"it is damaged. {REBUILD}",
    "Could not decode": f"it is damaged: a stored text is not UTF-8. {REBUILD}",
    "no such table": f"it is damaged: a table is missing. {REBUILD}",
    "no such column": f"it is damaged: a column is missing. {REBUILD}",
    "no such module": "this Python's SQLite was built without FTS5. Install another build of "
    "Python or SQLite.",
    "is full": "the disk is full. Nothing of this call was stored; free some space and repeat it.",
    "locked": f"another program has been writing to it for {BUSY_TIMEOUT_S:g} s. Wait for it and "
    "repeat.",
    "readonly": "it cannot be written here. Check its permissions and those of its folder.",
    "unable to open": "it cannot be opened. Check its permissions and those of its folder.",
    "disk I/O error": "the disk reports an error. Check its free space and health; nothing of this "
    "call was stored.",
    "too big": "a text is too long for one row (1 GB). Split it.",
}


@contextmanager
def typed_errors(path: Path, doing: str) -> Iterator[None]:
    """Tell SQLite's errors and found damage as ours, with what they mean and the next step."""
    try:
        yield
    except Damage as damage:
        raise IndexFileError(f"{path} is damaged: {damage}. {REBUILD}") from damage
    # Python decodes SQLite's messages, and these may quote damaged bytes
    except (sqlite3.Error, UnicodeDecodeError) as error:
        meanings = [meaning for words, meaning in _MEANINGS.items() if words in str(error)]
        meaning = meanings[0] if meanings else f"it may be damaged. {REBUILD}"
        raise IndexFileError(f"{path}: cannot {doing} ({error}): {meaning}") from error


def checked_path(path: str | Path, *, create: bool) -> Path:
    path = Path(path)
    if "\0" in str(path):
        raise IndexFileError(
            f"path={str(path)!r} holds a NUL character; no file can have that name."
        )
    if path.is_dir():
        raise IndexFileError(f"{path} is a folder: an index is one file. Give a file name in it.")
    if not path.exists():
        if not create:
            raise IndexFileError(
                f"{path}: no such file. Make an index with `egemma add {path} ...`."
            )
        if not path.parent.is_dir():
            raise IndexFileError(f"{path.parent}: no such folder. Make it first.")
    return path


def connect(path: Path) -> tuple[sqlite3.Connection, bool, bool]:
    """A connection; whether it can only read; whether it reads a file taken for unchanging.

    In a folder that cannot be written SQLite cannot make the `-shm` file that readers of a WAL file
    share, so the file is then read as unchanging, and `Index` compares its time and size before
    each search.
    """
    read_only = path.exists() and not os.access(path, os.W_OK)
    for mode in (
        ("mode=ro", "mode=ro&immutable=1")
        if read_only
        else ("mode=rw" if path.exists() else "mode=rwc",)
    ):
        frozen = "immutable" in mode
        if frozen and file_bytes(_wal(path)):
            raise IndexFileError(
                f"{path} cannot be read here: {_wal(path).name} beside it holds newer changes. "
                "Copy both to a folder of your own, or close the program that writes them."
            )
        with typed_errors(path, "open"):
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?{mode}",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with typed_errors(path, "open"):
                # a file from elsewhere gets no say in what SQL does
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA synchronous = FULL")
                # deleted texts leave the file where that costs no extra write
                connection.execute("PRAGMA secure_delete = FAST")
                # what a power cut needs on Apple's systems; no effect elsewhere
                connection.execute("PRAGMA fullfsync = ON")
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection, read_only, frozen
        except IndexFileError as error:
            connection.close()
            if (
                not read_only
                or frozen
                or not any(words in str(error) for words in ("unable to open", "readonly"))
            ):
                raise
    raise AssertionError("the loop returns or raises")


def is_blank(connection: sqlite3.Connection) -> bool:
    """Nothing is in the file, not even that it belongs to another program."""
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(tables == 0 and connection.execute("PRAGMA application_id").fetchone()[0] == 0)


def create_tables(connection: sqlite3.Connection, identity: ModelIdentity, *, floats: bool) -> None:
    """Make a blank file an index of this model, unless another process was faster."""
    # of no effect where another process was faster
    connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    _switch_to_wal(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if is_blank(connection):
            for statement in TABLES.values():
                connection.execute(statement)
            write_state(
                connection,
                State(
                    identity=identity,
                    scan_width=identity.dims[-1],
                    floats=floats,
                    generation=0,
                    numbering=0,
                    next_number=0,
                    chunks=0,
                    model_path=None,
                    tuned=None,
                ),
            )
            # pragmas take no parameters; both are our own integers
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check_format(connection: sqlite3.Connection, path: Path) -> None:
    """
    Raises:
        IndexFileError: another program's file, another version, or tables that are not ours.
    """
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    if application_id != APPLICATION_ID:
        raise IndexFileError(
            f"{path} is an SQLite file of another program (application_id {application_id:#x}). "
            "Give the path of an index, or of a file that does not exist yet."
        )
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version != FORMAT_VERSION:
        raise IndexFileError(
            f"{path} has format version {version}, and this egemma reads version {FORMAT_VERSION}.",
            hint="Export it as JSON lines with the egemma that wrote it (`egemma index export`), "
            "and import these here (`egemma index import`).",
        )
    made = dict(
        connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND "
            "NOT (type = 'table' AND name IN "
            # FTS5 makes these four
            "('words_data', 'words_idx', 'words_docsize', 'words_config'))"
        ).fetchall()
    )
    # SQLite quotes the name of a table that was renamed
    made = {name: str(sql).replace('"', "") for name, sql in made.items()}
    wanted = TABLES | NEXT_TABLES if "next_vectors" in made else TABLES
    if made != wanted:
        strange = sorted(
            name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name)
        )
        raise IndexFileError(
            f"{path} is damaged, or was made by something else: {', '.join(map(str, strange))} is "
            f"not as egemma makes it. {REBUILD}"
        )


@contextmanager
def transaction(connection: sqlite3.Connection, begin: str = "BEGIN") -> Iterator[None]:
    """Commit at the end of the block, or roll back."""
    if connection.in_transaction:  # a method called from within another one's block
        raise AssertionError("transactions do not nest")
    try:
        if begin == "BEGIN":
            connection.execute(begin)
        else:
            _begin_to_write(connection, begin)
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # after a full disk SQLite may have rolled back by itself
            connection.execute("ROLLBACK")
        raise


def _begin_to_write(connection: sqlite3.Connection, begin: str) -> None:
    """Take the write lock, and say so where it takes long."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    connection.execute(f"PRAGMA busy_timeout = {round(1000 * _WAIT_UNTOLD_S)}")
    told = False
    try:
        while True:
            try:
                connection.execute(begin)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            if not told:
                logger.warning(
                    "another program is writing to this index; waiting up to %g s for it",
                    BUSY_TIMEOUT_S,
                )
                told = True
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Another process that switches the same new file holds the lock for a moment, and here SQLite
    does not wait by itself: it would have to raise a read lock that both may hold.
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


def facts_of(connection: sqlite3.Connection, path: Path, *, check: bool) -> IndexFacts:
    """Inside a read transaction."""
    state = read_state(connection)
    documents = connection.execute("SELECT count(*) FROM documents").fetchone()[0]
    truncated = connection.execute("SELECT count(*) FROM chunks WHERE truncated").fetchone()[0]
    to = connection.execute("SELECT value FROM facts WHERE name = 'next_model'").fetchone()
    return IndexFacts(
        path=str(path),
        fingerprint=state.identity.fingerprint,
        model=state.identity.name,
        model_path=state.model_path,
        dims=state.identity.dims,
        scan_width=state.scan_width,
        floats=state.floats,
        documents=documents,
        chunks=state.chunks,
        truncated_chunks=truncated,
        file_bytes=file_bytes(path) + file_bytes(_wal(path)),
        format_version=FORMAT_VERSION,
        migrating_to=None if to is None else str(to[0]),
        tuned=None if state.tuned is None else json.loads(state.tuned),
        damage=find_damage(connection, state) if check else None,
    )


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # SQLite removes a `-wal` file whenever its last writer leaves
        return 0


def file_identity(path: Path) -> tuple[int, int] | None:
    """The same for the same file, whatever is written to it; None where there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when somebody writes to a file that this process takes for unchanging; None once
    it is gone.
    """
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, file_bytes(_wal(path))
