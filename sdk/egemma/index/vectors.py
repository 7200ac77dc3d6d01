"""Stored vectors, read and checked, and made into numbers again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.blocks import HeadReader
from egemma.index.checksums import Damage, vector_crc32
from egemma.index.codes import Layout, decode
from egemma.index.facts import State

VECTOR_COLUMNS = "v.crc32, v.scales, v.rest, v.floats"


def vector_is_sound(
    layout: Layout,
    keeps_floats: bool,
    number: int,
    head: bytes,
    crc: object,
    scales: object,
    rest: object,
    floats: object,
) -> bool:
    """Return whether the columns of a vector have their types, their lengths and their checksum."""
    return (
        isinstance(scales, bytes)
        and len(scales) == 4 * layout.scales
        and isinstance(rest, bytes)
        and len(rest) == layout.rest_bytes
        and (
            isinstance(floats, bytes) and len(floats) == 4 * layout.dim
            if keeps_floats
            else floats is None
        )
        and vector_crc32(number, head, scales, rest, floats) == crc  # type: ignore[arg-type]
    )


def read_vector(connection: sqlite3.Connection, state: State, number: int) -> NDArray[np.float32]:
    """Return (D,) a stored vector, as near to its floats as the file has it."""
    head = HeadReader(connection, state.scan_width).head(number)
    codes = np.frombuffer(head, np.int8)[None]
    vectors = read_vectors(connection, state, codes, np.array([number])).astype(np.float32)
    return vectors.reshape(-1)


def read_vectors(
    connection: sqlite3.Connection,
    state: State,
    codes: NDArray[np.int8],
    numbers: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return (n, D) stored vectors: floats where the file keeps them, else codes.

    Args:
        codes: (n, W) their heads, as they are in memory.
        numbers: (n,) rising numbers of chunks.
    """
    rows = connection.execute(
        f"SELECT v.number, {VECTOR_COLUMNS} FROM json_each(?) AS j CROSS JOIN vectors AS v "
        "ON v.number = j.value",
        (json.dumps(numbers.tolist()),),
    ).fetchall()
    if [row[0] for row in rows] != numbers.tolist():
        raise Damage(f"{len(numbers)} vectors are looked up, {len(rows)} are there")
    check_rows(state, codes, rows)
    return unpacked(state, codes, rows).astype(np.float64, copy=False)


def check_rows(state: State, codes: NDArray[np.int8], rows: Sequence[Sequence[Any]]) -> None:
    """Check rows of `vectors`, given with their (n, W) heads."""
    layout, keeps_floats, width = state.layout, state.floats, state.scan_width
    heads = codes.tobytes()
    start = 0
    for number, crc, scales, rest, floats in rows:
        head = heads[start : start + width]
        if not vector_is_sound(layout, keeps_floats, number, head, crc, scales, rest, floats):
            raise Damage(f"vector {number} is not what was stored")
        start += width


def unpacked(
    state: State, codes: NDArray[np.int8], rows: Sequence[Sequence[Any]]
) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return (n, D) vectors of rows that were checked, and their heads."""
    layout = state.layout
    if state.floats:
        return np.frombuffer(b"".join(row[4] for row in rows), "<f4").reshape(-1, layout.dim)
    return decode(
        codes,
        np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(-1, layout.scales),
        np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, layout.rest_bytes),
        layout,
    )
