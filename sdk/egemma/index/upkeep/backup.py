"""Copy an index while others use it."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

from egemma.index.file import checked_path, file_bytes, opened, transaction, typed_errors
from egemma.index.upkeep.describe import IndexFacts, describe_index
from egemma.index.upkeep.disk import check_room
from egemma_core.errors import IndexFileError
from egemma_core.files import replacing_file

_PAGES = 4096  # that are copied between two looks at Ctrl-C


def backup(path: str | Path, destination: str | Path, *, force: bool = False) -> IndexFacts:
    """Copy an index as it is at this moment, also while others write to it.

    At the end the copy is checked, and then it gets its name.

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
    with replacing_file(destination, mode=0o600, error=IndexFileError) as made:
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
                f"{path} cannot be backed up: {facts.damage}.",
                hint="An older backup is the better one; look at it with `egemma index check`.",
            )
        _check_replaceable(destination, force)
    return replace(facts, path=str(destination))


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
