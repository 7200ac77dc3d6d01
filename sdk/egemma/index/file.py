"""Connections to an index file: how it is opened and made, its locks, and what its errors mean."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from egemma.identity import ModelIdentity
from egemma.index.checksums import Damage
from egemma.index.facts import (
    APPLICATION_ID,
    FORMAT_VERSION,
    NEXT_TABLES,
    TABLES,
    State,
    write_state,
)
from egemma_core.errors import IndexFileError

BUSY_TIMEOUT_S = 10.0
_SILENT_WAIT_S = 0.25  # a writer that waits longer says so
_PAGE_BYTES = 8192  # eleven 768-wide vectors fit into one, where five fit into 4,096

MIGRATE_HINT = "Open it with that model, or re-embed it with `egemma index migrate`."

logger = logging.getLogger("egemma")

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
    """Turn damage and SQLite's errors into an IndexFileError that says what to do.

    Args:
        doing: what is done to the file in the block, for the message: "open", "search".
    """
    try:
        yield
    except Damage as damage:
        raise IndexFileError(f"{path} is damaged: {damage}.", hint=REBUILD) from damage
    # Python decodes SQLite's messages, and these may quote damaged bytes
    except (sqlite3.Error, UnicodeDecodeError) as error:
        meanings = [meaning for words, meaning in _MEANINGS.items() if words in str(error)]
        meaning = meanings[0] if meanings else f"it may be damaged. {REBUILD}"
        raise IndexFileError(f"{path}: cannot {doing} ({error}): {meaning}") from error


def checked_path(path: str | Path, *, create: bool) -> Path:
    """Return the path of an index that is there, or with `create` of one that can be made."""
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
    """Return a connection, whether it can only read, and whether it takes the file for unchanging.

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
        if frozen and file_bytes(wal_of(path)):
            raise IndexFileError(
                f"{path} cannot be read here: {wal_of(path).name} beside it holds newer changes. "
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
            no_shm = any(text in str(error.__cause__) for text in ("unable to open", "readonly"))
            if not read_only or frozen or not no_shm:
                raise
    raise AssertionError("the loop returns or raises")


def is_blank(connection: sqlite3.Connection) -> bool:
    """Return whether nothing is in the file, not even that it belongs to another program."""
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(tables == 0 and connection.execute("PRAGMA application_id").fetchone()[0] == 0)


def create_tables(connection: sqlite3.Connection, identity: ModelIdentity, *, floats: bool) -> None:
    """Make a blank file an index of this model, unless another process was faster."""
    # of no effect where another process was faster
    connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    _wait_for(connection, "PRAGMA journal_mode = WAL")
    with transaction(connection, "BEGIN IMMEDIATE"):
        if is_blank(connection):
            for statement in TABLES.values():
                connection.execute(statement)
            state = State(identity=identity, scan_width=identity.dims[-1], floats=floats)
            write_state(connection, state)
            # pragmas take no parameters; both are our own integers
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Check that the file is an index of the version that this egemma reads, with its tables."""
    if is_blank(connection):
        raise IndexFileError(f"{path} is empty: it is not an index yet. Fill it with `egemma add`.")
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
    rows = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        # FTS5 makes these four
        "AND NOT (type = 'table' AND name IN "
        "('words_data', 'words_idx', 'words_docsize', 'words_config'))"
    )
    # SQLite quotes the name of a table that was renamed
    found = {name: str(sql).replace('"', "") for name, sql in rows}
    right = TABLES | NEXT_TABLES if "next_vectors" in found else TABLES
    wrong = sorted(name for name in found | right if found.get(name) != right.get(name))
    if wrong:
        raise IndexFileError(
            f"{path} is damaged, or was made by something else: {', '.join(map(str, wrong))} is "
            "not as egemma makes it.",
            hint=REBUILD,
        )


@contextmanager
def opened(path: str | Path, doing: str, *, write: bool) -> Iterator[sqlite3.Connection]:
    """Give a connection of its own to an index that exists, and close it after the block.

    Args:
        doing: what is done to it, for messages: "check", "back up".
        write: refuse a file that cannot be written.
    """
    path = checked_path(path, create=False)
    connection, read_only, _ = connect(path)
    try:
        if write and read_only:
            raise IndexFileError(
                f"{path} cannot be written here, so nothing can {doing} it. Copy it elsewhere "
                "first."
            )
        with typed_errors(path, doing):
            check_format(connection, path)
            yield connection
    finally:
        connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection, begin: str = "BEGIN") -> Iterator[None]:
    """Commit at the end of the block, or roll back after an error."""
    if connection.in_transaction:  # a method called from within another one's block
        raise AssertionError("transactions do not nest")
    try:
        if begin == "BEGIN":
            connection.execute(begin)
        else:
            _wait_for(connection, begin)
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # after a full disk SQLite may have rolled back by itself
            connection.execute("ROLLBACK")
        raise


def _wait_for(connection: sqlite3.Connection, statement: str) -> None:
    """Run a statement that takes a lock; wait for it where another program has it, and log that.

    For the switch to a write-ahead log SQLite does not wait by itself: it would have to raise a
    read lock that both may hold.
    """
    started, logged = time.monotonic(), False
    connection.execute(f"PRAGMA busy_timeout = {round(1000 * _SILENT_WAIT_S)}")
    try:
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                waited = time.monotonic() - started
                if "locked" not in str(error) or waited > BUSY_TIMEOUT_S:
                    raise
            if waited > _SILENT_WAIT_S and not logged:
                logger.warning(
                    "another program is writing to this index; waiting up to %g s for it",
                    BUSY_TIMEOUT_S,
                )
                logged = True
            time.sleep(0.01)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")


def wal_of(path: Path) -> Path:
    """Return the path of the write-ahead log beside an index."""
    return path.with_name(path.name + "-wal")


def file_bytes(path: Path) -> int:
    """Return the size of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # SQLite removes a `-wal` file whenever its last writer leaves
        return 0


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies a file, whatever is written to it; None where there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    """Return what changes when somebody writes to a file; None where there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, file_bytes(wal_of(path))
