"""The tables of a store in PostgreSQL: how they are made and opened, and what its errors mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from egemma.identity import ModelIdentity
from egemma_core.errors import InputError, MissingDependencyError, StoreError

if TYPE_CHECKING:
    from psycopg import Connection

FORMAT_VERSION = 1
# iterative scans, so that a filter does not leave a graph search with too few hits
MIN_PGVECTOR = (0, 8)
# vectors up to here stay in their row: a scan need not fetch each from another table
_INLINE_BYTES = 4096


@dataclass(frozen=True)
class Run:
    """What executes the statements of one transaction.

    Their text is made of constants, checked names and whole numbers; what users gave is a
    parameter.
    """

    connection: Connection[Any]

    def __call__(self, statement: str, *parameters: Any) -> Any:
        """Execute a statement and return its cursor."""
        return self.connection.execute(statement.encode(), parameters)


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a store's tables, in quotes; `check_name` lets nothing in that needs more."""

    documents: str
    facts: str
    graph: str  # an index of the documents' vectors

    @classmethod
    def of(cls, name: str) -> Names:
        """Return the names of a store's tables."""
        return cls(
            documents=f'"{name}_documents"', facts=f'"{name}_facts"', graph=f'"{name}_graph"'
        )


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What statements about a store's tables are made of."""

    names: Names
    dim: int  # of the stored vectors
    half: bool  # 2 bytes a channel instead of 4
    vector: Callable[[bytes], Any]  # a parameter of type vector, of its binary form
    stored_vector: Callable[[bytes], Any]  # of the type in which documents have theirs

    def head(self, dim: int) -> str:
        """Return what a graph of this width is made of; a search must say it in the same words."""
        return f"subvector(embedding, 1, {dim})::{'halfvec' if self.half else 'vector'}({dim})"


def tables_of(
    connection: Connection[Any], name: str, identity: ModelIdentity, *, half: bool
) -> Tables:
    """Return the tables of an open store; registers pgvector's types with the connection.

    Raises:
        StoreError: the database's pgvector is too old.
    """
    vector = _vector_type(connection, "vector")
    return Tables(
        names=Names.of(name),
        dim=identity.dim,
        half=half,
        vector=vector,
        stored_vector=_vector_type(connection, "halfvec") if half else vector,
    )


def open_tables(
    connection: Connection[Any], name: str, identity: ModelIdentity | None, *, half: bool
) -> tuple[ModelIdentity, bool]:
    """Read what a store says about itself, or make its tables where there are none.

    Args:
        identity: the model of a new store; None to make none.
        half: of a new store.

    Returns:
        The model whose vectors are stored, and whether they have 2 bytes a channel.

    Raises:
        StoreError: there is no store, or one that is not understood; or the database lacks
            pgvector.
    """
    names, run = Names.of(name), Run(connection)
    if identity is not None:
        # Two may make the same tables at once. First of all, because a session remembers that it
        # has looked for a table in vain.
        run("SELECT pg_advisory_xact_lock(hashtextextended('egemma', 0))")
        if not _is_there(run, names.facts):
            _create_tables(run, name, identity, half=half)
    if not _is_there(run, names.facts):
        raise StoreError(
            f"there is no {place_of(name)} in this database.",
            hint="Pass an embedder and create=True, or another name.",
        )
    return read_facts(connection, names)


def _create_tables(run: Run, name: str, identity: ModelIdentity, *, half: bool) -> None:
    import psycopg

    names = Names.of(name)
    if _is_there(run, names.documents):
        raise StoreError(
            f"the database has a table {names.documents}, but no {names.facts} beside it: that is "
            "no egemma store.",
            hint="Pass another name.",
        )
    try:
        with run.connection.transaction():
            run("CREATE EXTENSION IF NOT EXISTS vector")
    except (
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.UndefinedFile,
        psycopg.errors.InsufficientPrivilege,
    ) as error:
        raise StoreError(
            f"the database lacks pgvector: {on_one_line(error)}.",
            hint="Install it on the server, and let an administrator run CREATE EXTENSION vector.",
        ) from error
    kind, channel_bytes = ("halfvec", 2) if half else ("vector", 4)
    run(
        f'CREATE TABLE {names.documents} (number bigserial PRIMARY KEY, id text COLLATE "C" NOT '
        "NULL UNIQUE, title text, text text NOT NULL, "
        "metadata text, filter jsonb NOT NULL, num_tokens integer NOT NULL, truncated boolean NOT "
        "NULL, "
        f"embedding {kind}({identity.dim}) NOT NULL, words tsvector NOT NULL)"
    )
    if identity.dim * channel_bytes <= _INLINE_BYTES:
        run(f"ALTER TABLE {names.documents} ALTER COLUMN embedding SET STORAGE PLAIN")
    run(f"CREATE INDEX ON {names.documents} USING gin (words)")
    run(f"CREATE TABLE {names.facts} (name text PRIMARY KEY, value text NOT NULL)")
    for fact, value in (
        ("format", str(FORMAT_VERSION)),
        ("model", identity.to_json()),
        ("half", str(int(half))),
    ):
        run(f"INSERT INTO {names.facts} (name, value) VALUES (%s, %s)", fact, value)


def read_facts(connection: Connection[Any], names: Names) -> tuple[ModelIdentity, bool]:
    """Return the model whose vectors a store holds, and whether they have 2 bytes a channel.

    Raises:
        StoreError: the store is of another format, or damaged.
    """
    facts = dict(Run(connection)(f"SELECT name, value FROM {names.facts}").fetchall())
    version = facts.get("format")
    if version != str(FORMAT_VERSION):
        raise StoreError(
            f"{names.facts} has format {version!r}, and this egemma reads {FORMAT_VERSION}.",
            hint="Update egemma, or pass another name.",
        )
    try:
        return ModelIdentity.from_json(facts["model"]), facts["half"] == "1"
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"{names.facts} does not say which model the vectors are of: {error}.",
            hint="Add the documents to a new store.",
        ) from error


def _is_there(run: Run, quoted: str) -> bool:
    return bool(run("SELECT to_regclass(%s) IS NOT NULL", quoted).fetchone()[0])


def graph_dim(run: Run, names: Names) -> int | None:
    """Return the width that a store's graph goes by, or None where there is no graph."""
    row = run(
        f"SELECT value FROM {names.facts} WHERE name = 'graph_dim' AND "
        f"to_regclass({literal(names.graph)}) IS NOT NULL"
    ).fetchone()
    return None if row is None else int(row[0])


def build_graph(run: Run, tables: Tables, dim: int, m: int, ef_construction: int) -> None:
    """Make, or make anew, pgvector's HNSW graph of the vectors' beginnings of this width."""
    names = tables.names
    kind = "halfvec" if tables.half else "vector"
    run(f"DROP INDEX IF EXISTS {names.graph}")
    run(
        f"CREATE INDEX {names.graph} ON {names.documents} USING hnsw "
        f"(({tables.head(dim)}) {kind}_cosine_ops) "
        f"WITH (m = {m}, ef_construction = {ef_construction})"
    )
    run(
        f"INSERT INTO {names.facts} (name, value) VALUES ('graph_dim', %s) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        str(dim),
    )


def engine_of(run: Run) -> str:
    """Return the names and versions of what computes."""
    server, extension = run(
        "SELECT current_setting('server_version'), extversion FROM pg_extension "
        "WHERE extname = 'vector'"
    ).fetchone()
    return f"PostgreSQL {server.split()[0]}, pgvector {extension}"


def _vector_type(connection: Connection[Any], kind: str) -> Callable[[bytes], Any]:
    """Return what makes a parameter of pgvector's type from its binary form."""
    from psycopg.adapt import Dumper
    from psycopg.pq import Format
    from psycopg.types import TypeInfo

    info = TypeInfo.fetch(connection, kind)
    version = connection.execute(
        "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    ).fetchone()
    if (
        info is None
        or version is None
        or tuple(int(part) for part in version[0].split(".")[:2]) < MIN_PGVECTOR
    ):
        raise StoreError(
            f"the database has pgvector {version and version[0]}, and at least "
            f"{'.'.join(map(str, MIN_PGVECTOR))} is needed.",
            hint="Update it on the server, then run ALTER EXTENSION vector UPDATE.",
        )

    type_oid = info.oid

    class Packed:
        def __init__(self, data: bytes) -> None:
            self.data = data

    class PackedDumper(Dumper):
        format = Format.BINARY
        oid = type_oid

        def dump(self, obj: Any) -> bytes:
            return cast(bytes, obj.data)

    connection.adapters.register_dumper(Packed, PackedDumper)
    return Packed


def place_of(name: str) -> str:
    """Return what messages call a store."""
    return f"PostgreSQL store {name!r}"


def literal(text: str) -> str:
    """Return a quoted name as an SQL text."""
    return f"'{text}'"


def on_one_line(error: BaseException) -> str:
    """Return what the server or the client says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def typed_errors(place: str, doing: str) -> Iterator[None]:
    """Turn the errors of a block's statements into ours.

    Args:
        doing: what the block does, after "cannot be": "opened", "searched".

    Raises:
        InputError: the server cannot hold a value.
        StoreError: everything else, a lost connection among it.
    """
    import psycopg

    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        raise StoreError(
            f"{place} is gone: {on_one_line(error)}.", hint="Open it again to make a new one."
        ) from error
    except (psycopg.errors.ProgramLimitExceeded, psycopg.DataError) as error:
        raise InputError(
            f"{place} cannot hold this: {on_one_line(error)}.",
            hint="Cut the text, or leave it out.",
        ) from error
    except psycopg.Error as error:
        raise StoreError(
            f"{place} cannot be {doing}: {on_one_line(error)}.",
            hint="If the connection is lost, open it again.",
        ) from error


def psycopg_here() -> Any:
    """Return the module psycopg.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import psycopg
    except ImportError as error:
        raise MissingDependencyError(
            "PostgresIndex needs psycopg, which is not installed.",
            hint="Install it with `pip install 'egemma[postgres]'`.",
        ) from error
    return psycopg
