"""What a vector search wants, and stored vectors at full width."""

from __future__ import annotations

import json
import sqlite3
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from egemma.index.codes import cosines, decode
from egemma.index.damage import fits, vector_crc32
from egemma.index.file import State
from egemma.index.heads import Damage, Heads
from egemma.index.tune import Tuned

MIN_SHORTLIST = 300  # where nothing was tuned: at least so many, and
SHORTLIST_PER_HIT = 10  # so many for each hit that is wanted


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a caller wants, checked as far as it can be without the file."""

    k: int
    dim: int | None
    condition: tuple[str, Sequence[object]] | None
    shortlist: int | None
    exact: bool


def default_shortlist(state: State, k: int) -> tuple[int, int | None]:
    """How many to compare at full width for k hits; and for how many chunks that was tuned, None
    where it was not.
    """
    tuned = None if state.tuned is None else Tuned.from_json(state.tuned)
    if tuned is None or tuned.scan_width != state.scan_width:
        return max(MIN_SHORTLIST, SHORTLIST_PER_HIT * k), None
    return tuned.shortlist_for(k), tuned.chunks


def stored_vectors(
    connection: sqlite3.Connection, state: State, heads: Heads, numbers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n, D) float64 stored vectors of these chunks, which are in rising order: floats where the
    file keeps them, else codes.
    """
    layout = state.layout
    codes = heads.codes[numbers]
    rows = connection.execute(
        "SELECT v.number, v.crc32, v.scales, v.rest, v.floats FROM json_each(?) AS j CROSS JOIN "
        "vectors AS v "
        "ON v.number = j.value",
        (json.dumps(numbers.tolist()),),
    ).fetchall()
    if [row[0] for row in rows] != numbers.tolist():
        raise Damage(f"{len(numbers)} vectors are wanted, {len(rows)} are there")
    for head, (number, crc, scales, rest, floats) in zip(codes, rows, strict=True):
        if (
            not fits(layout, state.floats, scales, rest, floats)
            or vector_crc32(number, head.tobytes(), scales, rest, floats) != crc
        ):
            raise Damage(f"vector {number} is not what was stored")
    if state.floats:
        return (
            np.frombuffer(b"".join(row[4] for row in rows), "<f4")
            .reshape(-1, layout.dim)
            .astype(np.float64)
        )
    return decode(
        codes,
        np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(-1, layout.scales),
        np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, layout.rest_bytes),
        layout,
    )


def rescore_ms(
    connection: sqlite3.Connection, state: State, heads: Heads, live: NDArray[np.int64], count: int
) -> float:
    """How long it takes to read so many vectors and compare them with a query, median."""
    times = []
    for run in range(5):
        numbers = np.sort(
            np.random.default_rng(run).choice(live, min(count, len(live)), replace=False)
        )
        started = time.perf_counter()
        stored = stored_vectors(connection, state, heads, numbers)
        cosines(stored[0], stored)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def shortened(rows: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """(B, dim) the first channels of each row, at length 1 again."""
    head = rows[:, :dim]
    unit: NDArray[np.float64] = head / np.sqrt((head * head).sum(axis=1, keepdims=True))
    return unit
