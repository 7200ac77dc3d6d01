"""The scanned prefix ("head") of every stored vector, held in memory as int8 and kept up with the
file.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.codes import MAX_CODE, squares

BLOCK_ROWS = 256
LIVE_BYTES = BLOCK_ROWS // 8
_SPLIT_BYTES = 32 * 2**20  # heads that are worth a second thread
_SCORES_BYTES = 64 * 2**20  # scores of several queries that are held at once
# rows whose products are made at a time, so that they stay in the processor's cache
_SCAN_ROWS = 16384


class Damage(Exception):  # noqa: N818 - users see an IndexFileError
    """The file is not what was stored.

    `typed_errors` tells it as an IndexFileError with the path and the next step.
    """


def block_crc32(block: int, live: bytes) -> int:
    return zlib.crc32(live, zlib.crc32(block.to_bytes(8, "little", signed=True)))


def head_crc32(block: int, squares: bytes, codes: bytes) -> int:
    return zlib.crc32(
        codes, zlib.crc32(squares, zlib.crc32(block.to_bytes(8, "little", signed=True)))
    )


def live_numbers(block: int, live: bytes) -> NDArray[np.int64]:
    """Chunk numbers whose bit is set: bit i (least significant first) of a block stands for chunk
    256 · block + i.
    """
    return (
        np.flatnonzero(np.unpackbits(np.frombuffer(live, np.uint8), bitorder="little"))
        + BLOCK_ROWS * block
    )


def kernel_name() -> str:
    """What multiplies int8: "numkong <version>" where it is installed (`egemma[search]`), else
    "numpy". Both give the same integers.
    """
    kong = _numkong()
    return "numpy" if kong is None else f"numkong {kong.__version__}"


@dataclass
class Heads:
    """Row n belongs to chunk number n.

    Call `refresh` and `scan` under one lock, inside one read transaction.
    """

    width: int
    threads: int
    codes: NDArray[np.int8] = field(init=False)  # (capacity, width)
    # (capacity,) 1 / length of the row's codes; 0 where there is no direction
    inverse: NDArray[np.float32] = field(init=False)
    live: NDArray[np.bool_] = field(init=False)  # (capacity,)
    count: int = 0  # rows in use, dead ones included
    generation: int = -1  # state of the file that this is; -1 for none
    dead: NDArray[np.int64] = field(init=False)  # numbers below count that are not live

    def __post_init__(self) -> None:
        self._reserve(0)
        self.dead = np.empty(0, np.int64)

    def refresh(
        self, connection: sqlite3.Connection, *, generation: int, next_number: int, num_chunks: int
    ) -> None:
        """Read what changed since the last call.

        Args:
            generation, next_number, num_chunks: as the file's facts say now.

        Raises:
            Damage: a checksum or a count does not fit.
        """
        if generation == self.generation:
            return
        # whatever fails below, the next call begins anew
        since, self.generation = self.generation, -1
        if since == -1 or next_number < self.count:
            since, self.count = -1, 0
        self._reserve(next_number)
        self.live[self.count : next_number] = False
        self.count = next_number
        changed = connection.execute(
            "SELECT b.number, b.live, b.crc32, h.squares, h.codes, h.crc32 FROM blocks b "
            "LEFT JOIN heads h ON h.block = b.number WHERE b.changed > ?",
            (since,),
        )
        while rows := changed.fetchmany(64):
            for row in rows:
                self._take(*row)
        # What no checksum of a row can see: a row that is gone.
        if int(self.live[: self.count].sum()) != num_chunks:
            raise Damage(
                f"{num_chunks} chunks are counted, the blocks hold "
                f"{int(self.live[: self.count].sum())}"
            )
        self.dead = np.flatnonzero(~self.live[: self.count])
        self.generation = generation

    def fill(self, codes: NDArray[np.int8]) -> None:
        """Hold these (N, width) heads, of no file."""
        self._reserve(len(codes))
        self.count = len(codes)
        self.codes[: self.count], self.live[: self.count] = codes, True
        self.inverse[: self.count] = inverse_lengths(squares(codes))

    def scan(
        self,
        queries: NDArray[np.float32],
        count: int,
        allowed: NDArray[np.bool_] | None = None,
        *,
        start: int = 0,
    ) -> list[NDArray[np.int64]]:
        """For each query the numbers of the live rows with the highest cosine, as far as int8 heads
        can tell.

        Args:
            queries: (B, width) float32, no row zero.
            count: how many; fewer come back when fewer are stored or allowed.
            allowed: (count of rows,) bool by number; None allows all.
            start: numbers below are left out.

        Returns:
            B arrays, in no order; equal scores at the edge all come back, so one can be longer than
            `count`.
        """
        rounded = round_queries(queries)
        rows: NDArray[np.int64] | None = None
        codes, inverse = self.codes[start : self.count], self.inverse[start : self.count]
        dead = self.dead[self.dead >= start] - start
        if allowed is not None:
            kept = allowed[start : self.count] & self.live[start : self.count]
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
                found.append(start + (best if rows is None else rows[best]))
        return found

    def _scores(
        self, queries: NDArray[np.int8], codes: NDArray[np.int8], inverse: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(B, N): cosines but for the query's own length, which orders nothing."""
        scores = np.empty((len(queries), len(codes)), np.float32)
        multiply = int8_products(queries)
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
        self, block: int, live: bytes, crc: int, squares: bytes, codes: bytes, head_crc: int
    ) -> None:
        start = BLOCK_ROWS * block
        sound = (
            isinstance(live, bytes) and len(live) == LIVE_BYTES and block_crc32(block, live) == crc
        )
        if (
            not sound
            or not isinstance(codes, bytes)
            or not isinstance(squares, bytes)
            or head_crc32(block, squares, codes) != head_crc
        ):
            raise Damage(f"block {block} of the vectors is not what was stored")
        rows = len(codes) // self.width
        stop = start + rows
        numbers = live_numbers(block, live)
        if (
            len(codes) != rows * self.width
            or len(squares) != 4 * rows
            or stop > self.count
            or (len(numbers) and numbers[-1] >= stop)
        ):
            raise Damage(
                f"block {block} of the vectors has {len(codes)} bytes of codes, {len(squares)} of "
                "squares"
            )
        self.codes[start:stop] = np.frombuffer(codes, np.int8).reshape(rows, self.width)
        self.inverse[start:stop] = inverse_lengths(np.frombuffer(squares, "<i4"))
        self.live[start:stop] = False
        self.live[numbers] = True

    def _reserve(self, rows: int) -> None:
        """Room for this many rows, with some to spare; what is there stays."""
        have = len(self.live) if hasattr(self, "live") else -1
        if rows <= have:
            return
        capacity = rows + rows // 8 + BLOCK_ROWS
        codes, inverse, live = (
            np.empty((capacity, self.width), np.int8),
            np.empty(capacity, np.float32),
            np.zeros(capacity, np.bool_),
        )
        if have > 0:
            codes[: self.count], inverse[: self.count] = (
                self.codes[: self.count],
                self.inverse[: self.count],
            )
            live[: self.count] = self.live[: self.count]
        self.codes, self.inverse, self.live = codes, inverse, live


def inverse_lengths(squares: NDArray[np.int32]) -> NDArray[np.float32]:
    """(N,) 1 / length of codes with these sums of squares; 0 where there is no direction."""
    lengths = np.sqrt(squares.astype(np.float32))
    inverse: NDArray[np.float32] = np.divide(
        1, lengths, out=np.zeros_like(lengths), where=lengths > 0
    )
    return inverse


def round_queries(queries: NDArray[np.float32]) -> NDArray[np.int8]:
    """(B, width) codes of queries, no row zero: the largest channel of each gets 127 or -127."""
    codes: NDArray[np.int8] = np.rint(
        queries * (MAX_CODE / np.abs(queries).max(axis=1, keepdims=True))
    ).astype(np.int8)
    return codes


def int8_products(queries: NDArray[np.int8]) -> Callable[[NDArray[np.int8]], NDArray[np.int32]]:
    """A function from (N, width) codes to their (N, B) dot products with these queries, exact.

    May be called from several threads. The queries are what numkong wants repacked: packing the
    codes costs ten times the product.
    """
    count, width = queries.shape
    kong = _numkong()
    if kong is not None:
        # its kernel does four at a time, fewer are slower
        packed = kong.dots_pack(np.pad(queries, ((0, -count % 4), (0, 0))))

        def multiply(codes: NDArray[np.int8]) -> NDArray[np.int32]:
            if not len(codes):
                return np.empty((0, count), np.int32)
            products: NDArray[np.int32] = np.asarray(kong.dots_packed(codes, packed))[:, :count]
            return products

        return multiply
    # float32 holds whole numbers to 2^24 and a product sum of at most 1,040 channels stays below,
    # so this is exact too.
    wide = queries.T.astype(np.float64 if width > 2**24 // MAX_CODE**2 else np.float32)
    return lambda codes: (codes.astype(wide.dtype) @ wide).astype(np.int32)


def _numkong() -> Any:
    """The module, or None where it is not installed; EGEMMA_KERNEL=numpy leaves it out."""
    if os.environ.get("EGEMMA_KERNEL") == "numpy":
        return None
    try:
        import numkong
    except ImportError:
        return None
    return numkong


def highest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the `count` highest scores stand, ties of the last included; -inf never comes back."""
    threshold = -np.inf
    if len(scores) > count:
        # The count-th highest of some groups' maxima is a score that at least `count` reach, and is
        # found quickly.
        group = max(1, len(scores) // (4 * count))
        if group > 1:
            whole = len(scores) // group * group
            maxima = scores[:whole].reshape(-1, group).max(axis=1)
            threshold = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        rows = np.flatnonzero(scores >= threshold)
        if len(rows) > count:
            kept = scores[rows]
            threshold = np.partition(kept, len(kept) - count)[len(kept) - count]
            rows = rows[kept >= threshold]
    else:
        rows = np.arange(len(scores))
    return rows[scores[rows] > -np.inf]
