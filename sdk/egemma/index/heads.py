"""The scanned prefix ("head") of every stored vector, held in memory and kept up with the file."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from egemma.index.checksums import Damage
from egemma.index.facts import BLOCK_ROWS, State
from egemma.index.scan import best_kernel, highest, int8_products, inverse_lengths, round_queries
from egemma.index.vectors import changed_blocks

_SPLIT_BYTES = 32 * 2**20  # heads that are worth a second thread
_SCORES_BYTES = 64 * 2**20  # scores of several queries that are held at once
_SCAN_ROWS = 16384  # whose products are made at a time: they stay in the processor's cache


@dataclass
class Heads:
    """The int8 heads of an index in memory: row n belongs to chunk number n.

    Call `refresh` and `scan` under one lock, inside one read transaction.
    """

    width: int
    threads: int
    kernel: str = field(default_factory=best_kernel)  # see `scan.KERNELS`
    count: int = 0  # rows in use, dead ones included
    generation: int = -1  # state of the file that this is; -1 for none

    def __post_init__(self) -> None:
        self.codes = np.empty((0, self.width), np.int8)  # (capacity, width)
        # (capacity,) 1 / length of the row's codes; 0 where there is no direction
        self.inverse = np.empty(0, np.float32)
        self.live = np.empty(0, np.bool_)  # (capacity,)
        self.dead = np.empty(0, np.int64)  # numbers below count that are not live

    def refresh(self, connection: sqlite3.Connection, state: State) -> None:
        """Read what changed since the last call.

        Args:
            state: what the file's facts say now.
        """
        if state.generation == self.generation:
            return
        # whatever fails below, the next call begins anew
        since, self.generation = self.generation, -1
        if since == -1 or state.next_number < self.count:
            since, self.count = -1, 0
        self._reserve(state.next_number)
        self.live[self.count : state.next_number] = False
        self.count = state.next_number
        for block in changed_blocks(connection, since):
            self._take(*block)
        # What no checksum of a row can see: a row that is gone.
        live = int(self.live[: self.count].sum())
        if live != state.chunks:
            raise Damage(f"{state.chunks} chunks are counted, the blocks hold {live}")
        self.dead = np.flatnonzero(~self.live[: self.count])
        self.generation = state.generation

    def scan(
        self,
        queries: NDArray[np.float32],
        count: int,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[NDArray[np.int64]]:
        """Find the live rows with the highest cosine for each query, as far as int8 can tell.

        Args:
            queries: (B, width) float32, no row zero.
            count: how many; fewer come back when fewer are stored or allowed.
            allowed: (count of rows,) bool by number; None allows all.

        Returns:
            B arrays of chunk numbers, in no order; equal scores at the edge all come back, so one
            can be longer than `count`.
        """
        rounded = round_queries(queries)
        rows: NDArray[np.int64] | None = None
        codes, inverse, dead = self.codes[: self.count], self.inverse[: self.count], self.dead
        if allowed is not None:
            kept = allowed[: self.count] & self.live[: self.count]
            if kept.sum() * 8 < len(kept):  # few: gather them instead of scanning all
                rows = np.flatnonzero(kept)
                # a quarter of the time of codes[rows]
                codes, inverse, dead = codes.take(rows, axis=0), inverse[rows], rows[:0]
            else:
                dead = np.flatnonzero(~kept)
        step = max(1, _SCORES_BYTES // (4 * max(1, len(codes))))
        found = []
        for first in range(0, len(queries), step):
            for scores in self._scores(rounded[first : first + step], codes, inverse):
                scores[dead] = -np.inf
                best = highest(scores, count)
                found.append(best if rows is None else rows[best])
        return found

    def _scores(
        self, queries: NDArray[np.int8], codes: NDArray[np.int8], inverse: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return (B, N) cosines but for the query's own length, which orders nothing."""
        scores = np.empty((len(queries), len(codes)), np.float32)
        multiply = int8_products(queries, self.kernel)
        parts = min(self.threads, 1 + codes.nbytes // _SPLIT_BYTES)
        edges = [len(codes) * part // parts for part in range(parts + 1)]

        def run(part: int) -> None:
            for start in range(edges[part], edges[part + 1], _SCAN_ROWS):
                rows = slice(start, min(start + _SCAN_ROWS, edges[part + 1]))
                np.multiply(multiply(codes[rows]).T, inverse[rows], out=scores[:, rows])

        if parts == 1:
            run(0)
        else:
            with ThreadPoolExecutor(parts) as pool:
                list(pool.map(run, range(parts)))
        return scores

    def _take(
        self, block: int, live: NDArray[np.int64], block_squares: bytes, codes: bytes
    ) -> None:
        """Put a block that was read and checked in its place."""
        start, rows = BLOCK_ROWS * block, len(codes) // self.width
        stop = start + rows
        if (
            len(codes) != rows * self.width
            or len(block_squares) != 4 * rows
            or stop > self.count
            or (len(live) and live[-1] >= stop)
        ):
            raise Damage(
                f"block {block} of the vectors has {len(codes)} bytes of codes, "
                f"{len(block_squares)} of squares"
            )
        self.codes[start:stop] = np.frombuffer(codes, np.int8).reshape(rows, self.width)
        self.inverse[start:stop] = inverse_lengths(np.frombuffer(block_squares, "<i4"))
        self.live[start:stop] = False
        self.live[live] = True

    def _reserve(self, rows: int) -> None:
        """Make room for this many rows, with some to spare; what is there stays."""
        if rows <= len(self.live):
            return
        capacity = rows + rows // 8 + BLOCK_ROWS
        codes, inverse, live = self.codes, self.inverse, self.live
        self.codes = np.empty((capacity, self.width), np.int8)
        self.inverse, self.live = np.empty(capacity, np.float32), np.zeros(capacity, np.bool_)
        self.codes[: self.count] = codes[: self.count]
        self.inverse[: self.count] = inverse[: self.count]
        self.live[: self.count] = live[: self.count]
