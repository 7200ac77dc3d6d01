"""What comes out of an index: documents, hits, and how they were found."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from egemma.exported import exported
from egemma.index.checksums import Damage
from egemma.index.records import chunk_with_document, chunks_of, find_document

Mode = Literal["vector", "text", "hybrid"]
MODES: tuple[Mode, ...] = ("vector", "text", "hybrid")


@exported
@dataclass(frozen=True, kw_only=True)
class Document:
    """One stored document."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, Any] | None
    source: Mapping[str, Any] | None  # where ingestion found it
    num_tokens: int  # of all its chunks, prompts included
    truncated: bool  # of a chunk only the beginning was embedded
    num_chunks: int


@exported
@dataclass(frozen=True, kw_only=True)
class Hit:
    """One search result: a chunk of a document."""

    id: str  # of the document
    # vector: cosine, -1 to 1; text: BM25, higher is better; hybrid: the sum of 1 / (60 + rank)
    score: float
    text: str  # of the chunk
    start: int  # where the chunk stands in its document, in characters (Unicode code points)
    stop: int
    position: int  # the chunk's number in its document, from 0
    title: str | None  # as embedded: the document's title, and the headings above the chunk
    metadata: Mapping[str, Any] | None
    truncated: bool  # only the beginning of the chunk was embedded, so only that can have matched
    vector_score: float | None  # cosine, where vectors were searched and this was among their best
    text_score: float | None  # BM25, where words were searched and this was among their best


@exported
@dataclass(frozen=True, kw_only=True)
class SearchInfo:
    """How a search was done."""

    mode: Mode
    dim: int | None = None  # width that cosines were computed at; None without vectors
    scan_width: int | None = None  # width of the first pass; None where there was none
    shortlist: int | None = None  # vectors that the first pass left over for the second
    vectors: int = 0  # that the first pass went through
    approximate: bool = False  # the first pass can miss some, as a server's own index may
    kernel: str | None = None  # what computed the first pass
    scanned: int = 0  # of `vectors`, those that the first pass compared one by one
    # chunks that there were when the shortlist was tuned; None where it was not tuned, or was given
    tuned_for: int | None = None


@exported
@dataclass(frozen=True, kw_only=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first, and how they were found."""

    hits: tuple[Hit, ...]
    how: SearchInfo

    def __len__(self) -> int:
        return len(self.hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]


def read_hit(
    connection: sqlite3.Connection,
    number: int,
    score: float,
    cosine: float | None,
    bm25: float | None,
) -> Hit:
    """Read and check the chunk that a search found, and the document that it is of."""
    chunk, document = chunk_with_document(connection, number)
    return Hit(
        id=document.id,
        score=score,
        text=chunk.text,
        start=chunk.start,
        stop=chunk.stop,
        position=chunk.position,
        title=chunk.title,
        metadata=None if document.metadata is None else json.loads(document.metadata),
        truncated=bool(chunk.truncated),
        vector_score=cosine,
        text_score=bm25,
    )


def read_document(connection: sqlite3.Connection, id_: str) -> Document | None:
    """Read and check a document, and put its text together; None where nothing has this id."""
    found = find_document(connection, id_)
    if found is None:
        return None
    number, document = found
    chunks = list(chunks_of(connection, number))
    if not chunks:
        raise Damage(f"document {id_!r} has no chunks")
    text: list[str] = []
    read = 0  # characters of the document; chunks may overlap
    for chunk in chunks:
        if chunk.start > read:
            raise Damage(f"chunk {chunk.number} is not what was stored")
        text.append(chunk.text[read - chunk.start :])
        read = max(read, chunk.stop)
    return Document(
        id=id_,
        text="".join(text),
        title=document.title,
        metadata=None if document.metadata is None else json.loads(document.metadata),
        source=None if document.source is None else json.loads(document.source),
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        truncated=any(chunk.truncated for chunk in chunks),
        num_chunks=len(chunks),
    )
