"""Equalising changes nothing in float arithmetic, and helps 8-bit activations where one channel
dominates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ConfigError
from egemma_core.nn.encoder import Encoder, Layer
from egemma_quant.equalize import (
    PLACES,
    channel_maxima,
    consumers,
    equalize_encoder,
    equalize_layer,
    factors,
    permute_feed_forward,
)
from egemma_quant.qat import rounded_activations

CONFIG = EncoderConfig(
    vocab_size=200,
    width=64,
    ffn_width=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,  # two query heads share the values of one
    head_dim=32,
    query_scale=32**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=48,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 128), (128, 64)),
    dims=(64, 32),
)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    made = Encoder(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return made


def texts(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7:] = False
    return ids, mask


def with_one_large_channel(encoder: Encoder) -> Encoder:
    """Return a copy in which one channel of every place is 60 times as large as it was.

    It is what real models have: channels of `down` beside which all others are small.
    """
    made = copy.deepcopy(encoder)
    for layer in made.layers:
        layer.mlp.up_proj.weight[5] *= 60
        layer.mlp.down_proj.weight[:, 5] /= 20
        layer.self_attn.v_proj.weight[3] *= 60
        layer.self_attn.o_proj.weight[:, 3] /= 20
        layer.input_layernorm.weight[7] = 60
        layer.pre_feedforward_layernorm.weight[7] = 60
        for place in ("attention", "mlp"):
            for product in consumers(layer, place):
                product.weight[:, 7] /= 20
    return made


@pytest.mark.parametrize("place", PLACES)
def test_a_place_equalised_by_any_factors_computes_the_same(encoder: Encoder, place: str) -> None:
    before = encoder(*texts())
    for layer in encoder.layers:
        count = consumers(layer, place)[0].in_features
        if place == "o":  # factors of the values' channels, not of the query heads'
            count = layer.self_attn.v_proj.out_features
        divisors = torch.rand(count, generator=torch.Generator().manual_seed(3)) * 4 + 0.1
        weights = [product.weight.clone() for product in consumers(layer, place)]
        equalize_layer(layer, place, divisors)
        assert not torch.equal(weights[0], consumers(layer, place)[0].weight)
    assert (encoder(*texts()) - before).abs().max() <= 1e-6


def test_an_equalised_encoder_computes_the_same(encoder: Encoder) -> None:
    outlying = with_one_large_channel(encoder)
    found = equalize_encoder(outlying, channel_maxima(outlying, [texts()]), 0.75)
    assert (found(*texts(1)) - outlying(*texts(1))).abs().max() <= 1e-6


def test_the_encoder_itself_is_left_alone(encoder: Encoder) -> None:
    before = {name: weight.clone() for name, weight in encoder.named_parameters()}
    equalize_encoder(encoder, channel_maxima(encoder, [texts()]), 0.75)
    for name, weight in encoder.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_equalising_helps_where_one_channel_dominates(encoder: Encoder) -> None:
    def distance(some: Encoder) -> float:
        exact = some(*texts(1))
        with rounded_activations(some):
            return float((1 - (some(*texts(1)) * exact).sum(-1)).mean())

    outlying = with_one_large_channel(encoder)
    found = equalize_encoder(outlying, channel_maxima(outlying, [texts()]), 0.75)
    assert distance(outlying) > 5 * distance(encoder)  # it is an outlier indeed
    assert distance(found) < 0.3 * distance(outlying)


def test_factors_by_hand() -> None:
    # Maxima 16 and 1, largest weights 1 and 4; sqrt(16/1) = 4, sqrt(1/4) = 1/2, of geometric mean
    # sqrt(2).
    weights = [torch.tensor([[0.5, -4.0], [1.0, 2.0]])]
    found = factors(torch.tensor([16.0, 1.0]), weights, 0.5)
    assert torch.allclose(found, torch.tensor([4.0, 0.5]) / 2**0.5)


def test_maxima_leave_padding_out_and_see_what_products_read(encoder: Encoder) -> None:
    ids, mask = texts()
    short = ids[:1, :7]
    alone = channel_maxima(encoder, [(short, torch.ones_like(short, dtype=torch.bool))])
    padded = channel_maxima(encoder, [(ids[:1], mask[:1])])
    with reading(encoder.layers[1], "down") as seen:
        encoder(short, torch.ones_like(short))
    assert torch.equal(alone[1]["down"], seen[0].abs().amax((0, 1)))
    for layer in range(2):
        for place in PLACES:
            assert torch.allclose(alone[layer][place], padded[layer][place], atol=1e-5)


@contextmanager
def reading(layer: Layer, place: str) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = consumers(layer, place)[0].register_forward_pre_hook(hook)
    yield seen
    handle.remove()


def test_permuted_feed_forward_channels_compute_the_same(encoder: Encoder) -> None:
    before = encoder(*texts())
    for layer in encoder.layers:
        permute_feed_forward(layer, torch.randperm(96))
    assert (encoder(*texts()) - before).abs().max() <= 1e-6


def test_an_unknown_place_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="place"):
        equalize_layer(encoder.layers[0], "table", torch.ones(64))
