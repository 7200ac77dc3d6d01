"""An approximate first pass: a USearch HNSW graph over the heads, in a file beside the index that
can be made anew at any time.

The file `<index>.graph`, integers little-endian:

    payload    USearch's own serialized bytes, at the start, so that every USearch opens the file by
               its path
    sums       one uint32 for each MiB of the payload, the last one begun included: its CRC32
    notes      a JSON object in UTF-8, the fields of `GraphNotes`
    tail       uint32 CRC32 of sums, notes, their version and length; uint32 length of the notes;
               uint32 version, 1; the 8 bytes EGXGRAPH

A key in the graph is the number of a chunk; its vector is that chunk's head of int8 codes, compared
by cosine. USearch itself checks nothing: a flipped bit loads without complaint and crashes a
search. So nobody may hand it bytes before all sums fit.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from egemma.index.heads import BLOCK_ROWS, Heads, highest, live_numbers, round_queries
from egemma_core.errors import ConfigError, IndexFileError, RuntimeUnavailableError

if TYPE_CHECKING:
    from egemma.index.file import State

logger = logging.getLogger("egemma")

CONNECTIVITY = 16
EXPANSION_ADD = 256
VERSION = 1
MAGIC = b"EGXGRAPH"
_TAIL = struct.Struct("<III8s")
_PIECE = 2**20  # bytes that one sum is of
_MAX_NOTES = 2**16
_ROWS = 10_000  # chunks between two calls of `progress`
_WIDEN = 4  # what the graph looks at, for each candidate that it gives back
_FEW = 8  # a filter that lets fewer than one in so many pass is scanned
_DEAD = 5  # a graph of which one in so many was deleted is not built on, but made anew
# between USearch's cosine and ours, which agree to 1e-6 where they are of the same vectors
_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class GraphNotes:
    """What a graph file says about itself."""

    fingerprint: str  # of the model
    numbering: int  # of the index file when it was built
    generation: int
    next_number: int  # chunks from this number on are not in it
    width: int  # channels of a head
    vectors: int  # chunks in it, those deleted since included
    connectivity: int  # neighbours of a node
    expansion_add: int  # how many nodes an insertion looked at
    usearch: str  # version that wrote it
    payload_bytes: int

    @classmethod
    def from_json(cls, text: bytes) -> GraphNotes:
        """
        Raises:
            ValueError: not such notes.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() != {field.name for field in fields(cls)}:
            raise ValueError("other fields")
        for name, value in found.items():
            if name in ("fingerprint", "usearch"):
                if not isinstance(value, str):
                    raise ValueError(f"{name} is no text")
            elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
                raise ValueError(f"{name} is no count")
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """How a graph file stands to its index."""

    vectors: int  # chunks in it
    added: int  # chunks of the index that are not in it: they are scanned
    removed: int  # chunks in it that the index has no more: they are passed over
    file_bytes: int
    problem: str | None  # why it cannot be used; then the counts are 0


@dataclass(frozen=True)
class Graph:
    """An open graph. Searches set its expansion, so only one may run at a time."""

    notes: GraphNotes
    usearch: Any  # usearch.index.Index
    # what `usearch` looks into; None where it has a copy of its own
    payload: NDArray[np.uint8] | None


def check_graph(connectivity: int, expansion_add: int) -> None:
    for name, value, most in (
        ("connectivity", connectivity, 256),
        ("expansion_add", expansion_add, 10_000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= most:
            raise ConfigError(f"{name}={value!r}: a whole number from 2 to {most}.")


def graph_path(index: Path) -> Path:
    return index.with_name(index.name + ".graph")


def usearch_module() -> Any:
    """
    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import usearch
        import usearch.index
    except ImportError as error:
        raise RuntimeUnavailableError(
            "approximate search needs usearch. Install it with `pip install 'egemma[search]'`."
        ) from error
    return usearch


def read_notes(path: Path) -> GraphNotes | None:
    """What the graph file says about itself, its payload unread; None where there is no file.

    Raises:
        IndexFileError: it is none, damaged, or cannot be read.
    """
    try:
        with _typed(path, "read"), path.open("rb") as file:
            return _read_end(file, path)[0]
    except FileNotFoundError:
        return None


def read_graph(path: Path, *, to_add: bool = False) -> Graph | None:
    """Read a graph file, checked whole before USearch sees a byte of it; None where there is no
    file.

    Args:
        to_add: for a graph that vectors are added to, which takes twice the memory for a moment.

    Raises:
        IndexFileError: it is none, damaged, or cannot be read.
        RuntimeUnavailableError: usearch is not installed.
    """
    module = usearch_module()
    try:
        with _typed(path, "read"), path.open("rb") as file:
            notes, sums = _read_end(file, path)
            # Read into memory of our own: nobody can change what was checked, and a file that is
            # cut off under a mapping kills a process.
            payload = np.empty(notes.payload_bytes, np.uint8)
            file.seek(0)
            for number, start in enumerate(range(0, notes.payload_bytes, _PIECE)):
                piece = payload[start : start + _PIECE].data
                if file.readinto(piece) != len(piece) or zlib.crc32(piece) != sums[number]:
                    raise _damaged(
                        path, f"byte {start} to {start + len(piece)} is not what was stored"
                    )
    except FileNotFoundError:
        return None
    index = _empty(notes.width, notes.connectivity, notes.expansion_add)
    try:
        (index.load if to_add else index.view)(payload.data)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise IndexFileError(
            f"{path}: usearch {module.__version__} cannot open what usearch {notes.usearch} wrote "
            f"({error}). "
            f"{_REBUILD}"
        ) from error
    if (len(index), index.ndim) != (notes.vectors, notes.width):
        raise _damaged(
            path,
            f"it holds {len(index)} vectors of {index.ndim} channels, its notes say "
            f"{notes.vectors} of {notes.width}",
        )
    return Graph(notes, index, None if to_add else payload)


def build(
    heads: NDArray[np.int8],
    numbers: NDArray[np.int64],
    *,
    onto: Graph | None,
    connectivity: int,
    expansion_add: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """A USearch index of these chunks.

    Args:
        heads: (rows, width) codes by chunk number.
        numbers: (N,) chunks to put in, rising.
        onto: a graph to add them to, read `to_add`; None begins a new one.
        progress: called with how many of N are in, now and then.
    """
    index = _empty(heads.shape[1], connectivity, expansion_add) if onto is None else onto.usearch
    index.expansion_add = expansion_add
    for start in range(0, len(numbers), _ROWS):
        part = numbers[start : start + _ROWS]
        index.add(part.astype(np.uint64), heads[part], threads=threads)
        if progress is not None:
            progress(start + len(part), len(numbers))
    return index


def write_graph(path: Path, index: Any, **known: Any) -> GraphNotes:
    """Put a USearch index at `path`: whole, durable, and in one step, so that a reader finds the
    old file or the new one.

    Args:
        known: the fields of `GraphNotes` that the index itself does not have.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _typed(path, "write"):
        for left in path.parent.glob(f"{_escaped(path.name)}.*.tmp"):  # of builds that were killed
            left.unlink(missing_ok=True)
        try:
            try:
                index.save(str(temporary))
            except (RuntimeError, ValueError) as error:
                raise IndexFileError(
                    f"{path}: cannot write ({error}). Check the folder's permissions and free "
                    "space."
                ) from error
            with temporary.open("r+b") as file:
                sums = []
                while piece := file.read(_PIECE):
                    sums.append(zlib.crc32(piece))
                notes = GraphNotes(
                    vectors=len(index),
                    payload_bytes=file.tell(),
                    usearch=usearch_module().__version__,
                    **known,
                )
                packed = json.dumps(asdict(notes)).encode()
                body = np.array(sums, "<u4").tobytes() + packed
                file.write(
                    body + _TAIL.pack(_end_crc32(body, len(packed)), len(packed), VERSION, MAGIC)
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return notes


def graph_facts(connection: sqlite3.Connection, state: State, index: Path) -> GraphFacts | None:
    """Of the graph file beside an index, its payload unread; None where there is none.

    Call inside a read transaction.
    """
    path = graph_path(index)
    try:
        notes = read_notes(path)
        problem = None if notes is None else problem_with(notes, state)
    except IndexFileError as error:
        notes, problem = None, str(error)
    if notes is None or problem is not None:
        return (
            None
            if problem is None
            else GraphFacts(
                vectors=0, added=0, removed=0, file_bytes=path.stat().st_size, problem=problem
            )
        )
    alive = 0
    for block, live in connection.execute(
        "SELECT number, live FROM blocks WHERE number * ? < ?", (BLOCK_ROWS, notes.next_number)
    ):
        alive += int((live_numbers(block, live) < notes.next_number).sum())
    return GraphFacts(
        vectors=notes.vectors,
        added=state.chunks - alive,
        removed=notes.vectors - alive,
        file_bytes=path.stat().st_size,
        problem=None,
    )


def problem_with(notes: GraphNotes, state: State) -> str | None:
    """Why a graph cannot be of the index in this state; None where it can."""
    if notes.fingerprint != state.identity.fingerprint:
        return "it is of another model's vectors"
    if notes.width != state.scan_width:
        return f"it is over {notes.width} channels, the index scans {state.scan_width}"
    if notes.numbering != state.numbering:
        return "the index has numbered its chunks anew since it was built"
    if notes.generation > state.generation or notes.next_number > state.next_number:
        return "it is of a later state of the index, which was restored or replaced"
    return None


def worth_adding_to(
    path: Path, state: State, heads: Heads, connectivity: int, expansion_add: int
) -> Graph | None:
    """The graph file, read to be added to; None where one must be made anew."""
    try:
        notes = read_notes(path)
        if (
            notes is None
            or problem_with(notes, state)
            or (notes.connectivity, notes.expansion_add) != (connectivity, expansion_add)
        ):
            return None
        dead = notes.vectors - int(heads.live[: notes.next_number].sum())
        if dead * _DEAD > notes.vectors:
            return None
        graph = read_graph(path, to_add=True)
    except IndexFileError as error:
        logger.warning("building the graph anew: %s", error)
        return None
    if graph is not None and not _is_of(graph, heads):
        logger.warning("building the graph anew: %s is of other vectors than the index holds", path)
        return None
    return graph


def candidates(
    graph: Graph,
    heads: Heads,
    queries: NDArray[np.float32],
    count: int,
    allowed: NDArray[np.bool_] | None,
    path: Path,
) -> tuple[list[NDArray[np.int64]], int]:
    """For each query the numbers of the live rows with the highest cosine, as far as the graph
    finds them.

    Rows that were added after the graph was built are scanned. Where a filter leaves so few that
    the graph would mostly walk past them, or where walking it compares more than scanning does, all
    are scanned.

    Args:
        queries: (B, width) float32, no row zero.
        count: how many; fewer come back when fewer are stored or allowed.
        allowed: (rows,) bool by number; None allows all.

    Returns:
        B arrays, in no order, as `Heads.scan` gives them; and how many rows were scanned for each.

    Raises:
        IndexFileError: the graph is of other vectors.
    """
    covered = graph.notes.next_number
    kept = (
        heads.live[: heads.count]
        if allowed is None
        else heads.live[: heads.count] & allowed[: heads.count]
    )
    reachable, scanned = int(kept[:covered].sum()), int(kept[covered:].sum())
    near = (
        _walk(graph, heads, queries, min(count, reachable), kept, path)
        if reachable * _FEW > graph.notes.vectors
        else None
    )
    if near is None:
        return heads.scan(queries, count, allowed), reachable + scanned
    if scanned:
        near = [
            np.concatenate(both)
            for both in zip(near, heads.scan(queries, count, allowed, start=covered), strict=True)
        ]
    return [
        numbers[highest(heads.compare(query, numbers), count)]
        for query, numbers in zip(queries, near, strict=True)
    ], scanned


def _walk(
    graph: Graph,
    heads: Heads,
    queries: NDArray[np.float32],
    count: int,
    kept: NDArray[np.bool_],
    path: Path,
) -> list[NDArray[np.int64]] | None:
    """For each query `count` kept rows that the graph finds near it; None where a scan would be no
    more work.
    """
    found = [np.empty(0, np.int64)] * len(queries)
    codes = round_queries(queries)
    reachable = int(kept[: graph.notes.next_number].sum())
    wanted = -(-count * graph.notes.vectors // reachable)
    # what is dead or does not pass may lie anywhere
    spare = 1 if reachable == graph.notes.vectors else 2
    pending = list(range(len(queries)))
    while pending:
        if wanted * _WIDEN * 2 * graph.notes.connectivity > graph.notes.vectors:
            return None
        graph.usearch.expansion_search = wanted * _WIDEN
        matches = graph.usearch.search(
            codes[pending], spare * wanted, threads=min(heads.threads, len(pending))
        )
        # USearch gives one query's matches without the axis of queries
        counts = [len(matches)] if len(pending) == 1 else matches.counts
        for row, keys, distances, number in zip(
            pending,
            np.atleast_2d(matches.keys),
            np.atleast_2d(matches.distances),
            counts,
            strict=True,
        ):
            numbers = keys[:number].astype(np.int64)
            if not _agrees(graph, heads, queries[row], numbers, distances[:number]):
                raise IndexFileError(f"{path} is of other vectors than the index holds. {_REBUILD}")
            found[row] = numbers[kept[numbers]][:count]
        pending = [row for row in pending if len(found[row]) < count]
        # what is near the query is mostly deleted, or does not pass the filter: look further
        wanted *= _WIDEN
    return found


def _agrees(
    graph: Graph,
    heads: Heads,
    query: NDArray[np.float32],
    numbers: NDArray[np.int64],
    distances: NDArray[np.float32],
) -> bool:
    """Whether what the graph found is of the vectors that the index holds."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < graph.notes.next_number:
        return False
    live = heads.live[numbers]  # the heads of dead chunks may have been wiped
    return bool(
        (np.abs(heads.compare(query, numbers[live]) - (1 - distances[live])) < _TOLERANCE).all()
    )


def _is_of(graph: Graph, heads: Heads) -> bool:
    """Whether a graph is of these vectors, as far as a hundred of them tell."""
    rows = np.flatnonzero(
        heads.live[: graph.notes.next_number] & (heads.inverse[: graph.notes.next_number] > 0)
    )
    graph.usearch.expansion_search = 64
    for row in rows[:: max(1, len(rows) // 100)]:
        matches = graph.usearch.search(heads.codes[row], 10)
        if not _agrees(
            graph,
            heads,
            heads.codes[row].astype(np.float32),
            matches.keys.astype(np.int64),
            matches.distances,
        ):
            return False
    return True


def _empty(width: int, connectivity: int, expansion_add: int) -> Any:
    index = usearch_module().index.Index
    return index(
        ndim=width,
        metric="cos",
        dtype="i8",
        connectivity=connectivity,
        expansion_add=expansion_add,
        enable_key_lookups=False,
    )


_REBUILD = "Build it anew with `egemma index graph`, or search without approximate=True."


def _damaged(path: Path, found: str) -> IndexFileError:
    return IndexFileError(
        f"{path} is damaged: {found}. The index beside it is not affected. {_REBUILD}"
    )


def _read_end(file: BinaryIO, path: Path) -> tuple[GraphNotes, NDArray[np.uint32]]:
    """Notes and sums from the end of a graph file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL.size))
    tail = file.read()
    if len(tail) < _TAIL.size or not tail.endswith(MAGIC):
        raise _damaged(path, "its end is missing or is none of a graph")
    crc, length, version, _ = _TAIL.unpack(tail)
    if length > min(_MAX_NOTES, size - _TAIL.size):
        raise _damaged(path, "its notes are longer than itself")
    file.seek(size - _TAIL.size - length)
    packed = file.read(length)
    try:
        notes = GraphNotes.from_json(packed) if version == VERSION else None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its notes cannot be read ({error})") from error
    if notes is None:
        raise IndexFileError(
            f"{path} has version {version}, this egemma reads {VERSION}. {_REBUILD}"
        )
    pieces = -(-notes.payload_bytes // _PIECE)
    if notes.payload_bytes + 4 * pieces + length + _TAIL.size != size:
        raise _damaged(
            path, f"it has {size} bytes, its notes tell of {notes.payload_bytes} and {pieces} sums"
        )
    file.seek(notes.payload_bytes)
    sums = file.read(4 * pieces)
    if _end_crc32(sums + packed, length) != crc:
        raise _damaged(path, "its end is not what was stored")
    return notes, np.frombuffer(sums, "<u4")


def _end_crc32(body: bytes, length: int) -> int:
    return zlib.crc32(struct.pack("<II", length, VERSION), zlib.crc32(body))


@contextmanager
def _typed(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if doing == "read":
            raise
        raise IndexFileError(
            f"{path}: cannot write, for another program builds the same graph. Wait for it and "
            "repeat."
        ) from None
    except OSError as error:
        raise IndexFileError(
            f"{path}: cannot {doing} ({error}). Check its permissions, those of its folder, and "
            "the free space."
        ) from error


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
