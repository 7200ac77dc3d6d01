"""The model as other ports got it wrong, so that a finished file can be told from each of them.

Rounded activations move a vector by as much as a doubled window does (cosine 0.9999 and 0.9993 in
the built-in model), so a bound on the cosine alone lets such a file pass. But rounding moves it in
no particular direction, and a mistake moves it exactly towards the mistaken vector. How far the
file went on the way from the right vector to the mistaken one tells them apart:

    share = <file - right, mistaken - right> / |mistaken - right|^2

0 is not at all, 1 is the mistake itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.nn.encoder import MASKED, Encoder, attention_biases
from egemma_export.golden import GoldenText, reference_vectors

# One text within any window and one beyond it; cutting or padding has checks of its own.
CASES = ("titled document", "past the window")
# A mistake that moves these texts by less cannot be told from rounded activations.
SMALLEST_DIFFERENCE = 0.01


class CausalEncoder(Encoder):
    """An encoder in which each token sees itself and what is before it.

    transformers before 4.57 computed this, without a warning.
    """

    def biases(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        future = torch.full((mask.shape[1],) * 2, MASKED, dtype=dtype).triu(1)
        full, sliding = attention_biases(mask, self.config.window, dtype)
        return full + future, sliding + future


def _changed(encoder: Encoder, **changes: object) -> Encoder:
    """Return the same weights under another config; nothing is copied."""
    other = copy.copy(encoder)
    # fields of EncoderConfig
    other.config = dataclasses.replace(encoder.config, **changes)  # type: ignore[arg-type]
    return other


def _causal(encoder: Encoder) -> Encoder:
    other = copy.copy(encoder)
    other.__class__ = CausalEncoder
    return other


def _without_head(encoder: Encoder) -> Encoder:
    other = copy.copy(encoder)
    other._modules = dict(encoder._modules)
    other.dense = torch.nn.ModuleList()
    return other


def _swapped(config: EncoderConfig) -> dict[str, float]:
    return {
        "rope_theta_full": config.rope_theta_sliding,
        "rope_theta_sliding": config.rope_theta_full,
    }


MISTAKES: dict[str, Callable[[Encoder], Encoder]] = {
    "causal attention": _causal,
    "a window twice as wide": lambda encoder: _changed(encoder, window=2 * encoder.config.window),
    "a window half as wide": lambda encoder: _changed(encoder, window=encoder.config.window // 2),
    "no window": lambda encoder: _changed(encoder, layer_types=(FULL,) * encoder.config.num_layers),
    "a window in every layer": lambda encoder: _changed(
        encoder, layer_types=(SLIDING,) * encoder.config.num_layers
    ),
    "swapped rotary bases": lambda encoder: _changed(encoder, **_swapped(encoder.config)),
    "no dense head": _without_head,
}


def mistaken_vectors(
    encoder: Encoder, texts: list[GoldenText], right: dict[str, NDArray[np.float32]]
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Return vectors of the texts CASES under each mistake, by mistake and by text.

    A mistake that moves them too little to be seen is left out.

    Args:
        encoder: the rounded model.
        right: what it gives when it is right.
    """
    chosen = [text for text in texts if text.name in CASES]
    found = {}
    for name, make in MISTAKES.items():
        mistaken = make(encoder)
        if name == "no dense head" and encoder.config.width != encoder.config.dim:
            continue  # another width; no runtime would take it for this model's
        vectors = reference_vectors(mistaken, chosen)
        moved = [float(np.linalg.norm(vectors[case] - right[case])) for case in vectors]
        if max(moved) >= SMALLEST_DIFFERENCE:
            found[name] = vectors
    return found
