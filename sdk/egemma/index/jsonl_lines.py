"""The lines of an index as JSON: a first one that says what the file is, then one per document."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument
from egemma.identity import ModelIdentity
from egemma.index.codes import MAX_CODE, Layout, check_vectors, decode
from egemma.index.facts import MAX_WIDTH
from egemma.index.prepare import Prepared, prepare
from egemma_core.errors import EgemmaError, InputError

VERSION = 1
MAX_LINE_BYTES = 256 * 2**20
_UNIT_SLACK = 0.05  # how far from 1 the length of rounded vectors may be
_MAX_COUNT = 2**31  # tokens and characters stay below
_VECTOR_PARTS = {"scales", "head", "rest", "floats"}


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
class ReadDocument:
    """A line that was checked: a document, and what an export says of its chunks beside texts."""

    document: ChunkedDocument
    packed: Prepared
    counts: list[tuple[int, bool]]  # tokens, truncated
    vectors: list[dict[str, bytes]]  # "floats", or "scales", "head" and "rest"; checked for length


def read_documents(
    lines: Iterator[tuple[int, Any]],
    header: Header,
    layout: Layout,
    source: Path,
    *,
    with_vectors: bool,
) -> Iterator[ReadDocument]:
    """Yield the documents of an export, each checked.

    Args:
        lines: from `opened_export`.
        layout: of the vectors in the lines.
        with_vectors: read the vectors too.

    Raises:
        InputError: a line is not as an export has it; says which.
    """
    seen: set[str] = set()
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
        yield read


def _document(value: Any, kind: str, layout: Layout) -> ReadDocument:
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
        found = _fields(
            chunk,
            what,
            {"start": int, "stop": int, "text": str, "tokens": int, "truncated": bool}
            | dict.fromkeys(parts, str),
            {"title": str},
        )
        if not all(0 <= found[name] < _MAX_COUNT for name in ("start", "stop", "tokens")):
            raise InputError(
                f"{what}: start={found['start']}, stop={found['stop']}, tokens={found['tokens']}: "
                "they must be from 0 to 2^31."
            )
        chunks.append(
            Chunk(
                start=found["start"], stop=found["stop"], title=found["title"], text=found["text"]
            )
        )
        counts.append((found["tokens"], found["truncated"]))
        vectors.append(
            {
                name: _bytes(found[name], f"{name} of {what}", num_bytes)
                for name, num_bytes in parts.items()
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
        check_vectors(stacked(vectors, "floats", "<f4"), layout.dim)
    elif kind == "codes":
        decoded(vectors, layout)
    return ReadDocument(document=document, packed=packed, counts=counts, vectors=vectors)


def _fields(
    value: Any, what: str, needed: Mapping[str, type], optional: Mapping[str, type]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is {type(value).__name__}, and must be a JSON object.")
    strange = sorted(value.keys() - needed.keys() - optional.keys() - _VECTOR_PARTS)
    if strange:
        raise InputError(f"{what} has {strange[0]!r}, which no export has.")
    for name, kind in needed.items():
        if type(value.get(name)) is not kind:  # not isinstance: True is an int
            raise InputError(
                f"{what} lacks {name!r}, or has it as {type(value.get(name)).__name__}; it must "
                f"be {kind.__name__}."
            )
    for name, kind in optional.items():
        if value.get(name) is not None and type(value[name]) is not kind:
            raise InputError(
                f"{what} has {name!r} as {type(value[name]).__name__}; it must be "
                f"{kind.__name__} or null."
            )
    return dict.fromkeys(optional) | value


def _bytes(text: str, what: str, num_bytes: int) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} is not base64 ({error}).") from error
    if len(found) != num_bytes:
        raise InputError(f"{what} has {len(found)} bytes, and must have {num_bytes}.")
    return found


def stacked(vectors: list[dict[str, bytes]], name: str, kind: str) -> NDArray[Any]:
    """Return one part of n vectors as (n, ...) numbers of a kind."""
    return np.frombuffer(b"".join(parts[name] for parts in vectors), kind).reshape(len(vectors), -1)


def decoded(vectors: list[dict[str, bytes]], layout: Layout) -> NDArray[np.float32]:
    """Return (n, D) unit vectors of codes.

    Raises:
        InputError: they are none that `encode` gives.
    """
    heads, scales = stacked(vectors, "head", "i1"), stacked(vectors, "scales", "<f4")
    rests = (
        stacked(vectors, "rest", "u1")
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
    if not (np.abs(length - 1) < _UNIT_SLACK).all():
        raise InputError(
            f"a vector has length {float(length[np.argmax(np.abs(length - 1))][0]):.4g}, not 1."
        )
    unit: NDArray[np.float32] = (wide / length).astype(np.float32)
    return unit


def read_header(source: str | Path) -> Header:
    """Return what an export says about itself.

    Raises:
        InputError: no such file, or it is no export.
    """
    with opened_export(Path(source)) as (header, _):
        return header


@contextmanager
def opened_export(source: Path) -> Iterator[tuple[Header, Iterator[tuple[int, Any]]]]:
    """Give the first line, and an iterator over the others with their numbers from 2."""
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
