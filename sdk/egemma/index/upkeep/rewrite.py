"""Give the vectors of an index heads of another width."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from egemma.index import bulk_reads
from egemma.index.checksums import vector_crc32
from egemma.index.codes import Layout, encode, squares
from egemma.index.facts import BLOCK_ROWS, State
from egemma.index.rows import Change, write_heads


def rewrite_heads(change: Change, width: int) -> None:
    """Give every vector a head of another width, inside a write transaction.

    Where the file keeps no floats the codes are rounded once more, and channels that leave the head
    keep 8 of their 12 bits.
    """
    state, connection = change.state, change.connection
    layout = Layout.of(state.identity.dims, width)
    written = 0  # blocks
    # which holds nothing open between two parts
    for numbers, vectors in bulk_reads.all_vectors(connection, state):
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
        together = bulk_reads.BLOCKS_TOGETHER
        first = int(numbers[0]) // BLOCK_ROWS // together * together
        _write_heads(connection, written, first, state, layout)  # of blocks without a live chunk
        written = first + together
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
    """Write the blocks from `start` on, before `stop` and as far as there are any.

    Chunks have the heads that are given, deleted ones zeros.
    """
    for block in range(start, min(stop, -(-state.next_number // BLOCK_ROWS))):
        first, last = BLOCK_ROWS * block, min(BLOCK_ROWS * (block + 1), state.next_number)
        codes = np.zeros((last - first, layout.head), np.int8)
        if numbers is not None and heads is not None:
            here = (numbers >= first) & (numbers < last)
            codes[numbers[here] - first] = heads[here]
        write_heads(connection, block, squares(codes).astype("<i4").tobytes(), codes.tobytes())
