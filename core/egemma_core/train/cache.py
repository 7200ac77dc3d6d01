"""Gradient caching: a contrastive batch of any size in the memory of one chunk, with the plain gradient.

The loss sees all vectors of the batch, but needs no activations: so embed everything without keeping any, differentiate the loss by the
vectors, and then embed chunk by chunk again, each time handing its vectors' gradients on. Two forward passes instead of one.

Source: Gao et al. 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from egemma_core.errors import ShapeError

Embed = Callable[[Any], Tensor]   # a chunk of texts to (rows, D) vectors


def embed_chunks(embed: Embed, chunks: Sequence[Any]) -> Tensor:
    """(B, D) vectors of all chunks, one after the other, without gradients but ready to take one."""
    with torch.no_grad():
        return torch.cat([embed(chunk) for chunk in chunks]).requires_grad_()


def backward_chunks(embed: Embed, chunks: Sequence[Any], gradient: Tensor) -> None:
    """Add to every parameter's `.grad` what the loss's gradient by the vectors means for it.

    Args:
        chunks: the same as given to `embed_chunks`; embedding must give the same vectors again, so there can be no dropout.
        gradient: (B, D).

    Raises:
        ShapeError: the chunks do not add up to B.
    """
    start = 0
    for chunk in chunks:
        vectors = embed(chunk)
        part = gradient[start : start + len(vectors)]
        if part.shape != vectors.shape:
            raise ShapeError(f"chunks give {start + len(vectors)} or more vectors of {vectors.shape[1]}, the gradient is {tuple(gradient.shape)}.")
        torch.autograd.backward(vectors, part)
        start += len(vectors)
    if start != len(gradient):
        raise ShapeError(f"chunks give {start} vectors, the gradient has {len(gradient)} rows.")


def cached_backward(embed: Embed, chunks: Sequence[Any], loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of a batch, with its gradient added to every parameter's `.grad`.

    Args:
        embed: a chunk to (rows, D) vectors, the same each time.
        chunks: one chunk is embedded once and differentiated plainly.
        loss_of: (B, D) vectors, in the order of the chunks, to a scalar.

    Returns:
        The loss, detached.
    """
    if len(chunks) == 1:
        loss = loss_of(embed(chunks[0]))
        torch.autograd.backward(loss)
        return loss.detach()
    vectors = embed_chunks(embed, chunks)
    loss = loss_of(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    backward_chunks(embed, chunks, gradient)
    return loss.detach()
