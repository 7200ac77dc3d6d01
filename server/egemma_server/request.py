"""A search as a caller asks for it: checked once, at the door, and the same for every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from egemma.fusion import reciprocal_rank_fusion
from egemma.identity import ModelIdentity
from egemma.index.hits import MODES, Hits, Mode, SearchInfo
from egemma.index.inputs import MAX_K, query_rows
from egemma.index.search import Queries, Query, SearchOptions
from egemma.index.words import MAX_WORDS
from egemma.where import Condition, parse
from egemma_core.checks import one_of, whole_number
from egemma_core.errors import ConfigError, InputError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.vectors import check_dim
from egemma_server.words import words_of

if TYPE_CHECKING:
    from egemma.embedder import Embedder

FUSED = 100  # hits of each kind that hybrid search joins, or k where that is more


class StoreOptions(SearchOptions, total=False):
    """The settings of a store's search by name, for type checkers."""

    approximate: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryVectors:
    """The vectors of a search's queries."""

    rows: NDArray[np.float64]  # (B, W), each of length 1
    dim: int  # the trained width to score at


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """A search, checked as far as it can be without the model and the server.

    Raises:
        ConfigError: a setting cannot work.
        InputError: a query cannot be searched for.
    """

    # one text or (W,) vector, or several texts or (B, W) vectors
    query: Query | Queries | NDArray[Any]
    k: int = 10
    dim: int | None = None  # a trained width to score at; None: the full one, or the vector's own
    where: Mapping[Any, Any] | None = None
    mode: Mode = "vector"
    task: str = DEFAULT_TASK  # of texts; decides their prompt
    shortlist: int | None = None  # candidates that a graph finds; None: the store's own choice
    exact: bool = False  # what a store does anyway; for calls that are the same on a local index
    approximate: bool = False  # let the server's own graph find the candidates

    several: bool = field(init=False)  # a list of results is wanted, one for each query
    texts: tuple[str, ...] | None = field(init=False)  # the queries, where they are texts
    vectors: NDArray[Any] | None = field(init=False)  # (B, W), where they are vectors
    condition: Condition | None = field(init=False)
    words: tuple[tuple[str, ...], ...] | None = field(init=False)  # None: no words are searched

    def __post_init__(self) -> None:
        whole_number("k", self.k, 1, MAX_K)
        one_of("mode", self.mode, MODES)
        if self.exact and self.approximate:
            raise ConfigError(
                "exact=True and approximate=True were both given, and exclude each other.",
                hint="Leave one of them out.",
            )
        if self.shortlist is not None:
            whole_number("shortlist", self.shortlist, 1)
            if not self.approximate:
                raise ConfigError(
                    f"shortlist={self.shortlist!r} was given without approximate=True, and a store "
                    "compares every vector then.",
                    hint="Leave shortlist out, or pass approximate=True.",
                )
        condition = None if self.where is None else parse(self.where)
        several, texts, vectors = _queries(self.query)
        if texts is None and self.mode != "vector":
            raise ConfigError(
                f"mode={self.mode!r} was given with a vector, which has no words.",
                hint="Pass the query's text, or leave mode out.",
            )
        words = None if texts is None or self.mode == "vector" else _words(texts)
        object.__setattr__(self, "several", several)
        object.__setattr__(self, "texts", texts)
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "condition", condition)
        object.__setattr__(self, "words", words)

    @property
    def num_queries(self) -> int:
        """How many queries there are."""
        queries = self.texts if self.vectors is None else self.vectors
        return 0 if queries is None else len(queries)

    @property
    def num_candidates(self) -> int:
        """How many hits of each kind, vectors and words, a store has to find."""
        return self.k if self.mode != "hybrid" else max(self.k, FUSED)

    def query_vectors(
        self, identity: ModelIdentity, embedder: Embedder | None, place: str
    ) -> QueryVectors | None:
        """Return the vectors to search for, or None where only words are searched.

        Args:
            identity: the model whose vectors the store holds.
            embedder: that model, for queries that are texts.
            place: what the store is called, for messages.

        Raises:
            ConfigError: there is no model for a text.
            DimensionError, InputError, TokenLimitError, PromptError: a query or the width cannot be
                used.
        """
        if self.dim is not None:
            check_dim(self.dim, identity.dims)
        vectors: object = self.vectors
        if self.texts and self.mode != "text":
            model = model_here(embedder, place, "search by meaning")
            vectors = model.embed_query(list(self.texts), task=self.task).vectors
        if vectors is None:
            return None
        rows, dim = query_rows(vectors, self.dim, identity)
        return QueryVectors(rows=rows, dim=dim)

    def ranked(
        self, cosines: Mapping[str, float], text_scores: Mapping[str, float]
    ) -> list[tuple[str, float]]:
        """Return the ids of one query's best `k` hits with their scores, best first.

        Args:
            cosines, text_scores: id -> score of what vectors and words found, each best first.
        """
        if self.mode == "hybrid":
            return reciprocal_rank_fusion([list(cosines), list(text_scores)])[: self.k]
        return list((cosines or text_scores).items())[: self.k]

    def info(
        self,
        queries: QueryVectors | None,
        *,
        engine: str,
        vectors: int,
        scan_width: int | None = None,
        shortlist: int | None = None,
    ) -> SearchInfo:
        """Return what a search did, for its hits.

        Args:
            engine: what computed the cosines.
            vectors: how many were compared.
            scan_width, shortlist: of the graph, where one was used.
        """
        return SearchInfo(
            mode=self.mode,
            dim=None if queries is None else queries.dim,
            scan_width=scan_width,
            shortlist=shortlist,
            vectors=vectors,
            approximate=self.approximate,
            kernel=None if queries is None else engine,
        )

    def answer(self, results: list[Hits]) -> Hits | list[Hits]:
        """Return the results as they were asked for: one for one query, a list for several."""
        return results if self.several else results[0]


def model_here(embedder: Embedder | None, place: str, doing: str) -> Embedder:
    """Return the embedder that a store was opened with.

    Raises:
        ConfigError: it was opened without one.
    """
    if embedder is None:
        raise ConfigError(
            f"{place} was opened without a model, so it cannot {doing}.",
            hint="Open it with an Embedder.",
        )
    return embedder


def _queries(query: object) -> tuple[bool, tuple[str, ...] | None, NDArray[Any] | None]:
    """Tell the kinds of queries apart.

    Returns:
        Whether there are several; the texts, or None; the (B, W) vectors, or None.
    """
    if isinstance(query, str):
        return False, _checked_texts([query]), None
    if isinstance(query, (list, tuple)) and all(isinstance(text, str) for text in query):
        return True, _checked_texts(query), None
    vectors = np.asarray(query)
    if vectors.ndim not in (1, 2) or vectors.dtype.kind != "f":
        raise InputError(
            f"the query is {type(query).__name__} of shape {vectors.shape} and type "
            f"{vectors.dtype}.",
            hint="Pass a text, a list of texts, a vector of floats or rows of floats.",
        )
    return vectors.ndim == 2, None, np.atleast_2d(vectors)


def _checked_texts(texts: Sequence[str]) -> tuple[str, ...]:
    for position, text in enumerate(texts):
        if not text.strip():
            raise InputError(
                "a query is blank, and needs at least one word.",
                hint="Leave it out.",
                position=position,
            )
    return tuple(texts)


def _words(texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the different words of each text."""
    found = []
    for position, text in enumerate(texts):
        words = tuple(dict.fromkeys(words_of(text)))
        if len(words) > MAX_WORDS:
            raise InputError(
                f"a query has {len(words)} different words, and may have {MAX_WORDS}.",
                hint="Shorten it, or use mode='vector'.",
                position=position,
            )
        found.append(words)
    return tuple(found)
