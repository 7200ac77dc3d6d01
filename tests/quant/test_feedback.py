"""Codes by calibration: by hand, less error of the product, and values that survive another
rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from egemma_core.errors import ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_quant.calibrate import flow_of, moments, round_calibrated
from egemma_quant.feedback import codes_and_scales, searched_scales
from egemma_quant.qat import rounded_weights
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import (
    INT4,
    INT4_BLOCK,
    INT4_CHANNEL,
    INT8_BLOCK,
    INT8_CHANNEL,
    MIXED,
    Q4_0,
    Scheme,
    WeightFormat,
    quantize,
)
from tests.quant.test_equalize import CONFIG

FORMATS = [INT4_BLOCK, INT4_CHANNEL, INT8_BLOCK, INT8_CHANNEL]


def weights(rows: int = 40, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def inputs(columns: int = 96) -> Tensor:
    """Return 500 inputs of channels that move together, some of them large."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(500, 24, generator=generator) @ torch.randn(
        24, columns, generator=generator
    )
    sizes = torch.randn(columns, generator=generator).exp()
    return (mixed + torch.randn(500, columns, generator=generator)) * sizes


def moment_of(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def lost(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (other - weight).t()).square().sum() / (x @ weight.t()).square().sum())


def test_errors_are_handed_on_by_hand() -> None:
    # Two columns that always carry the same input, and 30 that carry none. The scale is 1 (an 8-bit
    # group whose largest weight is 127, behind an unused column). 0.3 becomes 0 and its 0.3 go to
    # the other column: 0.3 + 0.3 = 0.6 becomes 1, and the product is 1 where 0.6 is right. Nearest
    # codes would be 0 and 0, and the product 0.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([0.3, 0.3, 127.0])
    moment = torch.zeros(32, 32)
    moment[:2, :2] = 1
    assert quantize(weight, INT8_BLOCK).codes[0, :3].tolist() == [0, 0, 127]
    assert quantize(weight, INT8_BLOCK, moment=moment).codes[0, :3].tolist() == [0, 1, 127]


def test_important_columns_decide_the_scale() -> None:
    # One weight of 8 that reads nothing, and 31 of 0.4 that read all. Scales of 8 / 7 and 1 leave
    # nothing of them; the smallest candidate, 8 / 16 = 0.5, makes them 0.5.
    groups = torch.full((1, 1, 32), 0.4)
    groups[0, 0, 0] = 8.0
    importance = torch.ones(1, 32)
    importance[0, 0] = 1e-6
    assert searched_scales(groups, importance, 4).tolist() == [[0.5]]
    assert searched_scales(groups, torch.ones(1, 32), 4).tolist() != [[0.5]]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_product_loses_less(weight_format: WeightFormat) -> None:
    weight, x = weights(), inputs()
    plain = quantize(weight, weight_format).dequantize()
    found = quantize(weight, weight_format, moment=moment_of(x)).dequantize()
    assert lost(weight, found, x) < 0.6 * lost(weight, plain, x)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_rounding_again_without_calibration_changes_nothing(
    weight_format: WeightFormat, feedback: bool
) -> None:
    weight, moment = weights(400), moment_of(inputs())
    size = weight_format.group_size or 96
    codes, scales = codes_and_scales(weight, moment, weight_format.bits, size, feedback=feedback)
    groups = codes.float().view(400, -1, size) * scales.unsqueeze(-1)
    found = groups.view_as(weight)
    assert torch.equal(quantize(found, weight_format).dequantize(), found)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_scales_are_positive_bfloat16_numbers_and_codes_in_bounds(
    weight_format: WeightFormat,
) -> None:
    found = quantize(weights(), weight_format, moment=moment_of(inputs()))
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert (found.scales > 0).all()
    lowest = -8 if weight_format.bits == 4 else -127
    assert found.codes.min() >= lowest
    assert found.codes.max() == -lowest - (weight_format.bits == 4)


def test_channels_without_input_are_rounded_too() -> None:
    moment = torch.zeros(96, 96)
    found = quantize(weights(), INT4_BLOCK, moment=moment).dequantize()
    assert (found - weights()).abs().max() < 0.05


def test_a_moment_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(96, 96\)"):
        quantize(weights(), INT4_BLOCK, moment=torch.eye(95))


def test_damaged_weights_and_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="finite"):
        quantize(weights(), INT4_BLOCK, moment=torch.full((96, 96), float("nan")))
    with pytest.raises(ConfigError, match="NaN"):
        quantize(weights() / 0, INT4_BLOCK, moment=torch.eye(96))


def test_ggmls_grids_are_left_alone() -> None:
    with pytest.raises(ConfigError, match="trained to lie on them"):
        quantize(weights(), Q4_0.attention, moment=torch.eye(96))


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    made = Encoder(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return made


def texts(seed: int, count: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 200, (count, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7:] = False
    return ids, mask


def with_large_channels(encoder: Encoder) -> Encoder:
    """Return the encoder with channels of all sizes, as real ones have them, read by small weights.

    With channels that are all alike and move apart, as random weights make them, there is nothing
    to know.
    """
    sizes = torch.randn(64, generator=torch.Generator().manual_seed(5)).mul(1.5).exp()
    for layer in encoder.layers:
        for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
            norm.weight.copy_((1 + norm.weight) * sizes - 1)
    encoder.norm.weight.copy_((1 + encoder.norm.weight) * sizes - 1)
    return encoder


@pytest.mark.parametrize("scheme", [INT4, MIXED])
def test_an_encoder_rounded_on_texts_stays_closer_on_others(
    encoder: Encoder, scheme: Scheme
) -> None:
    encoder = with_large_channels(encoder)
    exact = encoder(*texts(1, 30))
    with rounded_weights(encoder, scheme):
        plain = encoder(*texts(1, 30))
    round_calibrated(encoder, scheme, [texts(2, 100), texts(3, 100)])
    found = encoder(*texts(1, 30))
    assert (1 - (found * exact).sum(-1)).mean() < 0.8 * (1 - (plain * exact).sum(-1)).mean()


@pytest.mark.parametrize("scheme", [INT4, MIXED])
def test_a_rounded_encoder_holds_the_codes_that_were_returned(
    encoder: Encoder, scheme: Scheme
) -> None:
    codes = round_calibrated(encoder, scheme, [texts(2, 20)])
    again = quantize_encoder(encoder, scheme)
    assert codes.keys() == again.keys()
    for name, quantized in codes.items():
        assert torch.equal(encoder.get_parameter(name), quantized.dequantize()), name
        assert torch.equal(again[name].dequantize(), quantized.dequantize()), name


def test_moments_by_hand(encoder: Encoder) -> None:
    layer, kind = encoder.layers[0], CONFIG.layer_types[0]
    ids, mask = texts(4, 2)  # texts of 7 and of 12 tokens
    flow = flow_of(encoder, ids, mask)
    x = layer.input_layernorm(flow.x)
    short, long = x[0, :7], x[1]
    found = moments(layer, [flow], kind, relative=False)["attention"]
    wanted = (moment_of(short) + moment_of(long)) / 2
    assert torch.allclose(found, wanted, atol=1e-5)
    alike = moments(layer, [flow], kind, by_text=False)["attention"]
    assert torch.allclose(alike, moment_of(torch.cat((short, long))), atol=1e-5)


def test_behind_a_norm_tokens_count_by_how_small_their_product_is(encoder: Encoder) -> None:
    layer, kind = copy.deepcopy(encoder.layers[0]), CONFIG.layer_types[0]
    flow = flow_of(encoder, *texts(4, 2))
    before = moments(layer, [flow], kind)["down"]
    layer.mlp.down_proj.weight.mul_(2)  # every product is twice as large
    assert torch.allclose(moments(layer, [flow], kind)["down"], before / 4, rtol=1e-4)
    relative = moments(layer, [flow], kind, relative=False)
    layer.mlp.down_proj.weight.mul_(2)
    assert torch.equal(moments(layer, [flow], kind, relative=False)["down"], relative["down"])
