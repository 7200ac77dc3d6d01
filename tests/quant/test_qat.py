"""Training sees exactly the rounded weights, and moves the float ones by the gradient that these
have.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_quant.qat import round_tokens, rounded, rounded_activations
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Scheme, quantize
from tests.tiny import with_weights

CONFIG = EncoderConfig(
    vocab_size=200,
    width=64,
    ffn_width=96,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    query_scale=32**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=48,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 128), (128, 64)),
    dims=(64, 32),
)
SCHEMES = [INT4, INT8, INT8_PER_CHANNEL, MIXED]


def make_encoder() -> Encoder:
    torch.manual_seed(1)
    made = Encoder(CONFIG)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return made


@pytest.fixture
def encoder() -> Encoder:
    return make_encoder()


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 200, (5, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    return ids, mask


def state(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in encoder.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_inside_the_block_the_weights_are_the_dequantized_ones_to_the_last_bit(
    encoder: Encoder, scheme: Scheme
) -> None:
    before, quantized = state(encoder), quantize_encoder(encoder, scheme)
    objects = [id(weight) for weight in encoder.parameters()]
    with rounded(encoder, scheme):
        for name, weight in encoder.named_parameters():
            assert torch.equal(
                weight, quantized[name].dequantize() if name in quantized else before[name]
            ), name
        vectors = encoder(*texts())
    assert torch.equal(vectors, with_weights(encoder, quantized)(*texts()))
    assert same(state(encoder), before)
    assert [id(weight) for weight in encoder.parameters()] == objects


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_gradient_is_that_of_the_rounded_weights_and_reaches_every_parameter(
    encoder: Encoder, scheme: Scheme
) -> None:
    direction = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with rounded(encoder, scheme):
        (encoder(*texts()) * direction).sum().backward()
    plain = with_weights(encoder, quantize_encoder(encoder, scheme))
    (plain(*texts()) * direction).sum().backward()  # type: ignore[no-untyped-call]
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0, name
        assert torch.equal(weight.grad, plain.get_parameter(name).grad), name


def test_an_optimizer_step_moves_the_float_weights_and_then_the_rounded_ones(
    encoder: Encoder,
) -> None:
    before, optimizer = state(encoder), torch.optim.Adam(encoder.parameters(), lr=1e-2)
    with rounded(encoder, INT4):
        rounded_before = state(encoder)
    for _ in range(3):
        optimizer.zero_grad()
        with rounded(encoder, INT4):
            encoder(*texts()).select(1, 0).sum().backward()
        optimizer.step()
    # Adam's first steps have length lr each, whatever the gradient: the float weights cannot have
    # gone further than 3 of them.
    moved = (encoder.dense[0].weight - before["dense.0.weight"]).abs()
    assert 0 < moved.max() < 3.1e-2
    with rounded(encoder, INT4):
        assert not torch.equal(encoder.dense[0].weight, rounded_before["dense.0.weight"])
    off_grid = (
        encoder.dense[0].weight - quantize(encoder.dense[0].weight, INT4.projection).dequantize()
    )
    assert off_grid.abs().max() > 0, (
        "the master weights must not snap to the grid, or small steps would be lost"
    )


def test_the_float_weights_come_back_after_an_error_too(encoder: Encoder) -> None:
    before = state(encoder)
    inside: list[dict[str, torch.Tensor]] = []

    def fail() -> None:
        with rounded(encoder, MIXED, activations=True):
            inside.append(state(encoder))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not same(inside[0], before)
    assert same(state(encoder), before)
    with torch.no_grad():
        # the last matrix: all others are rounded when it is found
        encoder.dense[1].weight[3, 4] = torch.nan
    with pytest.raises(ConfigError, match="NaN"), rounded(encoder, INT4):
        pass
    assert all(
        torch.equal(weight, before[name])
        for name, weight in state(encoder).items()
        if name != "dense.1.weight"
    )
    with torch.no_grad():
        encoder.dense[1].weight[3, 4] = before["dense.1.weight"][3, 4]
    with rounded(encoder, INT4):
        pass
    assert same(state(encoder), before)


def test_a_block_inside_a_block_is_refused_and_leaves_both_as_they_were(encoder: Encoder) -> None:
    before = state(encoder)
    with rounded(encoder, INT4):
        inside = state(encoder)
        with pytest.raises(ConfigError, match="rounded already"), rounded(encoder, MIXED):
            pass
        assert same(state(encoder), inside)
        with rounded(Encoder(CONFIG), MIXED):
            pass
    assert same(state(encoder), before)


def test_a_backward_pass_behind_the_block_is_refused(encoder: Encoder) -> None:
    with rounded(encoder, INT4):
        total = encoder(*texts()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_half_precision_masters_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="float32 master"), rounded(encoder.bfloat16(), INT4):
        pass


def test_tokens_are_rounded_as_torchs_own_dynamic_quantization_does() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops = torch.ops.quantized_decomposed
    random = torch.Generator().manual_seed(3)
    for rows in (
        torch.randn(50, 64, generator=random),
        torch.rand(50, 64, generator=random) + 1,
        -torch.rand(50, 64, generator=random) - 1,
        torch.randn(50, 64, generator=random) * 1e4,
        torch.zeros(2, 64),
        torch.randn(50, 64, generator=random) * 1e-3,
    ):
        scale, zero = ops.choose_qparams_per_token_asymmetric.default(rows, torch.int8)
        codes = ops.quantize_per_token.default(rows, scale, zero, -128, 127, torch.int8)
        expected = ops.dequantize_per_token.default(
            codes, scale, zero, -128, 127, torch.int8, torch.float32
        )
        step = scale.max().item()
        off = (round_tokens(rows) - expected).abs()
        assert off.max() <= 1.001 * step
        # a tie may fall either way where x / s and x * (1 / s) differ
        assert (off > 1e-5 * step).float().mean() < 1e-3


def test_rounded_activations_change_linear_layers_inside_the_block_only(encoder: Encoder) -> None:
    with rounded(encoder, MIXED):
        plain = encoder(*texts())
    with rounded(encoder, MIXED, activations=True):
        vectors = encoder(*texts())
        vectors.sum().backward()
    assert 1e-4 < (1 - (vectors * plain).sum(1)).max() < 0.05
    assert all(
        weight.grad is not None and torch.isfinite(weight.grad).all()
        for weight in encoder.parameters()
    )
    with pytest.raises(RuntimeError), rounded_activations(encoder):
        raise RuntimeError
    with rounded(encoder, MIXED):
        assert torch.equal(encoder(*texts()), plain)


def test_shards_of_fsdp_round_to_the_same_weights_and_gradients(tmp_path: Path) -> None:
    """Two processes hold half of the rows each; what they compute is what one process computes."""
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)


def _rank(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    whole, sharded = make_encoder(), make_encoder()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with rounded(whole, MIXED):
        wanted = whole(*texts())
        wanted.square().mul(torch.arange(64)).sum().backward()
    with rounded(sharded, MIXED):
        found = sharded(*texts())
        found.square().mul(torch.arange(64)).sum().backward()
    assert torch.equal(found, wanted)
    for name, weight in sharded.named_parameters():
        assert isinstance(weight, DTensor)
        assert torch.equal(weight.full_tensor(), whole.get_parameter(name)), name
        assert weight.grad is not None
        torch.testing.assert_close(
            weight.grad.full_tensor(), whole.get_parameter(name).grad, rtol=1e-5, atol=1e-7
        )
    across = make_encoder()
    across.dense[0].weight = torch.nn.Parameter(
        distribute_tensor(across.dense[0].weight.detach(), mesh, [Shard(1)])
    )
    with pytest.raises(ConfigError, match="Shard whole rows"), rounded(across, MIXED):
        pass
    torch.distributed.destroy_process_group()
