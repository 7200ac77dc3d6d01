"""Quantization schemes: which weights get how many bits, and the one function that makes codes and
scales.

Training (straight-through) and both exporters use these codes and scales, so what is trained is
what ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from egemma_core.checks import one_of
from egemma_core.errors import ConfigError
from egemma_quant.feedback import codes_and_scales
from egemma_quant.ggml import GgmlFormat, into_codes
from egemma_quant.grid import BOUNDS, as_scale

ROLES = ("embedding", "attention", "feed_forward", "projection")


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How one matrix is stored: symmetric, without a zero point.

    Its rows are output channels, or tokens of the vocabulary.
    """

    bits: int  # 4: codes in [-8, 7]; 8: codes in [-127, 127]
    # g, weights along the input axis that share a scale; None: the whole row
    group_size: int | None

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (4, 8), hint="The runtimes have kernels for these.")
        if self.group_size is not None and self.group_size % 32:
            raise ConfigError(
                f"group_size={self.group_size} must be a multiple of 32, as the runtimes need."
            )


Format = WeightFormat | GgmlFormat


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One format per role; `projection` is the dense head."""

    name: str
    embedding: Format
    attention: Format
    feed_forward: Format
    projection: Format

    def format_of(self, role: str) -> Format:
        """Return the format of the weights in a role."""
        return getattr(self, one_of("role", role, ROLES))  # type: ignore[no-any-return]


def _uniform(name: str, weight_format: Format) -> Scheme:
    return Scheme(name=name, **dict.fromkeys(ROLES, weight_format))


INT4_BLOCK = WeightFormat(bits=4, group_size=32)
INT8_BLOCK = WeightFormat(bits=8, group_size=32)
INT4_CHANNEL = WeightFormat(bits=4, group_size=None)
INT8_CHANNEL = WeightFormat(bits=8, group_size=None)

INT4 = _uniform("int4", INT4_BLOCK)
INT8 = _uniform("int8", INT8_BLOCK)
INT8_PER_CHANNEL = _uniform("int8-per-channel", INT8_CHANNEL)
MIXED = Scheme(
    name="mixed",
    embedding=INT4_CHANNEL,
    attention=INT8_CHANNEL,
    feed_forward=INT4_CHANNEL,
    projection=INT4_CHANNEL,
)

# Google's published QAT checkpoints. In ggml-org's Q4_0 file the table is Q8_0; it has no dense
# head, which here is rounded as the other products.
Q4_0 = Scheme(
    name="q4_0",
    embedding=GgmlFormat(bits=8),
    attention=GgmlFormat(bits=4),
    feed_forward=GgmlFormat(bits=4),
    projection=GgmlFormat(bits=4),
)
Q8_0 = _uniform("q8_0", GgmlFormat(bits=8))

SCHEMES = {scheme.name: scheme for scheme in (INT4, INT8, INT8_PER_CHANNEL, MIXED, Q4_0, Q8_0)}


def scheme_named(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        ConfigError: there is none; lists them.
    """
    return SCHEMES[one_of("scheme", name, list(SCHEMES))]


# Candidate scales of a 4-bit group, as amax / divisor. 7 never clips; 8 uses the code -8 and clips
# +amax to 7. The smallest squared error wins, so a group is never worse than plain amax / 7.
INT4_DIVISORS = (7.0, 7.25, 7.5, 7.75, 8.0, 8.5)


# Weights that are rounded at once. On a CPU their temporaries then stay in its cache, 25 times as
# fast as 16,384 rows of 768. On another device starting an operation takes long, so more weights go
# together, with temporaries of 64 MiB each. Codes and scales do not depend on it.
PART_WEIGHTS, PART_WEIGHTS_ELSEWHERE = 2**17, 2**24


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix as integers. Codes never travel without their scales."""

    codes: Tensor  # (rows, columns) int8
    # (rows, G) float32, each exactly a bfloat16 number and > 0; of a GgmlFormat a float16 number of
    # any sign
    scales: Tensor
    format: Format

    def dequantize(self) -> Tensor:
        """Return (rows, columns) float32: code times scale.

        The product is exact: 4 or 8 bits times 8 bits fit into 24.
        """
        rows, columns = self.codes.shape
        groups = self.codes.float().view(rows, self.scales.shape[1], -1)  # (rows, G, g)
        return (groups * self.scales.unsqueeze(-1)).view(rows, columns)  # (rows, columns)


@torch.no_grad()
def quantize(weight: Tensor, weight_format: Format, *, moment: Tensor | None = None) -> Quantized:
    """Round a matrix to integers and scales.

    Scales are bfloat16 numbers, because XNNPACK's blockwise 4-bit kernel stores them so; every
    other kernel holds the same values in wider types. Codes are round-half-to-even of weight /
    scale, clipped. A GgmlFormat is rounded as ggml does it.

    Args:
        weight: (rows, columns), any float dtype, finite.
        weight_format: bits and group size; columns must be a multiple of the group size.
        moment: (columns, columns) the mean of x xᵀ over what the matrix will multiply. Codes are
            then those with a small error of the product (`egemma_quant.feedback`); without it,
            those nearest to the weights.

    Returns:
        Codes (rows, columns) int8 and scales (rows, G) float32.

    Raises:
        ConfigError: columns do not divide into groups, a weight is not finite, or a moment has
            another size or is given for a GgmlFormat.
    """
    rows, columns = weight.shape
    size = group_size_of(weight, weight_format)
    if moment is not None:
        if isinstance(weight_format, GgmlFormat):
            raise ConfigError(
                "ggml's grids are for weights that were trained to lie on them.",
                hint="Round those without calibration.",
            )
        require_finite(weight)
        of_moment = codes_and_scales(weight.float().contiguous(), moment, weight_format.bits, size)
        return Quantized(codes=of_moment[0], scales=of_moment[1], format=weight_format)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, columns // size, device=weight.device)
    for part, part_codes, part_scales in _parts(weight, weight_format):
        codes[part].view(-1, size).copy_(part_codes.t())
        scales[part].view(-1).copy_(part_scales)
    return Quantized(codes=codes, scales=scales, format=weight_format)


@torch.no_grad()
def round_(weight: Tensor, weight_format: Format) -> None:
    """Round a matrix in place to `quantize(weight, weight_format).dequantize()`.

    The integers in between are not made.

    Args:
        weight: (rows, columns) float32, contiguous, finite.

    Raises:
        ConfigError: as `quantize`, or another dtype, which could not hold every code times scale.
    """
    if weight.dtype != torch.float32:
        raise ConfigError(
            f"The weights are {weight.dtype}, and only float32 holds every code times scale.",
            hint="Train float32 master weights.",
        )
    size = group_size_of(weight, weight_format)
    for part, codes, scales in _parts(weight, weight_format):
        weight[part].view(-1, size).copy_(codes.mul_(scales).t())


def group_size_of(weight: Tensor, weight_format: Format) -> int:
    """Return how many weights share a scale in a matrix.

    Raises:
        ConfigError: its rows do not divide into such groups.
    """
    columns = weight.shape[1]
    size = weight_format.group_size or columns
    if columns % size:
        raise ConfigError(
            f"{columns} columns do not divide into groups of {size}.",
            hint="Choose a per-channel scheme.",
        )
    return size


def _parts(weight: Tensor, weight_format: Format) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows of the matrix, their codes (g, groups) and scales (groups,), both float32.

    The codes are overwritten by the next part. A group is a column here, so that what it shares is
    one contiguous row: 1.5 times as fast as groups along rows.
    """
    rows, columns = weight.shape
    size = group_size_of(weight, weight_format)
    step = max(
        1, (PART_WEIGHTS if weight.device.type == "cpu" else PART_WEIGHTS_ELSEWHERE) // columns
    )
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        groups = weight[part].float().reshape(-1, size).t().contiguous()  # (g, groups)
        amax = torch.maximum(groups.amax(0), -groups.amin(0))  # (groups,)
        require_finite(amax)
        codes = torch.empty_like(groups)
        if isinstance(weight_format, GgmlFormat):
            scales = into_codes(groups, weight_format.bits, codes)
        else:
            scales = (
                as_scale(amax / 127)
                if weight_format.bits == 8
                else _searched_scales(groups, amax, codes)
            )
            _into_codes(groups, scales, weight_format.bits, codes)
        yield part, codes, scales


def require_finite(weight: Tensor) -> None:
    """Refuse a weight that no code stands for.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise ConfigError("A weight is NaN or infinite; the checkpoint is damaged.")


def _into_codes(groups: Tensor, scales: Tensor, bits: int, codes: Tensor) -> None:
    torch.div(groups, scales, out=codes).round_().clamp_(*BOUNDS[bits])


def _searched_scales(groups: Tensor, amax: Tensor, scratch: Tensor) -> Tensor:
    """Return the 4-bit scale of each group that has the smallest squared error.

    Among equals it is the first of INT4_DIVISORS.
    """
    best_scale = best_error = None
    for divisor in INT4_DIVISORS:
        scale = as_scale(amax / divisor)
        _into_codes(groups, scale, 4, scratch)
        torch.addcmul(groups, scratch, scale, value=-1, out=scratch)  # the product is exact
        error = _sum_(scratch.square_())
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            best_scale = torch.where(error < best_error, scale, best_scale)
            best_error = torch.minimum(error, best_error)
    assert best_scale is not None
    return best_scale


def _sum_(values: Tensor) -> Tensor:
    """Return the sums (n,) of (g, n) values, and overwrite the values.

    They are summed in an order of our own, so that every device and thread count picks the same
    scale.
    """
    count = values.shape[0]
    while count > 1:
        half = count // 2
        values[:half] += values[half : 2 * half]
        if count % 2:
            values[0] += values[count - 1]
        count = half
    return values[0].clone()
