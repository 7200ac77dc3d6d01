"""Which texts run together: those of like length, as many as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from egemma_core.checks import whole_number
from egemma_core.errors import BundleError

Item = TypeVar("Item")

# In runs below this many tokens reading the weights takes the time, so padding is nearly free.
# Measured on 6 int4 layers, x86-64: 0.55 ms a token in a run of 4, 0.30 in one of 32, 0.26 in one
# of 2048.
FREE_TOKENS = 32
# In larger ones each padded token costs as much as a real one.
MOST_PADDING = 1 / 8


@dataclass(frozen=True, kw_only=True)
class BatchMemory:
    """How much memory the activations of one run may take, and what the model's shape needs."""

    limit_bytes: int
    width: int
    ffn_width: int
    num_heads: int

    def run_bytes(self, texts: int, tokens: int) -> int:
        """Estimate the peak of a run over (B, T): attention scores of a layer, and its vectors.

        All is float32. The T² term is what a limit on B · T alone would miss. Measured with ONNX
        Runtime at full width: 8 to 234 MB for runs of (1, 256), (32, 64), (1, 1024) and (1, 2048),
        within a quarter of this.
        """
        scores = 3 * self.num_heads * tokens * tokens  # q·k, its mask added, softmax
        vectors = tokens * (6 * self.width + 3 * self.ffn_width)
        return 4 * texts * (scores + vectors)

    def fits(self, texts: int, tokens: int) -> bool:
        return self.run_bytes(texts, tokens) <= self.limit_bytes


def memory_of(architecture: Mapping[str, Any], limit_bytes: int) -> BatchMemory:
    """Return what runs of a model of this shape take.

    Args:
        architecture: of the manifest.

    Raises:
        BundleError: it does not give the model's shape.
    """
    shape = {
        name: whole_number(
            f"the manifest's architecture: {name}",
            architecture.get(name),
            1,
            error=BundleError,
            hint="Export again.",
        )
        for name in ("width", "ffn_width", "num_heads")
    }
    return BatchMemory(limit_bytes=limit_bytes, **shape)


def plan_batches(lengths: Sequence[int], memory: BatchMemory) -> list[list[int]]:
    """Split texts into runs, each of texts of like length.

    Args:
        lengths: tokens of each text, its prompt and control tokens included.

    Returns:
        Positions in `lengths`, each exactly once, longest run first. A text that alone exceeds the
        memory still gets a run, by itself: the model reads it or does not, no plan changes that.
        The same lengths give the same plan.
    """
    batches: list[list[int]] = []
    longest = padding = 0  # tokens of the batch being filled
    for position in sorted(
        range(len(lengths)), key=lambda position: (-lengths[position], position)
    ):
        length = lengths[position]
        texts = len(batches[-1]) + 1 if batches else 1
        padded = padding + longest - length
        if (
            batches
            and memory.fits(texts, longest)
            and (texts * longest <= FREE_TOKENS or padded <= MOST_PADDING * texts * longest)
        ):
            batches[-1].append(position)
            padding = padded
        else:
            batches.append([position])
            longest, padding = length, 0
    return batches


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (B, T) ids, padded at the end, and a mask that is 1 on real tokens."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Give consecutive lists of up to `size` items; read nothing before it is asked for."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
