"""Documents on their way to and from a server: checked and embedded, the same for both stores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index.codes import check_vectors
from egemma.index.hits import Document, Hit, Hits, SearchInfo
from egemma.index.inputs import (
    check_counts,
    check_id,
    check_ids,
    check_text,
    check_unique,
    content_id,
    one_per_text,
)
from egemma.metadata import pack_metadata
from egemma_core.checks import one_of
from egemma_core.errors import ConfigError, InputError, NotFoundError
from egemma_core.tokens import Overflow

if TYPE_CHECKING:
    from egemma.embedder import Embedder

MAX_ID_BYTES = 2000  # PostgreSQL's B-tree takes 2,704 with everything around
MAX_NAME = 40  # PostgreSQL cuts names off at 63 bytes, and both stores add to them
_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_OVERFLOWS: tuple[Overflow, ...] = ("error", "truncate")


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
        """Return the document as callers get it."""
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
        """Return the document as one hit of a search."""
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
    # width of the server's own approximate index; None where none was built, or it is not ours
    graph_dim: int | None


def check_name(name: object) -> str:
    """Return the name of a store on its server, when it can be one.

    Raises:
        ConfigError: it has other characters, or too many.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ConfigError(
            f"name={name!r} must be 1 to {MAX_NAME} letters, digits, _ and - of ASCII."
        )
    return name


def identity_of(model: Embedder | ModelIdentity | None) -> ModelIdentity | None:
    """Return the identity of what a store is opened with."""
    if model is None or isinstance(model, ModelIdentity):
        return model
    return ModelIdentity.of(model.manifest)


def embedder_of(model: Embedder | ModelIdentity | None) -> Embedder | None:
    """Return the embedder among what a store may be opened with."""
    return None if isinstance(model, ModelIdentity) else model


def embedded_rows(
    embedder: Embedder,
    texts: Sequence[str],
    ids: Sequence[str] | None,
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    overflow: str,
) -> tuple[list[str], list[Row], NDArray[np.float32]]:
    """Check texts, and embed each once.

    Args:
        overflow: "error" or "truncate".

    Returns:
        The ids in the order of the texts, the rows of the different ones among them, and those
        rows' (N, D) vectors.
    """
    if isinstance(texts, str):
        raise InputError("texts is one str.", hint="Pass a list of texts.")
    cut = one_of(
        "overflow",
        overflow,
        _OVERFLOWS,
        hint="A store has one vector for each document: cut long texts with "
        "egemma.chunks.split_text, and add each chunk under an id of its own.",
    )
    texts = list(texts)
    checked = None if ids is None else check_ids(ids)
    named, packed = _described(texts, titles, metadata, blank=False)
    if checked is None:
        given = [content_id(text, title) for text, title in zip(texts, named, strict=True)]
    else:
        given = checked
    if len(given) != len(texts):
        raise InputError(
            f"there are {len(given)} ids for {len(texts)} texts.", hint="Give one each."
        )
    contents = list(zip(texts, named, packed, strict=True))
    check_unique(given, contents)
    unique = dict(zip(given, contents, strict=True))
    _check_id_bytes(unique)
    if not unique:
        return [], [], np.empty((0, embedder.dim), np.float32)
    found = embedder.embed_documents(
        [text for text, _, _ in unique.values()],
        titles=[title for _, title, _ in unique.values()],
        overflow=cut,
    )
    vectors = check_vectors(found.vectors, embedder.dim)
    if len(vectors) != len(unique):
        raise InputError(
            f"the model gave {len(vectors)} vectors for {len(unique)} texts.",
            hint="Check it with `egemma verify`.",
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
    """Check vectors that were computed elsewhere, and what belongs to them.

    Returns:
        The ids, the rows, and their (N, D) vectors.
    """
    checked = check_vectors(vectors, identity.dim)
    given = check_ids(ids)
    if len(given) != len(checked):
        raise InputError(
            f"there are {len(given)} ids for {len(checked)} vectors.", hint="Give one each."
        )
    if len(set(given)) != len(given):
        raise InputError("an id comes twice in one call.", hint="Give each vector its own.")
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


def ranked_hits(
    rows: Mapping[str, Row],
    ranked: Sequence[tuple[str, float]],
    cosines: Mapping[str, float],
    text_scores: Mapping[str, float],
    how: SearchInfo,
) -> Hits:
    """Return the hits of one query.

    Args:
        rows: id -> the document.
        ranked: ids and scores, best first.
        cosines, text_scores: id -> score, of what vectors and words found.
    """
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
    """Check texts, titles and metadata; return titles and packed metadata, one per text."""
    named, entries = (
        one_per_text("titles", titles, len(texts)),
        one_per_text("metadata", metadata, len(texts)),
    )
    for position, (text, title) in enumerate(zip(texts, named, strict=True)):
        check_text(f"text {position}", text, blank=blank, position=position)
        if title is not None:
            check_text(f"title {position}", title, blank=True, position=position)
    return [title or None for title in named], [pack_metadata(entry) for entry in entries]


def _check_id_bytes(ids: Sequence[str] | Mapping[str, Any]) -> None:
    for id_ in ids:
        if len(id_.encode()) > MAX_ID_BYTES:
            raise InputError(
                f"the id {id_[:60]!r}... has {len(id_.encode())} bytes, and a store takes at most "
                f"{MAX_ID_BYTES}.",
                hint="Give it a shorter one.",
            )


def can_be_stored(id_: object) -> bool:
    """Return whether a value could be the id of a document at all."""
    try:
        check_id(id_)
    except InputError:
        return False
    return True


def documents_of(rows: Mapping[str, Row], ids: Sequence[str], place: str) -> list[Document]:
    """Return documents in the order of `ids`.

    Args:
        rows: id -> document, of those that are stored.

    Raises:
        NotFoundError: one is not stored.
    """
    for position, id_ in enumerate(ids):
        if id_ not in rows:
            raise NotFoundError(f"{place} has no document {id_!r}.", position=position)
    return [rows[id_].document() for id_ in ids]
