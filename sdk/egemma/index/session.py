"""An open index file: its connections, its locks, and the model that it is of."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from egemma.identity import ModelIdentity, check_same_model
from egemma.index.facts import MAX_WIDTH, State, read_state
from egemma.index.file import (
    MIGRATE_HINT,
    check_format,
    checked_path,
    connect,
    create_tables,
    file_identity,
    is_blank,
    stamp_of,
    transaction,
    typed_errors,
)
from egemma.index.records import check_documents
from egemma.index.rows import Change
from egemma_core.errors import ConfigError, IndexFileError

if TYPE_CHECKING:
    from egemma.embedder import Embedder


class Session:
    """An open index file. Reads take turns among themselves, and so do writes.

    A read waits for no write. Each block of `reading` or `writing` is one transaction.
    """

    def __init__(
        self,
        path: Path,
        embedder: Embedder | None,
        connection: sqlite3.Connection,
        identity: ModelIdentity,
        *,
        read_only: bool,
        frozen: bool,
    ) -> None:
        self.path, self.read_only = path, read_only
        self.embedder, self.identity = embedder, identity
        self._reader, self._reading_lock = connection, threading.RLock()
        self._writer: sqlite3.Connection | None = None
        self._writing_lock = threading.RLock()
        self._stamp = stamp_of(path) if frozen else None
        self._file, self._process = file_identity(path), os.getpid()
        self._closed = False
        self._documents_checked = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        embedder: Embedder | ModelIdentity | None,
        *,
        create: bool,
        keep_floats: bool,
    ) -> Session:
        """Open an index file, or make one; see `Index.open`."""
        identity, model = embedder, None
        if embedder is not None and not isinstance(embedder, ModelIdentity):
            identity, model = ModelIdentity.of(embedder.manifest), embedder
        assert identity is None or isinstance(identity, ModelIdentity)
        if identity is not None and identity.dim > MAX_WIDTH:
            raise ConfigError(
                f"the model's vectors have {identity.dim} channels, an index holds up to "
                f"{MAX_WIDTH}."
            )
        path = checked_path(path, create=create and (identity is not None or Path(path).exists()))
        connection, read_only, frozen = connect(path)
        try:
            with typed_errors(path, "open"):
                if create and identity is not None and not read_only and is_blank(connection):
                    create_tables(connection, identity, floats=keep_floats)
                check_format(connection, path)
                with transaction(connection):
                    stored = read_state(connection).identity
            if identity is not None:
                check_same_model(path, stored, identity, MIGRATE_HINT)
        except BaseException:
            connection.close()
            raise
        return cls(path, model, connection, stored, read_only=read_only, frozen=frozen)

    @contextmanager
    def reading(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Give one state of the file for everything in the block."""
        with self._reading_lock:
            self._check_open()
            with typed_errors(self.path, doing), transaction(self._reader):
                if self._stamp is not None and stamp_of(self.path) != self._stamp:
                    raise IndexFileError(
                        f"{self.path} was changed while it was open for search only. Open it again."
                    )
                yield self._reader

    @contextmanager
    def writing(self, doing: str) -> Iterator[Change]:
        """Give one write transaction, which is committed at the end of the block."""
        with self._writing_lock:
            self.check_writable()
            if self._writer is None:
                self._writer = connect(self.path)[0]
            with typed_errors(self.path, doing), transaction(self._writer, "BEGIN IMMEDIATE"):
                change = Change(self._writer)
                self._check_model(change.state)
                yield change
                change.finish()

    @contextmanager
    def switching_to(self, embedder: Embedder) -> Iterator[Callable[[], None]]:
        """Keep writers out while the file gets another model, and go on with that afterwards.

        The block calls what it is given once nothing but the commit is left: searches then wait
        too. If it does not, or fails, the model stays.
        """
        # before the file's lock, as every writer of this index takes them
        with self._writing_lock, ExitStack() as held:
            ready = False

            def hold_searches() -> None:
                nonlocal ready
                held.enter_context(self._reading_lock)
                ready = True

            yield hold_searches
            if ready:
                self.embedder, self.identity = embedder, ModelIdentity.of(embedder.manifest)

    def checked_state(self, connection: sqlite3.Connection) -> State:
        """Return what the file says now, when nobody has migrated it to another model."""
        state = read_state(connection)
        self._check_model(state)
        return state

    def check_documents(self, connection: sqlite3.Connection) -> None:
        """Check all documents, once per opening."""
        if not self._documents_checked:
            check_documents(connection, read_state(connection).chunks)
            self._documents_checked = True

    def embedder_for(self, doing: str) -> Embedder:
        """Return the model of this moment; a migration may change it.

        Args:
            doing: what it is needed for, for the message: "embed texts".
        """
        if self.embedder is None:
            raise ConfigError(
                f"{self.path} was opened without a model, so it cannot {doing}.",
                hint="Open it with an Embedder.",
            )
        return self.embedder

    def check_writable(self) -> None:
        """Check that the file is open for writing."""
        self._check_open()
        if self.read_only:
            raise IndexFileError(
                f"{self.path} cannot be written here; it is open for search only.",
                hint="Copy it elsewhere first.",
            )

    def _check_model(self, state: State) -> None:
        check_same_model(self.path, state.identity, self.identity, MIGRATE_HINT)

    def _check_open(self) -> None:
        if self._closed:
            raise IndexFileError(f"{self.path} is closed. Open it again.")
        if os.getpid() != self._process:
            raise IndexFileError(
                f"{self.path} was opened by another process, and SQLite's connections must not be "
                "shared by a fork. Open it here."
            )
        if file_identity(self.path) != self._file:
            raise IndexFileError(
                f"{self.path} was moved, deleted or replaced while it was open. Open it again."
            )

    def close(self, forget: Callable[[], None]) -> None:
        """Release the file, once nobody reads or writes.

        Args:
            forget: frees what was learnt from the file, before it is released.
        """
        with self._writing_lock, self._reading_lock:
            self._closed = True
            forget()
            with typed_errors(self.path, "close"):
                if self._writer is not None:
                    self._writer.close()
                self._reader.close()
