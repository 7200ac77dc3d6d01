"""The one function that rounds weights: against values worked by hand, against torch's own fake
quantization, and its promises.
"""

from __future__ import annotations

import pytest
import torch

from egemma_core.errors import ConfigError
from egemma_quant.ggml import GgmlFormat
from egemma_quant.schemes import (
    INT4_BLOCK,
    INT4_CHANNEL,
    INT4_DIVISORS,
    INT8_BLOCK,
    INT8_CHANNEL,
    MIXED,
    PART_WEIGHTS,
    WeightFormat,
    quantize,
    round_,
)

FORMATS = [INT4_BLOCK, INT4_CHANNEL, INT8_BLOCK, INT8_CHANNEL]


def weights(rows: int = 40, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def test_int8_codes_by_hand() -> None:
    # amax 127/64 -> scale 1/64, a bfloat16 number; -1/128 is half a step and rounds to even, 0;
    # 3/128 is 1.5 steps, to 2.
    row = torch.zeros(1, 32)
    row[0, :5] = torch.tensor([127 / 64, -127 / 64, 1 / 64, -1 / 128, 3 / 128])
    found = quantize(row, INT8_BLOCK)
    assert found.scales.tolist() == [[1 / 64]]
    assert found.codes[0, :5].tolist() == [127, -127, 1, 0, 2]


def test_int4_codes_by_hand() -> None:
    # All of -8 .. 7 times 1/4: the divisor 8 gives scale 1/4 without any error, so it must win.
    row = torch.zeros(1, 32)
    row[0, :16] = torch.arange(-8, 8) / 4
    found = quantize(row, INT4_BLOCK)
    assert found.scales.tolist() == [[0.25]]
    assert found.codes[0, :16].tolist() == list(range(-8, 8))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_codes_equal_torchs_fake_quantization_on_the_same_scales(
    weight_format: WeightFormat,
) -> None:
    weight = weights()
    found = quantize(weight, weight_format)
    size = weight_format.group_size or weight.shape[1]
    lowest, highest = (-8, 7) if weight_format.bits == 4 else (-127, 127)
    scales = found.scales.flatten()
    wanted = torch.fake_quantize_per_channel_affine(
        weight.view(-1, size),
        scales,
        torch.zeros(len(scales), dtype=torch.int32),
        0,
        lowest,
        highest,
    )
    # torch multiplies by 1/scale where we divide; a weight on the edge between two codes may fall
    # the other way.
    differing = (found.dequantize().view(-1, size) != wanted).float().mean()
    assert differing < 0.002


@pytest.mark.parametrize("weight_format", FORMATS)
def test_scales_are_positive_bfloat16_numbers(weight_format: WeightFormat) -> None:
    scales = quantize(weights(), weight_format).scales
    assert scales.dtype == torch.float32
    assert torch.equal(scales, scales.bfloat16().float())
    assert (scales > 0).all()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_dequantizing_rounds_nothing(weight_format: WeightFormat) -> None:
    found = quantize(weights(), weight_format)
    exact = found.codes.double().view(
        40, found.scales.shape[1], -1
    ) * found.scales.double().unsqueeze(-1)
    assert torch.equal(found.dequantize().double(), exact.view(40, 96))


def test_a_searched_int4_scale_is_never_worse_than_the_plain_one() -> None:
    weight = weights(200)
    groups = weight.view(-1, 32)
    plain = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain_error = ((groups / plain).round().clamp(-8, 7) * plain - groups).square().sum(-1)
    error = (quantize(weight, INT4_BLOCK).dequantize() - weight).view(-1, 32).square().sum(-1)
    assert (error <= plain_error + 1e-12).all()
    assert error.sum() < 0.97 * plain_error.sum()


def test_a_row_of_zeros_is_zeros_and_keeps_a_usable_scale() -> None:
    found = quantize(torch.zeros(2, 64), INT4_BLOCK)
    assert not found.codes.any()
    assert torch.equal(found.scales, torch.ones(2, 2))


def test_tiny_and_huge_weights_keep_finite_normal_scales() -> None:
    for size in (1e-37, 1e30):
        found = quantize(torch.full((1, 32), size), INT8_BLOCK)
        assert torch.isfinite(found.scales).all()
        assert (found.scales >= torch.finfo(torch.bfloat16).tiny).all()


def test_rounding_in_parts_changes_nothing() -> None:
    table = torch.randn(PART_WEIGHTS // 32 + 100, 32, generator=torch.Generator().manual_seed(1))
    whole, tail = quantize(table, INT4_BLOCK), quantize(table[5000:], INT4_BLOCK)
    assert torch.equal(whole.codes[5000:], tail.codes)
    assert torch.equal(whole.scales[5000:], tail.scales)


@pytest.mark.parametrize("weight_format", [*FORMATS, GgmlFormat(bits=4), GgmlFormat(bits=8)])
def test_rounding_in_place_gives_the_dequantized_weights(
    weight_format: WeightFormat | GgmlFormat,
) -> None:
    weight = torch.randn(PART_WEIGHTS // 96 + 50, 96, generator=torch.Generator().manual_seed(4))
    wanted = quantize(weight, weight_format).dequantize()
    round_(weight, weight_format)
    assert torch.equal(weight, wanted)
    with pytest.raises(ConfigError, match="float32"):
        round_(weight.bfloat16(), weight_format)


@pytest.mark.parametrize("columns", [96, 35 * 32])
def test_no_divisor_has_a_smaller_error_than_the_chosen_one(columns: int) -> None:
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(5))
    for weight_format in (INT4_BLOCK, INT4_CHANNEL):
        groups = weight.double().view(-1, weight_format.group_size or columns)
        error = (
            (quantize(weight, weight_format).dequantize().double().view_as(groups) - groups)
            .square()
            .sum(-1)
        )
        for divisor in INT4_DIVISORS:
            scale = (groups.float().abs().amax(-1, keepdim=True) / divisor).bfloat16().double()
            other = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
            # float32 sums tell errors closer than that not apart
            assert (error <= other * (1 + 1e-5)).all(), divisor


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        quantize(torch.ones(2, 40), INT4_BLOCK)
    with pytest.raises(ConfigError, match="NaN"):
        quantize(torch.full((2, 32), float("nan")), INT4_BLOCK)
    with pytest.raises(ConfigError, match=r"bits=5 must be one of \[4, 8\]"):
        WeightFormat(bits=5, group_size=32)
    with pytest.raises(ConfigError, match="multiple of 32"):
        WeightFormat(bits=4, group_size=20)


def test_the_mixed_scheme_is_the_reports() -> None:
    # arXiv:2509.20354 section 2.3: int4 per channel for embedding, feed-forward and projection,
    # int8 for attention.
    assert [
        MIXED.format_of(role).bits
        for role in ("embedding", "feed_forward", "projection", "attention")
    ] == [4, 4, 4, 8]
    assert all(
        MIXED.format_of(role).group_size is None
        for role in ("embedding", "feed_forward", "projection", "attention")
    )
    with pytest.raises(ConfigError, match="role='norm'"):
        MIXED.format_of("norm")
