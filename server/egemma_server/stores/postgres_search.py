"""A search in PostgreSQL: vectors by pgvector, words by full text, all from one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.hits import Hits
from egemma_core.errors import ConfigError, InputError
from egemma_server.request import QueryVectors, SearchRequest
from egemma_server.stores.postgres_documents import (
    count_documents,
    packed_vectors,
    read_rows,
    sql_test,
)
from egemma_server.stores.postgres_tables import Run, Tables, graph_dim
from egemma_server.stores.rows import ranked_hits

DEFAULT_SHORTLIST = 200
_MAX_EF_SEARCH = 1000  # pgvector's own limit


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """How the server's graph is used by a search."""

    dim: int  # width that it goes by
    shortlist: int  # candidates that it is to find


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search within one transaction."""

    run: Run
    tables: Tables
    request: SearchRequest
    test: str  # the filter in SQL
    parameters: Sequence[Any]  # of the filter

    def by_cosine(self, query: NDArray[np.float64], dim: int) -> dict[str, float]:
        """Return id -> cosine at `dim`, best first; every vector is compared."""
        rows = self.run(
            f"SELECT id, {self._score(dim)} AS score FROM {self.tables.names.documents} "
            f"WHERE {self.test} ORDER BY score DESC, number LIMIT %s",
            self._query_parameter(query, dim),
            *self.parameters,
            self.request.num_candidates,
        )
        return {id_: _bounded(score) for id_, score in rows}

    def by_graph(
        self, query: NDArray[np.float64], dim: int, graph: _Graph
    ) -> tuple[dict[str, float], int]:
        """Return as `by_cosine`, for the candidates that the graph finds, and how many it found."""
        head = packed_vectors(query[None, : graph.dim], half=self.tables.half)[0]
        rows = self.run(
            f"SELECT id, {self._score(dim)} AS score, count(*) OVER () FROM "
            f"(SELECT id, number, embedding FROM {self.tables.names.documents} "
            f"WHERE {self.test} ORDER BY {self.tables.head(graph.dim)} <=> %s LIMIT %s) "
            "AS candidates ORDER BY score DESC, number LIMIT %s",
            self._query_parameter(query, dim),
            *self.parameters,
            self.tables.stored_vector(head),
            graph.shortlist,
            self.request.num_candidates,
        ).fetchall()
        return {id_: _bounded(score) for id_, score, _ in rows}, rows[0][2] if rows else 0

    def by_words(self, words: Sequence[str]) -> dict[str, float]:
        """Return id -> rank of the documents that hold any of the words, best first."""
        if not words:
            return {}
        query = " | ".join(f"'{word}'" for word in words)
        rows = self.run(
            f"SELECT id, ts_rank(words, query, 1) AS rank FROM {self.tables.names.documents}, "
            "(SELECT %s::tsquery AS query) AS wanted "
            f"WHERE words @@ query AND {self.test} ORDER BY rank DESC, number LIMIT %s",
            query,
            *self.parameters,
            self.request.num_candidates,
        )
        return {id_: float(rank) for id_, rank in rows}

    def _score(self, dim: int) -> str:
        # In float32 and with the query as it is, also where the stored vectors are halves; a vector
        # without a direction at this width scores 0. No graph is of this expression, so a query
        # that does not name the graph's own compares every row.
        prefix = "embedding::vector"
        if dim != self.tables.dim:
            prefix = f"subvector(embedding::vector, 1, {dim})"
        return f"coalesce(nullif(1 - ({prefix} <=> %s), 'NaN'), 0)"

    def _query_parameter(self, query: NDArray[np.float64], dim: int) -> Any:
        return self.tables.vector(packed_vectors(query[None, :dim], half=False)[0])


def search(
    run: Run, tables: Tables, place: str, request: SearchRequest, queries: QueryVectors | None
) -> list[Hits]:
    """Return the hits of each query, all from the state of the tables that this transaction sees.

    Args:
        place: what the store is called, for messages.

    Raises:
        ConfigError: a graph is asked for, and there is none.
        InputError: a vector is shorter than the graph's.
        psycopg.Error: the server refuses.
    """
    test, parameters = sql_test(request.condition)
    one = _Search(run=run, tables=tables, request=request, test=test, parameters=parameters)
    graph = None
    compared = 0
    if queries is not None and request.approximate:
        graph = _use_graph(run, tables, place, request, queries.rows.shape[1])
    elif queries is not None:
        compared = count_documents(run, tables, request.condition)
    results = []
    for number in range(request.num_queries):
        cosines: dict[str, float] = {}
        ranks: dict[str, float] = {}
        if queries is not None and graph is not None:
            cosines, compared = one.by_graph(queries.rows[number], queries.dim, graph)
        elif queries is not None:
            cosines = one.by_cosine(queries.rows[number], queries.dim)
        if request.words is not None:
            ranks = one.by_words(request.words[number])
        info = request.info(
            queries,
            engine="pgvector",
            vectors=compared,
            scan_width=None if graph is None else graph.dim,
            shortlist=None if graph is None else graph.shortlist,
        )
        ranked = request.ranked(cosines, ranks)
        rows = read_rows(run, tables, [id_ for id_, _ in ranked])
        results.append(ranked_hits(rows, ranked, cosines, ranks, info))
    return results


def _use_graph(run: Run, tables: Tables, place: str, request: SearchRequest, width: int) -> _Graph:
    """Set this transaction up for the graph."""
    dim = graph_dim(run, tables.names)
    if dim is None:
        raise ConfigError(
            f"approximate=True was given, but {place} has no graph.",
            hint="Make one with build_graph(), or leave approximate out.",
        )
    if width < dim:
        raise InputError(
            f"the vector has {width} channels, the graph goes by {dim}.",
            hint="Pass a wider one, or leave approximate out.",
        )
    candidates = request.num_candidates
    shortlist = max(candidates, request.shortlist or max(DEFAULT_SHORTLIST, 10 * candidates))
    # Until the shortlist is full, however few documents pass the filter.
    for setting, value in (
        ("hnsw.ef_search", min(shortlist, _MAX_EF_SEARCH)),
        ("hnsw.iterative_scan", "relaxed_order"),
        ("hnsw.max_scan_tuples", 2**31 - 1),
        ("hnsw.scan_mem_multiplier", 1000),
    ):
        run(f"SET LOCAL {setting} = {value}")
    return _Graph(dim=dim, shortlist=shortlist)


def _bounded(cosine: float) -> float:
    return max(-1.0, min(1.0, float(cosine)))
