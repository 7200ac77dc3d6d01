"""A quantization-aware run: training and dev scores are of the rounded weights, states hold the
float ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import INT4
from egemma_train.loop import run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import Contrast
from tests.train.test_contrast import LOSS, gradients, objective

RUN = LoopConfig(steps=4, learning_rate=1e-2, save_every=2, evaluate_every=2)


def weights(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in encoder.named_parameters()}


def grid(encoder: Encoder) -> dict[str, Tensor]:
    """What int4 files would hold of these float weights."""
    return {name: weight.dequantize() for name, weight in quantize_encoder(encoder, INT4).items()}


class Dev:
    """Keeps the weights that it was asked to score."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def score(self, encoder: Encoder) -> dict[str, float]:
        self.seen.append(weights(encoder))
        return {"score": encoder.dense[0].weight[0, 0].item()}


def test_training_and_scores_see_the_grid_and_states_hold_the_floats(
    tiny_spm: Path, tmp_path: Path
) -> None:
    dev, forward = Dev(), []
    made = objective(tiny_spm, LOSS, scheme=INT4, dev=dev)
    made.encoder.register_forward_pre_hook(lambda encoder, _: forward.append(weights(encoder)))

    class Watched(Contrast):
        """Compares what every pass of a step computed with to what the files would hold of the
        weights before it.
        """

        def backward(self, step: int) -> object:  # type: ignore[override]
            forward.clear()
            expected = grid(self.encoder)
            outcome = super().backward(step)
            assert len(forward) > 1
            for seen in forward:
                for name, weight in expected.items():
                    assert torch.equal(seen[name], weight), f"step {step}, {name}"
                assert torch.equal(seen["norm.weight"], self.encoder.norm.weight)
            return outcome

    made.__class__ = Watched
    finished = run(made, RUN, tmp_path / "run")
    assert len(dev.seen) == 2
    files = grid(made.encoder)
    assert files.keys() == {name for name in weights(made.encoder) if "norm" not in name}
    for name, weight in files.items():
        assert torch.equal(dev.seen[-1][name], weight), name
    assert finished.scores == {"score": files["dense.0.weight"][0, 0].item()}
    opened = load_encoder(open_checkpoint(str(finished.model)))
    for name, weight in weights(opened).items():
        assert torch.equal(weight, weights(made.encoder)[name]), name
        assert name not in files or not torch.equal(weight, files[name]), f"{name} lies on the grid"


def test_the_gradient_is_that_of_a_model_whose_weights_are_the_rounded_ones(tiny_spm: Path) -> None:
    float_losses = gradients(objective(tiny_spm))[0]
    for recompute in (False, True):
        config = replace(LOSS, recompute=recompute)
        shipped = objective(tiny_spm, config)
        with torch.no_grad():
            for name, weight in grid(shipped.encoder).items():
                shipped.encoder.get_parameter(name).copy_(weight)
        losses, expected = gradients(shipped)
        found_losses, found = gradients(objective(tiny_spm, config, scheme=INT4))
        assert found_losses == losses != float_losses
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name


def test_rounded_activations_are_another_loss(tiny_spm: Path) -> None:
    weights_only, both = (
        gradients(objective(tiny_spm, scheme=INT4, activations=activations))[0]["loss"]
        for activations in (False, True)
    )
    assert both == pytest.approx(weights_only, rel=0.2)
    assert both != weights_only
