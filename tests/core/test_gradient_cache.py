"""A batch that is embedded in chunks has the plain batch's loss and gradient, and needs the memory of a chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ShapeError
from egemma_core.nn.encoder import Encoder
from egemma_core.train.cache import backward_chunks, cached_backward
from egemma_core.train.losses import matryoshka, nce_loss, spread_out_loss

CONFIG = EncoderConfig(
    vocab_size=200, width=64, ffn_width=96, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=32, query_scale=32**-0.5,
    norm_eps=1e-6, layer_types=(SLIDING, FULL), window=4, rope_theta_full=1e6, rope_theta_sliding=1e4, max_tokens=48,
    bos_id=2, eos_id=1, pad_id=0, pooling="mean", dense=((64, 128), (128, 64)), dims=(64, 32))


def make() -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(CONFIG)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return encoder


def loss_of(vectors: Tensor) -> Tensor:
    queries, positives, negatives = vectors.chunk(3)
    return (matryoshka(lambda *rows: nce_loss(*rows, temperature=0.05), (64, 32), queries, positives, negatives)
            + matryoshka(spread_out_loss, (64, 32), queries) + matryoshka(spread_out_loss, (64, 32), positives))


def gradients(encoder: Encoder, sizes: list[int]) -> tuple[float, dict[str, Tensor]]:
    ids = torch.randint(3, 200, (24, 10), generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    loss = cached_backward(lambda rows: encoder(rows, torch.ones_like(rows, dtype=torch.bool)), ids.split(sizes), loss_of)
    return loss.item(), {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("sizes", [[8, 8, 8], [1] * 24, [5, 5, 5, 5, 4]])
def test_loss_and_gradient_are_the_plain_ones(sizes: list[int]) -> None:
    encoder = make()
    loss, plain = gradients(encoder, [24])
    cached_loss, cached = gradients(encoder, sizes)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    assert plain.keys() == cached.keys() == dict(encoder.named_parameters()).keys()
    for name, gradient in plain.items():
        assert (gradient - cached[name]).norm() <= 2e-5 * gradient.norm() + 1e-9, name


def test_no_more_than_one_chunk_is_kept_for_the_backward_pass() -> None:
    encoder = make()
    ids = torch.randint(3, 200, (24, 10), generator=torch.Generator().manual_seed(0))
    alive = 0
    most = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, vectors: Tensor) -> Tensor:  # type: ignore[override]
            nonlocal alive, most
            if torch.is_grad_enabled() or vectors.requires_grad:
                alive += 1
                most = max(most, alive)
            return vectors.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            nonlocal alive
            alive -= 1
            return gradient

    cached_backward(lambda rows: Counted.apply(encoder(rows, torch.ones_like(rows, dtype=torch.bool))), ids.split(6), loss_of)  # type: ignore[no-untyped-call]
    assert (alive, most) == (0, 1)


def test_chunks_that_do_not_add_up_are_refused() -> None:
    encoder = make()
    ids = torch.randint(3, 200, (6, 10))
    for rows in (4, 8):
        with pytest.raises(ShapeError):
            backward_chunks(lambda part: encoder(part, torch.ones_like(part, dtype=torch.bool)), ids.split(3), torch.zeros(rows, 64))
