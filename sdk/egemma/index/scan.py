"""The first pass over int8 codes: exact products, their cosines, and where the highest stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.codes import MAX_CODE

KERNELS = ("numkong", "numpy")  # of what multiplies int8; both give the same integers


def best_kernel() -> str:
    """Return "numkong" where it is installed (`egemma[search]`), else "numpy"."""
    return "numpy" if _numkong() is None else "numkong"


def kernel_name(kernel: str | None = None) -> str:
    """Return the name of a kernel for people, with its version; of the best one for None."""
    if (kernel or best_kernel()) == "numpy":
        return "numpy"
    return f"numkong {_numkong().__version__}"


def inverse_lengths(squares: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return (N,) 1 / length of codes with these sums of squares; 0 where there is no direction."""
    lengths = np.sqrt(squares.astype(np.float32))
    inverse: NDArray[np.float32] = np.divide(
        1, lengths, out=np.zeros_like(lengths), where=lengths > 0
    )
    return inverse


def round_queries(queries: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return (B, width) codes of queries, no row zero: the largest channel gets 127 or -127."""
    codes: NDArray[np.int8] = np.rint(
        queries * (MAX_CODE / np.abs(queries).max(axis=1, keepdims=True))
    ).astype(np.int8)
    return codes


def int8_products(
    queries: NDArray[np.int8], kernel: str | None = None
) -> Callable[[NDArray[np.int8]], NDArray[np.int32]]:
    """Return a function from (N, width) codes to their exact (N, B) dot products with queries.

    The function may be called from several threads. The queries are what numkong wants repacked:
    packing the codes costs ten times the product.
    """
    count, width = queries.shape
    if (kernel or best_kernel()) == "numkong":
        kong = _numkong()
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
    """Return the module, or None where it is not installed."""
    try:
        import numkong
    except ImportError:
        return None
    return numkong


def highest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return where the `count` highest scores stand, ties of the last included; never a -inf."""
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
