"""An index as JSON lines and back."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from egemma.chunks import ChunkedDocument
from egemma.identity import ModelIdentity, check_same_model
from egemma.index.bulk_reads import (
    HeadReader,
    StoredVector,
    chunks_with_vectors_of,
    documents_by_first_chunk,
)
from egemma.index.checksums import Damage
from egemma.index.codes import Layout
from egemma.index.facts import State, read_state
from egemma.index.file import opened, transaction
from egemma.index.jsonl_lines import (
    VERSION,
    Header,
    ReadDocument,
    decoded,
    opened_export,
    read_documents,
    stacked,
)
from egemma.index.put import PutReport, new_chunk
from egemma.index.records import StoredChunk, chunks_of, count_documents
from egemma.index.rows import Change
from egemma_core.errors import IndexFileError, InputError
from egemma_core.files import replacing_file

_DOCUMENTS_TOGETHER = 256  # of one transaction
_CHARACTERS_TOGETHER = 2**24  # of one transaction, or a document more

_WAY_OUT = (
    "Import it into an index of that model, or pass reembed=True (`--embed`) to embed its "
    "texts with this one."
)


def export_jsonl(
    path: str | Path, destination: str | Path, *, vectors: bool = True, force: bool = False
) -> int:
    """Write all documents of an index, as it is at this moment, and check every row on the way.

    Args:
        destination: a file that does not exist yet; it gets its name when it is complete.
        vectors: with their vectors, exactly as they are stored; otherwise an import embeds the
            texts anew.
        force: replace the destination.

    Returns:
        How many documents.

    Raises:
        IndexFileError: the destination exists or cannot be written, or the index is damaged.
    """
    destination = Path(destination)
    if destination.exists() and (destination.is_dir() or not force):
        raise IndexFileError(
            f"{destination} exists already.",
            hint="Give another name, or replace it (force=True, on the command line --force).",
        )
    with (
        opened(path, "export", write=False) as connection,
        transaction(connection),
        replacing_file(destination, mode=0o600, error=IndexFileError) as made,
    ):
        state = read_state(connection)
        count = count_documents(connection)
        kind = "none" if not vectors else "floats" if state.floats else "codes"
        written = 0
        with made.open("w", encoding="utf-8", newline="\n") as out:
            first = {
                "egemma_index": VERSION,
                "model": json.loads(state.identity.to_json()),
                "vectors": kind,
                "scan_width": state.scan_width,
                "floats": state.floats,
                "tuned": state.tuned,
                "documents": count,
            }
            out.write(json.dumps(first) + "\n")
            for document in _documents(connection, state, kind):
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
                written += 1
        if written != count:
            raise Damage(f"{count} documents are there, {written} can be read")
    return count


def _documents(connection: sqlite3.Connection, state: State, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of documents, in the order of their first chunks.

    That order is what orders equal scores.
    """
    heads = HeadReader(connection, state.scan_width)
    for number, document in documents_by_first_chunk(connection):
        rows: Iterable[tuple[StoredChunk, StoredVector | None]]
        if kind == "none":
            rows = ((chunk, None) for chunk in chunks_of(connection, number))
        else:
            rows = chunks_with_vectors_of(connection, state, heads, number)
        chunks: list[dict[str, Any]] = []
        for chunk, vector in rows:
            if chunk.position != len(chunks):
                raise Damage(f"chunk {chunk.number} is not what was stored")
            line: dict[str, Any] = {
                "start": chunk.start,
                "stop": chunk.stop,
                "title": chunk.title,
                "text": chunk.text,
                "tokens": chunk.num_tokens,
                "truncated": bool(chunk.truncated),
            }
            if vector is not None:
                names = ("floats",) if kind == "floats" else ("scales", "head", "rest")
                for name in names:
                    line[name] = base64.b64encode(getattr(vector, name)).decode()
            chunks.append(line)
        yield {
            "id": document.id,
            "title": document.title,
            "metadata": None if document.metadata is None else json.loads(document.metadata),
            "source": None if document.source is None else json.loads(document.source),
            "chunks": chunks,
        }


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What `import_jsonl` did."""

    documents: int
    chunks: int
    embedded: int  # chunks that the model had to read


def import_jsonl(
    source: str | Path,
    identity: ModelIdentity,
    put: Callable[[list[ChunkedDocument]], PutReport],
    writing: Callable[[str], AbstractContextManager[Change]],
    *,
    reembed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Put the documents of an export into an index, some hundred in a transaction.

    A stored id is replaced. Every line is checked before it is stored. After an error or a crash
    the lines before it may be stored; importing the file again then ends with the same contents. An
    index that never held anything takes the layout of the one that was exported, and answers as it
    did. (Only chunks with exactly equal scores can change places, where documents were edited after
    they were added.)

    Args:
        identity: the model of the index.
        put: embeds documents and stores them, as `Index.put`.
        writing: gives a write transaction on the index.
        reembed: embed the texts with the index's own model, for an export without vectors or of
            another model.
        progress: is called with documents done and documents in all.

    Raises:
        IndexMismatchError: vectors of another model.
        InputError: the file cannot be read, is no export, or a line is not as an export has it.
        IndexFileError: the index is read-only, full, locked or damaged.
    """
    source = Path(source)
    done = chunks = embedded = 0
    with opened_export(source) as (header, lines):
        if not reembed:
            if header.vectors == "none":
                raise InputError(
                    f"{source} has no vectors. Pass reembed=True (`--embed`) to embed its texts."
                )
            check_same_model(source, header.identity, identity, _WAY_OUT)
            if header.identity.dims != identity.dims:
                raise InputError(
                    f"{source} has dims={header.identity.dims}, the model of the index "
                    f"{identity.dims}: one of the two is wrong."
                )
        layout = Layout.of(header.identity.dims, header.scan_width)
        documents = read_documents(lines, header, layout, source, with_vectors=not reembed)
        try:
            while batch := _batch(documents):
                if reembed:
                    embedded += put([read.document for read in batch]).embedded
                else:
                    with writing("import") as change:
                        _store(change, batch, header, layout)
                done += len(batch)
                chunks += sum(len(read.document.chunks) for read in batch)
                if progress is not None:
                    progress(done, header.documents)
            if done != header.documents:
                raise InputError(
                    f"{source} ends after {done} documents, its first line says "
                    f"{header.documents}: the end is missing. Export it again."
                )
        except InputError as error:
            raise InputError(
                f"{error} {done} documents are stored; importing the whole file again is safe."
            ) from error
    return ImportReport(documents=done, chunks=chunks, embedded=embedded)


def _batch(documents: Iterator[ReadDocument]) -> list[ReadDocument]:
    """Return the next documents, as many as one transaction takes; none at the end."""
    batch: list[ReadDocument] = []
    characters = 0
    for read in documents:
        batch.append(read)
        characters += sum(len(chunk.text) for chunk in read.document.chunks)
        if len(batch) == _DOCUMENTS_TOGETHER or characters > _CHARACTERS_TOGETHER:
            break
    return batch


def _store(change: Change, batch: list[ReadDocument], header: Header, layout: Layout) -> None:
    """Write documents with the vectors of their lines."""
    vectors = [parts for read in batch for parts in read.vectors]
    if change.state.next_number == 0:
        change.state = replace(
            change.state,
            scan_width=header.scan_width,
            floats=change.state.floats or header.floats,
            tuned=header.tuned,
        )
    numbers = change.replace_documents([read.packed.row for read in batch])
    chunks = [
        new_chunk(number, position, chunk, *count)
        for number, read in zip(numbers, batch, strict=True)
        for position, (chunk, count) in enumerate(zip(read.packed.chunks, read.counts, strict=True))
    ]
    if header.vectors == "floats":
        change.add_chunks(chunks, stacked(vectors, "floats", "<f4").astype(np.float32))
    elif change.state.layout == layout and not change.state.floats:
        rests = np.frombuffer(b"".join(parts["rest"] for parts in vectors), np.uint8).reshape(
            len(vectors), layout.rest_bytes
        )
        change.add_coded(
            chunks,
            stacked(vectors, "head", "i1"),
            stacked(vectors, "scales", "<f4"),
            rests,
            None,
        )
    else:
        # another scan width, or floats that the export does not have: rounded again, or as near as
        # the codes are
        change.add_chunks(chunks, decoded(vectors, layout))
