"""Which scan width and shortlist find what an exact search finds, measured on a file's vectors."""

from __future__ import annotations

import math
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from egemma.index.bulk_reads import all_vectors
from egemma.index.codes import Layout, cosines, encode, squares
from egemma.index.facts import State, write_state
from egemma.index.file import opened, transaction
from egemma.index.heads import Heads
from egemma.index.inputs import query_rows
from egemma.index.scan import int8_products, inverse_lengths, round_queries
from egemma.index.search import unit_rows
from egemma.index.session import Session
from egemma.index.tuned import TuneReport, TuneRow
from egemma.index.upkeep.rewrite import rewrite_heads
from egemma.index.vectors import read_vectors
from egemma_core.checks import number, whole_number
from egemma_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    pass

SAMPLE = 200
_TIMED_BYTES = 64 * 2**20  # heads of a width that are timed; more take longer in proportion
_TIMED_RUNS = 9
_RESCORE_RUNS = 5
_RESAMPLES = 2000
_STEP = 1.25  # from one shortlist that is tried to the next
_LONGEST = 10_000  # shortlist that is tried


@dataclass(frozen=True)
class TuneRequest:
    """What a caller of `tune` asks for."""

    recall: float = 0.99  # part of the best k that shall be found
    k: int = 10  # hits that searches will ask for; for more the shortlist grows in proportion
    sample: int = SAMPLE  # stored chunks that stand in for queries, where none are given
    seed: int = 0  # of the choice of chunks and of the bootstrap
    confidence: float = 0.95  # of the interval around the recall

    def __post_init__(self) -> None:
        hint = "All of it is what exact=True finds."
        number("recall", self.recall, above=0, below=1, hint=hint)
        number("confidence", self.confidence, 0.5, 0.999)
        whole_number("k", self.k, 1, 1000)
        whole_number("sample", self.sample, 10, 100_000)
        whole_number("seed", self.seed, 0, 2**32 - 1)


def tune(
    request: TuneRequest,
    queries: Sequence[str] | NDArray[np.float32] | None,
    session: Session,
    *,
    threads: int,
) -> TuneReport:
    """Find the fastest scan width and shortlist that find what an exact search finds.

    They are measured on the vectors in the file, and stored in it. Every trained width is tried but
    the full one. The truth is an exact search at full width, the speed is that of this machine now,
    and what counts is the lower end of the recall's confidence interval. Where another width is
    chosen, all heads are written anew in one transaction. Where nothing reaches the recall, nothing
    is stored.

    Args:
        queries: texts, or their (B, D) vectors by the file's model, as users will ask; some
            hundred. None takes stored chunks, each without itself, which is a guess: queries can be
            harder.
        session: of the file; the measuring has a connection of its own, so searches go on.

    Raises:
        ConfigError: there are not more than k chunks.
        InputError: the queries are no texts or vectors of this model.
        IndexFileError: the index is damaged, or cannot be written.
    """
    session.check_writable()
    path = session.path
    rows = None if queries is None else _query_rows(queries, session)
    with opened(path, "tune", write=False) as connection, transaction(connection):
        state = session.checked_state(connection)
        if state.chunks <= request.k:
            raise ConfigError(
                f"{path} has {state.chunks} chunks: there is nothing to tune for k={request.k}. "
                "Add more first."
            )
        heads = Heads(state.scan_width, threads)
        heads.refresh(connection, state)
        live = np.flatnonzero(heads.live[: heads.count])
        own = None
        if rows is None:
            own = pick_chunks(live, request)
            rows = read_vectors(connection, state, heads.codes[own], own)
        report = measure(
            connection,
            state,
            unit_rows(rows, state.identity.dim),
            own,
            request,
            threads,
            lambda shortlist: rescore_ms(connection, state, heads, live, shortlist),
        )
    tuned = report.tuned()
    if tuned is None:
        return report
    with session.writing("tune") as change:
        if change.state.scan_width != tuned.scan_width:
            rewrite_heads(change, tuned.scan_width)
            report = replace(report, rewritten=True)
        change.state = replace(change.state, tuned=tuned.to_json())
        write_state(change.connection, change.state)
    return report


def _query_rows(
    queries: Sequence[str] | NDArray[np.float32], session: Session
) -> NDArray[np.float64]:
    """Return (B, D) unit rows of queries, which come as texts or as vectors of the model."""
    vectors: object = queries
    if not isinstance(queries, np.ndarray):
        embedder = session.embedder_for("embed queries")
        vectors = embedder.embed_query(list(queries)).vectors
    rows = query_rows(vectors, session.identity.dim, session.identity)[0]
    if not len(rows):
        raise InputError("queries is empty: pass some hundred, or None for stored chunks.")
    return rows


def pick_chunks(live: NDArray[np.int64], request: TuneRequest) -> NDArray[np.int64]:
    """Return the numbers of stored chunks that stand in for queries."""
    return np.sort(
        np.random.default_rng(request.seed).choice(
            live, min(request.sample, len(live)), replace=False
        )
    )


def measure(
    connection: sqlite3.Connection,
    state: State,
    queries: NDArray[np.float64],
    own: NDArray[np.int64] | None,
    request: TuneRequest,
    threads: int,
    rescore_ms: Callable[[int], float],
) -> TuneReport:
    """Compare every width's scan with an exact search; call it inside a read transaction.

    Args:
        queries: (B, D) unit rows.
        own: (B,) the chunk that each query is, which it must not find; None for queries from
            elsewhere.
        rescore_ms: how long the comparison of so many chunks at full width takes.
    """
    truth = _exact(connection, state, queries, own, request.k)
    ranks, scan_ms = _ranks(connection, state, queries, own, truth, threads)
    resampled = np.random.default_rng(request.seed).integers(
        0, len(queries), (_RESAMPLES, len(queries))
    )
    rows = []
    for width in sorted(ranks):
        for shortlist in _shortlists(request.k, state.chunks):
            found = (ranks[width] < shortlist).mean(axis=1)  # (B,) recall of each query
            low, high = interval(found, request.k, request.confidence, resampled)
            if low >= request.recall:
                break
        rows.append(
            TuneRow(
                scan_width=width,
                shortlist=shortlist,
                recall=float(found.mean()),
                low=low,
                high=high,
                reaches=low >= request.recall,
                ms=scan_ms[width] + rescore_ms(shortlist),
            )
        )
    good = [row for row in rows if row.reaches]
    return TuneReport(
        recall=request.recall,
        k=request.k,
        confidence=request.confidence,
        queries=len(queries),
        own_queries=own is not None,
        seed=request.seed,
        chunks=state.chunks,
        floats=state.floats,
        rows=tuple(rows),
        chosen=min(good, key=lambda row: row.ms) if good else None,
        rewritten=False,
    )


def interval(
    found: NDArray[np.float64], k: int, confidence: float, resampled: NDArray[np.int64]
) -> tuple[float, float]:
    """Return between which two values the recall of all queries of this kind lies.

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
    """Return (B, k) numbers of the chunks with the highest cosine at full width."""
    numbers, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    narrow = queries.astype(np.float32)
    for some, vectors in all_vectors(connection, state):
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
    """Return the rank of each true hit in the scan of each width, and the ms that a scan takes.

    A rank, (B, k), is how many chunks the scan puts before that hit.
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
    for some, vectors in all_vectors(connection, state):
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
    for some, vectors in all_vectors(connection, state):
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
    """Return (B, n) scores like those that `Heads.scan` orders by."""
    scores = np.empty((len(queries), len(heads)), np.float32)
    np.multiply(int8_products(queries)(heads).T, inverse_lengths(squares(heads)), out=scores)
    return scores


def _scan_ms(
    codes: NDArray[np.int8], queries: NDArray[np.int8], threads: int, chunks: int
) -> float:
    """Return the median time of a scan for one query over all chunks."""
    heads = Heads(codes.shape[1], threads, count=len(codes))  # of no file
    heads.codes, heads.inverse = codes, inverse_lengths(squares(codes))
    heads.live = np.ones(len(codes), np.bool_)
    times = []
    for run in range(_TIMED_RUNS):
        query = queries[run % len(queries)][None].astype(np.float32)
        started = time.perf_counter()
        heads.scan(query, SAMPLE)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times) * chunks / len(codes)


def rescore_ms(
    connection: sqlite3.Connection, state: State, heads: Heads, live: NDArray[np.int64], count: int
) -> float:
    """Return the median time to read so many vectors and compare them with a query."""
    times = []
    for run in range(_RESCORE_RUNS):
        numbers = np.sort(
            np.random.default_rng(run).choice(live, min(count, len(live)), replace=False)
        )
        started = time.perf_counter()
        stored = read_vectors(connection, state, heads.codes[numbers], numbers)
        cosines(stored[0], stored)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
