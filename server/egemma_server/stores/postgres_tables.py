"""The tables of a store in PostgreSQL, and what goes between them and Python: statements, vectors,
words, errors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma_core.errors import IndexFileError, InputError, RuntimeUnavailableError
from egemma_server.stores.rows import words_of

if TYPE_CHECKING:
    from psycopg import Connection

FORMAT_VERSION = 1
# iterative scans, so that a filter does not leave a graph search with too few hits
MIN_PGVECTOR = (0, 8)
# vectors up to here stay in their row: a scan need not fetch each from another table
_INLINE_BYTES = 4096
_MAX_POSITION = 16383  # the largest of a tsvector
_MAX_POSITIONS = 255  # of one word in a tsvector


@dataclass(frozen=True)
class Run:
    """Statements of one transaction.

    Their text is made of constants, checked names and whole numbers; what users gave is a
    parameter.
    """

    connection: Connection[Any]

    def __call__(self, statement: str, *parameters: Any) -> Any:
        return self.connection.execute(statement.encode(), parameters)


@dataclass(frozen=True, kw_only=True)
class Names:
    """Quoted names; `check_name` let nothing in that would need more than the quotes."""

    documents: str
    facts: str
    graph: str
    graph_name: str

    @classmethod
    def of(cls, name: str) -> Names:
        return cls(
            documents=f'"{name}_documents"',
            facts=f'"{name}_facts"',
            graph=f'"{name}_graph"',
            graph_name=f'"{name}_graph"',
        )


def open_tables(
    connection: Connection[Any], name: str, identity: ModelIdentity | None, *, half: bool
) -> tuple[ModelIdentity, bool]:
    """Read what the store says about itself, or make its tables where there are none and `identity`
    is given.
    """
    names, run = Names.of(name), Run(connection)
    if identity is not None:
        # Two may make the same tables at once. First of all, because a session remembers that it
        # has looked for a table in vain.
        run("SELECT pg_advisory_xact_lock(hashtextextended('egemma', 0))")
        if not _is_there(run, names.facts):
            _create_tables(run, name, identity, half=half)
    if not _is_there(run, names.facts):
        raise IndexFileError(
            f"there is no {place_of(name)} in this database. Pass an embedder and create=True, or "
            "another name."
        )
    return read_facts(connection, names)


def _create_tables(run: Run, name: str, identity: ModelIdentity, *, half: bool) -> None:
    import psycopg

    names = Names.of(name)
    if _is_there(run, names.documents):
        raise IndexFileError(
            f"the database has a table {names.documents}, but no {names.facts} beside it: that is "
            "no egemma store. Pass another name."
        )
    try:
        with run.connection.transaction():
            run("CREATE EXTENSION IF NOT EXISTS vector")
    except (
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.UndefinedFile,
        psycopg.errors.InsufficientPrivilege,
    ) as error:
        raise RuntimeUnavailableError(
            f"the database lacks pgvector: {said(error)}. Install it on the server, and let an "
            "administrator run "
            "CREATE EXTENSION vector."
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
    facts = dict(Run(connection)(f"SELECT name, value FROM {names.facts}").fetchall())
    version = facts.get("format")
    if version != str(FORMAT_VERSION):
        raise IndexFileError(
            f"{names.facts} has format {version!r}; this egemma reads {FORMAT_VERSION}. Update "
            "egemma, or pass another name."
        )
    try:
        return ModelIdentity.from_json(facts["model"]), facts["half"] == "1"
    except (KeyError, ValueError) as error:
        raise IndexFileError(
            f"{names.facts} does not say which model the vectors are of: {error}. Add the "
            "documents to a new store."
        ) from error


def _is_there(run: Run, quoted: str) -> bool:
    return bool(run("SELECT to_regclass(%s) IS NOT NULL", quoted).fetchone()[0])


def vector_type(connection: Connection[Any], kind: str) -> Callable[[bytes], Any]:
    """What makes a parameter of pgvector's type from its binary form; registered with the
    connection.
    """
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
        raise RuntimeUnavailableError(
            f"the database has pgvector {version and version[0]}: at least "
            f"{'.'.join(map(str, MIN_PGVECTOR))} is needed. "
            "Update it on the server, then run ALTER EXTENSION vector UPDATE."
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


def packed_vectors(vectors: NDArray[Any], *, half: bool) -> list[bytes]:
    """pgvector's binary form: channels and a zero as 16 bits each, then the channels, all with the
    high byte first.
    """
    head = struct.pack(">HH", vectors.shape[1], 0)
    return [head + row.tobytes() for row in vectors.astype(">f2" if half else ">f4")]


def tsvector(text: str) -> str:
    """The words of a text with their places, as PostgreSQL reads a tsvector; none holds a quote."""
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words_of(text), start=1):
        places.setdefault(word, []).append(min(place, _MAX_POSITION))
    return " ".join(
        f"'{word}':{','.join(map(str, numbers[:_MAX_POSITIONS]))}"
        for word, numbers in places.items()
    )


def place_of(name: str) -> str:
    return f"PostgreSQL store {name!r}"


def literal(text: str) -> str:
    """A quoted name as an SQL text."""
    return f"'{text}'"


def said(error: BaseException) -> str:
    """What the server or the client says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def typed_errors(place: str, doing: str) -> Iterator[None]:
    import psycopg

    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        raise IndexFileError(
            f"{place} is gone: {said(error)}. Open it again to make a new one."
        ) from error
    except (psycopg.errors.ProgramLimitExceeded, psycopg.DataError) as error:
        raise InputError(
            f"{place} cannot hold this: {said(error)}. Cut the text, or leave it out."
        ) from error
    except psycopg.Error as error:
        raise IndexFileError(
            f"{place} cannot be {doing}: {said(error)}. If the connection is lost, open it again."
        ) from error


def psycopg_here() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise RuntimeUnavailableError(
            "PostgresIndex needs psycopg. Install it with `pip install 'egemma[postgres]'`."
        ) from error
    return psycopg
