"""Another model for an index: everything is embedded anew beside the old vectors, which answer
until one transaction switches over.

What is done stays done: a batch is one short transaction, so others write in between, and after a
kill the same call goes on. The text of a chunk never changes under its number, and numbers rise, so
all chunks below `_filled` that still exist have their new vector.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from egemma.identity import ModelIdentity
from egemma.index.codes import Layout, check_vectors, encode
from egemma.index.damage import chunk_crc32, fits, vector_crc32
from egemma.index.file import NEXT_TABLES, checked_path, read_state, transaction, write_state
from egemma.index.heads import BLOCK_ROWS, Damage, head_crc32
from egemma.index.rows import append_heads
from egemma.index.upkeep import check_room, opened
from egemma_core.errors import ConfigError, EgemmaError, IndexFileError, InputError, TokenLimitError

if TYPE_CHECKING:
    from egemma.embedder import Embedder
    from egemma.index.index import Index

MigrationOverflow = Literal["error", "truncate"]
_TOGETHER = 1024  # chunks that are read, or written at the switch, at a time
_ROW_BYTES = 40  # of a vector's row beside the vector
_CONTROL_TOKENS = 8  # at most: begin, end, and what a tokenizer puts before the first word


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
class _Chunk:
    """What is embedded."""

    number: int
    document: str  # its id
    position: int
    title: str | None
    text: str
    bare: bool  # its vector came from elsewhere, without a text


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a migration goes."""

    embedder: Embedder
    identity: ModelIdentity
    overflow: MigrationOverflow

    @property
    def layout(self) -> Layout:
        return Layout.of(self.identity.dims, self.identity.dims[-1])


def migrate(
    path: str | Path,
    new_embedder: Embedder,
    *,
    overflow: MigrationOverflow = "error",
    progress: Callable[[int, int], None] | None = None,
    batch: int = 64,
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

    Raises:
        TokenLimitError: a chunk is too long and `overflow` is "error".
        InputError: a document was added as a vector without text, so there is nothing to embed.
        IndexFileError: another migration is half way, no room, read-only, locked or damaged.
    """
    return run(
        checked_path(path, create=False),
        new_embedder,
        overflow=overflow,
        progress=progress,
        batch=batch,
        index=None,
    )


def abandon(path: str | Path) -> bool:
    """Give up a migration that is half way; the old vectors stay. Returns whether there was one."""
    with (
        opened(path, "abandon the migration of", write=True) as connection,
        transaction(connection, "BEGIN IMMEDIATE"),
    ):
        if not _next_facts(connection):
            return False
        for table in NEXT_TABLES:
            connection.execute(f"DROP TABLE {table}")
        connection.execute(_FORGET)
        return True


def run(
    path: Path,
    embedder: Embedder,
    *,
    overflow: MigrationOverflow,
    progress: Callable[[int, int], None] | None,
    batch: int,
    index: Index | None,
) -> MigrationReport:
    """As `migrate`; `index`, if given, is held still at the moment of the switch and goes on with
    the new model.
    """
    if overflow not in ("error", "truncate"):
        raise ConfigError(
            f"overflow={overflow!r}: 'error' or 'truncate'. To cut documents into smaller chunks, "
            "add them anew from their source."
        )
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= _TOGETHER:
        raise ConfigError(f"batch={batch!r}: a whole number from 1 to {_TOGETHER}.")
    target = _Target(
        embedder=embedder, identity=ModelIdentity.of(embedder.manifest), overflow=overflow
    )
    embedded = resumed = 0
    with opened(path, "migrate", write=True) as connection:
        with transaction(connection):
            old = read_state(connection).identity
            steps = _Steps(connection, path, target)
            steps.check_no_other()
            if old.fingerprint != target.identity.fingerprint:
                resumed = steps.check_before()
        if old.fingerprint != target.identity.fingerprint:
            steps.begin()
            while not steps.switch(index):
                while chunks := steps.missing(batch):
                    embedded += steps.embed(chunks)
                    if progress is not None:
                        progress(resumed + embedded, max(steps.total, resumed + embedded))
                steps.verify()
        elif index is not None:
            with index._writing_lock, index._reading_lock:
                index._go_on_with(embedder)
        with transaction(connection):
            chunks_now = read_state(connection).chunks
            truncated = int(
                connection.execute("SELECT count(*) FROM chunks WHERE truncated").fetchone()[0]
            )
    return MigrationReport(
        chunks=chunks_now,
        embedded=embedded,
        resumed=resumed,
        truncated=truncated,
        from_model=old.name,
        to_model=target.identity.name,
    )


class _Steps:
    """The transactions of one call, each of which another program may come before."""

    def __init__(self, connection: sqlite3.Connection, path: Path, target: _Target) -> None:
        self._connection, self._path, self._target = connection, path, target
        self._verified = 0  # chunks below this number have a new vector that was read back
        self.total = 0  # chunks at the last look

    def check_no_other(self) -> None:
        """
        Raises:
            IndexFileError: a migration to another model is half way.
        """
        facts = _next_facts(self._connection)
        if facts and facts.get("next_fingerprint") != self._target.identity.fingerprint:
            raise IndexFileError(
                f"{self._path} is half way through a migration to {facts.get('next_model')}, this "
                f"is {self._target.identity.name}. "
                "Go on with that model, or give it up with `egemma index abandon`."
            )

    def check_before(self) -> int:
        """Whether everything can be embedded and stored.

        Returns how many chunks were embedded by an earlier call.
        """
        connection, state = self._connection, read_state(self._connection)
        resumed = 0
        if _next_facts(connection):
            resumed = int(connection.execute("SELECT count(*) FROM next_vectors").fetchone()[0])
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
        while chunks := self._chunks(last, _TOGETHER):
            for chunk in chunks:
                self._check_one(chunk)
            last = chunks[-1].number + 1
        return resumed

    def begin(self) -> None:
        """Make the tables, unless they are there."""
        identity = self._target.identity
        with transaction(self._connection, "BEGIN IMMEDIATE"):
            self.check_no_other()
            state = read_state(self._connection)
            if state.identity.fingerprint == identity.fingerprint or _next_facts(self._connection):
                return
            for statement in NEXT_TABLES.values():
                self._connection.execute(statement)
            facts = {
                "next_fingerprint": identity.fingerprint,
                "next_model": identity.name,
                "next_dims": json.dumps(list(identity.dims)),
                "next_parts": json.dumps(dict(identity.parts)),
                "next_scan_width": str(self._target.layout.head),
            }
            self._connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())

    def missing(self, count: int) -> list[_Chunk]:
        """The next chunks without a new vector; none at the end."""
        with transaction(self._connection):
            if not self._under_way():
                return []
            self.total = read_state(self._connection).chunks
            return self._chunks(self._filled(), count)

    def embed(self, chunks: list[_Chunk]) -> int:
        """Embed and store.

        Returns how many were stored: others may have deleted some meanwhile, or embedded them too.
        """
        for chunk in chunks:
            self._check_one(chunk)
        target = self._target
        found = target.embedder.embed_documents(
            [chunk.text for chunk in chunks],
            titles=[chunk.title for chunk in chunks],
            overflow=target.overflow,
        )
        vectors = check_vectors(found.vectors, target.identity.dim)
        if len(vectors) != len(chunks):
            raise InputError(
                f"the model gave {len(vectors)} vectors for {len(chunks)} texts. Check it with "
                "`egemma verify`."
            )
        heads, scales, rests = encode(vectors, target.layout)
        with transaction(self._connection, "BEGIN IMMEDIATE"):
            if not self._under_way():
                return 0
            first, stop = self._filled(), chunks[-1].number + 1
            keeps_floats = read_state(self._connection).floats
            alive = {
                row[0]
                for row in self._connection.execute(
                    "SELECT number FROM chunks WHERE number >= ? AND number < ?", (first, stop)
                )
            }
            # a number that is dead gets none
            new_heads = np.zeros((max(0, stop - first), target.layout.head), np.int8)
            rows, counts = [], []
            for row, chunk in enumerate(chunks):
                if chunk.number in alive:
                    new_heads[chunk.number - first] = heads[row]
                    floats = vectors[row].astype("<f4").tobytes() if keeps_floats else None
                    parts = scales[row].astype("<f4").tobytes(), rests[row].tobytes(), floats
                    rows.append(
                        (
                            chunk.number,
                            vector_crc32(chunk.number, heads[row].tobytes(), *parts),
                            *parts,
                        )
                    )
                    counts.append(
                        (chunk.number, int(found.num_tokens[row]), int(found.truncated[row]))
                    )
            self._connection.executemany(
                "INSERT INTO next_vectors (number, crc32, scales, rest, floats) VALUES (?, ?, ?, "
                "?, ?)",
                rows,
            )
            self._connection.executemany(
                "INSERT INTO next_tokens (number, num_tokens, truncated) VALUES (?, ?, ?)", counts
            )
            append_heads(self._connection, "next_heads", first, new_heads)
        return len(rows)

    def verify(self) -> None:
        """Read the new vectors back before the old ones go.

        Raises:
            Damage: one is not what was stored.
        """
        layout = self._target.layout
        with transaction(self._connection):
            if not self._under_way():
                return
            floats = read_state(self._connection).floats
            heads: tuple[int, bytes] = (-1, b"")
            for number, crc, scales, rest, wide in self._connection.execute(
                "SELECT number, crc32, scales, rest, floats FROM next_vectors "
                "WHERE number >= ? ORDER BY number",
                (self._verified,),
            ):
                block, slot = divmod(number, BLOCK_ROWS)
                if heads[0] != block:
                    row = self._connection.execute(
                        "SELECT squares, codes, crc32 FROM next_heads WHERE block = ?", (block,)
                    ).fetchone()
                    if row is None or head_crc32(block, row[0], row[1]) != row[2]:
                        raise Damage(
                            f"block {block} of the new vectors is not what was stored; give the "
                            "migration up with `egemma index abandon`"
                        )
                    heads = block, row[1]
                head = heads[1][slot * layout.head : (slot + 1) * layout.head]
                if (
                    not fits(layout, floats, scales, rest, wide)
                    or vector_crc32(number, head, scales, rest, wide) != crc
                ):
                    raise Damage(
                        f"the new vector {number} is not what was stored; give the migration up "
                        "with `egemma index abandon`"
                    )
            self._verified = self._filled()

    def switch(self, index: Index | None) -> bool:
        """Put the new vectors into the place of the old ones; False where chunks still lack theirs,
        or were not verified yet.
        """
        connection, target = self._connection, self._target
        with ExitStack() as held:
            if index is not None:
                # before the file's lock, as every writer of this index takes them
                held.enter_context(index._writing_lock)
            with transaction(connection, "BEGIN IMMEDIATE"):
                if self._under_way():
                    state = read_state(connection)
                    filled = self._filled()
                    if (
                        self._verified < filled
                        or connection.execute(
                            "SELECT 1 FROM chunks WHERE number >= ? LIMIT 1", (filled,)
                        ).fetchone()
                    ):
                        return False
                    # of chunks that were deleted meanwhile
                    for table in ("next_vectors", "next_tokens"):
                        connection.execute(
                            f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM chunks)"
                        )
                        count = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                        if count != state.chunks:
                            raise Damage(
                                f"{state.chunks} chunks are counted, {table} has {count}; give the "
                                "migration up with `egemma index abandon`"
                            )
                    self._update_counts()
                    append_heads(
                        connection,
                        "next_heads",
                        filled,
                        np.zeros((state.next_number - filled, target.layout.head), np.int8),
                    )
                    for table in ("vectors", "heads"):
                        connection.execute(f"DROP TABLE {table}")
                        connection.execute(f"ALTER TABLE next_{table} RENAME TO {table}")
                    connection.execute("DROP TABLE next_tokens")
                    connection.execute(_FORGET)
                    connection.execute("UPDATE blocks SET changed = ?", (state.generation + 1,))
                    write_state(
                        connection,
                        replace(
                            state,
                            identity=target.identity,
                            scan_width=target.layout.head,
                            generation=state.generation + 1,
                            model_path=None,
                            tuned=None,
                        ),
                    )
                if index is not None:
                    # its searches wait for the commit, not for the work before it
                    held.enter_context(index._reading_lock)
            if index is not None:
                index._go_on_with(target.embedder)
        return True

    def _under_way(self) -> bool:
        """Whether this migration goes on; False where somebody else has completed it.

        Inside a transaction.

        Raises:
            IndexFileError: somebody has given it up, or begun another.
        """
        self.check_no_other()
        if read_state(self._connection).identity.fingerprint == self._target.identity.fingerprint:
            return False
        if not _next_facts(self._connection):
            raise IndexFileError(
                f"{self._path}: this migration was given up by another program. Migrate again to "
                "begin anew."
            )
        return True

    def _filled(self) -> int:
        """Below this number every chunk has its new vector."""
        row = self._connection.execute(
            "SELECT block, length(codes) FROM next_heads ORDER BY block DESC LIMIT 1"
        ).fetchone()
        return (
            0 if row is None else BLOCK_ROWS * int(row[0]) + int(row[1]) // self._target.layout.head
        )

    def _chunks(self, first: int, count: int) -> list[_Chunk]:
        rows = self._connection.execute(
            "SELECT d.id, c.number, c.document, c.position, c.start, c.stop, c.num_tokens, "
            "c.truncated, c.title, c.text, "
            "c.crc32 FROM chunks c JOIN documents d ON d.number = c.document WHERE c.number >= ? "
            "ORDER BY c.number LIMIT ?",
            (first, count),
        ).fetchall()
        for _, *fields, crc in rows:
            if chunk_crc32(*fields) != crc:
                raise Damage(f"chunk {fields[0]} is not what was stored")
        return [
            _Chunk(
                number=row[1],
                document=row[0],
                position=row[3],
                title=row[8],
                text=row[9],
                bare=not row[6] and not row[9].strip(),
            )
            for row in rows
        ]

    def _check_one(self, chunk: _Chunk) -> None:
        """
        Raises:
            InputError, TokenLimitError: it cannot be embedded; says which document it is of.
        """
        embedder, what = (
            self._target.embedder,
            f"{self._path}: document {chunk.document!r}, chunk {chunk.position}",
        )
        if chunk.bare:
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

    def _update_counts(self) -> None:
        """What the new model's tokenizer counted, where it differs."""
        last = -1
        while rows := self._connection.execute(
            "SELECT t.num_tokens, t.truncated, c.crc32, c.number, c.document, c.position, c.start, "
            "c.stop, c.num_tokens, c.truncated, c.title, c.text "
            "FROM chunks c JOIN next_tokens t ON t.number = c.number WHERE c.number > ? AND "
            "(c.num_tokens != t.num_tokens "
            "OR c.truncated != t.truncated) ORDER BY c.number LIMIT ?",
            (last, _TOGETHER),
        ).fetchall():
            changed = []
            for num_tokens, truncated, crc, *fields in rows:
                if chunk_crc32(*fields) != crc:
                    raise Damage(f"chunk {fields[0]} is not what was stored")
                number, document, position, start, stop, _, _, title, text = fields
                changed.append(
                    (
                        num_tokens,
                        truncated,
                        chunk_crc32(
                            number,
                            document,
                            position,
                            start,
                            stop,
                            num_tokens,
                            truncated,
                            title,
                            text,
                        ),
                        number,
                    )
                )
            self._connection.executemany(
                "UPDATE chunks SET num_tokens = ?, truncated = ?, crc32 = ? WHERE number = ?",
                changed,
            )
            last = changed[-1][-1]


def _next_facts(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(
        connection.execute(
            "SELECT name, value FROM facts WHERE substr(name, 1, 5) = 'next_' AND name != "
            "'next_number'"
        ).fetchall()
    )


_FORGET = "DELETE FROM facts WHERE substr(name, 1, 5) = 'next_' AND name != 'next_number'"
