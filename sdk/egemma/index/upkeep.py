"""Looking after an index file: check it, copy it, make it smaller.

None of this needs a model; all of it works while others search.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egemma.index.damage import all_damage, chunk_crc32, fits, vector_crc32
from egemma.index.file import (
    BUSY_TIMEOUT_S,
    IndexFacts,
    State,
    check_format,
    checked_path,
    connect,
    describe_index,
    file_bytes,
    is_blank,
    read_state,
    transaction,
    typed_errors,
    write_state,
)
from egemma.index.heads import BLOCK_ROWS, LIVE_BYTES, Damage, block_crc32, head_crc32, live_numbers
from egemma.index.rows import append_heads
from egemma.index.upgrade import upgrade
from egemma_core.errors import IndexFileError

MOST_FINDINGS = 100
_DEAD_SHARE = 8  # chunks get new numbers when more than one number in so many is dead
_TOGETHER = 512  # chunks that are renumbered at a time
_PAGES = 4096  # that a backup copies between two looks at Ctrl-C
_SLACK = 1.05  # of an estimate of disk space


@contextmanager
def opened(path: str | Path, doing: str, *, write: bool) -> Iterator[sqlite3.Connection]:
    """A connection of its own to an index that exists, with errors told as ours."""
    path = checked_path(path, create=False)
    connection, read_only, _ = connect(path)
    try:
        if write and read_only:
            raise IndexFileError(
                f"{path} cannot be written here, so nothing can {doing} it. Copy it elsewhere "
                "first."
            )
        with typed_errors(path, doing):
            if is_blank(connection):
                raise IndexFileError(
                    f"{path} is empty: it is not an index yet. Fill it with `egemma add`."
                )
            if not read_only:
                upgrade(connection)
            check_format(connection, path)
            yield connection
    finally:
        connection.close()


def check(path: str | Path) -> list[str]:
    """Read everything, and compare it with its checksums and with everything else; the full-text
    table is made anew beside it.

    Returns:
        What does not fit, at most MOST_FINDINGS; empty for a sound index.

    Raises:
        IndexFileError: no file, no index, or so damaged that it cannot be opened.
    """
    found: list[str] = []
    with opened(path, "check", write=False) as connection:
        try:
            with transaction(connection):
                for finding in all_damage(connection, read_state(connection)):
                    found.append(finding)
                    if len(found) == MOST_FINDINGS:
                        break
        except (sqlite3.Error, UnicodeDecodeError, Damage) as error:
            found.append(f"{error}; what comes after it was not checked")
    return found


def backup(path: str | Path, destination: str | Path, *, force: bool = False) -> IndexFacts:
    """Copy an index as it is at this moment, also while others write to it; at the end the copy is
    checked and then gets its name.

    Args:
        destination: a file that does not exist yet.
        force: replace it if it does.

    Returns:
        What the copy says about itself.

    Raises:
        IndexFileError: the destination exists or is in use, there is no room, or the index is
            damaged.
    """
    path, destination = checked_path(path, create=False), checked_path(destination, create=True)
    if destination.exists() and destination.samefile(path):
        raise IndexFileError(f"{destination} is the index itself. Give the name of another file.")
    _check_replaceable(destination, force)
    with written_beside(destination) as made:
        made.chmod(path.stat().st_mode & 0o777)
        # one state, from the first page to the last
        with opened(path, "back up", write=False) as connection, transaction(connection):
            needed = (
                connection.execute("PRAGMA page_count").fetchone()[0]
                * connection.execute("PRAGMA page_size").fetchone()[0]
            )
            check_room(destination.absolute().parent, needed, f"a copy of {path}")
            with typed_errors(made, "write"):
                copy = sqlite3.connect(made, isolation_level=None)
                try:
                    # the whole file is flushed once, before it gets its name
                    copy.execute("PRAGMA synchronous = OFF")
                    connection.backup(copy, pages=_PAGES)
                finally:
                    copy.close()
        facts = describe_index(made, check=True)
        if facts.damage is not None:
            raise IndexFileError(
                f"{path} cannot be backed up: {facts.damage}. An older backup is the better one; "
                "look at it with "
                "`egemma index check`."
            )
        _check_replaceable(destination, force)
    return replace(facts, path=str(destination))


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What `compact` did."""

    chunks: int
    renumbered: bool  # chunks have new, dense numbers; a graph must be built again
    bytes_before: int
    bytes_after: int


def compact(path: str | Path) -> CompactReport:
    """Give back the space of what was deleted, and wipe what was left of it.

    Chunks get new numbers where more than one number in eight is dead. Searches go on meanwhile;
    writers wait, and give up after some seconds where this takes longer. A crash at any point
    leaves the index as it was or as it will be. It needs free disk as large as the index twice:
    once beside it, once in SQLite's folder for temporary files.

    Raises:
        IndexFileError: read-only, no room, damaged, or half way through a migration.
    """
    path = checked_path(path, create=False)
    with opened(path, "compact", write=True) as connection:
        before = file_bytes(path) + file_bytes(path.with_name(path.name + "-wal"))
        _check_room_to_compact(connection, path)
        with transaction(connection, "BEGIN IMMEDIATE"):
            state = read_state(connection)
            if "next_fingerprint" in (
                row[0] for row in connection.execute("SELECT name FROM facts")
            ):
                raise IndexFileError(
                    f"{path} is half way through a migration. Go on with `egemma index migrate`, "
                    "or give it up with `egemma index abandon`; then compact it."
                )
            renumber = (state.next_number - state.chunks) * _DEAD_SHARE > state.next_number
            if renumber:
                _renumber(connection, state)
            else:
                _wipe_dead_heads(connection, state)
            connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        # not where a reader is still in an older state; then the last one does it
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return CompactReport(
            chunks=state.chunks,
            renumbered=renumber,
            bytes_before=before,
            bytes_after=file_bytes(path),
        )


def _renumber(connection: sqlite3.Connection, state: State) -> None:
    """Give chunks the numbers from 0 on, in their old order.

    Everything is checked on the way: damage must not get a new checksum.
    """
    layout, generation = state.layout, state.generation + 1
    old_block, old_codes = -1, b""
    gathered: list[bytes] = []  # heads of the new block that is being filled
    last, count = -1, 0

    def write_block() -> None:
        heads = np.frombuffer(b"".join(gathered), np.int8).reshape(-1, layout.head)
        append_heads(connection, "heads", count - len(gathered), heads)
        gathered.clear()

    while rows := connection.execute(
        "SELECT c.number, c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, "
        "c.title, c.text, c.crc32, "
        "v.crc32, v.scales, v.rest, v.floats FROM chunks c LEFT JOIN vectors v ON v.number = "
        "c.number "
        "WHERE c.number > ? ORDER BY c.number LIMIT ?",
        (last, _TOGETHER),
    ).fetchall():
        chunks, vectors = [], []
        for number, *fields, crc, vector_crc, scales, rest, floats in rows:
            if chunk_crc32(number, *fields) != crc:
                raise Damage(f"chunk {number} is not what was stored")
            if number // BLOCK_ROWS != old_block:
                old_block = number // BLOCK_ROWS
                old_codes = _heads(connection, old_block)[1]
            slot = number % BLOCK_ROWS
            head = old_codes[slot * layout.head : (slot + 1) * layout.head]
            if (
                not fits(layout, state.floats, scales, rest, floats)
                or vector_crc32(number, head, scales, rest, floats) != vector_crc
            ):
                raise Damage(f"vector {number} is not what was stored")
            chunks.append((count, chunk_crc32(count, *fields), number))
            vectors.append((count, vector_crc32(count, head, scales, rest, floats), number))
            gathered.append(head)
            count += 1
            # its number is not above that of the old block, which is in memory
            if len(gathered) == BLOCK_ROWS:
                write_block()
        connection.executemany("UPDATE chunks SET number = ?, crc32 = ? WHERE number = ?", chunks)
        connection.executemany("UPDATE vectors SET number = ?, crc32 = ? WHERE number = ?", vectors)
        last = rows[-1][0]
    if gathered:
        write_block()
    if count != state.chunks:
        raise Damage(f"{state.chunks} chunks are counted, {count} can be read")
    connection.execute("DELETE FROM heads WHERE block * ? >= ?", (BLOCK_ROWS, count))
    connection.execute("DELETE FROM blocks")
    for block in range(-(-count // BLOCK_ROWS)):
        live = np.packbits(
            np.arange(BLOCK_ROWS) < count - BLOCK_ROWS * block, bitorder="little"
        ).tobytes()
        connection.execute(
            "INSERT INTO blocks (number, changed, crc32, live) VALUES (?, ?, ?, ?)",
            (block, generation, block_crc32(block, live), live),
        )
    connection.execute("INSERT INTO words (words) VALUES ('delete-all')")
    connection.execute(
        "INSERT INTO words (rowid, title, text) SELECT number, coalesce(title, ''), text FROM "
        "chunks ORDER BY number"
    )
    write_state(
        connection,
        replace(state, generation=generation, numbering=state.numbering + 1, next_number=count),
    )


def _wipe_dead_heads(connection: sqlite3.Connection, state: State) -> None:
    """A deleted chunk's head stays in its block, where it is passed over.

    Nobody needs to read such a block again.
    """
    for block, live, crc in connection.execute("SELECT number, live, crc32 FROM blocks").fetchall():
        if (
            not isinstance(live, bytes)
            or len(live) != LIVE_BYTES
            or block_crc32(block, live) != crc
        ):
            raise Damage(f"block {block} of the vectors is not what was stored")
        head_squares, codes = _heads(connection, block)
        heads = np.frombuffer(codes, np.int8).reshape(-1, state.scan_width).copy()
        squares = np.frombuffer(head_squares, "<i4").copy()
        dead: NDArray[np.int64] = np.setdiff1d(
            np.arange(len(heads)), live_numbers(block, live) - BLOCK_ROWS * block
        )
        if heads[dead].any():
            heads[dead], squares[dead] = 0, 0
            connection.execute(
                "UPDATE heads SET squares = ?, codes = ?, crc32 = ? WHERE block = ?",
                (
                    squares.tobytes(),
                    heads.tobytes(),
                    head_crc32(block, squares.tobytes(), heads.tobytes()),
                    block,
                ),
            )


def _heads(connection: sqlite3.Connection, block: int) -> tuple[bytes, bytes]:
    """Squares and codes of a block, checked."""
    row = connection.execute(
        "SELECT squares, codes, crc32 FROM heads WHERE block = ?", (block,)
    ).fetchone()
    if (
        row is None
        or not isinstance(row[0], bytes)
        or not isinstance(row[1], bytes)
        or head_crc32(block, row[0], row[1]) != row[2]
    ):
        raise Damage(f"block {block} of the vectors is not what was stored")
    return row[0], row[1]


@contextmanager
def written_beside(destination: Path) -> Iterator[Path]:
    """An empty file in the same folder, to be filled; at the end it is flushed to the disk and gets
    the name, or after an error is gone.
    """
    try:
        _remove_leftovers(destination)
        handle, name = tempfile.mkstemp(
            prefix=f".{destination.name}.{os.getpid()}.", suffix=".part", dir=destination.parent
        )
    except OSError as error:
        raise IndexFileError(
            f"{destination} cannot be written ({error}). Check the permissions of its folder."
        ) from error
    made = Path(name)
    try:
        os.close(handle)
        yield made
        try:
            flush(made)
            os.replace(made, destination)
            if os.name == "posix":  # the name itself; Windows has no handle of a folder
                flush(destination.parent)
        except OSError as error:
            raise IndexFileError(
                f"{destination} cannot be written ({error}). Check the disk and the permissions of "
                "its folder."
            ) from error
    finally:
        for leftover in (made, Path(f"{name}-wal"), Path(f"{name}-shm"), Path(f"{name}-journal")):
            leftover.unlink(missing_ok=True)


def _remove_leftovers(destination: Path) -> None:
    """What earlier calls left that were killed: files with the number of a process that is no
    more.
    """
    if os.name != "posix":  # elsewhere asking after a process can end it
        return
    pattern = re.compile(
        re.escape(f".{destination.name}.") + r"(\d+)\.\w+\.part(-wal|-shm|-journal)?"
    )
    for found in destination.parent.iterdir():
        match = pattern.fullmatch(found.name)
        if match is not None:
            try:
                os.kill(int(match[1]), 0)
            except (ProcessLookupError, OverflowError):
                found.unlink(missing_ok=True)
            except PermissionError:  # it lives, as another user's
                pass


def flush(path: Path) -> None:
    """Wait until what was written to a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(folder: Path, needed: float, what: str) -> None:
    """
    Raises:
        IndexFileError: the disk of this folder has less than `needed` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * _SLACK:
        raise IndexFileError(
            f"{folder} has {free / 1e6:.0f} MB free: {what} needs about "
            f"{needed * _SLACK / 1e6:.0f} MB. Free some space and repeat it."
        )


def _check_replaceable(destination: Path, force: bool) -> None:
    if destination.exists() and not force:
        raise IndexFileError(
            f"{destination} exists already.",
            hint="Give another name, or replace it (force=True, on the command line --force).",
        )
    for suffix in ("-wal", "-journal"):
        beside = destination.with_name(destination.name + suffix)
        if file_bytes(beside):
            raise IndexFileError(
                f"{beside} belongs to {destination}, which is open or was left by a crash: SQLite "
                "would mix it into the new "
                "file. Open and close that index first, or give another name."
            )


def _check_room_to_compact(connection: sqlite3.Connection, path: Path) -> None:
    pages = (
        connection.execute("PRAGMA page_count").fetchone()[0]
        - connection.execute("PRAGMA freelist_count").fetchone()[0]
    )
    needed = pages * connection.execute("PRAGMA page_size").fetchone()[0]
    here, there = path.absolute().parent, _folder_for_temporary_files()
    if there.stat().st_dev == here.stat().st_dev:
        check_room(here, 2 * needed, f"compacting {path}")
    else:
        check_room(here, needed, f"compacting {path}")
        check_room(there, needed, f"compacting {path}")


def _folder_for_temporary_files() -> Path:
    """Where SQLite's VACUUM writes the new file first: https://sqlite.org/tempfiles.html, section
    5.
    """
    candidates = (
        [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp"]
        if os.name == "posix"
        else []
    )
    for folder in candidates:
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    return Path(tempfile.gettempdir())
