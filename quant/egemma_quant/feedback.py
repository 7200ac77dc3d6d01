"""Codes that know what the matrix will multiply: searched scales, and errors handed on.

Rounding each weight to the nearest code leaves the smallest error in the weights. What counts is
the error of the product, and channels of the input differ in size and move together. With
`moment`, the mean of x xᵀ over calibration inputs, the error of a row w is e moment eᵀ. Scales are
searched by its diagonal; then columns are rounded one after another, and what a column lost is
made good by those that are still to come.

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ), on our grids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egemma_core.errors import ConfigError

# Candidate scales of a group, as amax / divisor. Rows of many weights gain by clipping their
# largest ones, so 4 bits go far beyond 8.
DIVISORS = {
    4: (7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0),
    8: (127.0, 130.0, 135.0, 140.0, 150.0, 160.0),
}
BOUNDS = {4: (-8, 7), 8: (-127, 127)}
DAMPING = 0.01  # of the mean diagonal, added to it: channels that calibration never saw
REFITS = 3  # alternations of codes and least-squares scales
BLOCK = 128  # columns that are rounded before their errors reach the columns behind them


def as_scale(scale: Tensor) -> Tensor:
    """Return the nearest bfloat16 scales, normal and positive as XNNPACK demands.

    A group of zeros, whose codes are 0 anyway, has the scale 1.
    """
    rounded = scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).float()
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def searched_scales(groups: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Return the scales with the smallest weighted squared error, among candidates and their refits.

    Args:
        groups: (rows, G, g) float32.
        importance: (G, g), at least 0: what a squared error of a column counts.
        bits: 4 or 8.

    Returns:
        (rows, G, 1) float32, bfloat16 numbers.
    """
    amax = groups.abs().amax(-1, keepdim=True)
    best = best_error = torch.empty(0)
    for divisor in DIVISORS[bits]:
        scale = as_scale(amax / divisor)
        for _ in range(1 + REFITS):
            codes = (groups / scale).round_().clamp_(*BOUNDS[bits])
            error = ((groups - codes * scale).square_() * importance).sum(-1, keepdim=True)
            if not best.numel():
                best, best_error = scale, error
            else:
                best = torch.where(error < best_error, scale, best)
                best_error = torch.minimum(error, best_error)
            if divisor % 1 or bits == 8:
                break  # a refit from each whole divisor finds the same minima
            fitted = (groups * codes * importance).sum(-1, keepdim=True)
            fitted /= (codes.square() * importance).sum(-1, keepdim=True).clamp(min=1e-30)
            scale = torch.where(fitted > 0, as_scale(fitted), scale)
    return best


def codes_and_scales(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, *, feedback: bool = True
) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns) int8 and scales (rows, G) float32 of a matrix.

    Args:
        weight: (rows, columns) float32, finite.
        moment: (columns, columns), the mean of x xᵀ over inputs x, symmetric.
        bits: 4 or 8.
        group_size: weights along a row that share a scale; it divides the columns.
        feedback: hand errors on; otherwise only the scales know the moment.

    Raises:
        ConfigError: the moment has another size, or is not finite.
    """
    rows, columns = weight.shape
    if moment.shape != (columns, columns) or not torch.isfinite(moment).all():
        raise ConfigError(
            f"The moment is {tuple(moment.shape)} and must be ({columns}, {columns}) and finite."
        )
    groups = weight.float().view(rows, -1, group_size)
    diagonal = moment.diagonal().float()
    importance = diagonal + DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    scales = searched_scales(groups, importance.view(-1, group_size), bits)  # (rows, G, 1)
    by_column = scales.expand(-1, -1, group_size).reshape(rows, columns)
    if not feedback:
        codes = (weight / by_column).round().clamp(*BOUNDS[bits])
        return codes.to(torch.int8), scales[..., 0]

    # The most important columns first: they are rounded while others can still make good for them.
    order = importance.argsort(descending=True, stable=True)
    by_column = by_column[:, order]
    damped = moment.double() + torch.diag(importance.double() - moment.diagonal().double())
    damped = damped[order][:, order]
    # Upper triangular U with U' U = inverse of the moment: row j says what column j hands on.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    hand_on = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float()[:, order].clone()  # what each column has to stand for by now
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            scale = by_column[:, column]
            codes[:, column] = (left[:, column] / scale).round_().clamp_(*BOUNDS[bits])
            error = (left[:, column] - codes[:, column] * scale) / hand_on[column, column]
            left[:, column:stop].addr_(error, hand_on[column, column:stop], alpha=-1)
            errors[:, column - start] = error
        left[:, stop:] -= errors @ hand_on[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8), scales[..., 0]
