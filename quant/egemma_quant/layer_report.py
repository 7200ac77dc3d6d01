"""Which layer lost what to rounding: a model's outputs and weights, layer by layer, beside those of
the same model in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from egemma_core.nn.encoder import Encoder

EMBEDDING, HEAD = "embedding", "dense head"
ROWS_AT_ONCE = 2**14  # of a matrix: a copy of the whole embedding table would cost 0.8 GB


def layers_of(encoder: Encoder) -> list[tuple[str, nn.Module]]:
    """Return the table and the layers, with their names in a report."""
    layers = [(f"layer {number}", layer) for number, layer in enumerate(encoder.layers)]
    return [(EMBEDDING, encoder.embed_tokens), *layers]


def layer_of(parameter: str) -> str:
    """Return the name in a report of what a parameter belongs to."""
    if parameter.startswith("layers."):
        return f"layer {parameter.split('.')[1]}"
    return HEAD if parameter.startswith("dense.") else EMBEDDING


@contextmanager
def kept_outputs(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Keep what each named module gives inside the block, of the first text of the last batch."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = output[0].clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def layer_cosines(
    before: Iterable[Mapping[str, Tensor]], after: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the cosine of each token of each text, by layer.

    Args:
        before, after: outputs by layer of the float and of the rounded model, text by text.
    """
    found: dict[str, list[Tensor]] = {}
    for exact, other in zip(before, after, strict=True):
        for layer in exact:
            cosines = torch.cosine_similarity(exact[layer], other[layer], dim=-1)
            found.setdefault(layer, []).append(cosines.reshape(-1))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@torch.no_grad()
def weight_errors(encoder: Encoder, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return |rounded - float| / |float| over the rounded weights of each layer.

    Args:
        encoder: rounded.
        exact: its float weights, by their names in the state dict.
    """
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, weight in exact.items():
        layer = layer_of(name)
        rounded = encoder.get_parameter(name)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            difference = torch.linalg.vector_norm(rounded[rows] - weight[rows])
            lost[layer] = lost.get(layer, 0.0) + float(difference) ** 2
            length = torch.linalg.vector_norm(weight[rows])
            whole[layer] = whole.get(layer, 0.0) + float(length) ** 2
    return {layer: (lost[layer] / whole[layer]) ** 0.5 for layer in lost}
