"""The loss of tokens that are to be written, in the memory of a block of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from egemma_core.errors import ShapeError
from egemma_core.nn.encode import Ids

Chunk = TypeVar("Chunk")

# Scores that are in memory at a time, in elements of 4 bytes: 256 tokens of Gemma's vocabulary.
BLOCK_SCORES = 2**26


def token_loss(
    hidden: Tensor, table: Tensor, target: Tensor, block_scores: int = BLOCK_SCORES
) -> Tensor:
    """Return the cross-entropy of the tokens to be written, summed.

    It never holds all (N, V) scores. Block by block the scores are made, turned into the gradient
    in place, and dropped; so it is differentiated while it is computed. All in float32, also under
    autocast.

    Args:
        hidden: (N, D) last hidden states of the real tokens.
        table: (V, D) token vectors.
        target: (N,) int64 what comes next.
        block_scores: a block has as many tokens as keep N * V below this, and at least one.

    Returns:
        A float32 scalar, in nats.

    Raises:
        ShapeError: the three disagree.
    """
    if hidden.ndim != 2 or target.shape != hidden.shape[:1] or table.shape[1:] != hidden.shape[1:]:
        raise ShapeError(
            f"hidden {tuple(hidden.shape)}, table {tuple(table.shape)} and target "
            f"{tuple(target.shape)} must be (N, D), (V, D) and (N,)."
        )
    loss: Tensor = _TokenLoss.apply(
        hidden, table, target, max(1, block_scores // len(table)), torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, block: int, differentiate: bool
    ) -> Tensor:
        by_hidden = (
            torch.empty_like(hidden, dtype=torch.float32)
            if differentiate and ctx.needs_input_grad[0]
            else None
        )
        by_table = (
            torch.zeros_like(table, dtype=torch.float32)
            if differentiate and ctx.needs_input_grad[1]
            else None
        )
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, wide = hidden.float(), table.float()
            # (n, V), all that there is of scores
            memory = torch.empty(min(block, len(rows)), len(wide), device=rows.device)
            for start in range(0, len(rows), block):
                # (n, D), (n, 1)
                part, right = rows[start : start + block], target[start : start + block, None]
                scores = torch.mm(part, wide.T, out=memory[: len(part)])  # (n, V)
                chosen = scores.gather(1, right)  # (n, 1)
                highest = scores.amax(1, keepdim=True)  # (n, 1)
                scores.sub_(highest).exp_()
                mass = scores.sum(1, keepdim=True)  # (n, 1)
                total += (highest + mass.log() - chosen).sum()
                if by_hidden is None and by_table is None:
                    continue
                # (n, V) probability - one hot
                slope = scores.div_(mass).scatter_add_(1, right, torch.full_like(mass, -1.0))
                if by_hidden is not None:
                    torch.mm(slope, wide, out=by_hidden[start : start + block])
                if by_table is not None:
                    by_table.addmm_(slope.T, part)
        ctx.gradients = by_hidden, by_table
        ctx.dtypes = hidden.dtype, table.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def backward_in_parts(
    chunks: Sequence[Chunk], loss_of: Callable[[Chunk], Tensor], total: int
) -> Tensor:
    """Return the chunks' summed losses over `total`, and add its gradient to every `.grad`.

    Both are the same for every way to cut chunks; the loss is detached.
    """
    parts = []
    for chunk in chunks:
        part = loss_of(chunk) / total
        torch.autograd.backward(part)
        parts.append(part.detach())
    return torch.stack(parts).sum()


def flat(rows: Sequence[Ids], device: torch.device) -> Tensor:
    """Return all rows' tokens, one row after the other."""
    return torch.tensor([token for row in rows for token in row], device=device)
