"""What a teacher is: a model, or a file of vectors, whose embedding of a text the student is to
match, and whose ranking finds hard negatives.

The report's teacher is Gemini Embedding, which is a service: its vectors come in as a file.
Source: arXiv:2509.20354, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import InputError
from egemma_core.vectors import normalize

Role = Literal["query", "document"]
Vectors = NDArray[np.float32]


class Embedded(NamedTuple):
    """The vectors of some texts."""

    vectors: Vectors  # (n, dim) unit vectors
    truncated: NDArray[np.bool_]  # (n,) true where the model read only the beginning of the text


class Teacher(Protocol):
    """What turns texts into unit vectors in a space of its own."""

    name: str
    dim: int

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts in one role."""

    def identity(self, role: Role) -> str:
        """Return all that the vectors depend on beside the text: weights and prompt."""

    def described(self) -> dict[str, Any]:
        """Return the facts for a report."""


def unit_vectors(vectors: Vectors, texts: Sequence[str], name: str) -> Vectors:
    """Return the vectors at length 1.

    Raises:
        InputError: a vector is zero, NaN or infinite; names a text of such a vector.
    """
    usable = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    if not usable.all():
        first = texts[int(np.argmin(usable))]
        raise InputError(
            f"teacher {name}: {int((~usable).sum())} of {len(texts)} vectors are zero, NaN or "
            f"infinite, such as that of {first[:60]!r}."
        )
    return normalize(vectors)


def no_vectors(dim: int) -> Embedded:
    """Return the vectors of no texts."""
    return Embedded(np.zeros((0, dim), np.float32), np.zeros(0, np.bool_))
