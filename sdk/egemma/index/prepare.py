"""Documents on their way into an index, checked and in the form in which they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument, split_text
from egemma.index.checksums import chunk_hash
from egemma.index.codes import check_vectors
from egemma.index.inputs import (
    check_counts,
    check_id,
    check_ids,
    check_text,
    check_unique,
    content_id,
    one_per_text,
    pack_json,
)
from egemma.index.records import StoredDocument
from egemma.metadata import pack_metadata
from egemma_core.errors import InputError

if TYPE_CHECKING:
    from egemma.embedder import Embedder

IndexOverflow = Literal["error", "truncate", "chunk"]


class TextRow(NamedTuple):
    """One text with what stands beside it, checked but for the metadata."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, Any] | None


@dataclass
class Prepared:
    """A document on its way in: checked, and as far as possible embedded."""

    row: StoredDocument
    chunks: tuple[Chunk, ...]
    position: int = field(compare=False)  # in the call
    # chunk hash -> vector, tokens, truncated
    vectors: dict[bytes, tuple[NDArray[np.float32], int, bool]] = field(default_factory=dict)

    @cached_property
    def hashed(self) -> list[tuple[bytes, Chunk]]:
        """The chunks, each with the hash by which it finds a vector that is stored of it."""
        return [(chunk_hash(chunk.title, chunk.text), chunk) for chunk in self.chunks]


@dataclass(frozen=True, kw_only=True)
class PreparedVectors:
    """Documents of one chunk each whose vectors come with them, checked; N of everything."""

    documents: Sequence[StoredDocument]
    texts: Sequence[str]
    vectors: NDArray[np.float32]  # (N, D)
    num_tokens: Sequence[int]
    truncated: Sequence[bool]


def text_rows(
    texts: Sequence[str],
    ids: Sequence[str] | None,
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    *,
    blank: bool = False,
) -> list[TextRow]:
    """Check texts, and join each with its id, title and metadata.

    Args:
        ids: None makes each from a hash of its title and text.
        blank: whether a text may be blank.
    """
    if isinstance(texts, str):
        raise InputError("texts is one str: pass a list of texts.")
    texts = list(texts)
    names = one_per_text("titles", titles, len(texts))
    entries = one_per_text("metadata", metadata, len(texts))
    for position, (text, title) in enumerate(zip(texts, names, strict=True)):
        try:
            check_text("the text", text, blank=blank)
            if title is not None:
                check_text("its title", title, blank=True)
        except InputError as error:
            raise error.at(f"text {position}", position=position) from error
    if ids is None:
        ids = [content_id(text, title or None) for text, title in zip(texts, names, strict=True)]
    ids = one_per_text("ids", ids, len(texts))
    return [
        TextRow(id_, text, title or None, entry)
        for id_, text, title, entry in zip(ids, texts, names, entries, strict=True)
    ]


def document_of(row: TextRow, embedder: Embedder, overflow: IndexOverflow) -> ChunkedDocument:
    """Return a text as a document: of one chunk, or with overflow "chunk" of as many as needed."""
    chunks = [Chunk(start=0, stop=len(row.text), title=row.title, text=row.text)]
    if overflow == "chunk":
        chunks = split_text(
            row.text,
            title=row.title,
            count_tokens=embedder.count_tokens,
            max_tokens=embedder.max_tokens,
            prompt=embedder.document_prompt,
        )
    return ChunkedDocument(
        id=row.id, title=row.title, metadata=row.metadata, source=None, chunks=tuple(chunks)
    )


def prepare(documents: Sequence[ChunkedDocument], *, blank: bool = False) -> list[Prepared]:
    """Check documents, and bring them into the form in which they are stored.

    The same document twice in a call counts once.

    Args:
        blank: whether a document without a word is allowed, because its vectors come with it.
    """
    prepared: dict[str, Prepared] = {}
    for position, document in enumerate(documents):
        try:
            made = _prepare(document, position, blank=blank)
            first = prepared.setdefault(document.id, made)
            check_unique([document.id, document.id], [first, made])
        except InputError as error:
            raise error.at(error.place, position=position) from error
    return list(prepared.values())


def _prepare(document: ChunkedDocument, position: int, *, blank: bool) -> Prepared:
    check_id(document.id)
    title = document.title or None
    if title is not None:
        check_text(f"the title of {document.id!r}", title, blank=True)
    chunks = tuple(replace(chunk, title=chunk.title or None) for chunk in document.chunks)
    _check_chunks(document.id, chunks)
    # a blank chunk between others is part of the text
    lacks = "has no chunks" if not chunks else "is blank"
    if not chunks or not (blank or any(chunk.text.strip() for chunk in chunks)):
        raise InputError(
            f"document {document.id!r} {lacks}, so there is nothing to find in it.",
            hint="Leave it out.",
        )
    metadata, source = pack_metadata(document.metadata), pack_json("source", document.source)
    return Prepared(StoredDocument(document.id, title, metadata, source), chunks, position)


def _check_chunks(id_: str, chunks: Sequence[Chunk]) -> None:
    read = 0  # characters of the document that the chunks before have
    for number, chunk in enumerate(chunks):
        name = f"chunk {number} of {id_!r}"
        check_text(name, chunk.text, blank=True)
        if chunk.title is not None:
            check_text(f"the title of {name}", chunk.title, blank=True)
        # what SQLite would not give back as it is
        if type(chunk.start) is not int or type(chunk.stop) is not int:
            raise InputError(
                f"{name} has a span of {type(chunk.start).__name__} and "
                f"{type(chunk.stop).__name__}.",
                hint="Pass int.",
            )
        if chunk.stop - chunk.start != len(chunk.text) or chunk.start < 0:
            raise InputError(
                f"{name} spans {chunk.start} to {chunk.stop}, but has {len(chunk.text)} characters."
            )
        if chunk.start > read:
            raise InputError(
                f"{name} begins at {chunk.start}: the {chunk.start - read} characters before it "
                "are in no chunk."
            )
        read = chunk.stop


def prepare_vectors(
    vectors: object,
    dim: int,
    ids: Sequence[str],
    texts: Sequence[str] | None,
    titles: Sequence[str | None] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    num_tokens: Sequence[int] | None,
    truncated: Sequence[bool] | None,
) -> PreparedVectors:
    """Check vectors that were computed elsewhere, and what is stored with them.

    Args:
        dim: the model's full width.
    """
    checked = check_vectors(vectors, dim)
    count = len(checked)
    given = check_ids(ids)
    if len(given) != count:
        raise InputError(f"{len(given)} ids for {count} vectors: give one each.")
    if len(set(given)) != count:
        raise InputError("an id comes twice in one call.", hint="Give each vector its own.")
    words = [""] * count if texts is None else one_per_text("texts", texts, count)
    rows = text_rows(words, given, titles, metadata, blank=True)
    return PreparedVectors(
        documents=[
            StoredDocument(row.id, row.title, pack_metadata(row.metadata), None) for row in rows
        ],
        texts=[row.text for row in rows],
        vectors=checked,
        num_tokens=[0] * count if num_tokens is None else check_counts(num_tokens, count),
        truncated=[bool(cut) for cut in one_per_text("truncated", truncated, count)],
    )
