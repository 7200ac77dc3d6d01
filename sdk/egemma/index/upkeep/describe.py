"""What an index file says about itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egemma.index.bulk_reads import count_truncated
from egemma.index.facts import FORMAT_VERSION, read_migration, read_state
from egemma.index.file import (
    checked_path,
    connect,
    file_bytes,
    is_blank,
    opened,
    transaction,
    typed_errors,
    wal_of,
)
from egemma.index.records import count_documents
from egemma.index.upkeep.check import findings


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
    """Return what an index file says about itself; this needs no model.

    Args:
        check: read the whole file and look for damage.

    Raises:
        IndexFileError: no file, no index, or too damaged to say anything.
    """
    with opened(path, "read", write=False) as connection, transaction(connection):
        return facts_of(connection, Path(path), check=check)


def is_new(path: str | Path) -> bool:
    """Return whether there is no file yet, or one whose maker died before its first commit."""
    path = checked_path(path, create=True)
    if not path.exists():
        return True
    connection, _, _ = connect(path)
    try:
        with typed_errors(path, "read"):
            return is_blank(connection)
    finally:
        connection.close()


def facts_of(connection: sqlite3.Connection, path: Path, *, check: bool) -> IndexFacts:
    """Return what the file of a connection says; call it inside a read transaction."""
    state = read_state(connection)
    return IndexFacts(
        path=str(path),
        fingerprint=state.identity.fingerprint,
        model=state.identity.name,
        model_path=state.model_path,
        dims=state.identity.dims,
        scan_width=state.scan_width,
        floats=state.floats,
        documents=count_documents(connection),
        chunks=state.chunks,
        truncated_chunks=count_truncated(connection),
        file_bytes=file_bytes(path) + file_bytes(wal_of(path)),
        format_version=FORMAT_VERSION,
        migrating_to=read_migration(connection).get("next_model"),
        tuned=None if state.tuned is None else json.loads(state.tuned),
        damage=next(findings(connection, state), None) if check else None,
    )
