"""Documents put into an index: compared with what is stored, embedded where needed, written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument
from egemma.exported import exported
from egemma.index.codes import check_vectors
from egemma.index.prepare import Prepared, PreparedVectors, prepare
from egemma.index.records import ChunkKey, NewChunk, chunk_keys
from egemma.index.rows import Change
from egemma.index.session import Session
from egemma.index.vectors import read_vector
from egemma_core.errors import EgemmaError, InputError
from egemma_core.tokens import Overflow

if TYPE_CHECKING:
    from egemma.embedder import Embedder

Stored = Mapping[str, tuple[int, list[ChunkKey]]]  # id -> a document's number, and its chunks


@exported
@dataclass(frozen=True, kw_only=True)
class PutReport:
    """What `put` did."""

    documents: int  # that were given
    chunks: int  # that they have now
    embedded: int  # chunks that the model had to read
    reused: int  # chunks that kept their vector
    removed: int  # chunks of earlier versions that went


def put_documents(
    documents: Sequence[ChunkedDocument], overflow: Overflow, session: Session
) -> PutReport:
    """Embed what the file has no vector of, and store all documents in one transaction."""
    embedder = session.embedder_for("put documents")
    prepared = prepare(documents)
    session.check_writable()
    if not prepared:
        return PutReport(documents=0, chunks=0, embedded=0, reused=0, removed=0)
    ids = [document.row.id for document in prepared]
    embedded = 0
    while True:
        if embedder is not session.embedder:  # a migration came between, and is done
            embedder = session.embedder_for("put documents")
            for document in prepared:
                document.vectors.clear()
        with session.reading("read") as connection:
            missing = _missing_vectors(prepared, chunk_keys(connection, ids), overflow)
        if missing:
            _embed(prepared, missing, embedder, overflow)
            embedded += len(missing)
        with session.writing("add") as change:
            stored = chunk_keys(change.connection, ids)
            # else another writer took away what was to be reused: begin again with what is embedded
            if embedder is session.embedder and not _missing_vectors(prepared, stored, overflow):
                report = _store_documents(change, prepared, stored, overflow)
                return replace(report, embedded=embedded)


def _missing_vectors(
    prepared: Sequence[Prepared], stored: Stored, overflow: Overflow
) -> dict[bytes, tuple[Prepared, Chunk]]:
    """Return by hash the chunks that have a vector neither at hand nor in the file."""
    missing: dict[bytes, tuple[Prepared, Chunk]] = {}
    for document in prepared:
        reusable = _reusable_chunks(document, stored, overflow)
        for hash_, chunk in document.hashed:
            if hash_ not in document.vectors and hash_ not in reusable:
                missing.setdefault(hash_, (document, chunk))
    return missing


def _reusable_chunks(
    document: Prepared, stored: Stored, overflow: Overflow
) -> dict[bytes, list[ChunkKey]]:
    """Return stored chunks by hash, without those that were cut off where that is an error now."""
    by_hash: dict[bytes, list[ChunkKey]] = {}
    for key in stored[document.row.id][1] if document.row.id in stored else []:
        if not key.truncated or overflow == "truncate":
            by_hash.setdefault(key.hash, []).append(key)
    return by_hash


def _embed(
    prepared: Sequence[Prepared],
    missing: Mapping[bytes, tuple[Prepared, Chunk]],
    embedder: Embedder,
    overflow: Overflow,
) -> None:
    """Embed chunks, given by hash, and note each vector in the documents that have the chunk."""
    try:
        embeddings = embedder.embed_documents(
            [chunk.text for _, chunk in missing.values()],
            titles=[chunk.title for _, chunk in missing.values()],
            overflow=overflow,
        )
    except EgemmaError as error:  # about a chunk: say which document of the call it is of
        if error.position is None:
            raise
        position = list(missing.values())[error.position][0].position
        raise error.at(f"text {position}", position=position) from error
    vectors = check_vectors(embeddings.vectors, embedder.dim)
    if len(vectors) != len(missing):
        raise InputError(
            f"the model gave {len(vectors)} vectors for {len(missing)} texts.",
            hint="Check it with `egemma verify`.",
        )
    found = {
        hash_: (vectors[row], int(embeddings.num_tokens[row]), bool(embeddings.truncated[row]))
        for row, hash_ in enumerate(missing)
    }
    for document in prepared:
        document.vectors.update(
            (hash_, found[hash_]) for hash_, _ in document.hashed if hash_ in found
        )


def _store_documents(
    change: Change, prepared: Sequence[Prepared], stored: Stored, overflow: Overflow
) -> PutReport:
    """Write documents, none of which misses a vector."""
    chunks: list[NewChunk] = []
    vectors: list[NDArray[np.float32]] = []
    # the same words once more in a document: the stored vector is copied
    copies: list[tuple[NewChunk, int]] = []
    gone: list[int] = []
    reused = 0
    for document in prepared:
        number, keys = stored.get(document.row.id, (None, []))
        number = change.put_document(document.row, number)
        reusable = _reusable_chunks(document, stored, overflow)
        kept: set[int] = set()
        for position, (hash_, chunk) in enumerate(document.hashed):
            same = reusable.get(hash_, [])
            free = next((key for key in same if key.number not in kept), None)
            if free is not None:
                kept.add(free.number)
                if (free.position, free.start, free.stop) != (position, chunk.start, chunk.stop):
                    moved = new_chunk(number, position, chunk, free.num_tokens, free.truncated)
                    change.move_chunk(free.number, moved)
            elif hash_ in document.vectors:
                vector, num_tokens, truncated = document.vectors[hash_]
                chunks.append(new_chunk(number, position, chunk, num_tokens, truncated))
                vectors.append(vector)
            else:
                copied = same[0]
                new = new_chunk(number, position, chunk, copied.num_tokens, copied.truncated)
                copies.append((new, copied.number))
        gone += [key.number for key in keys if key.number not in kept]
        reused += len(kept)
    for new, source in copies:
        chunks.append(new)
        vectors.append(read_vector(change.connection, change.state, source))
    change.remove_chunks(gone)
    if chunks:
        change.add_chunks(chunks, np.stack(vectors))
    return PutReport(
        documents=len(prepared),
        chunks=sum(len(document.chunks) for document in prepared),
        embedded=0,
        reused=reused + len(copies),
        removed=len(gone),
    )


def store_vectors(change: Change, prepared: PreparedVectors) -> None:
    """Write documents of one chunk each, whose vectors were computed elsewhere."""
    numbers = change.replace_documents(prepared.documents)
    chunks = [
        NewChunk(number, 0, 0, len(text), num_tokens, int(truncated), document.title, text)
        for number, document, text, num_tokens, truncated in zip(
            numbers,
            prepared.documents,
            prepared.texts,
            prepared.num_tokens,
            prepared.truncated,
            strict=True,
        )
    ]
    change.add_chunks(chunks, prepared.vectors)


def new_chunk(
    document: int, position: int, chunk: Chunk, num_tokens: int, truncated: bool
) -> NewChunk:
    """Return a chunk as a row of the document with a number."""
    return NewChunk(
        document=document,
        position=position,
        start=chunk.start,
        stop=chunk.stop,
        num_tokens=num_tokens,
        truncated=int(truncated),
        title=chunk.title,
        text=chunk.text,
    )
