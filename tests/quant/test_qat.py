"""Training sees exactly the rounded weights, and moves the float ones by the gradient that these have."""

from __future__ import annotations

import pytest
import torch

from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.nn.encoder import Encoder
from egemma_quant.qat import QatEncoder, round_tokens, rounded_activations
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Scheme, quantize
from egemma_quant.weights import quantize_encoder, with_weights

CONFIG = EncoderConfig(
    vocab_size=200, width=64, ffn_width=96, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=32, query_scale=32**-0.5,
    norm_eps=1e-6, layer_types=(SLIDING, FULL), window=4, rope_theta_full=1e6, rope_theta_sliding=1e4, max_tokens=48,
    bos_id=2, eos_id=1, pad_id=0, pooling="mean", dense=((64, 128), (128, 64)), dims=(64, 32))
SCHEMES = [INT4, INT8, INT8_PER_CHANNEL, MIXED]


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    made = Encoder(CONFIG)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return made


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 200, (5, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    return ids, mask


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_forward_pass_is_that_of_the_dequantized_weights_to_the_last_bit(encoder: Encoder, scheme: Scheme) -> None:
    qat = QatEncoder(encoder, scheme)
    quantized = quantize_encoder(encoder, scheme)
    weights = qat.weights()
    assert weights.keys() == dict(encoder.named_parameters()).keys()
    for name, weight in weights.items():
        assert torch.equal(weight, quantized[name].dequantize() if name in quantized else encoder.get_parameter(name)), name
    assert torch.equal(qat(*texts()), with_weights(encoder, quantized)(*texts()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_gradient_is_that_of_the_rounded_weights_and_reaches_every_parameter(encoder: Encoder, scheme: Scheme) -> None:
    direction = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    (QatEncoder(encoder, scheme)(*texts()) * direction).sum().backward()  # type: ignore[no-untyped-call]
    rounded = with_weights(encoder, quantize_encoder(encoder, scheme))
    (rounded(*texts()) * direction).sum().backward()  # type: ignore[no-untyped-call]
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0, name
        torch.testing.assert_close(weight.grad, rounded.get_parameter(name).grad, rtol=0, atol=0)


def test_an_optimizer_step_moves_the_float_weights_and_then_the_rounded_ones(encoder: Encoder) -> None:
    qat = QatEncoder(encoder, INT4)
    assert {id(weight) for weight in qat.parameters()} == {id(weight) for weight in encoder.parameters()}
    before, rounded_before = encoder.dense[0].weight.clone(), qat.weights()["dense.0.weight"]
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        qat(*texts()).select(1, 0).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert not torch.equal(encoder.dense[0].weight, before)
    assert not torch.equal(qat.weights()["dense.0.weight"], rounded_before)
    off_grid = encoder.dense[0].weight - quantize(encoder.dense[0].weight, INT4.projection).dequantize()
    assert off_grid.abs().max() > 0, "the master weights must not snap to the grid, or small steps would be lost"


def test_tokens_are_rounded_as_torchs_own_dynamic_quantization_does() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops = torch.ops.quantized_decomposed
    random = torch.Generator().manual_seed(3)
    for rows in (torch.randn(50, 64, generator=random), torch.rand(50, 64, generator=random) + 1, -torch.rand(50, 64, generator=random) - 1,
                 torch.randn(50, 64, generator=random) * 1e4, torch.zeros(2, 64), torch.randn(50, 64, generator=random) * 1e-3):
        scale, zero = ops.choose_qparams_per_token_asymmetric.default(rows, torch.int8)
        codes = ops.quantize_per_token.default(rows, scale, zero, -128, 127, torch.int8)
        expected = ops.dequantize_per_token.default(codes, scale, zero, -128, 127, torch.int8, torch.float32)
        step = scale.max().item()
        off = (round_tokens(rows) - expected).abs()
        assert off.max() <= 1.001 * step
        assert (off > 1e-5 * step).float().mean() < 1e-3   # a tie may fall either way where x / s and x * (1 / s) differ


def test_rounded_activations_change_linear_layers_inside_the_block_only(encoder: Encoder) -> None:
    plain = QatEncoder(encoder, MIXED)(*texts())
    rounded = QatEncoder(encoder, MIXED, activations=True)
    vectors = rounded(*texts())
    assert 1e-4 < (1 - (vectors * plain).sum(1)).max() < 0.05
    assert torch.equal(QatEncoder(encoder, MIXED)(*texts()), plain)
    vectors.sum().backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in encoder.parameters())
    with pytest.raises(RuntimeError), rounded_activations(encoder):
        raise RuntimeError
    assert torch.equal(QatEncoder(encoder, MIXED)(*texts()), plain)

