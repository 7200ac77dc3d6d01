"""Another model for an index: everything is embedded anew beside the old vectors.

These answer until one transaction switches over. What is done stays done: a batch is one short
transaction, so others write in between, and after a kill the same call goes on. The text of a chunk
never changes under its number, and numbers rise, so all chunks below `filled_below` that still
exist have their new vector.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from egemma.identity import ModelIdentity
from egemma.index import migration_tables
from egemma.index.bulk_reads import check_vectors_from, chunks_from, count_truncated
from egemma.index.checksums import Damage
from egemma.index.codes import Layout, check_vectors
from egemma.index.facts import read_migration, read_state
from egemma.index.file import checked_path, opened, transaction
from egemma.index.records import StoredChunk
from egemma.index.upkeep.disk import check_room
from egemma_core.checks import one_of, whole_number
from egemma_core.errors import EgemmaError, IndexFileError, InputError, TokenLimitError

if TYPE_CHECKING:
    from egemma.embedder import Embedder

MigrationOverflow = Literal["error", "truncate"]
_CHUNKS_TOGETHER = 1024  # that are read at a time, and the largest batch
_ROW_BYTES = 40  # of a vector's row beside the vector
_CONTROL_TOKENS = 8  # at most: begin, end, and what a tokenizer puts before the first word
# Gives, for the time of the switch, what to call when nothing but the commit is left.
Switching = Callable[[], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class MigrationReport:
    """What `migrate` did."""

    chunks: int  # in the index now
    embedded: int  # by this call
    resumed: int  # that an earlier, interrupted call had embedded
    truncated: int  # of which the new model read only the beginning
    from_model: str
    to_model: str


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The model that a migration is to."""

    embedder: Embedder
    identity: ModelIdentity
    overflow: MigrationOverflow

    @property
    def layout(self) -> Layout:
        """How the new vectors are stored."""
        return Layout.of(self.identity.dims, self.identity.dims[-1])


def migrate(
    path: str | Path,
    new_embedder: Embedder,
    *,
    overflow: MigrationOverflow = "error",
    progress: Callable[[int, int], None] | None = None,
    batch: int = 64,
    switching: Switching | None = None,
) -> MigrationReport:
    """Embed everything in an index with another model. The old one is not needed.

    The old vectors answer until the last chunk is done; others may add, remove and search
    meanwhile. Then one transaction switches over, and whoever has the index open with the old model
    gets an IndexMismatchError from then on. Interrupted at any moment, the same call goes on where
    it was. Where the bundle lies does not matter: equal fingerprints mean that there is nothing to
    do.

    What `tune` found is of the old model and is forgotten; the scanned width becomes the new
    model's smallest. `compact` afterwards gives back the space of the old vectors; until then the
    file needs room for both.

    Args:
        overflow: what to do with a chunk that is longer than the new model reads: "error" names its
            document before anything is embedded; "truncate" embeds its beginning and marks it. To
            have it cut into smaller chunks instead, add it anew from its source, because chunks are
            what hits and hashes refer to.
        progress: is called with chunks done and chunks in all.
        batch: chunks that are embedded and stored at a time.
        switching: for an index that is open: keeps its users away while the file changes models;
            see `Session.switching_to`.

    Raises:
        TokenLimitError: a chunk is too long and `overflow` is "error".
        InputError: a document was added as a vector without text, so there is nothing to embed.
        IndexFileError: another migration is half way, no room, read-only, locked or damaged.
    """
    path = checked_path(path, create=False)
    one_of(
        "overflow",
        overflow,
        ("error", "truncate"),
        hint="To cut documents into smaller chunks, add them anew from their source.",
    )
    whole_number("batch", batch, 1, _CHUNKS_TOGETHER)
    switching = switching or _nobody_to_keep_away
    identity = ModelIdentity.of(new_embedder.manifest)
    target = _Target(embedder=new_embedder, identity=identity, overflow=overflow)
    embedded = resumed = 0
    with opened(path, "migrate", write=True) as connection:
        with transaction(connection):
            old = read_state(connection).identity
            steps = _Steps(connection, path, target)
            steps.check_no_other()
            if old.fingerprint != identity.fingerprint:
                resumed = steps.check_before()
        if old.fingerprint != identity.fingerprint:
            steps.begin()
            while not steps.switch(switching):
                while chunks := steps.missing(batch):
                    embedded += steps.embed(chunks)
                    if progress is not None:
                        progress(resumed + embedded, max(steps.total, resumed + embedded))
                steps.verify()
        else:
            with switching() as ready:
                ready()
        with transaction(connection):
            chunks_now, truncated = read_state(connection).chunks, count_truncated(connection)
    return MigrationReport(
        chunks=chunks_now,
        embedded=embedded,
        resumed=resumed,
        truncated=truncated,
        from_model=old.name,
        to_model=identity.name,
    )


def abandon(path: str | Path) -> bool:
    """Give up a migration that is half way, and return whether there was one.

    The old vectors stay.
    """
    with (
        opened(path, "abandon the migration of", write=True) as connection,
        transaction(connection, "BEGIN IMMEDIATE"),
    ):
        if not read_migration(connection):
            return False
        migration_tables.drop_tables(connection)
        return True


@contextmanager
def _nobody_to_keep_away() -> Iterator[Callable[[], None]]:
    yield lambda: None


class _Steps:
    """The transactions of one call, each of which another program may come before."""

    def __init__(self, connection: sqlite3.Connection, path: Path, target: _Target) -> None:
        self._connection, self._path, self._target = connection, path, target
        self._verified = 0  # chunks below this number have a new vector that was read back
        self.total = 0  # chunks in the index, as last read

    def check_no_other(self) -> None:
        """Check that no migration to another model is half way.

        Raises:
            IndexFileError: one is.
        """
        facts = read_migration(self._connection)
        if facts and facts.get("next_fingerprint") != self._target.identity.fingerprint:
            raise IndexFileError(
                f"{self._path} is half way through a migration to {facts.get('next_model')}, this "
                f"is {self._target.identity.name}. "
                "Go on with that model, or give it up with `egemma index abandon`."
            )

    def check_before(self) -> int:
        """Check that everything can be embedded and stored.

        Returns:
            How many chunks were embedded by an earlier call.
        """
        connection, state = self._connection, read_state(self._connection)
        resumed = 0
        if read_migration(connection):
            resumed = migration_tables.count_vectors(connection)
        layout = self._target.layout
        row = (
            layout.head
            + 4 * layout.scales
            + layout.rest_bytes
            + state.floats * 4 * layout.dim
            + _ROW_BYTES
        )
        check_room(
            self._path.absolute().parent, (state.chunks - resumed) * row, f"migrating {self._path}"
        )
        last = self._filled() if resumed else 0
        while chunks := chunks_from(connection, last, _CHUNKS_TOGETHER):
            for id_, chunk in chunks:
                self._check_one(id_, chunk)
            last = chunks[-1][1].number + 1
        return resumed

    def begin(self) -> None:
        """Make the tables, unless they are there."""
        identity = self._target.identity
        with transaction(self._connection, "BEGIN IMMEDIATE"):
            self.check_no_other()
            state = read_state(self._connection)
            if state.identity.fingerprint == identity.fingerprint or read_migration(
                self._connection
            ):
                return
            migration_tables.make_tables(self._connection, identity, self._target.layout.head)

    def missing(self, count: int) -> list[tuple[str, StoredChunk]]:
        """Return the next chunks without a new vector, each with its document's id."""
        with transaction(self._connection):
            if not self._under_way():
                return []
            self.total = read_state(self._connection).chunks
            return chunks_from(self._connection, self._filled(), count)

    def embed(self, chunks: list[tuple[str, StoredChunk]]) -> int:
        """Embed chunks and store their vectors.

        Returns:
            How many were stored: others may have deleted some meanwhile, or embedded them too.
        """
        for id_, chunk in chunks:
            self._check_one(id_, chunk)
        target = self._target
        embeddings = target.embedder.embed_documents(
            [chunk.text for _, chunk in chunks],
            titles=[chunk.title for _, chunk in chunks],
            overflow=target.overflow,
        )
        vectors = check_vectors(embeddings.vectors, target.identity.dim)
        if len(vectors) != len(chunks):
            raise InputError(
                f"the model gave {len(vectors)} vectors for {len(chunks)} texts.",
                hint="Check it with `egemma verify`.",
            )
        with transaction(self._connection, "BEGIN IMMEDIATE"):
            if not self._under_way():
                return 0
            return migration_tables.add_vectors(
                self._connection,
                target.layout,
                [chunk.number for _, chunk in chunks],
                vectors,
                embeddings.num_tokens,
                embeddings.truncated,
            )

    def verify(self) -> None:
        """Read the new vectors back before the old ones go.

        Raises:
            Damage: one is not what was stored.
        """
        with transaction(self._connection), _saying_how_to_abandon():
            if not self._under_way():
                return
            floats = read_state(self._connection).floats
            check_vectors_from(
                self._connection, self._target.layout, self._verified, keeps_floats=floats
            )
            self._verified = self._filled()

    def switch(self, switching: Switching) -> bool:
        """Put the new vectors into the place of the old ones.

        Returns:
            False where chunks still lack theirs, or were not verified yet.
        """
        connection, target = self._connection, self._target
        with switching() as ready, transaction(connection, "BEGIN IMMEDIATE"):
            if self._under_way():
                filled = self._filled()
                if self._verified < filled or chunks_from(connection, filled, 1):
                    return False
                with _saying_how_to_abandon():
                    migration_tables.take_the_place(
                        connection, read_state(connection), target.identity, target.layout.head
                    )
            ready()
        return True

    def _under_way(self) -> bool:
        """Return whether this migration goes on; False where somebody else has completed it.

        Raises:
            IndexFileError: somebody has given it up, or begun another.
        """
        self.check_no_other()
        if read_state(self._connection).identity.fingerprint == self._target.identity.fingerprint:
            return False
        if not read_migration(self._connection):
            raise IndexFileError(
                f"{self._path}: this migration was given up by another program. Migrate again to "
                "begin anew."
            )
        return True

    def _filled(self) -> int:
        return migration_tables.filled_below(self._connection, self._target.layout.head)

    def _check_one(self, id_: str, chunk: StoredChunk) -> None:
        """Check that the new model can embed a chunk of the document with this id.

        Raises:
            InputError, TokenLimitError: it cannot; says which document it is.
        """
        embedder = self._target.embedder
        what = f"{self._path}: document {id_!r}, chunk {chunk.position}"
        if not chunk.num_tokens and not chunk.text.strip():  # its vector came without a text
            raise InputError(
                f"{what} has no text, only a vector of the old model. Remove the document, or add "
                "it with its text; then migrate."
            )
        try:
            whole = embedder.document_prompt(chunk.title) + chunk.text
        except EgemmaError as error:
            raise InputError(
                f"{what} cannot be embedded with {self._target.identity.name}: {error}"
            ) from error
        # a token is a byte at least
        if (
            self._target.overflow == "error"
            and len(whole.encode()) + _CONTROL_TOKENS > embedder.max_tokens
        ):
            num_tokens = embedder.count_tokens(whole)
            if num_tokens > embedder.max_tokens:
                raise TokenLimitError(
                    f"{what} has {num_tokens} tokens, {self._target.identity.name} reads "
                    f"{embedder.max_tokens}. Pass "
                    "overflow='truncate' to embed its beginning, or add the document anew, in "
                    "smaller chunks, to a new index."
                )


@contextmanager
def _saying_how_to_abandon() -> Iterator[None]:
    """Say in the errors of damage what to do about a migration."""
    try:
        yield
    except Damage as damage:
        raise Damage(f"{damage}; give the migration up with `egemma index abandon`") from damage
