"""How a vector is stored: codes and scales. All arithmetic on them is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import InputError

MAX_CODE = 127
FINE = 16  # steps of a head's code in the four bits that stand beside the rest
# how far from 1 the length of a vector may be: float32 sums, and models that round
_UNIT_SLACK = 1e-3


def to_array(vectors: object) -> NDArray[Any]:
    """Return vectors as an array of any type and shape."""
    try:
        return np.asarray(vectors)
    # rows of different lengths, or a tensor that NumPy may not read
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the vectors cannot be read as rows of floats: {error}") from error


def check_vectors(vectors: object, dim: int) -> NDArray[np.float32]:
    """Return (N, dim) float32 rows, when every row is finite and of unit length."""
    array = to_array(vectors)
    if array.ndim != 2 or array.shape[1] != dim:
        raise InputError(
            f"the vectors have shape {array.shape}: they must be rows of {dim} floats, the model's "
            "full width."
        )
    if array.dtype.kind != "f":
        raise InputError(
            f"the vectors have type {array.dtype}: pass floats as the embedder gives them."
        )
    with np.errstate(all="ignore"):
        narrow = array.astype(np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", narrow, narrow, dtype=np.float64))  # (N,)
        wrong = np.flatnonzero(~(np.abs(length - 1) < _UNIT_SLACK))  # ~(... <): NaN is wrong too
    if len(wrong):
        raise InputError(
            f"vector {wrong[0]} has length {length[wrong[0]]:.4g}, not 1: a vector of this model "
            "is a finite unit vector. Pass them as the embedder gives them; check a model with "
            "`egemma verify`."
        )
    return narrow


@dataclass(frozen=True)
class Layout:
    """Where each channel of a stored vector stands: in the head, or in a segment of the rest.

    The head is what every search goes through, and carries the most, as a Matryoshka prefix does:
    int8 codes for the scan, and four more bits beside the rest, so that it counts with 12 bits in
    the end. The segments end at the trained widths, because a model gives the channels of different
    widths different sizes.
    """

    head: int  # W, channels of the head: a trained width
    edges: tuple[int, ...]  # where the segments of the rest end: the trained widths above W, rising

    @classmethod
    def of(cls, dims: Sequence[int], head: int) -> Layout:
        """Return the layout of a model's vectors with a head of one of its widths."""
        return cls(head=head, edges=tuple(sorted(dim for dim in dims if dim > head)))

    @cached_property
    def dim(self) -> int:
        """D, the full width of a vector."""
        return self.edges[-1] if self.edges else self.head

    @cached_property
    def rest_bytes(self) -> int:
        """Bytes of a rest: half a byte per channel of the head, then one per further channel."""
        return (self.head + 1) // 2 + self.dim - self.head

    @cached_property
    def scales(self) -> int:
        """How many scales a vector has: one for the head, one for each segment."""
        return 1 + len(self.edges)


def encode(
    vectors: NDArray[np.float32], layout: Layout
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round vectors: the largest channel of the head, and of each segment, gets code 127 or -127.

    Args:
        vectors: (N, D) float32, no row zero.

    Returns:
        (N, W) int8 codes of the heads, (N, 1 + segments) float32 scales, (N, rest_bytes) rests.
    """
    bounds = (0, layout.head, *layout.edges)
    scales = np.stack(
        [np.abs(vectors[:, start:stop]).max(axis=1) for start, stop in pairwise(bounds)], axis=1
    ) / np.float32(MAX_CODE)
    safe = np.where(scales > 0, scales, np.float32(1))  # of a segment of zeros: codes 0
    fine = (
        np.rint(vectors[:, : layout.head] * (FINE / safe[:, :1]))
        .astype(np.int32)
        .clip(-MAX_CODE * FINE, MAX_CODE * FINE)
    )  # (N, W)
    heads = (fine + FINE // 2) // FINE  # floor: the remainder is -8 to 7
    nibbles = (fine - FINE * heads + FINE // 2).astype(np.uint8)  # (N, W), 0 to 15
    if layout.head % 2:
        nibbles = np.pad(nibbles, ((0, 0), (0, 1)), constant_values=FINE // 2)
    parts = [nibbles[:, 0::2] | nibbles[:, 1::2] << 4]
    for segment, (start, stop) in enumerate(pairwise(bounds[1:]), start=1):
        parts.append(
            np.rint(vectors[:, start:stop] / safe[:, segment, None])
            .clip(-MAX_CODE, MAX_CODE)
            .astype(np.int8)
            .view(np.uint8)
        )
    return heads.astype(np.int8), scales, np.concatenate(parts, axis=1)


def decode(
    heads: NDArray[np.int8], scales: NDArray[np.float32], rests: NDArray[np.uint8], layout: Layout
) -> NDArray[np.float64]:
    """Return (N, D) vectors of what `encode` gave: nearly, but not exactly, of unit length."""
    vectors = np.empty((len(heads), layout.dim), np.float64)
    packed = rests[:, : (layout.head + 1) // 2]
    nibbles = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(heads), 2 * packed.shape[1])[
        :, : layout.head
    ]
    wide = scales.astype(np.float64)
    vectors[:, : layout.head] = (heads + (nibbles - FINE / 2) / FINE) * wide[:, :1]
    codes = rests[:, packed.shape[1] :].view(np.int8)
    for segment, (start, stop) in enumerate(pairwise((layout.head, *layout.edges)), start=1):
        part = codes[:, start - layout.head : stop - layout.head]
        np.multiply(part, wide[:, segment, None], out=vectors[:, start:stop])
    return vectors


def squares(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return (N,) exact sums of squared codes: at most 127² · 133,000 channels fit."""
    wide = codes.astype(np.int32)
    total: NDArray[np.int32] = np.einsum("nd,nd->n", wide, wide)
    return total


def cosines(query: NDArray[np.float64], stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosines of a query with stored rows; a row without a direction scores 0.

    Each row is summed alone and in the same order, so equal rows tie, wherever they stand.

    Args:
        query: (dim,) of length 1.
        stored: (N, dim) float64; only their direction counts.

    Returns:
        (N,) float64 in -1 to 1.
    """
    length = np.sqrt((stored * stored).sum(axis=1))  # (N,)
    dots = (stored * query).sum(axis=1)
    result: NDArray[np.float64] = np.divide(
        dots, length, out=np.zeros_like(dots), where=length > 0
    ).clip(-1.0, 1.0)
    return result
