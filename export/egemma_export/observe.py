"""What the float model and the rounded model give for the golden texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from egemma_core.nn.encoder import Encoder
from egemma_export.golden import GoldenText, reference_vectors
from egemma_export.mistakes import mistaken_vectors
from egemma_export.report import LayerLoss
from egemma_quant.layer_report import HEAD, kept_outputs, layer_cosines, layers_of, weight_errors
from egemma_quant.qat import rounded_weights
from egemma_quant.schemes import Scheme

PROBE = "titled document"  # the text of which the outputs of every layer are compared

Vectors = dict[str, NDArray[np.float32]]  # (dim,) float32 by golden text


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a model gives for the golden texts."""

    vectors: Vectors
    outputs: dict[str, Tensor]  # by layer, (T, D) of the text PROBE; of the head (dim,)


@dataclass(frozen=True, kw_only=True)
class ObservedRounded:
    """What the rounded model gives, and what rounding cost."""

    vectors: Vectors
    mistaken: dict[str, Vectors]  # by mistake
    layers: list[LayerLoss]  # none for a float32 target


def observe(encoder: Encoder, texts: list[GoldenText]) -> Observed:
    """Run each golden text once."""
    probe = [text for text in texts if text.name == PROBE]
    others = [text for text in texts if text.name != PROBE]
    with kept_outputs([*layers_of(encoder), (HEAD, encoder)]) as outputs:
        vectors = reference_vectors(encoder, probe)
    return Observed(vectors=vectors | reference_vectors(encoder, others), outputs=outputs)


def observe_rounded(
    encoder: Encoder, scheme: Scheme | None, texts: list[GoldenText], exact: Observed
) -> ObservedRounded:
    """Run each golden text with rounded weights, right and under each known mistake.

    Args:
        exact: what the float model gives.
    """
    if scheme is None:
        mistaken = mistaken_vectors(encoder, texts, exact.vectors)
        return ObservedRounded(vectors=exact.vectors, mistaken=mistaken, layers=[])
    with rounded_weights(encoder, scheme) as float_weights:
        errors = weight_errors(encoder, float_weights)
        found = observe(encoder, texts)
        mistaken = mistaken_vectors(encoder, texts, found.vectors)
    cosines = layer_cosines([exact.outputs], [found.outputs])
    layers = [
        LayerLoss(
            layer=layer,
            weight_error=errors.get(layer, 0.0),
            hidden_cosine=float(of_tokens.mean()),
        )
        for layer, of_tokens in cosines.items()
    ]
    return ObservedRounded(vectors=found.vectors, mistaken=mistaken, layers=layers)
