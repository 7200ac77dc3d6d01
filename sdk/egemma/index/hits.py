"""What comes out of an index: documents, hits, and how they were found; read from the file and
checked.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from egemma.exported import exported
from egemma.index.damage import chunk_crc32, document_crc32
from egemma.index.heads import Damage

Mode = Literal["vector", "text", "hybrid"]
MODES = ("vector", "text", "hybrid")


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


@dataclass(frozen=True, kw_only=True)
class How:
    """What a search did."""

    mode: Mode
    dim: int | None  # width that cosines were computed at; None where no vector was searched
    scan_width: int | None  # width of the first pass; None where there was none
    shortlist: int | None  # vectors that the first pass left over for the second
    vectors: int  # that the first pass went through
    approximate: bool  # the first pass was a graph, which can miss some
    kernel: str | None  # what computed the first pass
    # of `vectors`, those that the first pass compared one by one; a graph found the others
    scanned: int = 0
    # chunks that there were when the shortlist was tuned; None where it was not tuned, or was given
    tuned_for: int | None = None


@exported
@dataclass(frozen=True, kw_only=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first, and how they were found."""

    hits: tuple[Hit, ...]
    how: How

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: Any) -> Any:
        return self.hits[index]


def read_hit(
    connection: sqlite3.Connection,
    number: int,
    score: float,
    cosine: float | None,
    bm25: float | None,
) -> Hit:
    row = connection.execute(
        "SELECT c.document, c.position, c.start, c.stop, c.num_tokens, c.truncated, c.title, "
        "c.text, c.crc32, "
        "d.id, d.title, d.metadata, d.source, d.crc32 FROM chunks c JOIN documents d ON d.number = "
        "c.document "
        "WHERE c.number = ?",
        (number,),
    ).fetchone()
    if row is None:
        raise Damage(f"chunk {number} cannot be looked up")
    (
        document,
        position,
        start,
        stop,
        num_tokens,
        truncated,
        title,
        text,
        crc,
        id_,
        document_title,
        metadata,
        source,
        document_crc,
    ) = row
    if (
        chunk_crc32(number, document, position, start, stop, num_tokens, truncated, title, text)
        != crc
    ):
        raise Damage(f"chunk {number} is not what was stored")
    if document_crc32(id_, document_title, metadata, source) != document_crc:
        raise Damage(f"document {id_!r} is not what was stored")
    return Hit(
        id=id_,
        score=score,
        text=text,
        start=start,
        stop=stop,
        position=position,
        title=title,
        metadata=None if metadata is None else json.loads(metadata),
        truncated=bool(truncated),
        vector_score=cosine,
        text_score=bm25,
    )


def read_document(connection: sqlite3.Connection, id_: str) -> Document | None:
    row = connection.execute(
        "SELECT number, title, metadata, source, crc32 FROM documents WHERE id = ?", (id_,)
    ).fetchone()
    if row is None:
        return None
    number, title, metadata, source, crc = row
    if document_crc32(id_, title, metadata, source) != crc:
        raise Damage(f"document {id_!r} is not what was stored")
    text: list[str] = []
    read = tokens = count = 0
    cut = False
    for (
        chunk,
        position,
        start,
        stop,
        num_tokens,
        truncated,
        chunk_title,
        part,
        chunk_crc,
    ) in connection.execute(
        "SELECT number, position, start, stop, num_tokens, truncated, title, text, crc32 FROM "
        "chunks WHERE document = ? ORDER BY position",
        (number,),
    ):
        if (
            chunk_crc32(
                chunk, number, position, start, stop, num_tokens, truncated, chunk_title, part
            )
            != chunk_crc
            or start > read
        ):
            raise Damage(f"chunk {chunk} is not what was stored")
        text.append(part[read - start :])
        read, tokens, count, cut = (
            max(read, stop),
            tokens + num_tokens,
            count + 1,
            cut or bool(truncated),
        )
    if not count:
        raise Damage(f"document {id_!r} has no chunks")
    return Document(
        id=id_,
        text="".join(text),
        title=title,
        metadata=None if metadata is None else json.loads(metadata),
        source=None if source is None else json.loads(source),
        num_tokens=tokens,
        truncated=cut,
        num_chunks=count,
    )
