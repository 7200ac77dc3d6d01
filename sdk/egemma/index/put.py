"""Documents put into an index: compared with what is stored, embedded where needed, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from sqlite3 import Connection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk
from egemma.exported import exported
from egemma.index.codes import check_vectors
from egemma.index.prepare import Prepared, PreparedVectors
from egemma.index.records import ChunkKey, chunk_keys
from egemma.index.rows import Change, NewChunk
from egemma.index.vectors import read_vector
from egemma_core.errors import EgemmaError, InputError
from egemma_core.tokens import Overflow

if TYPE_CHECKING:
    from egemma.embedder import Embedder


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
    prepared: list[Prepared],
    overflow: Overflow,
    *,
    current_embedder: Callable[[], Embedder],
    reading: Callable[[str], AbstractContextManager[Connection]],
    writing: Callable[[str], AbstractContextManager[Change]],
) -> PutReport:
    """Embed what the file has no vector of, and store all documents in one transaction.

    Args:
        current_embedder: gives the model that the file is of; a migration may change it meanwhile.
        reading, writing: give a read or a write transaction on the file.
    """
    embedder = current_embedder()
    embedded = 0
    while True:
        if embedder is not current_embedder():  # a migration came between, and is done
            embedder = current_embedder()
            for document in prepared:
                document.vectors.clear()
        with reading("read") as connection:
            known = chunk_keys(connection, [document.id for document in prepared])
        missing: dict[bytes, tuple[Prepared, Chunk]] = {}
        for document in prepared:
            reusable = reusable_chunks(known.get(document.id), overflow)
            for hash_, chunk in document.hashed:
                if hash_ not in document.vectors and hash_ not in reusable:
                    missing.setdefault(hash_, (document, chunk))
        if missing:
            _embed(prepared, missing, embedder, overflow)
            embedded += len(missing)
        report = None
        with writing("add") as change:
            if embedder is current_embedder():
                report = store_documents(change, prepared, overflow)
        # None: another writer took away what was to be reused, so begin again with what is embedded
        if report is not None:
            return replace(report, embedded=embedded)


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


def reusable_chunks(
    known: tuple[int, list[ChunkKey]] | None, overflow: Overflow
) -> dict[bytes, list[ChunkKey]]:
    """Return stored chunks by hash, without those that were cut off where that is an error now."""
    by_hash: dict[bytes, list[ChunkKey]] = {}
    for chunk in known[1] if known else []:
        if not chunk.truncated or overflow == "truncate":
            by_hash.setdefault(chunk.hash, []).append(chunk)
    return by_hash


def store_documents(
    change: Change, prepared: list[Prepared], overflow: Overflow
) -> PutReport | None:
    """Write documents.

    Returns:
        None, with nothing written, where a chunk has neither a vector at hand nor one in the file.
    """
    known = chunk_keys(change.connection, [document.id for document in prepared])
    by_hash = {
        document.id: reusable_chunks(known.get(document.id), overflow) for document in prepared
    }
    for document in prepared:
        here = by_hash[document.id].keys() | document.vectors.keys()
        if any(hash_ not in here for hash_, _ in document.hashed):
            return None
    chunks: list[NewChunk] = []
    vectors: list[NDArray[np.float32]] = []
    # the same words once more in a document: the stored vector is copied
    copies: list[tuple[NewChunk, int]] = []
    gone: list[int] = []
    reused = 0
    for document in prepared:
        stored, reusable = known.get(document.id), by_hash[document.id]
        number = change.put_document(
            document.id,
            document.title,
            document.metadata,
            document.source,
            None if stored is None else stored[0],
        )
        kept: set[int] = set()
        for position, (hash_, chunk) in enumerate(document.hashed):
            new = NewChunk(
                document=number,
                position=position,
                start=chunk.start,
                stop=chunk.stop,
                num_tokens=0,
                truncated=False,
                title=chunk.title,
                text=chunk.text,
            )
            free = [key for key in reusable.get(hash_, []) if key.number not in kept]
            if free:
                kept.add(free[0].number)
                reused += 1
                if free[0][2:5] != (position, chunk.start, chunk.stop):
                    change.move_chunk(free[0], new)
            elif hash_ in document.vectors:
                vector, num_tokens, truncated = document.vectors[hash_]
                chunks.append(replace(new, num_tokens=num_tokens, truncated=truncated))
                vectors.append(vector)
            else:
                key = reusable[hash_][0]
                new = replace(new, num_tokens=key.num_tokens, truncated=key.truncated)
                copies.append((new, key.number))
        gone += [key.number for key in (stored[1] if stored else []) if key.number not in kept]
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
    known = chunk_keys(change.connection, [row.id for row in prepared.rows])
    change.remove_chunks([key.number for _, keys in known.values() for key in keys])
    chunks = [
        NewChunk(
            document=change.put_document(
                row.id, row.title, metadata, None, known[row.id][0] if row.id in known else None
            ),
            position=0,
            start=0,
            stop=len(row.text),
            num_tokens=num_tokens,
            truncated=bool(truncated),
            title=row.title,
            text=row.text,
        )
        for row, metadata, num_tokens, truncated in zip(
            prepared.rows, prepared.metadata, prepared.num_tokens, prepared.truncated, strict=True
        )
    ]
    change.add_chunks(chunks, prepared.vectors)
