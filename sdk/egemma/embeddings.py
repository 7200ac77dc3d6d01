"""What an embedder gives: vectors, and what must be known to compare them with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from egemma.exported import exported


@exported
@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """One text's vector, with what must be known to compare it with another."""

    vector: NDArray[np.float32]  # (dim,), length 1
    num_tokens: int  # of the whole text, its prompt and control tokens included
    truncated: bool  # the model read only the beginning
    fingerprint: str  # of the model; vectors of different fingerprints must not be compared

    @property
    def dim(self) -> int:
        return int(self.vector.shape[0])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.vector, dtype, copy)


@exported
@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings(Sequence[Embedding]):
    """The vectors of several texts, in the order of the texts."""

    vectors: NDArray[np.float32]  # (B, dim), each row of length 1
    num_tokens: tuple[int, ...]  # as in `Embedding`, one per text
    truncated: tuple[bool, ...]
    fingerprint: str

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.num_tokens)

    @overload
    def __getitem__(self, index: int) -> Embedding: ...
    @overload
    def __getitem__(self, index: slice) -> Embeddings: ...
    def __getitem__(self, index: int | slice) -> Embedding | Embeddings:
        if isinstance(index, slice):
            vectors, num_tokens = self.vectors[index], self.num_tokens[index]
            truncated = self.truncated[index]
            return replace(self, vectors=vectors, num_tokens=num_tokens, truncated=truncated)
        return Embedding(
            vector=self.vectors[index],
            num_tokens=self.num_tokens[index],
            truncated=self.truncated[index],
            fingerprint=self.fingerprint,
        )

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.vectors, dtype, copy)


def _as_array(
    vectors: NDArray[np.float32], dtype: DTypeLike | None, copy: bool | None
) -> NDArray[Any]:
    """Answer NumPy's `__array__` protocol."""
    asked = vectors.dtype if dtype is None else np.dtype(dtype)
    if copy is False and asked != vectors.dtype:
        raise ValueError(f"{asked} from {vectors.dtype} needs a copy.")
    return vectors.astype(asked, copy=bool(copy))
