"""An index as JSON lines and back: a line that says what the file is, then one object per document,
its chunks and their vectors in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument
from egemma.identity import ModelIdentity, check_same_model
from egemma.index.codes import MAX_CODE, Layout, check_vectors, decode
from egemma.index.damage import chunk_crc32, document_crc32, fits, vector_crc32
from egemma.index.file import MAX_WIDTH, State, read_state, transaction
from egemma.index.heads import BLOCK_ROWS, Damage, head_crc32
from egemma.index.rows import NewChunk, stored_chunks
from egemma.index.upkeep import opened, written_beside
from egemma_core.errors import EgemmaError, IndexFileError, InputError
from egemma_core.tokens import Overflow

if TYPE_CHECKING:
    from egemma.index.index import Index
    from egemma.index.put import Prepared

VERSION = 1
MAX_LINE_BYTES = 256 * 2**20
_TOGETHER = 256  # documents of one transaction
_ROUNDED = 0.05  # how far from 1 the length of rounded vectors may be
_CHARACTERS_TOGETHER = 2**24
_COUNT = 2**31  # tokens and characters stay below
_VECTOR_PARTS = {"scales", "head", "rest", "floats"}

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
        written_beside(destination) as made,
    ):
        state = read_state(connection)
        count = int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])
        kind = "none" if not vectors else "floats" if state.floats else "codes"
        written = 0
        try:
            with made.open("w", encoding="utf-8", newline="\n") as out:
                out.write(
                    json.dumps(
                        {
                            "egemma_index": VERSION,
                            "model": json.loads(state.identity.to_json()),
                            "vectors": kind,
                            "scan_width": state.scan_width,
                            "floats": state.floats,
                            "tuned": state.tuned,
                            "documents": count,
                        }
                    )
                    + "\n"
                )
                for document in _documents(connection, state, kind):
                    out.write(json.dumps(document, ensure_ascii=False) + "\n")
                    written += 1
        except OSError as error:
            raise IndexFileError(
                f"{destination} cannot be written ({error}). Free some space, or check its folder."
            ) from error
        if written != count:
            raise Damage(f"{count} documents are there, {written} can be read")
    return count


def _documents(connection: sqlite3.Connection, state: State, kind: str) -> Iterator[dict[str, Any]]:
    """In the order of their first chunks, because that is what orders equal scores."""
    heads: tuple[int, bytes] = (-1, b"")
    rows = connection.execute(
        "SELECT d.number, d.id, d.title, d.metadata, d.source, d.crc32 FROM documents d JOIN "
        "(SELECT document, "
        "min(number) AS first FROM chunks GROUP BY document) c ON c.document = d.number ORDER BY "
        "c.first"
    )
    for document, id_, title, metadata, source, crc in rows:
        if document_crc32(id_, title, metadata, source) != crc:
            raise Damage(f"document {id_!r} is not what was stored")
        chunks: list[dict[str, Any]] = []
        for (
            number,
            position,
            start,
            stop,
            num_tokens,
            truncated,
            chunk_title,
            text,
            chunk_crc,
            scales,
            rest,
            floats,
            vector_crc,
        ) in connection.execute(
            "SELECT c.number, c.position, c.start, c.stop, c.num_tokens, c.truncated, c.title, "
            "c.text, c.crc32, v.scales, v.rest, v.floats, v.crc32 "
            "FROM chunks c LEFT JOIN vectors v ON v.number = c.number WHERE c.document = ? ORDER "
            "BY c.position, c.number",
            (document,),
        ):
            if (
                position != len(chunks)
                or chunk_crc32(
                    number,
                    document,
                    position,
                    start,
                    stop,
                    num_tokens,
                    truncated,
                    chunk_title,
                    text,
                )
                != chunk_crc
            ):
                raise Damage(f"chunk {number} is not what was stored")
            chunk: dict[str, Any] = {
                "start": start,
                "stop": stop,
                "title": chunk_title,
                "text": text,
                "tokens": num_tokens,
                "truncated": bool(truncated),
            }
            if kind != "none":
                block, slot = divmod(number, BLOCK_ROWS)
                if heads[0] != block:
                    heads = block, _heads(connection, block)
                head = heads[1][slot * state.scan_width : (slot + 1) * state.scan_width]
                if (
                    not fits(state.layout, state.floats, scales, rest, floats)
                    or vector_crc32(number, head, scales, rest, floats) != vector_crc
                ):
                    raise Damage(f"vector {number} is not what was stored")
                parts = (
                    {"floats": floats}
                    if kind == "floats"
                    else {"scales": scales, "head": head, "rest": rest}
                )
                chunk.update(
                    (name, base64.b64encode(part).decode()) for name, part in parts.items()
                )
            chunks.append(chunk)
        yield {
            "id": id_,
            "title": title,
            "metadata": None if metadata is None else json.loads(metadata),
            "source": None if source is None else json.loads(source),
            "chunks": chunks,
        }


def _heads(connection: sqlite3.Connection, block: int) -> bytes:
    row = connection.execute(
        "SELECT squares, codes, crc32 FROM heads WHERE block = ?", (block,)
    ).fetchone()
    if (
        row is None
        or not isinstance(row[0], bytes)
        or not isinstance(row[1], bytes)
        or head_crc32(block, row[0], row[1]) != row[2]
    ):
        raise Damage(f"block {block} of the vectors is not what was stored")
    return row[1]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line of an export."""

    identity: ModelIdentity
    vectors: str  # "codes", "floats" or "none"
    scan_width: int  # of the index it came from
    floats: bool
    tuned: str | None
    documents: int


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What `import_jsonl` did."""

    documents: int
    chunks: int
    embedded: int  # chunks that the model had to read


def read_header(source: str | Path) -> Header:
    """What an export says about itself.

    Raises:
        InputError: no such file, or it is no export.
    """
    with _opened(Path(source)) as (header, _):
        return header


def import_jsonl(
    index: Index,
    source: str | Path,
    *,
    reembed: bool = False,
    overflow: Overflow = "error",
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Put the documents of an export into an index, some hundred in a transaction; a stored id is
    replaced.

    Every line is checked before it is stored. After an error or a crash the lines before it may be
    stored; importing the file again then ends with the same contents. An index that never held
    anything takes the layout of the one that was exported, and answers as it did. (Only chunks with
    exactly equal scores can change places, where documents were edited after they were added.)

    Args:
        reembed: embed the texts with the index's own model, for an export without vectors or of
            another model.
        overflow: for `reembed`; see `Index.put`.
        progress: is called with documents done and documents in all.

    Raises:
        IndexMismatchError: vectors of another model.
        InputError: the file cannot be read, is no export, or a line is not as an export has it.
        IndexFileError: the index is read-only, full, locked or damaged.
    """
    source = Path(source)
    done = chunks = embedded = 0
    with _opened(source) as (header, lines):
        if not reembed:
            if header.vectors == "none":
                raise InputError(
                    f"{source} has no vectors. Pass reembed=True (`--embed`) to embed its texts."
                )
            check_same_model(source, header.identity, index.identity, _WAY_OUT)
            if header.identity.dims != index.identity.dims:
                raise InputError(
                    f"{source} has dims={header.identity.dims}, the model of the index "
                    f"{index.identity.dims}: one of the two is wrong."
                )
        layout = Layout.of(header.identity.dims, header.scan_width)
        seen: set[str] = set()
        try:
            while batch := _batch(lines, header, layout, seen, source, with_vectors=not reembed):
                if reembed:
                    report = index.put([read.document for read in batch], overflow=overflow)
                    embedded += report.embedded
                else:
                    _store(index, batch, header, layout)
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


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One line, checked: a document, and what an export knows of its chunks beyond their texts."""

    document: ChunkedDocument
    packed: Prepared
    counts: list[tuple[int, bool]]  # tokens, truncated
    vectors: list[dict[str, bytes]]  # "floats", or "scales", "head" and "rest"; checked for length


def _batch(
    lines: Iterator[tuple[int, Any]],
    header: Header,
    layout: Layout,
    seen: set[str],
    source: Path,
    *,
    with_vectors: bool,
) -> list[_Read]:
    """The next documents; none at the end."""
    batch: list[_Read] = []
    characters = 0
    for number, value in lines:
        try:
            read = _document(value, header.vectors if with_vectors else "none", layout)
        except EgemmaError as error:
            raise InputError(f"{source}, line {number}: {error}") from error
        if read.document.id in seen:
            raise InputError(
                f"{source}, line {number}: the id {read.document.id!r} was there before."
            )
        seen.add(read.document.id)
        batch.append(read)
        characters += sum(len(chunk.text) for chunk in read.document.chunks)
        if len(batch) == _TOGETHER or characters > _CHARACTERS_TOGETHER:
            break
    return batch


def _document(value: Any, kind: str, layout: Layout) -> _Read:
    from egemma.index.put import prepare

    fields = _fields(
        value,
        "the line",
        {"id": str, "chunks": list},
        {"title": str, "metadata": dict, "source": dict},
    )
    chunks, counts, vectors = [], [], []
    parts = {
        "codes": {"scales": 4 * layout.scales, "head": layout.head, "rest": layout.rest_bytes},
        "floats": {"floats": 4 * layout.dim},
    }.get(kind, {})
    for position, chunk in enumerate(fields["chunks"]):
        what = f"chunk {position}"
        told = _fields(
            chunk,
            what,
            {"start": int, "stop": int, "text": str, "tokens": int, "truncated": bool}
            | dict.fromkeys(parts, str),
            {"title": str},
        )
        if not all(0 <= told[name] < _COUNT for name in ("start", "stop", "tokens")):
            raise InputError(
                f"{what}: start={told['start']}, stop={told['stop']}, tokens={told['tokens']}: "
                "they must be from 0 to 2^31."
            )
        chunks.append(
            Chunk(start=told["start"], stop=told["stop"], title=told["title"], text=told["text"])
        )
        counts.append((told["tokens"], told["truncated"]))
        vectors.append(
            {
                name: _bytes(told[name], f"{name} of {what}", wanted)
                for name, wanted in parts.items()
            }
        )
    document = ChunkedDocument(
        id=fields["id"],
        title=fields["title"],
        metadata=fields["metadata"],
        source=fields["source"],
        chunks=tuple(chunks),
    )
    packed = prepare([document], blank=True)[0]
    if kind == "floats":
        check_vectors(_stacked(vectors, "floats", "<f4"), layout.dim)
    elif kind == "codes":
        _decoded(vectors, layout)
    return _Read(document=document, packed=packed, counts=counts, vectors=vectors)


def _fields(
    value: Any, what: str, needed: Mapping[str, type], optional: Mapping[str, type]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is {type(value).__name__}, wanted is a JSON object.")
    strange = sorted(value.keys() - needed.keys() - optional.keys() - _VECTOR_PARTS)
    if strange:
        raise InputError(f"{what} has {strange[0]!r}, which no export has.")
    for name, kind in needed.items():
        if type(value.get(name)) is not kind:  # not isinstance: True is an int
            raise InputError(
                f"{what} lacks {name!r}, or has it as {type(value.get(name)).__name__}; wanted is "
                f"{kind.__name__}."
            )
    for name, kind in optional.items():
        if value.get(name) is not None and type(value[name]) is not kind:
            raise InputError(
                f"{what} has {name!r} as {type(value[name]).__name__}; wanted is {kind.__name__} "
                "or null."
            )
    return dict.fromkeys(optional) | value


def _bytes(text: str, what: str, wanted: int) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} is not base64 ({error}).") from error
    if len(found) != wanted:
        raise InputError(f"{what} has {len(found)} bytes, wanted are {wanted}.")
    return found


def _stacked(vectors: list[dict[str, bytes]], name: str, kind: str) -> NDArray[Any]:
    return np.frombuffer(b"".join(parts[name] for parts in vectors), kind).reshape(len(vectors), -1)


def _decoded(vectors: list[dict[str, bytes]], layout: Layout) -> NDArray[np.float32]:
    """(n, D) unit vectors of codes.

    Raises:
        InputError: they are none that `encode` gives.
    """
    heads, scales = _stacked(vectors, "head", "i1"), _stacked(vectors, "scales", "<f4")
    rests = (
        _stacked(vectors, "rest", "u1")
        if layout.rest_bytes
        else np.empty((len(vectors), 0), np.uint8)
    )
    segments = rests[:, (layout.head + 1) // 2 :].view(np.int8)
    if (
        not np.isfinite(scales).all()
        or (scales < 0).any()
        or (heads < -MAX_CODE).any()
        or (segments < -MAX_CODE).any()
    ):
        raise InputError(
            "a scale is negative or no number, or a code is -128: a rounded vector has neither."
        )
    wide = decode(heads, scales, rests, layout)
    length = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    if not (np.abs(length - 1) < _ROUNDED).all():
        raise InputError(
            f"a vector has length {float(length[np.argmax(np.abs(length - 1))][0]):.4g}, not 1."
        )
    unit: NDArray[np.float32] = (wide / length).astype(np.float32)
    return unit


def _store(index: Index, batch: list[_Read], header: Header, layout: Layout) -> None:
    vectors = [parts for read in batch for parts in read.vectors]
    with index._writing("import") as change:
        if change.state.next_number == 0:
            change.state = replace(
                change.state,
                scan_width=header.scan_width,
                floats=change.state.floats or header.floats,
                tuned=header.tuned,
            )
        known = stored_chunks(change.connection, [read.document.id for read in batch])
        change.remove_chunks([chunk.number for _, stored in known.values() for chunk in stored])
        chunks = []
        for read in batch:
            document = read.packed
            number = change.put_document(
                document.id,
                document.title,
                document.metadata,
                document.source,
                known.get(document.id, (None,))[0],
            )
            chunks += [
                NewChunk(
                    document=number,
                    position=position,
                    start=chunk.start,
                    stop=chunk.stop,
                    num_tokens=num_tokens,
                    truncated=truncated,
                    title=chunk.title,
                    text=chunk.text,
                )
                for position, (chunk, (num_tokens, truncated)) in enumerate(
                    zip(document.chunks, read.counts, strict=True)
                )
            ]
        if header.vectors == "floats":
            change.add_chunks(chunks, _stacked(vectors, "floats", "<f4").astype(np.float32))
        elif change.state.layout == layout and not change.state.floats:
            rests = np.frombuffer(b"".join(parts["rest"] for parts in vectors), np.uint8).reshape(
                len(vectors), layout.rest_bytes
            )
            change.add_coded(
                chunks,
                _stacked(vectors, "head", "i1"),
                _stacked(vectors, "scales", "<f4"),
                rests,
                None,
            )
        # another scan width, or floats that the export does not have: rounded again, or as near as
        # the codes are
        else:
            change.add_chunks(chunks, _decoded(vectors, layout))


@contextmanager
def _opened(source: Path) -> Iterator[tuple[Header, Iterator[tuple[int, Any]]]]:
    """The first line, and an iterator over the others with their numbers from 2."""
    try:
        file = source.open("rb")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source} cannot be read ({error}). Give the path of an export."
        ) from error
    with file:
        lines = _objects(file, source)
        yield _header(next(lines, (1, None))[1], source), lines


def _objects(file: BinaryIO, source: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise InputError(f"{source} cannot be read ({error}).") from error
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{source}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB. Split that "
                "document."
            )
        try:
            yield number, json.loads(line.decode(), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError
            raise InputError(f"{source}, line {number} is not a JSON object: {error}.") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _header(value: Any, source: Path) -> Header:
    wrong = (
        f"{source} is no export of an index: its first line is not as `egemma index export` "
        "writes it"
    )
    if not isinstance(value, dict) or "egemma_index" not in value:
        raise InputError(f"{wrong}.")
    if value["egemma_index"] != VERSION:
        raise InputError(
            f"{source} has version {value['egemma_index']!r}, this egemma reads {VERSION}. Update "
            "egemma."
        )
    try:
        identity = ModelIdentity.from_json(json.dumps(value["model"]))
        header = Header(
            identity=identity,
            vectors=value["vectors"],
            scan_width=value["scan_width"],
            floats=value["floats"],
            tuned=value["tuned"],
            documents=value["documents"],
        )
        tuned = None if header.tuned is None else json.loads(header.tuned)["shortlist"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{wrong} ({error}).") from error
    fits_together = (
        header.vectors in ("codes", "floats", "none")
        and header.scan_width in identity.dims
        and type(header.floats) is bool
        and type(header.documents) is int
        and (tuned is None or type(tuned) is int)
    )
    if (
        not fits_together
        or identity.dim > MAX_WIDTH
        or (header.vectors == "floats" and not header.floats)
    ):
        raise InputError(f"{wrong}: {value}"[:1000])
    return header
