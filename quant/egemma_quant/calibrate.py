"""Rounding that looks at data: layer after layer, each on what it will read from those before.

A matrix is rounded by the moment of its inputs (`egemma_quant.feedback`). Two things decide what an
input counts. A text's vector is the mean over its tokens, so a token counts by 1 / T, and every
text alike. Behind `o` and `down` stands a norm, so there a token counts by how small the product is
that the norm will make large again: without it, the few tokens with outliers of a thousand would
decide alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from egemma_core.checkpoint.config import FULL, SLIDING
from egemma_core.nn.encode import Chunk, Ids, by_length, pad
from egemma_core.nn.encoder import Encoder, Layer, rotary_tables
from egemma_quant.equalize import PLACES, consumers, layers_of
from egemma_quant.roles import role_of
from egemma_quant.schemes import Quantized, Scheme, quantize

NORMED = ("o", "down")  # places behind whose product stands a norm


def chunks(rows: Sequence[Ids], pad_id: int, chunk_tokens: int = 1536) -> list[Chunk]:
    """Return token rows as padded ids and masks, texts of like length together."""
    return [
        pad([rows[index] for index in chunk], pad_id) for chunk in by_length(rows, chunk_tokens)
    ]


@dataclass
class Flow:
    """A batch of texts on its way through the layers."""

    mask: Tensor  # (B, T) bool
    rotary: dict[str, tuple[Tensor, Tensor]]  # by kind of layer
    bias: dict[str, Tensor]
    x: Tensor  # (B, T, D) what the next layer reads

    def through(self, layer: Layer, kind: str) -> Tensor:
        """Return (B, T, D) what the layer gives."""
        out: Tensor = layer(self.x, self.rotary[kind], self.bias[kind])
        return out


def flow_of(encoder: Encoder, ids: Tensor, mask: Tensor) -> Flow:
    """Return texts as they enter the first layer.

    Args:
        ids, mask: (B, T), as the encoder reads them.
    """
    config, real = encoder.config, mask.bool()
    x = encoder.embed_tokens(ids)
    x = x * torch.tensor(config.width**0.5, dtype=x.dtype)
    full, sliding = encoder.biases(real, x.dtype)
    bases = {FULL: config.rope_theta_full, SLIDING: config.rope_theta_sliding}
    tables = {
        kind: rotary_tables(ids.shape[1], config.head_dim, base, x) for kind, base in bases.items()
    }
    return Flow(mask=real, rotary=tables, bias={FULL: full, SLIDING: sliding}, x=x)


def what_products_read(layer: Layer, flow: Flow, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the first product of each place reads and gives, (real tokens, channels) each."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(place: str) -> object:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[place] = (inputs[0][flow.mask], output[flow.mask])

        return hook

    handles = [
        consumers(layer, place)[0].register_forward_hook(keep(place))  # type: ignore[arg-type]
        for place in PLACES
    ]
    try:
        flow.through(layer, kind)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def moments(
    layer: Layer, flows: Iterable[Flow], kind: str, *, relative: bool = True, by_text: bool = True
) -> dict[str, Tensor]:
    """Return the mean of x xᵀ over what the products of each place read, (channels, channels).

    Args:
        relative: where a norm follows, a token counts by the size of the product ** -2.
        by_text: a token counts by 1 / T; otherwise all tokens alike.
    """
    found: dict[str, Tensor] = {}
    total = 0.0
    for flow in flows:
        lengths = flow.mask.sum(1, keepdim=True).expand_as(flow.mask)[flow.mask]  # (tokens,)
        share = 1 / lengths if by_text else torch.ones_like(lengths, dtype=torch.float32)
        total += float(share.sum())
        for place, (x, product) in what_products_read(layer, flow, kind).items():
            weight = share
            if relative and place in NORMED:
                weight = share / product.square().mean(-1).clamp(min=1e-30)
            weighted = x * weight.sqrt().unsqueeze(-1)
            moment = weighted.t() @ weighted
            found[place] = found[place] + moment if place in found else moment
    return {place: moment / total for place, moment in found.items()}


@torch.no_grad()
def round_calibrated(
    encoder: Encoder, scheme: Scheme, batches: Iterable[Chunk]
) -> dict[str, Quantized]:
    """Round every parameter that has a role, in place, and return its codes by name.

    Products are rounded on calibration texts, the table to the nearest codes. `quantize` rounds the
    weights that are left in the encoder to the same values.

    Args:
        encoder: float32.
        batches: ids (B, T) and masks (B, T) of calibration texts, with their prompts: some hundred,
            short ones among them.

    Raises:
        ConfigError: a weight is not finite, its rows do not divide into groups, or the scheme has
            one of ggml's grids, which are for weights trained to lie on them.
    """
    codes: dict[str, Quantized] = {}

    def round_parameter(name: str, moment: Tensor | None) -> None:
        weight, role = encoder.get_parameter(name), role_of(name)
        assert role is not None
        codes[name] = quantize(weight, scheme.format_of(role), moment=moment)
        weight.copy_(codes[name].dequantize())

    round_parameter("embed_tokens.weight", None)
    flows = [flow_of(encoder, ids, mask) for ids, mask in batches]
    names = {id(weight): name for name, weight in encoder.named_parameters()}
    for layer, kind in zip(layers_of(encoder), encoder.config.layer_types, strict=True):
        by_place = moments(layer, flows, kind)
        for place in PLACES:
            for product in consumers(layer, place):
                round_parameter(names[id(product.weight)], by_place[place])
        for flow in flows:
            flow.x = flow.through(layer, kind)
    pooled = torch.cat([encoder.pooler(encoder.norm(flow.x), flow.mask) for flow in flows])
    for position, dense in enumerate(encoder.dense):
        # the length of a text's vector is lost in the end
        unit = torch.nn.functional.normalize(pooled, dim=-1)  # (texts, width)
        round_parameter(f"dense.{position}.weight", unit.t() @ unit / len(unit))
        pooled = dense(pooled)
    return codes
