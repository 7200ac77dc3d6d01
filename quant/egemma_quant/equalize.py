"""Channels made alike in size, by factors that cancel: exact in float, free at run time.

8-bit activations share a scale per token or block, so one large channel takes the steps from all
others. A channel's factor moves into the weights on both sides of it. In this encoder four places
allow that:

    attention   input_layernorm            -> columns of q, k, v
    o           rows of v                  -> columns of o, of every query head that shares them
    mlp         pre_feedforward_layernorm  -> columns of gate and up
    down        rows of up                 -> columns of down (gelu(gate) * up is linear in up)

Behind `o` and `down` stands a norm with weights per channel, and no place of these reaches the
residual stream: it cannot be equalised, nor turned.

Source: Xiao et al. 2022, arXiv:2211.10438 (SmoothQuant); Nagel et al. 2019, arXiv:1906.04721.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from egemma_core.checks import one_of
from egemma_core.nn.encoder import Encoder, Layer

PLACES = ("attention", "o", "mlp", "down")
# Channels smaller than this share of the largest are taken to be that large: their factors would
# only blow up noise.
LEAST = 1e-5

Maxima = Sequence[Mapping[str, Tensor]]  # by layer and place, (channels,)


def layers_of(encoder: Encoder) -> list[Layer]:
    """Return the layers in order, as what they are."""
    return [layer for layer in encoder.layers if isinstance(layer, Layer)]


def consumers(layer: Layer, place: str) -> list[nn.Linear]:
    """Return the products that read the channels of a place.

    Raises:
        ConfigError: there is no such place.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "attention": [attention.q_proj, attention.k_proj, attention.v_proj],
        "o": [attention.o_proj],
        "mlp": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }[one_of("place", place, PLACES)]


@torch.no_grad()
def channel_maxima(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]]) -> Maxima:
    """Return the largest magnitude of each channel that a product reads, by layer and place.

    Args:
        batches: ids (B, T) and masks (B, T) of calibration texts; padding is left out.
    """
    found: list[dict[str, Tensor]] = [{} for _ in encoder.layers]
    real = torch.ones(0, dtype=torch.bool)

    def watcher(of_layer: dict[str, Tensor], place: str) -> Callable[..., None]:
        def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0][real].abs().amax(0)
            of_layer[place] = torch.maximum(of_layer.get(place, largest), largest)

        return watch

    handles = [
        consumers(layer, place)[0].register_forward_pre_hook(watcher(of_layer, place))
        for layer, of_layer in zip(layers_of(encoder), found, strict=True)
        for place in PLACES
    ]
    try:
        for ids, mask in batches:
            real = mask.bool()
            encoder.hidden_states(ids, real)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def factors(maxima: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """Return what each channel is to be divided by, with a geometric mean of 1.

    Args:
        maxima: (channels,) the largest magnitude of each channel on calibration texts.
        weights: the matrices that read them, (rows, channels).
        strength: 0 to 1; 0 makes the largest weights of all columns equal, 1 all maxima.

    Returns:
        (channels,) in proportion to maxima ** strength / largest weight ** (1 - strength).
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    logs = strength * _logs(maxima) - (1 - strength) * _logs(largest)
    return (logs - logs.mean()).exp()


def _logs(sizes: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    return sizes.clamp(min=max(tiny, LEAST * float(sizes.max()))).log()


@torch.no_grad()
def equalize_layer(layer: Layer, place: str, divisors: Tensor) -> None:
    """Divide the channels of a place by factors, in place; the layer computes what it did.

    Args:
        place: one of PLACES.
        divisors: (channels,) above 0. At "o" those of the key/value heads, (K * C,).

    Raises:
        ConfigError: there is no such place.
    """
    products = consumers(layer, place)
    read = divisors
    if place in ("attention", "mlp"):
        norm = layer.input_layernorm if place == "attention" else layer.pre_feedforward_layernorm
        norm.weight.copy_((1 + norm.weight) / divisors - 1)
    elif place == "o":
        layer.self_attn.v_proj.weight.div_(divisors.unsqueeze(1))
        read = _of_query_heads(divisors, layer)
    else:
        layer.mlp.up_proj.weight.div_(divisors.unsqueeze(1))
    for product in products:
        product.weight.mul_(read)


def equalize_encoder(
    encoder: Encoder, maxima: Maxima, strength: float | Sequence[Mapping[str, float]]
) -> Encoder:
    """Return a copy that computes the same, with the channels of every place made alike in size.

    Args:
        maxima: what `channel_maxima` found on calibration texts.
        strength: of `factors`; one for all, or by layer and place, where a place that is not named
            is left alone.
    """
    made = copy.deepcopy(encoder)
    for number, (layer, of_layer) in enumerate(zip(layers_of(made), maxima, strict=True)):
        for place in PLACES:
            of_place = strength if isinstance(strength, float) else strength[number].get(place)
            if of_place is not None:
                divide(layer, place, of_layer[place], of_place)
    return made


def divide(layer: Layer, place: str, maxima: Tensor, strength: float) -> None:
    """Equalise one place of one layer, in place, with the strength of `factors`."""
    weights = [product.weight for product in consumers(layer, place)]
    if place == "o":  # a channel of the values is read once by each query head that shares it
        maxima = _of_kv_heads(maxima, layer)
        weights = [_of_kv_heads(weight.abs().amax(0), layer).unsqueeze(0) for weight in weights]
    equalize_layer(layer, place, factors(maxima, weights, strength))


@torch.no_grad()
def permute_feed_forward(layer: Layer, order: Tensor) -> None:
    """Put the feed-forward channels into another order; the layer computes what it did."""
    mlp = layer.mlp
    for product in (mlp.gate_proj, mlp.up_proj):
        product.weight.copy_(product.weight[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


def _of_query_heads(of_kv_heads: Tensor, layer: Layer) -> Tensor:
    """Return (H * C,) from (K * C,): every query head reads the values of its key/value head."""
    attention = layer.self_attn
    heads = of_kv_heads.view(attention.kv_heads, 1, attention.channels)
    return heads.expand(-1, attention.heads // attention.kv_heads, -1).reshape(-1)


def _of_kv_heads(of_query_heads: Tensor, layer: Layer) -> Tensor:
    """Return (K * C,) from (H * C,): the largest among the query heads that share them."""
    attention = layer.self_attn
    return of_query_heads.view(attention.kv_heads, -1, attention.channels).amax(1).reshape(-1)
