"""Codes that know what the matrix will multiply: weighted scales, and errors handed on.

Rounding each weight to the nearest code leaves the smallest error in the weights. What counts is
the error of the product, and the channels that it reads differ in size and move together. With
`moment`, the mean of x xᵀ over calibration inputs x, an error e of a row costs e moment eᵀ. Scales
are searched by its diagonal. Then columns are rounded one after another, and what a column loses is
made good by those still to come.

In every group the largest weight keeps the largest code, so that rounding these weights again,
without a moment, gives the same values: a float checkpoint can carry them to an exporter.

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ), on our grids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egemma_core.errors import ConfigError
from egemma_quant.grid import BOUNDS, LARGEST_CODE, as_scale

# Candidate scales of a group, as amax / divisor. Where few weights carry much, and in long rows,
# 4 bits gain by clipping the largest ones; 8 bits do not.
DIVISORS = {
    4: (7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.0, 14.0, 16.0),
    8: (127.0,),
}
DAMPING = 0.01  # of the mean diagonal, added to it: for channels that calibration hardly saw
BLOCK = 128  # columns that are rounded before their errors reach the columns behind them


def codes_and_scales(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, *, feedback: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a matrix.

    Args:
        weight: (rows, columns) float32, finite.
        moment: (columns, columns) the mean of x xᵀ over inputs x; symmetric.
        bits: 4 or 8.
        group_size: how many weights of a row share a scale; it divides the columns.
        feedback: hand errors on; otherwise only the scales know the moment.

    Returns:
        (rows, columns) int8 and (rows, G) float32.

    Raises:
        ConfigError: the moment has another size, or is not finite.
    """
    rows, columns = weight.shape
    if moment.shape != (columns, columns) or not torch.isfinite(moment).all():
        raise ConfigError(
            f"The moment is {tuple(moment.shape)}; it must be ({columns}, {columns}) and finite."
        )
    groups = weight.view(rows, -1, group_size)  # (rows, G, g)
    diagonal = moment.diagonal().float()
    damping = DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    scales = searched_scales(groups, (diagonal + damping).view(-1, group_size), bits)
    by_column = scales.repeat_interleave(group_size, dim=1)  # (rows, columns)
    largest = groups.abs().argmax(-1, keepdim=True)
    anchors = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True).view_as(weight)
    least = torch.where(anchors, weight.sign() * LARGEST_CODE[bits], torch.zeros(()))
    if not feedback:
        return _codes(weight, by_column, least, bits).to(torch.int8), scales

    # The most important columns first: others can still make good for them.
    order = diagonal.argsort(descending=True, stable=True)
    damped = moment.double()[order][:, order]
    damped.diagonal().add_(float(damping))
    # Upper triangular U with Uᵀ U = damped ** -1: row j says what column j hands on.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    hand_on = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, order].clone()  # what each column has to stand for by now
    by_column, least = by_column[:, order], least[:, order]
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = left.new_empty(rows, stop - start)
        for column in range(start, stop):
            scale = by_column[:, column]
            codes[:, column] = _codes(left[:, column], scale, least[:, column], bits)
            error = (left[:, column] - codes[:, column] * scale) / hand_on[column, column]
            left[:, column:stop].addr_(error, hand_on[column, column:stop], alpha=-1)
            errors[:, column - start] = error
        left[:, stop:] -= errors @ hand_on[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8), scales


def _codes(weight: Tensor, scale: Tensor, least: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, those of anchors as large as `least`, which is 0 elsewhere."""
    codes = (weight / scale).round_().clamp_(*BOUNDS[bits])
    codes = torch.where(least > 0, torch.maximum(codes, least), codes)
    return torch.where(least < 0, torch.minimum(codes, least), codes)


def searched_scales(groups: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Return the candidate scale of each group with the smallest weighted squared error.

    Args:
        groups: (rows, G, g) float32.
        importance: (G, g) above 0: what a squared error of a column counts.
        bits: 4 or 8.

    Returns:
        (rows, G) float32, bfloat16 numbers.
    """
    amax = groups.abs().amax(-1, keepdim=True)
    best = best_error = None
    for divisor in DIVISORS[bits]:
        scale = as_scale(amax / divisor)
        codes = (groups / scale).round_().clamp_(*BOUNDS[bits])
        error = ((groups - codes * scale).square_() * importance).sum(-1, keepdim=True)
        if best is None or best_error is None:
            best, best_error = scale, error
        else:
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
    assert best is not None
    return best[..., 0]
