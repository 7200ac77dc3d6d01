"""Which parameters of the encoder are rounded, and by which part of a scheme."""

from __future__ import annotations

from egemma_core.nn.encoder import Encoder
from egemma_quant.schemes import Quantized, Scheme, quantize


def role_of(name: str) -> str | None:
    """Return the role of a parameter of `Encoder`; None for norms, which stay float32."""
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
    """Return codes and scales of every parameter that has a role, by its name in the state dict."""
    return {
        name: quantize(weight, scheme.format_of(role))
        for name, weight in encoder.named_parameters()
        if (role := role_of(name)) is not None
    }
