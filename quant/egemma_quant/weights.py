"""Which parameters of the encoder are quantized, and an encoder whose weights are on the grid."""

from __future__ import annotations

import copy

import torch

from egemma_core.nn.encoder import Encoder
from egemma_quant.schemes import Quantized, Scheme, quantize


def role_of(name: str) -> str | None:
    """The role of a parameter of `Encoder` in a scheme, or None for norms, which stay float32."""
    if name == "embed_tokens.weight":
        return "embedding"
    if ".self_attn." in name and name.endswith("_proj.weight"):
        return "attention"
    if ".mlp." in name:
        return "feed_forward"
    if name.startswith("dense."):
        return "projection"
    return None


def quantize_encoder(encoder: Encoder, scheme: Scheme) -> dict[str, Quantized]:
    """Codes and scales of every quantized parameter, by its name in the state dict."""
    return {
        name: quantize(weight, scheme.format_of(role))
        for name, weight in encoder.named_parameters()
        if (role := role_of(name)) is not None
    }


def with_weights(encoder: Encoder, quantized: dict[str, Quantized]) -> Encoder:
    """A float32 copy of the encoder that computes with the dequantized weights: the fake-quantized
    reference.
    """
    reference = copy.deepcopy(encoder).float()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in quantized:
                weight.copy_(quantized[name].dequantize())
    return reference
