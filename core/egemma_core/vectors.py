"""What may be done to a finished vector: shorten it to a trained width, at unit length again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import DimensionError, InputError


def check_dim(dim: int | None, dims: Sequence[int]) -> int:
    """Return `dim`, or for None the full width; DimensionError where it is none of `dims`."""
    if dim is None:
        return dims[0]
    if isinstance(dim, bool) or dim not in dims:
        raise DimensionError(f"dim={dim!r} was not trained; choose one of {tuple(dims)}.")
    return int(dim)


def shorten(
    vectors: NDArray[np.float32], dim: int | None, dims: Sequence[int]
) -> NDArray[np.float32]:
    """Return the first `dim` channels of each vector, at unit length again.

    A prefix of a unit vector is shorter than 1, so its scores would not be cosines.

    Args:
        vectors: (..., dims[0]) float32 unit vectors.
        dim: one of `dims`; None keeps the full width.

    Returns:
        (..., dim) float32, each of length 1.

    Raises:
        DimensionError: `dim` is not in `dims`.
    """
    return normalize(vectors[..., : check_dim(dim, dims)])


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each row divided by its length, computed in float64, as float32.

    Raises:
        InputError: a row is zero, NaN or infinite and has no direction.
    """
    wide = np.asarray(vectors, dtype=np.float64)
    length = np.sqrt(np.square(wide).sum(-1, keepdims=True))
    if not (np.isfinite(length) & (length > 0)).all():
        found = "a vector is zero, NaN or infinite and has no direction."
        raise InputError(found, hint="Check the model file with `egemma verify`.")
    unit: NDArray[np.float32] = (wide / length).astype(np.float32)
    return unit
