"""Every loss against a value worked out by hand, and against sentence-transformers where it has
one.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from egemma_core.errors import ConfigError, ShapeError
from egemma_train.objectives.losses import (
    false_negatives,
    matching_loss,
    matryoshka,
    nce_loss,
    right_negatives,
    spread_out_loss,
)

TAU = 0.5
# Two queries, their positives and hard negatives on a circle, so that every cosine is one of 1,
# 0.8, 0.6, 0.
Q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
P = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
N = torch.tensor([[0.6, 0.8], [0.8, 0.6]])


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(
            count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ),
        dim=1,
    ).float()


def test_nce_by_hand() -> None:
    # Row 1: right 0.8, other positive 0.6, own negative 0.6 with weight e^(5 * 0.6); row 2 is the
    # mirror image.
    expected = -math.log(
        math.exp(0.8 / TAU)
        / (math.exp(0.8 / TAU) + math.exp(0.6 / TAU) + math.exp(5 * 0.6) * math.exp(0.6 / TAU))
    )
    assert nce_loss(Q, P, N, temperature=TAU).item() == pytest.approx(expected, abs=1e-6)
    no_negative = -math.log(math.exp(0.8 / TAU) / (math.exp(0.8 / TAU) + math.exp(0.6 / TAU)))
    assert nce_loss(Q, P, temperature=TAU).item() == pytest.approx(no_negative, abs=1e-6)
    mixed = nce_loss(Q, P, N, temperature=TAU, has_negative=torch.tensor([True, False]))
    assert mixed.item() == pytest.approx((expected + no_negative) / 2, abs=1e-6)


def test_a_duplicate_is_no_wrong_answer_and_the_literal_mask_leaves_the_positive_out() -> None:
    twins = torch.tensor([[False, True], [True, False]])
    assert nce_loss(Q, P, duplicates=twins, temperature=TAU).item() == pytest.approx(0.0, abs=1e-6)
    hard = math.exp(5 * 0.6) * math.exp(0.6 / TAU)
    literal = nce_loss(Q, P, N, duplicates=twins, temperature=TAU, literal_mask=True)
    assert literal.item() == pytest.approx(-math.log(math.exp(0.8 / TAU) / hard), abs=1e-6)
    decoupled = nce_loss(Q, P, temperature=TAU, literal_mask=True)
    assert decoupled.item() == pytest.approx(
        -math.log(math.exp(0.8 / TAU) / math.exp(0.6 / TAU)), abs=1e-6
    )
    assert decoupled.item() < 0
    with pytest.raises(ConfigError, match="without any wrong answer"):
        nce_loss(Q, P, duplicates=twins, temperature=TAU, literal_mask=True)


def test_what_the_caller_says_of_the_own_positive_is_never_read() -> None:
    assert nce_loss(Q, P, duplicates=torch.eye(2, dtype=torch.bool), temperature=TAU) == nce_loss(
        Q, P, temperature=TAU
    )


def test_the_hardness_weight_has_no_gradient() -> None:
    """sg: with weight w fixed at its value, the gradient is the same."""
    queries = rows(4, 8, 0).requires_grad_()
    positives, negatives = rows(4, 8, 1), rows(4, 8, 2)
    nce_loss(queries, positives, negatives, temperature=TAU).backward()  # type: ignore[no-untyped-call]
    ours, queries.grad = queries.grad, None
    weight = torch.exp(5.0 * (queries * negatives).sum(1)).detach()
    scores = queries @ positives.T / TAU
    denominator = scores.exp().sum(1) + weight * ((queries * negatives).sum(1) / TAU).exp()
    (denominator.log() - scores.diagonal()).mean().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, queries.grad, atol=1e-6, rtol=1e-5)


class Fixed(torch.nn.Module):
    """A sentence-transformers model of known vectors."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def get_embedding_dimension(self) -> int:
        return self.parts[0].shape[1]

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": self.parts[int(features["part"])]}


def features(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"part": torch.tensor(part)} for part in range(count)]


@pytest.mark.parametrize("hardness", [0.0, 5.0])
def test_nce_is_sentence_transformers_with_shared_negatives(hardness: float) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    parts = [rows(6, 16, seed) for seed in range(3)]
    theirs = MultipleNegativesRankingLoss(
        Fixed(parts),
        scale=1 / TAU,
        hardness_mode="hard_negatives" if hardness else None,  # type: ignore[arg-type]
        hardness_strength=hardness,
    )
    expected = theirs(features(3), torch.empty(0))
    ours = nce_loss(*parts, temperature=TAU, hardness=hardness, share_negatives=True)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)


def test_spread_out_by_hand_and_against_sentence_transformers() -> None:
    assert spread_out_loss(P).item() == pytest.approx((0.8 * 0.6 + 0.6 * 0.8) ** 2, abs=1e-6)
    assert spread_out_loss(Q).item() == 0.0
    vectors = rows(64, 4, 5)
    from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

    theirs = GlobalOrthogonalRegularizationLoss(
        Fixed([vectors]), mean_weight=0.0, second_moment_weight=1.0, aggregation="sum"
    )  # type: ignore[arg-type]
    found = theirs(features(1), torch.empty(0))
    value = sum(found.values()) if isinstance(found, dict) else found
    # Theirs has a hinge, max(0, M2 - 1/D), which the report's equation has not.
    assert float(value) == pytest.approx(
        max(0.0, spread_out_loss(vectors).item() - 1 / 4), abs=1e-6
    )
    even = F.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    assert spread_out_loss(even).item() == pytest.approx(1 / 16, rel=0.02)


def test_matching_by_hand() -> None:
    assert matching_loss(Q, P).item() == pytest.approx(math.sqrt(0.2**2 + 0.6**2), abs=1e-6)
    assert matching_loss(Q, P, "mse").item() == pytest.approx(0.2**2 + 0.6**2, abs=1e-6)
    assert matching_loss(Q, P, "cosine").item() == pytest.approx(0.2, abs=1e-6)
    same = Q.clone().requires_grad_()
    matching_loss(same, Q).backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(same.grad).all()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="l2"):
        matching_loss(Q, P, "l1")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="Match the widths"):
        matching_loss(Q, P[:, :1])


def test_matryoshka_sums_renormalized_prefixes_as_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses import (
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )

    parts = [rows(6, 16, seed) for seed in range(2)]
    by_hand = sum(
        nce_loss(
            F.normalize(parts[0][:, :dim], dim=1),
            F.normalize(parts[1][:, :dim], dim=1),
            temperature=TAU,
        )
        for dim in (16, 8, 4)
    )
    ours = matryoshka(
        lambda queries, positives, negatives: nce_loss(
            queries, positives, negatives, temperature=TAU
        ),
        (16, 8, 4),
        *parts,
        None,
    )
    assert ours.item() == pytest.approx(float(by_hand), abs=1e-5)
    model = Fixed(parts)
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=1 / TAU), [16, 8, 4])  # type: ignore[arg-type]
    assert ours.item() == pytest.approx(theirs(features(2), torch.empty(0)).item(), abs=1e-4)
    with pytest.raises(ConfigError, match="dim=32"):
        matryoshka(spread_out_loss, (32,), parts[0])


def test_duplicates_are_found_by_text() -> None:
    assert false_negatives(list("abcdaefg"), list("12345278")).nonzero().tolist() == [
        [0, 4],
        [1, 5],
        [4, 0],
        [5, 1],
    ]
    # Row 1's negative is row 0's positive, and row 2 asks what row 0 asks; row 3's is its own
    # query's other answer; row 2 has none.
    found = right_negatives(["a", "b", "a", "b"], ["1", "2", "3", "4"], ["9", "1", None, "2"])
    assert found.nonzero().tolist() == [[0, 1], [1, 3], [2, 1], [3, 3]]


def test_a_shared_negative_that_is_a_right_answer_does_not_count() -> None:
    queries, positives, negatives = rows(3, 16, 0), rows(3, 16, 1), rows(3, 16, 2)
    right = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    loss = nce_loss(
        queries,
        positives,
        negatives,
        temperature=TAU,
        share_negatives=True,
        shared_duplicates=right,
        hardness=0,
    )
    logits = torch.cat([queries @ positives.T, queries @ negatives.T], 1) / TAU
    logits[0, 4] = float("-inf")
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.arange(3)).item(), abs=1e-5
    )


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ShapeError, match="both"):
        nce_loss(Q, P[:1], temperature=TAU)
    with pytest.raises(ShapeError, match="one for each query"):
        nce_loss(Q, P, N[:1], temperature=TAU)
    with pytest.raises(ShapeError, match="duplicates"):
        nce_loss(Q, P, duplicates=torch.zeros(1, 2, dtype=torch.bool), temperature=TAU)
    with pytest.raises(ConfigError, match="temperature"):
        nce_loss(Q, P, temperature=0)
    with pytest.raises(ShapeError, match="at least two"):
        spread_out_loss(Q[:1])
