"""What both stores do before and after the server: check and embed what comes in, check a search,
split texts into words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index.codes import check_vectors
from egemma.index.hits import MODES, Document, Hit, Hits, Mode, SearchInfo
from egemma.index.inputs import (
    check_counts,
    check_ids,
    check_k,
    check_text,
    check_unique,
    content_id,
    one_per_text,
    query_rows,
)
from egemma.index.words import MAX_WORDS
from egemma.metadata import pack_metadata
from egemma.where import Condition, parse
from egemma_core.errors import ConfigError, InputError
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim

if TYPE_CHECKING:
    from egemma.embedder import Embedder

FUSED = 100  # hits of each kind that hybrid search joins, or k where that is more
MAX_ID_BYTES = 2000  # PostgreSQL's B-tree takes 2,704 with everything around
MAX_NAME = 40  # PostgreSQL cuts names off at 63 bytes, and both stores add to them
# PostgreSQL's words have at most 2,046 bytes; equal beginnings of longer ones count as the same
# word
_MAX_WORD = 500
_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A document on its way to or from a server."""

    id: str
    title: str | None
    text: str
    metadata: str | None  # JSON text
    num_tokens: int
    truncated: bool

    def document(self) -> Document:
        return Document(
            id=self.id,
            text=self.text,
            title=self.title,
            metadata=self._metadata(),
            source=None,
            num_tokens=self.num_tokens,
            truncated=self.truncated,
            num_chunks=1,
        )

    def hit(self, score: float, vector_score: float | None, text_score: float | None) -> Hit:
        return Hit(
            id=self.id,
            score=score,
            text=self.text,
            start=0,
            stop=len(self.text),
            position=0,
            title=self.title,
            metadata=self._metadata(),
            truncated=self.truncated,
            vector_score=vector_score,
            text_score=text_score,
        )

    def _metadata(self) -> dict[str, Any] | None:
        unpacked: dict[str, Any] | None = (
            None if self.metadata is None else json.loads(self.metadata)
        )
        return unpacked


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What a store says about itself."""

    engine: str  # such as "PostgreSQL 18.4, pgvector 0.8.5"
    name: str
    fingerprint: str
    model: str
    dims: tuple[int, ...]
    documents: int
    # width that approximate search goes by first; None where there is no graph
    graph_dim: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search, checked as far as it can be without the server."""

    k: int
    count: int  # hits of each kind to fetch
    mode: Mode
    condition: Condition | None
    vectors: NDArray[np.float64] | None  # (B, W) unit rows; None where no vector is searched
    dim: int | None  # width to score at
    words: tuple[tuple[str, ...], ...] | None  # of each query; None where no words are searched
    shortlist: int | None
    approximate: bool

    def how(
        self, *, scan_width: int | None, shortlist: int | None, vectors: int, kernel: str | None
    ) -> SearchInfo:
        return SearchInfo(
            mode=self.mode,
            dim=self.dim,
            scan_width=scan_width,
            shortlist=shortlist,
            vectors=vectors,
            approximate=self.approximate,
            kernel=kernel,
        )


def check_name(name: object) -> str:
    """The name of a store on its server."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ConfigError(f"name={name!r}: 1 to {MAX_NAME} letters, digits, _ and - of ASCII.")
    return name


def embedded_rows(
    embedder: Embedder,
    texts: Sequence[str],
    ids: Sequence[str] | None,
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    overflow: str,
) -> tuple[list[str], list[Row], NDArray[np.float32]]:
    """Check texts, and embed each once.

    Returns:
        The ids in the order of the texts, the rows of the different ones among them, and those
        rows' (N, D) vectors.
    """
    if isinstance(texts, str):
        raise InputError("texts is one str: pass a list of texts.")
    if overflow not in ("error", "truncate"):
        raise ConfigError(
            f"overflow={overflow!r}: a store has one vector for each document, so it can be "
            "'error' or 'truncate'. "
            "Cut long texts with egemma.chunks.split_text and add each chunk under an id of its "
            "own."
        )
    texts = list(texts)
    given = None if ids is None else check_ids(ids)
    named, packed = _described(texts, titles, metadata, blank=False)
    given = (
        [content_id(text, title) for text, title in zip(texts, named, strict=True)]
        if given is None
        else given
    )
    if len(given) != len(texts):
        raise InputError(f"{len(given)} ids for {len(texts)} texts: give one each.")
    contents = list(zip(texts, named, packed, strict=True))
    check_unique(given, contents)
    unique = dict(zip(given, contents, strict=True))
    _check_id_bytes(unique)
    if not unique:
        return [], [], np.empty((0, embedder.dim), np.float32)
    wanted: Overflow = "truncate" if overflow == "truncate" else "error"
    found = embedder.embed_documents(
        [text for text, _, _ in unique.values()],
        titles=[title for _, title, _ in unique.values()],
        overflow=wanted,
    )
    vectors = check_vectors(found.vectors, embedder.dim)
    if len(vectors) != len(unique):
        raise InputError(
            f"the model gave {len(vectors)} vectors for {len(unique)} texts. Check it with `egemma "
            "verify`."
        )
    rows = [
        Row(
            id=id_,
            title=title,
            text=text,
            metadata=meta,
            num_tokens=int(found.num_tokens[number]),
            truncated=bool(found.truncated[number]),
        )
        for number, (id_, (text, title, meta)) in enumerate(unique.items())
    ]
    return given, rows, vectors


def vector_rows(
    identity: ModelIdentity,
    vectors: object,
    ids: Sequence[str],
    texts: Sequence[str] | None,
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    num_tokens: Sequence[int] | None,
    truncated: Sequence[bool] | None,
) -> tuple[list[str], list[Row], NDArray[np.float32]]:
    """As `embedded_rows`, for vectors that are there already."""
    checked = check_vectors(vectors, identity.dim)
    given = check_ids(ids)
    if len(given) != len(checked):
        raise InputError(f"{len(given)} ids for {len(checked)} vectors: give one each.")
    if len(set(given)) != len(given):
        raise InputError("an id comes twice in one call. Give each vector its own.")
    _check_id_bytes(given)
    words = [""] * len(checked) if texts is None else one_per_text("texts", texts, len(checked))
    named, packed = _described(words, titles, metadata, blank=True)
    counts = [0] * len(checked) if num_tokens is None else check_counts(num_tokens, len(checked))
    cut = (
        [False] * len(checked)
        if truncated is None
        else one_per_text("truncated", truncated, len(checked))
    )
    rows = [
        Row(id=id_, title=title, text=text, metadata=meta, num_tokens=tokens, truncated=bool(short))
        for id_, text, title, meta, tokens, short in zip(
            given, words, named, packed, counts, cut, strict=True
        )
    ]
    return given, rows, checked


def plan_of(
    identity: ModelIdentity,
    embedder: Embedder | None,
    place: str,
    *,
    queries: Sequence[str] | None,
    vectors: object | None,
    k: int,
    dim: int | None,
    where: Mapping[Any, Any] | None,
    mode: Mode,
    task: str,
    shortlist: int | None,
    exact: bool,
    approximate: bool,
) -> Plan:
    """Check a search by texts or by vectors, and embed the texts where `mode` needs it."""
    check_k(k)
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose one of {', '.join(MODES)}.")
    if exact and approximate:
        raise ConfigError("exact=True compares every vector: leave approximate out.")
    if shortlist is not None and (
        not approximate
        or isinstance(shortlist, bool)
        or not isinstance(shortlist, int)
        or shortlist < 1
    ):
        raise ConfigError(
            f"shortlist={shortlist!r}: a whole number of at least 1, beside approximate=True; a "
            "store compares every vector otherwise."
        )
    if dim is not None:
        check_dim(dim, identity.dims)
    condition = None if where is None else parse(where)
    words = None
    if queries is not None:
        if isinstance(queries, str) or not all(
            isinstance(query, str) and query.strip() for query in queries
        ):
            raise InputError(
                "queries is one str: pass a list, or use `search`."
                if isinstance(queries, str)
                else "queries: pass a list of texts, each with at least one word."
            )
        words = (
            None
            if mode == "vector"
            else tuple(tuple(dict.fromkeys(words_of(query))) for query in queries)
        )
        if words is not None and max(map(len, words), default=0) > MAX_WORDS:
            raise InputError(
                f"a query has more than {MAX_WORDS} different words. Shorten it, or use "
                "mode='vector'."
            )
        if mode != "text":
            vectors = (
                model_here(embedder, place, "search by meaning")
                .embed_query(queries, task=task)
                .vectors
                if queries
                else None
            )
    rows, width = (None, None) if vectors is None else query_rows(vectors, dim, identity)
    return Plan(
        k=k,
        count=k if mode != "hybrid" else max(k, FUSED),
        mode=mode,
        condition=condition,
        vectors=rows,
        dim=width,
        words=words,
        shortlist=shortlist,
        approximate=approximate,
    )


def one_vector(vector: object) -> NDArray[Any]:
    array = np.asarray(vector)
    if array.ndim != 1:
        raise InputError(
            f"vector has shape {array.shape} and type {array.dtype}: it must be one row of floats."
        )
    return array


def model_here(embedder: Embedder | None, place: str, doing: str) -> Embedder:
    if embedder is None:
        raise ConfigError(
            f"{place} was opened without a model, so it cannot {doing}. Open it with an Embedder."
        )
    return embedder


def no_chunks(place: str) -> NoReturn:
    raise ConfigError(
        f"{place} has one vector for each document and takes no ChunkedDocument. Add each chunk "
        "with `add`, under an id of its own."
    )


def words_of(text: str) -> list[str]:
    """Words as full text compares them: without case and accents, as the local index does."""
    bare = "".join(
        character
        for character in unicodedata.normalize("NFD", text)
        if not unicodedata.combining(character)
    )
    return [word[:_MAX_WORD] for word in _WORD.findall(unicodedata.normalize("NFC", bare).lower())]


def ranked_hits(
    rows: Mapping[str, Row],
    ranked: Sequence[tuple[str, float]],
    cosines: Mapping[str, float],
    text_scores: Mapping[str, float],
    how: SearchInfo,
) -> Hits:
    return Hits(
        hits=tuple(
            rows[id_].hit(score, cosines.get(id_), text_scores.get(id_)) for id_, score in ranked
        ),
        how=how,
    )


def _described(
    texts: Sequence[str],
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    *,
    blank: bool,
) -> tuple[list[str | None], list[str | None]]:
    """Titles and packed metadata, one per text; all three checked."""
    named, entries = (
        one_per_text("titles", titles, len(texts)),
        one_per_text("metadata", metadata, len(texts)),
    )
    for position, (text, title) in enumerate(zip(texts, named, strict=True)):
        check_text(f"text {position}", text, blank=blank)
        if title is not None:
            check_text(f"title {position}", title, blank=True)
    return [title or None for title in named], [pack_metadata(entry) for entry in entries]


def _check_id_bytes(ids: Sequence[str] | Mapping[str, Any]) -> None:
    for id_ in ids:
        if len(id_.encode()) > MAX_ID_BYTES:
            raise InputError(
                f"id {id_[:60]!r}... has {len(id_.encode())} bytes: a store takes at most "
                f"{MAX_ID_BYTES}. Give it a shorter one."
            )
