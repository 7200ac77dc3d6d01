"""Token rows through an encoder: rows of similar length go together, in chunks of a bounded number
of padded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from egemma_core.errors import ConfigError

Ids = tuple[int, ...]
# (rows, T) int64 ids padded on the right, (rows, T) bool, true on real tokens
Chunk = tuple[Tensor, Tensor]


def pad(rows: Sequence[Ids], pad_id: int, device: torch.device | str = "cpu") -> Chunk:
    """(rows, T) ids and mask of the longest row's length."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor(
        [[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.int64
    )
    mask = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), mask.to(device)


def by_length(rows: Sequence[Ids], chunk_tokens: int) -> list[list[int]]:
    """Which rows go together: indices in order of length, cut so that no chunk is larger than
    `chunk_tokens` once padded.

    A row that is longer than that goes alone.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens={chunk_tokens}: must be positive.")
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
    """(rows, D) vectors in the order of `rows`."""
    order = by_length(rows, chunk_tokens)
    parts = torch.cat(
        [encoder(*pad([rows[index] for index in chunk], pad_id, device)) for chunk in order]
    )
    return parts[
        torch.tensor([index for chunk in order for index in chunk]).argsort().to(parts.device)
    ]
