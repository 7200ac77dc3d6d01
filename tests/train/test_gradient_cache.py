"""A batch that is embedded in chunks has the plain batch's loss and gradient, and needs the memory
of a chunk.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ShapeError
from egemma_core.nn.encoder import Encoder
from egemma_train.objectives.cache import backward_in_chunks
from egemma_train.objectives.losses import matryoshka, nce_loss, spread_out_loss

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


def make() -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(CONFIG)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    return encoder


def loss_of(vectors: Tensor) -> Tensor:
    queries, positives, negatives = vectors.chunk(3)
    return (
        matryoshka(
            lambda *rows: nce_loss(*rows, temperature=0.05), (64, 32), queries, positives, negatives
        )
        + matryoshka(spread_out_loss, (64, 32), queries)
        + matryoshka(spread_out_loss, (64, 32), positives)
    )


def gradients(
    encoder: Encoder, sizes: list[int], recompute: bool = False
) -> tuple[float, dict[str, Tensor]]:
    ids = torch.randint(3, 200, (24, 10), generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    loss = backward_in_chunks(
        lambda rows: encoder(rows, torch.ones_like(rows, dtype=torch.bool)),
        ids.split(sizes),
        loss_of,
        recompute=recompute,
    )
    return loss.item(), {
        name: weight.grad.clone()
        for name, weight in encoder.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [1] * 24, [5, 5, 5, 5, 4]])
def test_loss_and_gradient_are_the_plain_ones(sizes: list[int], recompute: bool) -> None:
    encoder = make()
    ids = torch.randint(3, 200, (24, 10), generator=torch.Generator().manual_seed(0))
    whole = loss_of(encoder(ids, torch.ones_like(ids, dtype=torch.bool)))
    whole.backward()  # type: ignore[no-untyped-call]
    loss, plain = (
        whole.item(),
        {
            name: weight.grad.clone()
            for name, weight in encoder.named_parameters()
            if weight.grad is not None
        },
    )
    cached_loss, cached = gradients(encoder, sizes, recompute)
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

    backward_in_chunks(
        lambda rows: Counted.apply(encoder(rows, torch.ones_like(rows, dtype=torch.bool))),
        ids.split(6),
        loss_of,
        recompute=True,
    )  # type: ignore[no-untyped-call]
    assert (alive, most) == (0, 1)


def test_a_chunk_that_changes_its_size_is_refused() -> None:
    sizes = iter((3, 3, 2))
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(ShapeError, match="3 vectors at first and 2"):
        backward_in_chunks(
            lambda _: weight * torch.eye(8)[: next(sizes)],
            [0, 1],
            lambda vectors: vectors.sum(),
            recompute=True,
        )


def test_parameters_of_the_loss_get_their_gradient_once() -> None:
    encoder, factor = make(), torch.ones((), requires_grad=True)
    ids = torch.randint(3, 200, (6, 10))
    for recompute in (False, True):
        factor.grad = None
        loss = backward_in_chunks(
            lambda rows: encoder(rows, torch.ones_like(rows, dtype=torch.bool)),
            ids.split(2),
            lambda vectors: factor * spread_out_loss(vectors),
            recompute=recompute,
        )
        assert factor.grad is not None
        # d(f * L)/df = L at f = 1
        assert factor.grad.item() == pytest.approx(loss.item(), rel=1e-6)
