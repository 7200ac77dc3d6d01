"""Token rows through an encoder, in chunks of rows of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from egemma_core.checks import whole_number

Ids = tuple[int, ...]
# (rows, T) int64 ids padded on the right, (rows, T) bool, true on real tokens
Chunk = tuple[Tensor, Tensor]


def pad(rows: Sequence[Ids], pad_id: int, device: torch.device | str = "cpu") -> Chunk:
    """Return (rows, T) ids and their mask, padded on the right to the longest row."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    # fmt: off
    ids = torch.tensor(padded, dtype=torch.int64)                                # (rows, T)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]       # (rows, T)
    # fmt: on
    return ids.to(device), mask.to(device)


def by_length(rows: Sequence[Ids], chunk_tokens: int) -> list[list[int]]:
    """Return which rows go together: their indices, in order of length.

    No chunk is larger than `chunk_tokens` once padded; a row that is longer than that goes alone.

    Raises:
        ConfigError: `chunk_tokens` is no whole number of at least 1.
    """
    whole_number("chunk_tokens", chunk_tokens, 1)
    chunks: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if chunks and (len(chunks[-1]) + 1) * len(rows[index]) <= chunk_tokens:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def encode_rows(
    encoder: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Ids],
    pad_id: int,
    chunk_tokens: int = 4096,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return (rows, D) vectors in the order of `rows`.

    Args:
        encoder: ids (rows, T) and mask to (rows, D).
        chunk_tokens: the most tokens that go through it at once, padding included.
    """
    chunks = by_length(rows, chunk_tokens)
    parts = [encoder(*pad([rows[index] for index in chunk], pad_id, device)) for chunk in chunks]
    vectors = torch.cat(parts)
    order = torch.tensor([index for chunk in chunks for index in chunk])
    return vectors[order.argsort().to(vectors.device)]
