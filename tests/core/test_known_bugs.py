"""The mistakes that other EmbeddingGemma ports made, put into ours on purpose: the parity check
must see each one.

A parity test that could not fail would prove nothing. So each bug is planted, and the difference to
the reference must be far beyond the tolerance of test_parity.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn import encoder as encoder_module
from egemma_core.nn import pooling
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from models.make_checkpoint import load_reference, write_checkpoint
from tests.core.test_parity import TOLERANCE

pytest.importorskip(
    "sentence_transformers", reason="the parity reference; pip install 'egemma[dev]'"
)

FAR = 50 * TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published"), "tiny", tiny_spm)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_reference(folder)


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return load_encoder(open_checkpoint(folder))


def difference(encoder: Encoder, reference: Any) -> float:
    """Largest difference on a ragged batch whose longest text is past the window."""
    ids = torch.zeros(3, 60, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate((60, 20, 4)):
        ids[row, :length] = torch.randint(3, 500, (length,), generator=generator)
    mask = ids > 0
    with torch.no_grad():
        return float((encoder(ids, mask) - reference(ids, mask)).abs().nan_to_num(9.0).max())


def test_without_a_bug_the_difference_is_within_tolerance(encoder: Encoder, reference: Any) -> None:
    assert difference(encoder, reference) <= TOLERANCE


def test_causal_attention_is_seen(
    encoder: Encoder, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = encoder_module.attention_biases

    def causal(mask: Tensor, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        future = torch.full((mask.shape[1],) * 2, encoder_module.MASKED).triu(1)
        full, sliding = honest(mask, window, dtype)
        return full + future, sliding + future

    monkeypatch.setattr(encoder_module, "attention_biases", causal)
    assert difference(encoder, reference) > FAR


@pytest.mark.parametrize(
    "window",
    [8, 5, 3, 2, 10**6],
    ids=["doubled", "one too wide", "one too narrow", "halved", "none"],
)
def test_another_window_is_seen(encoder: Encoder, reference: Any, window: int) -> None:
    assert encoder.config.window == 4
    encoder.config = dataclasses.replace(encoder.config, window=window)
    assert difference(encoder, reference) > FAR


def test_swapped_rotary_bases_are_seen(encoder: Encoder, reference: Any) -> None:
    config = encoder.config
    encoder.config = dataclasses.replace(
        config, rope_theta_full=config.rope_theta_sliding, rope_theta_sliding=config.rope_theta_full
    )
    assert difference(encoder, reference) > FAR


def test_a_dropped_dense_head_is_seen(encoder: Encoder, reference: Any) -> None:
    encoder.dense = torch.nn.ModuleList()
    assert difference(encoder, reference) > FAR


def test_pooling_over_padding_is_seen(
    encoder: Encoder, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "mean_pool", lambda hidden, mask: hidden.float().mean(1))
    assert difference(encoder, reference) > FAR


def test_attention_to_padding_is_seen(
    encoder: Encoder, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = encoder_module.attention_biases
    monkeypatch.setattr(
        encoder_module,
        "attention_biases",
        lambda mask, window, dtype: honest(torch.ones_like(mask), window, dtype),
    )
    assert difference(encoder, reference) > FAR


def test_minus_infinity_as_a_mask_gives_nan_on_windows_of_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # torch's own attention survives a row of -inf; the softmax of a runtime does not, and exporters
    # write this bias down.
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, :3] = True
    assert torch.isfinite(
        encoder_module.attention_biases(mask, 4, torch.float32)[1].softmax(-1)
    ).all()
    monkeypatch.setattr(encoder_module, "MASKED", float("-inf"))
    assert torch.isnan(encoder_module.attention_biases(mask, 4, torch.float32)[1].softmax(-1)).any()


def test_a_nan_in_padding_does_not_reach_the_mean() -> None:
    hidden, mask = torch.ones(1, 3, 2), torch.tensor([[True, True, False]])
    hidden[0, 2] = float("nan")
    assert torch.equal(pooling.mean_pool(hidden, mask), torch.ones(1, 2))


def _rounded_scale(module: torch.nn.Embedding, _inputs: Any, output: Tensor) -> Tensor:
    return output * (27.75 / 27.7128)


@pytest.mark.parametrize(
    "plant",
    [
        lambda encoder: setattr(
            encoder.layers[0].self_attn, "scale", encoder.layers[0].self_attn.scale * 1.5
        ),
        lambda encoder: encoder.layers[1].self_attn.q_norm.weight.zero_(),
        lambda encoder: encoder.norm.weight.zero_(),
        lambda encoder: encoder.embed_tokens.register_forward_hook(_rounded_scale),
    ],
    ids=[
        "query scale",
        "query norm weight",
        "final norm weight",
        "bfloat16 constant in a float32 model",
    ],
)
def test_smaller_slips_are_seen(
    encoder: Encoder, reference: Any, plant: Callable[[Encoder], Any]
) -> None:
    with torch.no_grad():
        plant(encoder)
    assert difference(encoder, reference) > 2 * TOLERANCE


def test_a_shortened_embedding_has_unit_length() -> None:
    from egemma_core.checkpoint.folder import MATRYOSHKA_DIMS
    from egemma_core.vectors import shorten

    vectors = np.random.default_rng(0).normal(size=(5, 768)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for dim in MATRYOSHKA_DIMS:
        assert np.allclose(
            np.linalg.norm(shorten(vectors, dim, MATRYOSHKA_DIMS), axis=1), 1, atol=1e-6
        )
    assert np.linalg.norm(vectors[:, :256], axis=1).max() < 0.7  # what a caller would get without
