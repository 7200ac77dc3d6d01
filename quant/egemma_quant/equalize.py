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

import torch
from torch import Tensor, nn

from egemma_core.checks import one_of
from egemma_core.nn.encoder import Layer

PLACES = ("attention", "o", "mlp", "down")


def consumers(layer: Layer, place: str) -> list[nn.Linear]:
    """Return the products that read the channels of a place."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "attention": [attention.q_proj, attention.k_proj, attention.v_proj],
        "o": [attention.o_proj],
        "mlp": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }[one_of("place", place, PLACES)]


@torch.no_grad()
def factors(maxima: Tensor, weights: list[Tensor], strength: float) -> Tensor:
    """Return the factor that each channel is to be divided by, around 1.

    Args:
        maxima: (channels,) the largest magnitude of each channel on calibration texts.
        weights: the matrices that read them, (rows, channels).
        strength: 0 leaves activations as they are, 1 makes their maxima equal.

    Returns:
        (channels,) maxima ** strength / largest weights ** (1 - strength), divided by its geometric
        mean. 1 for strength 0.
    """
    if strength == 0:
        return torch.ones_like(maxima)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    least = 1e-5
    logs = strength * maxima.clamp(min=least * float(maxima.max())).log()
    logs -= (1 - strength) * largest.clamp(min=least * float(largest.max())).log()
    return (logs - logs.mean()).exp()


@torch.no_grad()
def equalize_(layer: Layer, place: str, divisors: Tensor) -> None:
    """Divide the channels of a place by factors, in place; the layer computes what it did.

    Args:
        place: one of PLACES.
        divisors: (channels,) above 0. At `o`, of the key/value heads' channels (K * C).
    """
    attention = layer.self_attn
    read = divisors
    if place in ("attention", "mlp"):
        norm = layer.input_layernorm if place == "attention" else layer.pre_feedforward_layernorm
        norm.weight.copy_((1 + norm.weight) / divisors - 1)
    elif place == "o":
        attention.v_proj.weight.div_(divisors.unsqueeze(1))
        read = per_query_head(divisors, layer)
    else:
        layer.mlp.up_proj.weight.div_(divisors.unsqueeze(1))
    for product in consumers(layer, place):
        product.weight.mul_(read)


def per_query_head(of_kv_heads: Tensor, layer: Layer) -> Tensor:
    """Return (H * C,) from (K * C,): every query head reads the values of its key/value head."""
    attention = layer.self_attn
    heads = of_kv_heads.view(attention.kv_heads, 1, attention.channels)
    return heads.expand(-1, attention.heads // attention.kv_heads, -1).reshape(-1)


def per_kv_head(of_query_heads: Tensor, layer: Layer) -> Tensor:
    """Return (K * C,) from (H * C,): the largest among the query heads that share them."""
    attention = layer.self_attn
    return of_query_heads.view(attention.kv_heads, -1, attention.channels).amax(1).reshape(-1)


@torch.no_grad()
def permute_(layer: Layer, order: Tensor) -> None:
    """Put the feed-forward channels into another order; the layer computes what it did."""
    mlp = layer.mlp
    for product in (mlp.gate_proj, mlp.up_proj):
        product.weight.copy_(product.weight[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
