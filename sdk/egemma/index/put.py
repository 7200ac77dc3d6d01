"""Documents on their way into an index: checked, compared with what is stored, written.

Embedding happens between, elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument
from egemma.index.codes import decode
from egemma.index.damage import chunk_hash, fits, vector_crc32
from egemma.index.heads import BLOCK_ROWS, Damage
from egemma.index.inputs import check_id, check_text, check_unique, pack_json
from egemma.index.rows import Change, NewChunk, StoredChunk, stored_chunks, stored_heads
from egemma.metadata import pack_metadata
from egemma_core.errors import EgemmaError, InputError
from egemma_core.tokens import Overflow


@dataclass(frozen=True, kw_only=True)
class PutReport:
    """What `put` did."""

    documents: int  # that were given
    chunks: int  # that they have now
    embedded: int  # chunks that the model had to read
    reused: int  # chunks that kept their vector
    removed: int  # chunks of earlier versions that went


@dataclass
class Prepared:
    """A document on its way in: checked, and as far as possible known."""

    id: str
    title: str | None
    metadata: str | None
    source: str | None
    chunks: tuple[Chunk, ...]
    # chunk hash -> vector, tokens, truncated
    vectors: dict[bytes, tuple[NDArray[np.float32], int, bool]] = field(default_factory=dict)


def hash_of(chunk: Chunk) -> bytes:
    return chunk_hash(chunk.title, chunk.text)


def prepare(documents: Sequence[ChunkedDocument], *, blank: bool = False) -> list[Prepared]:
    """Check documents; the same one twice in a call counts once.

    Only where vectors come with them may a text be blank.
    """
    prepared: dict[str, Prepared] = {}
    for position, document in enumerate(documents):
        try:
            made = _prepare(document, blank=blank)
            check_unique([document.id, document.id], [made, prepared.get(document.id, made)])
        except InputError as error:
            raise error.at(error.place, position=position) from error
        prepared[document.id] = made
    return list(prepared.values())


def _prepare(document: ChunkedDocument, *, blank: bool) -> Prepared:
    check_id(document.id)
    title = document.title or None
    if title is not None:
        check_text(f"the title of {document.id!r}", title, blank=True)
    if not document.chunks:
        raise InputError(
            f"document {document.id!r} has no chunks: there is nothing to find in it. Leave it out."
        )
    chunks = tuple(replace(chunk, title=chunk.title or None) for chunk in document.chunks)
    for number, chunk in enumerate(chunks):
        check_text(f"chunk {number} of {document.id!r}", chunk.text, blank=True)
        if chunk.title is not None:
            check_text(f"the title of chunk {number} of {document.id!r}", chunk.title, blank=True)
        # what SQLite would not give back as it is
        if type(chunk.start) is not int or type(chunk.stop) is not int:
            raise InputError(
                f"chunk {number} of {document.id!r} has a span of {type(chunk.start).__name__} "
                f"and {type(chunk.stop).__name__}: "
                "pass int."
            )
        if chunk.stop - chunk.start != len(chunk.text) or chunk.start < 0:
            raise InputError(
                f"chunk {number} of {document.id!r} spans {chunk.start} to {chunk.stop}, but "
                f"has {len(chunk.text)} characters."
            )
        if chunk.start > (chunks[number - 1].stop if number else 0):
            raise InputError(
                f"chunk {number} of {document.id!r} begins at {chunk.start}: what stands "
                "before it is in no chunk."
            )
    # a blank chunk between others is part of the text
    if not blank and not any(chunk.text.strip() for chunk in chunks):
        raise InputError(
            f"document {document.id!r} is blank: there is nothing to find in it. Leave it out."
        )
    return Prepared(
        document.id,
        title,
        pack_metadata(document.metadata),
        pack_json("source", document.source),
        chunks,
    )


@contextmanager
def naming_document(documents: Sequence[ChunkedDocument], owners: Sequence[str]) -> Iterator[None]:
    """Say in an error about a chunk which document of the call it is of.

    Args:
        owners: the id of the document of each chunk that is embedded.
    """
    try:
        yield
    except EgemmaError as error:
        if error.position is None:
            raise
        position = [document.id for document in documents].index(owners[error.position])
        raise error.at(f"text {position}", position=position) from error


def reusable_chunks(
    known: tuple[int, list[StoredChunk]] | None, overflow: Overflow
) -> dict[bytes, list[StoredChunk]]:
    """Stored chunks by hash; one that was cut off is none where that is an error now."""
    by_hash: dict[bytes, list[StoredChunk]] = {}
    for chunk in known[1] if known else []:
        if not chunk.truncated or overflow == "truncate":
            by_hash.setdefault(chunk.hash, []).append(chunk)
    return by_hash


def store_documents(
    change: Change, prepared: list[Prepared], overflow: Overflow
) -> PutReport | None:
    """Write documents; None, and nothing written, where a chunk has neither a vector at hand nor
    one in the file any more.
    """
    known = stored_chunks(change.connection, [document.id for document in prepared])
    for document in prepared:
        reusable = reusable_chunks(known.get(document.id), overflow)
        if any(
            hash_of(chunk) not in reusable and hash_of(chunk) not in document.vectors
            for chunk in document.chunks
        ):
            return None
    chunks: list[NewChunk] = []
    vectors: list[NDArray[np.float32]] = []
    # the same words twice in a document, of which the file has the vector once
    twins: list[tuple[NewChunk, int]] = []
    gone: list[int] = []
    reused = 0
    for document in prepared:
        reusable = reusable_chunks(known.get(document.id), overflow)
        stored = known[document.id][1] if document.id in known else []
        number = change.put_document(
            document.id,
            document.title,
            document.metadata,
            document.source,
            known[document.id][0] if document.id in known else None,
        )
        kept: set[int] = set()
        for position, chunk in enumerate(document.chunks):
            hash_ = hash_of(chunk)
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
            free = [twin for twin in reusable.get(hash_, []) if twin.number not in kept]
            if free:
                kept.add(free[0].number)
                reused += 1
                if (free[0].position, free[0].start, free[0].stop) != (
                    position,
                    chunk.start,
                    chunk.stop,
                ):
                    change.move_chunk(free[0], new)
            elif hash_ in document.vectors:
                vector, num_tokens, truncated = document.vectors[hash_]
                chunks.append(replace(new, num_tokens=num_tokens, truncated=truncated))
                vectors.append(vector)
            else:
                twin = reusable[hash_][0]
                twins.append(
                    (
                        replace(new, num_tokens=twin.num_tokens, truncated=twin.truncated),
                        twin.number,
                    )
                )
        gone += [chunk.number for chunk in stored if chunk.number not in kept]
    for new, number in twins:
        chunks.append(new)
        vectors.append(stored_floats(change, number))
    change.remove_chunks(gone)
    if chunks:
        change.add_chunks(chunks, np.stack(vectors))
    return PutReport(
        documents=len(prepared),
        chunks=sum(len(document.chunks) for document in prepared),
        embedded=0,
        reused=reused + len(twins),
        removed=len(gone),
    )


def stored_floats(change: Change, number: int) -> NDArray[np.float32]:
    """(D,) a stored vector, as near to its floats as the file has it."""
    block, slot = divmod(number, BLOCK_ROWS)
    layout = change.state.layout
    head = stored_heads(change.connection, "heads", block)[1][
        slot * layout.head : (slot + 1) * layout.head
    ]
    row = change.connection.execute(
        "SELECT crc32, scales, rest, floats FROM vectors WHERE number = ?", (number,)
    ).fetchone()
    if (
        row is None
        or not fits(layout, change.state.floats, *row[1:])
        or vector_crc32(number, head, *row[1:]) != row[0]
    ):
        raise Damage(f"vector {number} is not what was stored")
    _, scales, rest, floats = row
    if floats is not None:
        return np.frombuffer(floats, "<f4")
    decoded: NDArray[np.float64] = decode(
        np.frombuffer(head, np.int8)[None],
        np.frombuffer(scales, "<f4")[None],
        np.frombuffer(rest, np.uint8)[None],
        layout,
    )
    vector: NDArray[np.float32] = decoded[0].astype(np.float32)
    return vector
