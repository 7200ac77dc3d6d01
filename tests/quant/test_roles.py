"""Which parameters are rounded, and that a rounded encoder is the same encoder with other
weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_quant.roles import quantize_encoder, role_of
from egemma_quant.schemes import INT4, MIXED
from models.make_checkpoint import write_checkpoint
from tests.tiny import with_weights

pytest.importorskip(
    "sentence_transformers", reason="it writes the folders; pip install 'egemma[dev]'"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Encoder:
    return load_encoder(
        open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("m"), "tiny", tiny_spm))
    )


def test_every_matrix_has_a_role_and_no_norm_has(encoder: Encoder) -> None:
    for name, weight in encoder.named_parameters():
        assert (role_of(name) is not None) == (weight.ndim == 2), name
    assert role_of("layers.1.self_attn.q_norm.weight") is None
    assert role_of("layers.1.self_attn.o_proj.weight") == "attention"
    assert role_of("layers.1.mlp.gate_proj.weight") == "feed_forward"
    assert role_of("dense.1.weight") == "projection"
    assert role_of("embed_tokens.weight") == "embedding"


def test_the_mixed_scheme_gives_each_role_its_bits(encoder: Encoder) -> None:
    quantized = quantize_encoder(encoder, MIXED)
    assert quantized["layers.0.self_attn.k_proj.weight"].codes.abs().max() > 8
    assert quantized["layers.0.mlp.up_proj.weight"].codes.abs().max() <= 8
    assert quantized["embed_tokens.weight"].scales.shape == (512, 1)


def test_a_rounded_encoder_leaves_the_original_alone_and_stays_near(encoder: Encoder) -> None:
    before = encoder.layers[0].mlp.up_proj.weight.clone()
    quantized = quantize_encoder(encoder, INT4)
    rounded = with_weights(encoder, quantized)
    assert torch.equal(encoder.layers[0].mlp.up_proj.weight, before)
    assert torch.equal(
        rounded.layers[0].mlp.up_proj.weight, quantized["layers.0.mlp.up_proj.weight"].dequantize()
    )
    assert torch.equal(rounded.norm.weight, encoder.norm.weight)
    ids = torch.randint(3, 500, (4, 30), generator=torch.Generator().manual_seed(0))
    cosine = (encoder(ids, torch.ones_like(ids)) * rounded(ids, torch.ones_like(ids))).sum(-1)
    assert 0.9 < float(cosine.min()) < 0.99999
