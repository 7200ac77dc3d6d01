"""Which layer lost what: the rounded model beside the float model, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from egemma_core.nn.encoder import Encoder
from egemma_quant.schemes import Quantized


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """One layer of the rounded model."""

    layer: str  # "embedding", "layer 0" .. or "dense head"
    weight_error: float  # |rounded - float| / |float| over the layer's rounded weights
    # mean cosine of its output rows to those of the float model, on one golden text
    hidden_cosine: float


@torch.no_grad()
def outputs_by_layer(encoder: Encoder, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """(T, D) output of each layer and (1, dim) of the head, for one text."""
    outputs: dict[str, Tensor] = {}
    hooks = [encoder.embed_tokens.register_forward_hook(_keep(outputs, "embedding"))]
    hooks += [
        layer.register_forward_hook(_keep(outputs, f"layer {number}"))
        for number, layer in enumerate(encoder.layers)
    ]
    try:
        tensor = torch.tensor([ids])
        outputs["dense head"] = encoder(tensor, torch.ones_like(tensor))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@torch.no_grad()
def round_in_place(encoder: Encoder, quantized: dict[str, Quantized]) -> dict[str, float]:
    """Put the rounded weights into the encoder; the relative error by layer.

    A copy of 308M weights would cost 1.2 GB.
    """
    squares: dict[str, list[float]] = {}
    for name, weight in encoder.named_parameters():
        if name not in quantized:
            continue
        rounded = quantized[name].dequantize()
        lost, whole = squares.setdefault(_layer_of(name), [0.0, 0.0])
        difference = float(torch.linalg.vector_norm(rounded - weight)) ** 2
        squares[_layer_of(name)] = [
            lost + difference,
            whole + float(torch.linalg.vector_norm(weight)) ** 2,
        ]
        weight.copy_(rounded)
    return {layer: (lost / whole) ** 0.5 for layer, (lost, whole) in squares.items()}


def compare_layers(
    before: dict[str, Tensor], after: dict[str, Tensor], weight_errors: dict[str, float]
) -> list[LayerLoss]:
    return [
        LayerLoss(
            layer=layer,
            weight_error=weight_errors.get(layer, 0.0),
            hidden_cosine=float(
                torch.cosine_similarity(before[layer], after[layer], dim=-1).mean()
            ),
        )
        for layer in (
            "embedding",
            *(name for name in before if name.startswith("layer ")),
            "dense head",
        )
    ]


def _layer_of(name: str) -> str:
    if name.startswith("layers."):
        return f"layer {name.split('.')[1]}"
    return "dense head" if name.startswith("dense.") else "embedding"


# torch hooks have no public type
def _keep(outputs: dict[str, Tensor], layer: str):  # type: ignore[no-untyped-def]
    def hook(_module: object, _inputs: object, output: Tensor) -> None:
        outputs[layer] = output[0].clone()

    return hook
