"""The index in PostgreSQL with pgvector: two tables, one transaction for every call, filters and
ranking done by the server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from egemma.fusion import reciprocal_rank_fusion
from egemma.identity import ModelIdentity, check_same_model
from egemma.index.hits import Document, Hits, Mode
from egemma.index.inputs import check_ids
from egemma.where import And, parse
from egemma_core.errors import ConfigError, IndexFileError, InputError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.vectors import check_dim
from egemma_server.stores.postgres_tables import (
    Names,
    Run,
    literal,
    open_tables,
    packed_vectors,
    place_of,
    psycopg_here,
    read_facts,
    said,
    tsvector,
    typed_errors,
    vector_type,
)
from egemma_server.stores.postgres_where import filterable, to_postgres
from egemma_server.stores.rows import (
    Plan,
    Row,
    StoreFacts,
    check_name,
    embedded_rows,
    model_here,
    no_chunks,
    one_vector,
    plan_of,
    ranked_hits,
    vector_rows,
)

if TYPE_CHECKING:
    from psycopg import Connection

    from egemma.embedder import Embedder

DEFAULT_GRAPH_DIM = 256
DEFAULT_SHORTLIST = 200
_MAX_EF_SEARCH = 1000  # pgvector's own limit
_WAY_OUT = "Open it with that model, or re-embed the texts into a store of another name."


class PostgresIndex:
    """An open store.

    Make one with `PostgresIndex.open`. May be used from several threads, which then take turns.

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
        """Of a connection whose tables `open` has checked; `open` does it all."""
        self.name = name
        self._connection, self._identity, self._embedder = connection, identity, embedder
        self._half = half
        self._lock = threading.RLock()
        self._names = Names.of(name)
        self._vector = vector_type(connection, "vector")
        self._stored_vector = vector_type(connection, "halfvec") if half else self._vector

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
            IndexFileError: no connection, no store, or one that is not understood.
            RuntimeUnavailableError: psycopg is not installed here, or pgvector not there.
        """
        check_name(name)
        identity = (
            embedder
            if isinstance(embedder, ModelIdentity) or embedder is None
            else ModelIdentity.of(embedder.manifest)
        )
        psycopg = psycopg_here()
        place = place_of(name)
        try:
            connection = psycopg.connect(dsn, autocommit=True, client_encoding="UTF8")
        except psycopg.Error as error:
            raise IndexFileError(
                f"{place} cannot be reached: {said(error)}. Check the address and the server."
            ) from error
        try:
            with typed_errors(place, "opened"):
                encoding = connection.info.parameter_status("server_encoding")
                if encoding != "UTF8":
                    raise ConfigError(
                        f"the database has the encoding {encoding}, which cannot hold every text. "
                        "Use one with UTF8."
                    )
                with connection.transaction():
                    stored, half = open_tables(
                        connection, name, identity if create else None, half=half
                    )
            if identity is not None:
                check_same_model(place, stored, identity, _WAY_OUT)
            return cls(
                connection,
                name,
                stored,
                None if isinstance(embedder, ModelIdentity) else embedder,
                half=half,
            )
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
        given, rows, vectors = embedded_rows(
            model_here(self._embedder, self._place, "add texts"),
            texts,
            ids,
            titles,
            metadata,
            overflow,
        )
        self._store(rows, vectors)
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
        """Store documents whose vectors were computed elsewhere by the same model: all, or none; as
        `egemma.Index.add_vectors`.
        """
        given, rows, checked = vector_rows(
            self._identity, vectors, ids, texts, titles, metadata, num_tokens, truncated
        )
        self._store(rows, checked)
        return given

    def put(self, documents: object, *, overflow: str = "error") -> NoReturn:
        """Not here: a store has one vector for each document."""
        no_chunks(self._place)

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents, all in one transaction; ids that are not stored are passed over.

        Returns how many were deleted.
        """
        wanted = check_ids(ids)
        with self._transaction("changed") as run:
            # Locked in the order in which `_store` locks them: two writers must not wait for each
            # other.
            return int(
                run(
                    f"DELETE FROM {self._names.documents} WHERE number IN (SELECT number FROM "
                    f"{self._names.documents} "
                    'WHERE id = ANY(%s) ORDER BY id COLLATE "C" FOR UPDATE)',
                    wanted,
                ).rowcount
            )

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The stored documents with these ids, in their order.

        Raises:
            InputError: an id is not stored.
        """
        wanted = check_ids(ids)
        with self._transaction("read", snapshot=True) as run:
            rows = self._rows(run, wanted)
        missing = [id_ for id_ in wanted if id_ not in rows]
        if missing:
            raise InputError(f"{self._place} has no document {missing[0]!r}.")
        return [rows[id_].document() for id_ in wanted]

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """The ids of all documents, or of those that a filter is true for, in the order in which
        they were added.
        """
        condition, parameters = to_postgres(parse(where) if where is not None else And(()))
        with self._transaction("read", snapshot=True) as run:
            return [
                row[0]
                for row in run(
                    f"SELECT id FROM {self._names.documents} WHERE {condition} ORDER BY number",
                    *parameters,
                )
            ]

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits:
        """The documents that answer a query best.

        Every vector is compared at `dim`, on the server. With `approximate` pgvector's graph (see
        `build_graph`) finds `shortlist` candidates first, 200 or 10 k where that is more, and these
        are ordered by the cosine at `dim`.

        Args: as `egemma.Index.search`. Full text is ranked by PostgreSQL's `ts_rank`, which does
        not weigh rare words more.

        Returns:
            Hits by falling score; equal scores in the order in which documents were added.
        """
        return self.search_many(
            [query],
            k,
            dim=dim,
            where=where,
            mode=mode,
            task=task,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> list[Hits]:
        """As `search`, for several queries at once: they are embedded together and answered from
        one state.
        """
        return self._search(
            plan_of(
                self._identity,
                self._embedder,
                self._place,
                queries=queries,
                vectors=None,
                k=k,
                dim=dim,
                where=where,
                mode=mode,
                task=task,
                shortlist=shortlist,
                exact=exact,
                approximate=approximate,
            )
        )

    def search_vector(
        self,
        vector: NDArray[np.float32],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits:
        """As `search`, for a query's vector by the same model: (W,) of any trained width; only its
        direction counts.
        """
        return self.search_vectors(
            one_vector(vector)[None],
            k,
            dim=dim,
            where=where,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )[0]

    def search_vectors(
        self,
        vectors: NDArray[np.float32],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> list[Hits]:
        """As `search_vector`, for the (B, W) vectors of several queries."""
        return self._search(
            plan_of(
                self._identity,
                None,
                self._place,
                queries=None,
                vectors=vectors,
                k=k,
                dim=dim,
                where=where,
                mode="vector",
                task=DEFAULT_TASK,
                shortlist=shortlist,
                exact=exact,
                approximate=approximate,
            )
        )

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
        default = (
            DEFAULT_GRAPH_DIM if DEFAULT_GRAPH_DIM in self._identity.dims else self._identity.dim
        )
        dim = check_dim(dim if dim is not None else default, self._identity.dims)
        if not all(type(value) is int for value in (m, ef_construction)) or not (
            2 <= m <= 100 and 2 * m <= ef_construction <= 1000
        ):
            raise ConfigError(
                f"m={m!r}, ef_construction={ef_construction!r}: whole numbers from 2 to 100, and "
                "from 2 m to 1000."
            )
        kind = "halfvec" if self._half else "vector"
        with self._transaction("changed") as run:
            run(f"DROP INDEX IF EXISTS {self._names.graph}")
            run(
                f"CREATE INDEX {self._names.graph_name} ON {self._names.documents} USING hnsw "
                f"(({self._head(dim)}) {kind}_cosine_ops) "
                f"WITH (m = {m}, ef_construction = {ef_construction})"
            )
            run(
                f"INSERT INTO {self._names.facts} (name, value) VALUES ('graph_dim', %s) ON "
                "CONFLICT (name) DO UPDATE SET value = excluded.value",
                str(dim),
            )

    def facts(self) -> StoreFacts:
        """What the store says about itself."""
        with self._transaction("read", snapshot=True) as run:
            count = run(f"SELECT count(*) FROM {self._names.documents}").fetchone()[0]
            engine = run(
                "SELECT current_setting('server_version'), extversion FROM pg_extension WHERE "
                "extname = 'vector'"
            ).fetchone()
            graph = self._graph_dim(run)
        return StoreFacts(
            engine=f"PostgreSQL {engine[0].split()[0]}, pgvector {engine[1]}",
            name=self.name,
            fingerprint=self._identity.fingerprint,
            model=self._identity.name,
            dims=self._identity.dims,
            documents=int(count),
            graph_dim=graph,
        )

    def __len__(self) -> int:
        """How many documents there are."""
        with self._transaction("read", snapshot=True) as run:
            return int(run(f"SELECT count(*) FROM {self._names.documents}").fetchone()[0])

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

    @property
    def _place(self) -> str:
        return place_of(self.name)

    def _store(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        if not rows:
            return
        packed = packed_vectors(vectors, half=self._half)
        entries = [
            (
                row.id,
                row.title,
                row.text,
                row.metadata,
                filterable(row.metadata),
                row.num_tokens,
                row.truncated,
                self._stored_vector(vector),
                tsvector(f"{row.title or ''} {row.text}"),
            )
            for row, vector in zip(rows, packed, strict=True)
        ]
        columns = (
            "title",
            "text",
            "metadata",
            "filter",
            "num_tokens",
            "truncated",
            "embedding",
            "words",
        )
        with self._transaction("changed") as run:
            first = run(
                f"SELECT nextval(pg_get_serial_sequence({literal(self._names.documents)}, "
                "'number')) FROM generate_series(1, %s)",
                len(rows),
            )
            numbers = [number for (number,) in first.fetchall()]
            with self._connection.cursor() as cursor:
                # In the order of ids, so that two writers of the same documents do not wait for
                # each other.
                cursor.executemany(
                    f"INSERT INTO {self._names.documents} (number, id, {', '.join(columns)}) "
                    "VALUES (%s, %s, %s, %s, %s, %s::jsonb, %s, %s, %s, %s::tsvector) "
                    "ON CONFLICT (id) DO UPDATE SET "
                    f"{', '.join(f'{column} = excluded.{column}' for column in columns)}".encode(),
                    [
                        (number, *entry)
                        for number, entry in sorted(
                            zip(numbers, entries, strict=True), key=lambda pair: pair[1][0]
                        )
                    ],
                )

    def _search(self, plan: Plan) -> list[Hits]:
        """Everything about these queries from one state of the tables."""
        condition, parameters = to_postgres(
            plan.condition if plan.condition is not None else And(())
        )
        results = []
        with self._transaction("searched", snapshot=True) as run:
            graph_dim, shortlist, compared = None, None, 0
            if plan.vectors is not None and plan.approximate:
                graph_dim, shortlist = self._prepare_graph(run, plan, plan.vectors.shape[1])
            elif plan.vectors is not None:
                compared = int(
                    run(
                        f"SELECT count(*) FROM {self._names.documents} WHERE {condition}",
                        *parameters,
                    ).fetchone()[0]
                )
            for row in range(
                len(plan.vectors) if plan.vectors is not None else len(plan.words or ())
            ):
                cosine: dict[str, float] = {}
                if plan.vectors is not None:
                    cosine, candidates = self._by_vector(
                        run, plan, plan.vectors[row], condition, parameters, graph_dim, shortlist
                    )
                    compared = candidates if plan.approximate else compared
                how = plan.how(
                    scan_width=graph_dim,
                    shortlist=shortlist,
                    vectors=compared,
                    kernel="pgvector" if plan.vectors is not None else None,
                )
                rank = (
                    self._by_words(run, plan, plan.words[row], condition, parameters)
                    if plan.words is not None
                    else {}
                )
                ranked = (
                    list((cosine or rank).items())
                    if plan.mode != "hybrid"
                    else reciprocal_rank_fusion([list(cosine), list(rank)])
                )
                rows = self._rows(run, [id_ for id_, _ in ranked[: plan.k]])
                results.append(ranked_hits(rows, ranked[: plan.k], cosine, rank, how))
        return results

    def _prepare_graph(self, run: Run, plan: Plan, width: int) -> tuple[int, int]:
        """Set this transaction up for the graph; its width and how many candidates it shall
        find.
        """
        graph_dim = self._graph_dim(run)
        if graph_dim is None:
            raise ConfigError(
                f"approximate=True, but {self._place} has no graph. Make one with build_graph(), "
                "or leave approximate out."
            )
        if width < graph_dim:
            raise InputError(
                f"the vector has {width} channels, the graph goes by {graph_dim}: pass a wider "
                "one, or exact=True."
            )
        shortlist = max(plan.count, plan.shortlist or max(DEFAULT_SHORTLIST, 10 * plan.count))
        # Until the shortlist is full, however few documents pass the filter.
        for setting, value in (
            ("hnsw.ef_search", min(shortlist, _MAX_EF_SEARCH)),
            ("hnsw.iterative_scan", "relaxed_order"),
            ("hnsw.max_scan_tuples", 2**31 - 1),
            ("hnsw.scan_mem_multiplier", 1000),
        ):
            run(f"SET LOCAL {setting} = {value}")
        return graph_dim, shortlist

    def _by_vector(
        self,
        run: Run,
        plan: Plan,
        query: NDArray[np.float64],
        condition: str,
        parameters: Sequence[Any],
        graph_dim: int | None,
        shortlist: int | None,
    ) -> tuple[dict[str, float], int]:
        """Id -> cosine at the plan's width, best first; and how many vectors the graph gave."""
        dim = cast(int, plan.dim)
        wanted = self._vector(packed_vectors(query[None, :dim], half=False)[0])
        # Scored in float32 and with the query as it is, also where the stored vectors are halves; a
        # vector without a direction at this width scores 0. No graph is of this expression, so
        # without one named below this compares every row.
        prefix = (
            "embedding::vector"
            if dim == self._identity.dim
            else f"subvector(embedding::vector, 1, {dim})"
        )
        score = f"coalesce(nullif(1 - ({prefix} <=> %s), 'NaN'), 0)"
        if graph_dim is None:
            rows = run(
                f"SELECT id, {score} AS score FROM {self._names.documents} WHERE {condition} ORDER "
                "BY score DESC, number LIMIT %s",
                wanted,
                *parameters,
                plan.count,
            )
            return {id_: _bounded(value) for id_, value in rows}, 0
        head = self._stored_vector(packed_vectors(query[None, :graph_dim], half=self._half)[0])
        rows = run(
            f"SELECT id, {score} AS score, count(*) OVER () FROM (SELECT id, number, embedding "
            f"FROM {self._names.documents} "
            f"WHERE {condition} ORDER BY {self._head(graph_dim)} <=> %s LIMIT %s) AS candidates "
            "ORDER BY score DESC, number LIMIT %s",
            wanted,
            *parameters,
            head,
            shortlist,
            plan.count,
        ).fetchall()
        return {id_: _bounded(value) for id_, value, _ in rows}, rows[0][2] if rows else 0

    def _by_words(
        self, run: Run, plan: Plan, words: Sequence[str], condition: str, parameters: Sequence[Any]
    ) -> dict[str, float]:
        """Id -> rank of the documents that hold any of the words, best first."""
        if not words:
            return {}
        query = " | ".join(f"'{word}'" for word in words)
        rows = run(
            f"SELECT id, ts_rank(words, query, 1) AS rank FROM {self._names.documents}, (SELECT "
            "%s::tsquery AS query) AS wanted "
            f"WHERE words @@ query AND {condition} ORDER BY rank DESC, number LIMIT %s",
            query,
            *parameters,
            plan.count,
        )
        return {id_: float(rank) for id_, rank in rows}

    def _rows(self, run: Run, ids: Sequence[str]) -> dict[str, Row]:
        found = run(
            f"SELECT id, title, text, metadata, num_tokens, truncated FROM {self._names.documents} "
            "WHERE id = ANY(%s)",
            list(ids),
        )
        return {
            id_: Row(
                id=id_,
                title=title,
                text=text,
                metadata=metadata,
                num_tokens=num_tokens,
                truncated=truncated,
            )
            for id_, title, text, metadata, num_tokens, truncated in found
        }

    def _head(self, dim: int) -> str:
        """What a graph of this width is made of; a search must say it in the same words."""
        return f"subvector(embedding, 1, {dim})::{'halfvec' if self._half else 'vector'}({dim})"

    def _graph_dim(self, run: Run) -> int | None:
        row = run(
            f"SELECT value FROM {self._names.facts} WHERE name = 'graph_dim' AND "
            f"to_regclass({literal(self._names.graph)}) IS NOT NULL"
        ).fetchone()
        return None if row is None else int(row[0])

    @contextmanager
    def _transaction(self, doing: str, *, snapshot: bool = False) -> Iterator[Run]:
        """One transaction, which begins by seeing that the store still holds vectors of this
        model.
        """
        with self._lock, typed_errors(self._place, doing), self._connection.transaction():
            if snapshot:
                self._connection.execute(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
                )
            check_same_model(
                self._place, read_facts(self._connection, self._names)[0], self._identity, _WAY_OUT
            )
            yield Run(self._connection)


def _bounded(cosine: float) -> float:
    return max(-1.0, min(1.0, float(cosine)))
