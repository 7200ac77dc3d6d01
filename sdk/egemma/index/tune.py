"""Which scan width and shortlist find what an exact search finds, measured on the vectors that are
in the file.
"""

from __future__ import annotations

import json
import math
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from egemma.index.codes import Layout, decode, encode, squares
from egemma.index.damage import fits, vector_crc32
from egemma.index.heads import (
    BLOCK_ROWS,
    Damage,
    Heads,
    head_crc32,
    int8_products,
    inverse_lengths,
    round_queries,
)
from egemma_core.errors import ConfigError

if TYPE_CHECKING:
    from egemma.index.file import State
    from egemma.index.rows import Change

SAMPLE = 200
_TOGETHER = 16  # blocks that are read at a time
_TIMED_BYTES = 64 * 2**20  # heads of a width that are timed; more take longer in proportion
_TIMED_RUNS = 9
_RESAMPLES = 2000
_STEP = 1.25  # from one shortlist that is tried to the next
_LONGEST = 10_000  # shortlist that is tried


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tune` stores in the file."""

    scan_width: int
    shortlist: int
    k: int
    recall: float  # of the sample
    low: float  # of its confidence interval
    high: float
    confidence: float
    queries: int
    own_queries: bool  # stored chunks stood in for queries
    seed: int
    chunks: int  # in the index at that time

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        """
        Raises:
            Damage: not what `to_json` gave.
        """
        try:
            found = json.loads(text)
            tuned = cls(**found)
            whole = [
                tuned.scan_width,
                tuned.shortlist,
                tuned.k,
                tuned.queries,
                tuned.seed,
                tuned.chunks,
            ]
        except (TypeError, ValueError, RecursionError) as error:
            raise Damage(f"what was tuned cannot be read ({error})") from error
        if (
            not all(type(number) is int and number >= 0 for number in whole)
            or min(tuned.shortlist, tuned.k) < 1
        ):
            raise Damage("what was tuned is impossible")
        return tuned

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def shortlist_for(self, k: int) -> int:
        """In proportion for more hits; as it is for fewer, because the best hit is not found at a
        tenth of the work of ten.
        """
        return max(self.shortlist, -(-self.shortlist * k // self.k))


@dataclass(frozen=True, kw_only=True)
class TuneRow:
    """One scan width, with the shortest shortlist that reaches the recall, or else the longest that
    was tried.
    """

    scan_width: int
    shortlist: int
    recall: float  # of the sample
    low: float  # of the confidence interval
    high: float
    reaches: bool  # `low` is not below what is wanted
    ms: float  # of one query, median: the scan and the comparison at full width


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What `Index.tune` measured and did."""

    recall: float  # that was wanted
    k: int
    confidence: float
    queries: int
    own_queries: bool  # stored chunks stood in for queries, each without itself
    seed: int
    chunks: int
    floats: bool  # the truth is of float32 vectors; else of the codes that are stored
    rows: tuple[TuneRow, ...]
    chosen: TuneRow | None  # the fastest of those that reach it; None where none does
    rewritten: bool  # the heads were written anew at another width

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        asked = (
            f"{self.queries} stored chunks as queries, each without itself"
            if self.own_queries
            else f"{self.queries} queries"
        )
        lines = [
            f"recall@{self.k} of at least {self.recall:g} wanted, with {self.confidence:.0%} "
            f"confidence; {asked}, {self.chunks} chunks, seed {self.seed}.",
            "The truth is an exact search at full width of the stored "
            f"{'float32 vectors' if self.floats else 'codes'}.",
            "",
            "| scan width | shortlist | recall | interval | ms a query |",
            "|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            mark = "" if row.reaches else " (not reached)"
            lines.append(
                f"| {row.scan_width} | {row.shortlist} | {row.recall:.4f}{mark} | {row.low:.4f} to "
                f"{row.high:.4f} | {row.ms:.2f} |"
            )
        if self.chosen is None:
            best = max(self.rows, key=lambda row: row.low)
            lines += [
                "",
                f"Nothing was changed: no shortlist reaches it. The best is {best.low:.4f}, with "
                f"{best.shortlist} at {best.scan_width} channels. "
                "Ask for less, pass more queries, or search with exact=True.",
            ]
        else:
            lines += [
                "",
                f"Chosen and stored: a scan of {self.chosen.scan_width} channels and a shortlist "
                f"of {self.chosen.shortlist}"
                f"{', for which the heads were written anew' if self.rewritten else ''}.",
            ]
        return "\n".join(lines)

    def tuned(self) -> Tuned | None:
        if self.chosen is None:
            return None
        return Tuned(
            scan_width=self.chosen.scan_width,
            shortlist=self.chosen.shortlist,
            k=self.k,
            recall=self.chosen.recall,
            low=self.chosen.low,
            high=self.chosen.high,
            confidence=self.confidence,
            queries=self.queries,
            own_queries=self.own_queries,
            seed=self.seed,
            chunks=self.chunks,
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a caller of `tune` asks for."""

    recall: float = 0.99
    k: int = 10
    sample: int = SAMPLE  # stored chunks, where no queries are given
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (
            isinstance(self.recall, bool)
            or not isinstance(self.recall, (int, float))
            or not 0 < self.recall < 1
        ):
            raise ConfigError(
                f"recall={self.recall!r}: a number between 0 and 1, such as 0.99. All of it is "
                "what exact=True finds."
            )
        if (
            isinstance(self.confidence, bool)
            or not isinstance(self.confidence, float)
            or not 0.5 <= self.confidence <= 0.999
        ):
            raise ConfigError(f"confidence={self.confidence!r}: a number from 0.5 to 0.999.")
        for name, value, least, most in (
            ("k", self.k, 1, 1000),
            ("sample", self.sample, 10, 100_000),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name}={value!r}: a whole number from {least} to {most}.")


def pick_chunks(live: NDArray[np.int64], wanted: Wanted) -> NDArray[np.int64]:
    """Numbers of stored chunks that stand in for queries."""
    return np.sort(
        np.random.default_rng(wanted.seed).choice(
            live, min(wanted.sample, len(live)), replace=False
        )
    )


def measure(
    connection: sqlite3.Connection,
    state: State,
    queries: NDArray[np.float64],
    own: NDArray[np.int64] | None,
    wanted: Wanted,
    threads: int,
    rescore_ms: Callable[[int], float],
) -> TuneReport:
    """Compare every width's scan with an exact search. Call inside a read transaction.

    Args:
        queries: (B, D) unit rows.
        own: (B,) the chunk that each query is, which it must not find; None for queries from
            elsewhere.
        rescore_ms: how long the comparison of so many chunks at full width takes.
    """
    truth = _exact(connection, state, queries, own, wanted.k)
    ranks, scan_ms = _ranks(connection, state, queries, own, truth, threads)
    resampled = np.random.default_rng(wanted.seed).integers(
        0, len(queries), (_RESAMPLES, len(queries))
    )
    rows = []
    for width in sorted(ranks):
        for shortlist in _shortlists(wanted.k, state.chunks):
            found = (ranks[width] < shortlist).mean(axis=1)  # (B,) recall of each query
            low, high = interval(found, wanted.k, wanted.confidence, resampled)
            if low >= wanted.recall:
                break
        rows.append(
            TuneRow(
                scan_width=width,
                shortlist=shortlist,
                recall=float(found.mean()),
                low=low,
                high=high,
                reaches=low >= wanted.recall,
                ms=scan_ms[width] + rescore_ms(shortlist),
            )
        )
    good = [row for row in rows if row.reaches]
    return TuneReport(
        recall=wanted.recall,
        k=wanted.k,
        confidence=wanted.confidence,
        queries=len(queries),
        own_queries=own is not None,
        seed=wanted.seed,
        chunks=state.chunks,
        floats=state.floats,
        rows=tuple(rows),
        chosen=min(good, key=lambda row: row.ms) if good else None,
        rewritten=False,
    )


def interval(
    found: NDArray[np.float64], k: int, confidence: float, resampled: NDArray[np.int64]
) -> tuple[float, float]:
    """Between which the recall of all queries of this kind lies.

    The wider, on each side, of a bootstrap over queries, which knows that the hits of one query are
    missed together, and Wilson's interval over all hits, which knows that a sample without a miss
    does not prove that there are none.

    Args:
        found: (B,) recall of each query.
        resampled: (resamples, B) rows of the sample.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    1927.
    """
    edges = np.quantile(found[resampled].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    n, mean = len(found) * k, float(found.mean())
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, min(float(edges[0]), middle - half)), min(
        1.0, max(float(edges[1]), middle + half)
    )


def _shortlists(k: int, chunks: int) -> Iterator[int]:
    shortlist = k
    while shortlist < min(chunks, _LONGEST):
        yield shortlist
        unit = 10 ** max(0, len(str(shortlist)) - 2)  # two digits are as much as a sample can tell
        shortlist = max(shortlist + 1, math.ceil(shortlist * _STEP / unit) * unit)
    yield min(chunks, _LONGEST)


def _exact(
    connection: sqlite3.Connection,
    state: State,
    queries: NDArray[np.float64],
    own: NDArray[np.int64] | None,
    k: int,
) -> NDArray[np.int64]:
    """(B, k) numbers of the chunks with the highest cosine at full width."""
    numbers, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    narrow = queries.astype(np.float32)
    for some, vectors in stored_vectors(connection, state):
        length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        found = narrow @ (vectors / np.where(length > 0, length, 1)[:, None]).T  # (B, n)
        if own is not None:
            found[own[:, None] == some[None]] = -np.inf
        scores = np.concatenate([scores, found], axis=1)
        numbers = np.concatenate([numbers, np.broadcast_to(some, found.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, numbers = (
            np.take_along_axis(scores, best, axis=1),
            np.take_along_axis(numbers, best, axis=1),
        )
    return numbers


def _ranks(
    connection: sqlite3.Connection,
    state: State,
    queries: NDArray[np.float64],
    own: NDArray[np.int64] | None,
    truth: NDArray[np.int64],
    threads: int,
) -> tuple[dict[int, NDArray[np.int64]], dict[int, float]]:
    """For each width but the full one: (B, k) how many chunks its scan puts before each true hit;
    and the time of a scan in ms.
    """
    widths = sorted(state.identity.dims)[:-1] or [state.identity.dim]
    wide = {
        width: (
            round_queries(queries[:, :width].astype(np.float32)),
            Layout.of(state.identity.dims, width),
        )
        for width in widths
    }
    of_truth: dict[int, dict[int, NDArray[np.int8]]] = {width: {} for width in widths}
    among = np.unique(truth)
    for some, vectors in stored_vectors(connection, state):
        hits = np.isin(some, among)
        for width, (_, layout) in wide.items():
            of_truth[width].update(
                zip(some[hits].tolist(), encode(vectors[hits], layout)[0], strict=True)
            )
    ranks = {width: np.zeros(truth.shape, np.int64) for width in widths}
    theirs = {
        width: np.stack(
            [
                _scores(np.stack([of_truth[width][number] for number in row]), codes[None])[0]
                for row, codes in zip(truth.tolist(), wide[width][0], strict=True)
            ]
        )
        for width in widths
    }  # (B, k)
    timed: dict[int, list[NDArray[np.int8]]] = {width: [] for width in widths}
    for some, vectors in stored_vectors(connection, state):
        for width, (codes, layout) in wide.items():
            heads = encode(vectors, layout)[0]
            scores = _scores(heads, codes)  # (B, n)
            if own is not None:
                scores[own[:, None] == some[None]] = -np.inf
            # the few that stand before any of them
            query, row = np.nonzero(scores > theirs[width].min(axis=1)[:, None])
            np.add.at(ranks[width], query, scores[query, row][:, None] > theirs[width][query])
            if sum(part.nbytes for part in timed[width]) < _TIMED_BYTES:
                timed[width].append(heads)
    return ranks, {
        width: _scan_ms(np.concatenate(timed[width]), wide[width][0], threads, state.chunks)
        for width in widths
    }


def _scores(heads: NDArray[np.int8], queries: NDArray[np.int8]) -> NDArray[np.float32]:
    """(B, n) as `Heads.scan` orders by."""
    scores = np.empty((len(queries), len(heads)), np.float32)
    np.multiply(int8_products(queries)(heads).T, inverse_lengths(squares(heads)), out=scores)
    return scores


def _scan_ms(
    codes: NDArray[np.int8], queries: NDArray[np.int8], threads: int, chunks: int
) -> float:
    """Of one query over all chunks, median."""
    heads = Heads(codes.shape[1], threads)
    heads.fill(codes)
    times = []
    for run in range(_TIMED_RUNS):
        query = queries[run % len(queries)][None].astype(np.float32)
        started = time.perf_counter()
        heads.scan(query, SAMPLE)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times) * chunks / len(codes)


def stored_vectors(
    connection: sqlite3.Connection, state: State
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """All chunks' numbers and (n, D) vectors, some thousand at a time, each checked: floats where
    the file keeps them, else codes.

    Raises:
        Damage: a row is missing or is not what was stored.
    """
    layout, seen = state.layout, 0
    for first in range(0, state.next_number, BLOCK_ROWS * _TOGETHER):
        heads = b"".join(_heads_of(connection, first // BLOCK_ROWS, layout.head))
        rows = connection.execute(
            "SELECT number, crc32, scales, rest, floats FROM vectors WHERE number >= ? AND number "
            "< ? ORDER BY number",
            (first, first + BLOCK_ROWS * _TOGETHER),
        ).fetchall()
        for number, crc, scales, rest, floats in rows:
            head = heads[(number - first) * layout.head : (number - first + 1) * layout.head]
            if (
                not fits(layout, state.floats, scales, rest, floats)
                or vector_crc32(number, head, scales, rest, floats) != crc
            ):
                raise Damage(f"vector {number} is not what was stored")
        if not rows:
            continue
        numbers = np.array([row[0] for row in rows])
        if state.floats:
            yield (
                numbers,
                np.frombuffer(b"".join(row[4] for row in rows), "<f4")
                .reshape(-1, layout.dim)
                .astype(np.float32),
            )
        else:
            codes = np.frombuffer(heads, np.int8).reshape(-1, layout.head)[numbers - first]
            yield (
                numbers,
                decode(
                    codes,
                    np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(
                        -1, layout.scales
                    ),
                    np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(
                        -1, layout.rest_bytes
                    ),
                    layout,
                ).astype(np.float32),
            )
        seen += len(rows)
    if seen != state.chunks:
        raise Damage(f"{state.chunks} chunks are counted, {seen} vectors are there")


def _heads_of(connection: sqlite3.Connection, first: int, width: int) -> Iterator[bytes]:
    expected = first
    for block, crc, head_squares, codes in connection.execute(
        "SELECT block, crc32, squares, codes FROM heads WHERE block >= ? AND block < ? "
        "ORDER BY block",
        (first, first + _TOGETHER),
    ):
        sound = (
            isinstance(head_squares, bytes) and isinstance(codes, bytes) and len(codes) % width == 0
        )
        if block != expected or not sound or head_crc32(block, head_squares, codes) != crc:
            raise Damage(f"block {block} of the vectors is not what was stored")
        expected += 1
        yield codes


def rewrite_heads(change: Change, width: int) -> None:
    """Give every vector a head of another width, inside a write transaction.

    Where the file keeps no floats the codes are rounded once more, and channels that leave the head
    keep 8 of their 12 bits.
    """
    state, connection = change.state, change.connection
    layout = Layout.of(state.identity.dims, width)
    written = 0  # blocks
    # which holds nothing open between two parts
    for numbers, vectors in stored_vectors(connection, state):
        heads, scales, rests = encode(vectors, layout)
        scales = scales.astype("<f4")
        rows = []
        for number, head, scale, rest, vector in zip(
            numbers.tolist(), heads, scales, rests, vectors, strict=True
        ):
            floats = vector.astype("<f4").tobytes() if state.floats else None
            rows.append(
                (
                    vector_crc32(number, head.tobytes(), scale.tobytes(), rest.tobytes(), floats),
                    scale.tobytes(),
                    rest.tobytes(),
                    number,
                )
            )
        connection.executemany(
            "UPDATE vectors SET crc32 = ?, scales = ?, rest = ? WHERE number = ?", rows
        )
        first = int(numbers[0]) // BLOCK_ROWS // _TOGETHER * _TOGETHER
        _write_heads(connection, written, first, state, layout)  # of blocks without a live chunk
        written = first + _TOGETHER
        _write_heads(connection, first, written, state, layout, numbers, heads)
    _write_heads(connection, written, -(-state.next_number // BLOCK_ROWS), state, layout)
    change.state = replace(state, scan_width=width)
    change.touch_all()


def _write_heads(
    connection: sqlite3.Connection,
    start: int,
    stop: int,
    state: State,
    layout: Layout,
    numbers: NDArray[np.int64] | None = None,
    heads: NDArray[np.int8] | None = None,
) -> None:
    """Blocks `start` to `stop`, as far as there are any: these chunks' heads, zeros for dead
    ones.
    """
    for block in range(start, min(stop, -(-state.next_number // BLOCK_ROWS))):
        first, last = BLOCK_ROWS * block, min(BLOCK_ROWS * (block + 1), state.next_number)
        codes = np.zeros((last - first, layout.head), np.int8)
        if numbers is not None and heads is not None:
            here = (numbers >= first) & (numbers < last)
            codes[numbers[here] - first] = heads[here]
        packed = squares(codes).astype("<i4").tobytes(), codes.tobytes()
        connection.execute(
            "UPDATE heads SET crc32 = ?, squares = ?, codes = ? WHERE block = ?",
            (head_crc32(block, *packed), *packed, block),
        )
