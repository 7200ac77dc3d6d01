"""How an index is searched: by vectors in two passes or exactly, by words, or by both joined.

The first pass goes through the int8 heads of all vectors in memory; the second reads the best of
them from the file and compares them at full width.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from egemma.fusion import reciprocal_rank_fusion
from egemma.index.codes import cosines, to_array
from egemma.index.facts import State
from egemma.index.heads import Heads
from egemma.index.hits import Hit, Hits, Mode, SearchInfo, read_hit
from egemma.index.inputs import query_rows
from egemma.index.records import numbers_where
from egemma.index.scan import kernel_name
from egemma.index.session import Session
from egemma.index.tuned import Tuned
from egemma.index.vectors import read_vectors
from egemma.index.words import best_words
from egemma_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from egemma.embeddings import Embedding, Embeddings

MIN_SHORTLIST = 300  # where nothing was tuned: at least so many, and
SHORTLIST_PER_HIT = 10  # so many for each hit that is asked for
FUSED_HITS = 100  # of each kind that hybrid search joins, or k where that is more
_VECTORS_TOGETHER = 4096  # that are held at full width at a time
_KEPT_FILTERS = 16

Ranking = list[tuple[int, float]]  # chunk numbers and scores, best first


# What gives one `Hits`, and what gives a list of them; an array of NumPy may be either.
Query: TypeAlias = "str | Embedding"
Queries: TypeAlias = "list[str] | tuple[str, ...] | Embeddings"


class SearchOptions(TypedDict, total=False):
    """The settings of a search by name, for type checkers; `Index.search` says what they mean."""

    dim: int | None
    where: Mapping[Any, Any] | None
    mode: Mode
    task: str
    shortlist: int | None
    exact: bool


def queries_of(query: object) -> tuple[list[str] | None, NDArray[Any] | None, bool]:
    """Tell texts from vectors, and one query from several.

    Returns:
        The texts, or None; the (B, W) vectors, or None; whether it is one query without a list.
    """
    if isinstance(query, str) or (
        isinstance(query, (list, tuple))
        and (not query or any(isinstance(text, str) for text in query))
    ):
        single = isinstance(query, str)
        texts: list[Any] = [query] if single else list(query)
        for position, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"the query is {text!r}, and must be a text with at least one word.",
                    position=position,
                    place="" if single else f"query {position}",
                )
        return texts, None, single
    vectors = to_array(query)
    if vectors.ndim not in (1, 2) or vectors.dtype.kind != "f":
        raise InputError(
            f"the query has shape {vectors.shape} and type {vectors.dtype}: it must be a text, "
            "a list of texts, a vector of floats, or rows of them."
        )
    return None, np.atleast_2d(vectors), vectors.ndim == 1


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a caller searches for and how, checked; `Index.search` says what each setting means."""

    texts: list[str] | None  # the queries, or else
    vectors: NDArray[Any] | None  # (B, W) theirs
    k: int
    dim: int | None
    condition: tuple[str, list[Any]] | None  # SQL of a filter, and its parameters
    mode: Mode
    task: str
    shortlist: int | None
    exact: bool

    def __post_init__(self) -> None:
        if self.vectors is not None and self.mode != "vector":
            raise ConfigError(
                f"mode={self.mode!r} searches for words, and the query is a vector.",
                hint="Pass a text, or mode='vector'.",
            )
        numbers = self.dim is not None or self.shortlist is not None or self.exact
        if self.mode == "text" and numbers:
            raise ConfigError(
                "mode='text' compares no vectors.", hint="Leave dim, shortlist and exact out."
            )
        if self.exact and self.shortlist is not None:
            raise ConfigError("exact=True compares every vector.", hint="Leave shortlist out.")

    @property
    def count(self) -> int:
        """How many hits of each kind are looked for."""
        return max(self.k, FUSED_HITS) if self.mode == "hybrid" else self.k


class Searcher:
    """Searches one index, with its heads and the latest filters in memory."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._heads = Heads(0, threads)
        # SQL and parameters -> allowed by number; of one generation
        self._filters: dict[tuple[str, str], NDArray[np.bool_]] = {}
        self._filters_generation = -1

    def forget(self) -> None:
        """Free the memory; the next search reads everything again."""
        self._heads = Heads(0, self._threads)
        self._filters.clear()

    def answer(self, plan: SearchPlan, session: Session) -> list[Hits]:
        """Embed texts where the plan compares vectors, and search in one state of the file."""
        if plan.texts == []:
            return []
        while True:
            vectors, embedder = plan.vectors, None
            if plan.texts is not None and plan.mode != "text":
                embedder = session.embedder_for("search by meaning")
                vectors = embedder.embed_query(plan.texts, task=plan.task).vectors
            with session.reading("search") as connection:
                # else a migration came between, and is done: ask the new model
                if embedder is None or embedder is session.embedder:
                    state = session.checked_state(connection)
                    if plan.condition is not None:
                        session.check_documents(connection)
                    return self._search(connection, state, plan, vectors)

    def _search(
        self,
        connection: sqlite3.Connection,
        state: State,
        plan: SearchPlan,
        vectors: NDArray[Any] | None,
    ) -> list[Hits]:
        """Search for each query.

        Args:
            vectors: (B, W) of the queries, where the plan compares vectors.
        """
        info = SearchInfo(mode=plan.mode)
        by_vector: list[Ranking] = []
        by_words: list[Ranking] = []
        if vectors is not None:
            by_vector, info = self._by_vector(connection, state, plan, vectors)
        if plan.texts is not None and plan.mode != "vector":
            by_words = [
                best_words(connection, text, plan.count, plan.condition) for text in plan.texts
            ]
        nothing: list[Ranking] = [[]] * max(len(by_vector), len(by_words))
        return [
            Hits(hits=_hits(connection, plan, *rankings), how=info)
            for rankings in zip(by_vector or nothing, by_words or nothing, strict=True)
        ]

    def _by_vector(
        self,
        connection: sqlite3.Connection,
        state: State,
        plan: SearchPlan,
        vectors: NDArray[Any],
    ) -> tuple[list[Ranking], SearchInfo]:
        queries, dim = query_rows(vectors, plan.dim, state.identity)
        if state.scan_width != self._heads.width:
            self._heads = Heads(state.scan_width, self._threads)
        self._heads.refresh(connection, state)
        live, allowed = self._heads.live[: self._heads.count], None
        if plan.condition is not None:
            allowed = self._allowed(connection, state, plan.condition)
            live = live & allowed
        searched = state.chunks if allowed is None else int(live.sum())
        info = SearchInfo(
            mode=plan.mode, dim=dim, vectors=searched, scanned=searched, kernel="numpy"
        )
        unit = unit_rows(queries, dim)
        if plan.exact:
            return self._rank(connection, state, unit, np.flatnonzero(live), plan.count), info
        if queries.shape[1] < state.scan_width:
            raise InputError(
                f"the vector has {queries.shape[1]} channels, and this index scans "
                f"{state.scan_width}.",
                hint="Pass a wider vector, or exact=True.",
            )
        shortlist, tuned_for = plan.shortlist, None
        if shortlist is None:
            shortlist, tuned_for = _default_shortlist(state, plan.k)
        shortlist = max(plan.count, shortlist)
        rough = unit_rows(queries, state.scan_width).astype(np.float32)
        candidates = self._heads.scan(rough, shortlist, allowed)
        ranked = [
            self._rank(connection, state, unit[row : row + 1], np.sort(numbers), plan.count)[0]
            for row, numbers in enumerate(candidates)
        ]
        return ranked, replace(
            info,
            scan_width=state.scan_width,
            shortlist=shortlist,
            kernel=kernel_name(self._heads.kernel),
            tuned_for=tuned_for,
        )

    def _rank(
        self,
        connection: sqlite3.Connection,
        state: State,
        queries: NDArray[np.float64],
        numbers: NDArray[np.int64],
        count: int,
    ) -> list[Ranking]:
        """Rank chunks, given by rising numbers, for (B, dim) queries by their stored vectors."""
        best: list[Ranking] = [[] for _ in queries]
        for start in range(0, len(numbers), _VECTORS_TOGETHER):
            part = numbers[start : start + _VECTORS_TOGETHER]
            stored = read_vectors(connection, state, self._heads.codes[part], part)
            stored = stored[:, : queries.shape[1]]
            for row, query in enumerate(queries):
                scores = cosines(query, stored)
                kept = np.lexsort((part, -scores))[:count]
                found = zip(part[kept].tolist(), scores[kept].tolist(), strict=True)
                best[row] = sorted([*best[row], *found], key=lambda pair: (-pair[1], pair[0]))
                del best[row][count:]
        return best

    def _allowed(
        self, connection: sqlite3.Connection, state: State, condition: tuple[str, list[Any]]
    ) -> NDArray[np.bool_]:
        """Return (rows,) bool by chunk number: whose document passes a filter; kept for a while."""
        if self._filters_generation != state.generation:
            self._filters.clear()
            self._filters_generation = state.generation
        key = (condition[0], repr(condition[1]))
        if key not in self._filters:
            allowed = np.zeros(state.next_number, np.bool_)
            allowed[numbers_where(connection, state, *condition)] = True
            while len(self._filters) >= _KEPT_FILTERS:
                del self._filters[next(iter(self._filters))]
            self._filters[key] = allowed
        return self._filters[key]


def _default_shortlist(state: State, k: int) -> tuple[int, int | None]:
    """Return how many vectors to compare at full width for k hits.

    The second value is for how many chunks that was tuned, None where it was not.
    """
    tuned = None if state.tuned is None else Tuned.from_json(state.tuned)
    if tuned is None or tuned.scan_width != state.scan_width:
        return max(MIN_SHORTLIST, SHORTLIST_PER_HIT * k), None
    return tuned.shortlist_for(k), tuned.chunks


def unit_rows(rows: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Return (B, dim) the first channels of each row, at length 1 again."""
    head = rows[:, :dim]
    unit: NDArray[np.float64] = head / np.sqrt((head * head).sum(axis=1, keepdims=True))
    return unit


def _hits(
    connection: sqlite3.Connection, plan: SearchPlan, by_vector: Ranking, by_words: Ranking
) -> tuple[Hit, ...]:
    """Read the best chunks of one query, by the ranking of the plan's mode."""
    cosine, bm25 = dict(by_vector), dict(by_words)
    ranked = by_vector or by_words
    if plan.mode == "hybrid":
        ranked = reciprocal_rank_fusion([list(cosine), list(bm25)])
    return tuple(
        read_hit(connection, number, score, cosine.get(number), bm25.get(number))
        for number, score in ranked[: plan.k]
    )
