"""The index in PostgreSQL with pgvector: two tables, one transaction for every call, filters and
ranking done by the server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity, check_same_model
from egemma.index.hits import Document, Hits, Mode
from egemma.index.inputs import check_id, check_ids
from egemma.index.search import Queries, Query
from egemma.where import parse
from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError, StoreError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.vectors import check_dim
from egemma_server.request import (
    SearchRequest,
    StoreOptions,
    model_here,
)
from egemma_server.stores import postgres_documents as documents
from egemma_server.stores import postgres_search
from egemma_server.stores.postgres_tables import (
    Run,
    build_graph,
    engine_of,
    graph_dim,
    on_one_line,
    open_tables,
    place_of,
    psycopg_here,
    read_facts,
    tables_of,
    typed_errors,
)
from egemma_server.stores.rows import (
    StoreFacts,
    can_be_stored,
    check_name,
    documents_of,
    embedded_rows,
    embedder_of,
    identity_of,
    vector_rows,
)

if TYPE_CHECKING:
    from psycopg import Connection
    from typing_extensions import Unpack

    from egemma.embedder import Embedder

DEFAULT_GRAPH_DIM = 256
_WAY_OUT = "Open it with that model, or re-embed the texts into a store of another name."


class PostgresIndex:
    """An open store in PostgreSQL.

    Make one with `PostgresIndex.open`. It may be used from several threads, which then take turns.

    Several processes may have the same store open. Every call is one transaction: a search sees one
    state, and a write happens as a whole or not at all.
    """

    def __init__(
        self,
        connection: Connection[Any],
        name: str,
        identity: ModelIdentity,
        embedder: Embedder | None,
        *,
        half: bool,
    ) -> None:
        """Take a connection whose tables `open` has checked; `open` does it all."""
        self.name = name
        self._place = place_of(name)
        self._connection, self._identity, self._embedder = connection, identity, embedder
        self._lock = threading.RLock()
        self._tables = tables_of(connection, name, identity, half=half)

    @classmethod
    def open(
        cls,
        dsn: str,
        embedder: Embedder | ModelIdentity | None = None,
        *,
        name: str = "egemma",
        create: bool = True,
        half: bool = False,
    ) -> PostgresIndex:
        """Open a store in a database, or make one.

        Args:
            dsn: as libpq takes it, such as "postgresql://user@host/database".
            embedder: the model; it must be the one that made the store. An identity will do where
                vectors come from elsewhere, None for a store that exists.
            name: of the store; its tables are `<name>_documents` and `<name>_facts` in the first
                schema of the search path.
            create: make the tables, and the extension `vector` where it is missing and this user
                may.
            half: a new store keeps 2 bytes per channel instead of 4 and scores by the rounded
                vectors. One that exists stays as it is.

        Raises:
            IndexMismatchError: the store holds vectors of another model.
            StoreError: no connection, no store, one that is not understood, or no pgvector.
            MissingDependencyError: psycopg is not installed.
        """
        check_name(name)
        identity = identity_of(embedder)
        psycopg = psycopg_here()
        place = place_of(name)
        try:
            connection = psycopg.connect(dsn, autocommit=True, client_encoding="UTF8")
        except psycopg.Error as error:
            raise StoreError(
                f"{place} cannot be reached: {on_one_line(error)}.",
                hint="Check the address and the server.",
            ) from error
        try:
            with typed_errors(place, "opened"):
                encoding = connection.info.parameter_status("server_encoding")
                if encoding != "UTF8":
                    raise ConfigError(
                        f"the database has the encoding {encoding}, which cannot hold every text.",
                        hint="Use one with UTF8.",
                    )
                with connection.transaction():
                    made_for = identity if create else None
                    stored, half = open_tables(connection, name, made_for, half=half)
            if identity is not None:
                check_same_model(place, stored, identity, _WAY_OUT)
            return cls(connection, name, stored, embedder_of(embedder), half=half)
        except BaseException:
            connection.close()
            raise

    @property
    def identity(self) -> ModelIdentity:
        """The model whose vectors are in the store."""
        return self._identity

    def add(
        self,
        texts: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        overflow: str = "error",
    ) -> list[str]:
        """Embed texts as documents and store them: all of them, or after any error or crash none.

        Args, returns and raises as `egemma.Index.add`; `overflow` can be "error" or "truncate".
        """
        model = model_here(self._embedder, self._place, "add texts")
        given, rows, vectors = embedded_rows(model, texts, ids, titles, metadata, overflow)
        if rows:
            with self._transaction("changed") as run:
                documents.store_documents(run, self._tables, rows, vectors)
        return given

    def add_vectors(
        self,
        vectors: NDArray[np.float32],
        *,
        ids: Sequence[str],
        texts: Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        num_tokens: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
    ) -> list[str]:
        """Store documents whose vectors were computed elsewhere by the same model: all, or none.

        Args, returns and raises as `egemma.Index.add_vectors`.
        """
        given, rows, checked = vector_rows(
            self._identity, vectors, ids, texts, titles, metadata, num_tokens, truncated
        )
        if rows:
            with self._transaction("changed") as run:
                documents.store_documents(run, self._tables, rows, checked)
        return given

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents, all in one transaction; ids that are not stored are passed over.

        Returns how many were deleted.
        """
        checked = check_ids(ids)
        with self._transaction("changed") as run:
            return documents.delete_documents(run, self._tables, checked)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the stored documents with these ids, in their order.

        Raises:
            NotFoundError: an id is not stored.
        """
        checked = check_ids(ids)
        with self._transaction("read", snapshot=True) as run:
            rows = documents.read_rows(run, self._tables, checked)
        return documents_of(rows, checked, self._place)

    def __getitem__(self, id_: str) -> Document:
        """Return the stored document with this id; raises as `get`."""
        check_id(id_)
        return self.get([id_])[0]

    def __contains__(self, id_: object) -> bool:
        """Return whether a document with this id is stored."""
        if not isinstance(id_, str) or not can_be_stored(id_):
            return False
        with self._transaction("read", snapshot=True) as run:
            return bool(documents.read_rows(run, self._tables, [id_]))

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """Return the ids of all documents, or of those that a filter is true for.

        They are in the order in which the documents were added.
        """
        condition = None if where is None else parse(where)
        with self._transaction("read", snapshot=True) as run:
            return documents.read_ids(run, self._tables, condition)

    @overload
    def search(self, query: Query, k: int = 10, **options: Unpack[StoreOptions]) -> Hits: ...
    @overload
    def search(
        self, query: Queries, k: int = 10, **options: Unpack[StoreOptions]
    ) -> list[Hits]: ...
    @overload  # one vector or rows of them: NumPy's types do not tell
    def search(self, query: NDArray[Any], k: int = 10, **options: Unpack[StoreOptions]) -> Any: ...
    def search(
        self,
        query: Query | Queries | NDArray[Any],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits | list[Hits]:
        """Return the documents that answer a query best.

        Every vector is compared at `dim`, on the server. Full text is ranked by PostgreSQL's
        `ts_rank`, which does not weigh rare words more.

        Args:
            query: a text or a (W,) vector by the same model; or several: a list of texts or (B, W)
                vectors. Of a vector only the direction counts; W is any trained width.
            k, dim, where, mode, task: as in `egemma.Index.search`.
            approximate: let the server's own index, pgvector's graph (see `build_graph`), find the
                candidates, which are then ordered by their cosine at `dim`; it can miss some.
            shortlist: how many candidates the graph finds; None for 200, or 10 k where that is
                more.
            exact: what a store does unless `approximate` is given.

        Returns:
            Hits by falling score; equal scores in the order in which documents were added. For
            several queries a list, answered from one state of the store.
        """
        request = SearchRequest(
            query=query,
            k=k,
            dim=dim,
            where=where,
            mode=mode,
            task=task,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )
        queries = request.query_vectors(self._identity, self._embedder, self._place)
        with self._transaction("searched", snapshot=True) as run:
            found = postgres_search.search(run, self._tables, self._place, request, queries)
        return request.answer(found)

    def build_graph(
        self, *, dim: int | None = None, m: int = 16, ef_construction: int = 64
    ) -> None:
        """Make, or make anew, pgvector's HNSW graph for `approximate=True`.

        The server keeps it up to date; writers wait while it is made.

        Args:
            dim: trained width that the graph goes by; None for 256, or the full width of a model
                that was not trained for that.
            m, ef_construction: pgvector's: links of each vector, candidates while linking. More of
                both find more and take longer.
        """
        if dim is None and DEFAULT_GRAPH_DIM in self._identity.dims:
            dim = DEFAULT_GRAPH_DIM
        dim = check_dim(dim, self._identity.dims)
        m = whole_number("m", m, 2, 100)
        ef_construction = whole_number("ef_construction", ef_construction, 2 * m, 1000)
        with self._transaction("changed") as run:
            build_graph(run, self._tables, dim, m, ef_construction)

    def facts(self) -> StoreFacts:
        """Return what the store says about itself."""
        with self._transaction("read", snapshot=True) as run:
            return StoreFacts(
                engine=engine_of(run),
                name=self.name,
                fingerprint=self._identity.fingerprint,
                model=self._identity.name,
                dims=self._identity.dims,
                documents=documents.count_documents(run, self._tables),
                graph_dim=graph_dim(run, self._tables.names),
            )

    def __len__(self) -> int:
        """Return how many documents there are."""
        with self._transaction("read", snapshot=True) as run:
            return documents.count_documents(run, self._tables)

    def close(self) -> None:
        """End the connection. The embedder stays open: it was not opened here."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> PostgresIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self, doing: str, *, snapshot: bool = False) -> Iterator[Run]:
        """Run a block in one transaction of a store that still holds vectors of this model.

        Args:
            doing: what the block does, after "cannot be", for messages.
            snapshot: the block only reads, and sees one state.
        """
        with self._lock, typed_errors(self._place, doing), self._connection.transaction():
            if snapshot:
                self._connection.execute(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
                )
            stored, _ = read_facts(self._connection, self._tables.names)
            check_same_model(self._place, stored, self._identity, _WAY_OUT)
            yield Run(self._connection)
