"""A contrastive batch in chunks, with the plain gradient; on request in the memory of one chunk,
whatever the batch.

The loss sees all vectors of the batch, but needs no activations. So it is differentiated by the
vectors alone, and each chunk then hands its vectors' gradient on to the weights. With `recompute`
the vectors are first made without keeping activations, and every chunk is embedded again when its
turn comes: two forward passes instead of one (gradient caching).

Source: Gao et al. 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from egemma_core.errors import ShapeError

Chunk = TypeVar("Chunk")


def backward_in_chunks(
    embed: Callable[[Chunk], Tensor],
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], Tensor],
    *,
    recompute: bool,
) -> Tensor:
    """Return the loss of a batch, and add its gradient to every parameter's `.grad`.

    Args:
        embed: a chunk to (rows, D) vectors; with `recompute` the same each time, so there can be no
            dropout.
        loss_of: (B, D) vectors, in the order of the chunks, to a scalar. Parameters of its own get
            their gradient as well.
        recompute: embed twice and keep the activations of one chunk, instead of once and of all.

    Returns:
        The loss, detached.

    Raises:
        ShapeError: with `recompute`, a chunk gave another number of vectors the second time.
    """
    with torch.set_grad_enabled(not recompute):
        parts = [embed(chunk) for chunk in chunks]
    vectors = torch.cat([part.detach() for part in parts]).requires_grad_()
    loss = loss_of(vectors)
    torch.autograd.backward(loss)
    assert vectors.grad is not None
    gradients = torch.split(vectors.grad, [len(part) for part in parts])
    if not recompute:
        torch.autograd.backward(parts, list(gradients))
        return loss.detach()
    for chunk, gradient in zip(chunks, gradients, strict=True):
        again = embed(chunk)
        if again.shape != gradient.shape:
            raise ShapeError(
                f"a chunk gave {len(gradient)} vectors at first and {len(again)} when it was "
                "embedded again."
            )
        torch.autograd.backward(again, gradient)
    return loss.detach()
