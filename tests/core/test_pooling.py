"""The four poolers: against sentence-transformers and torch's own attention, and untouched by
padding on either side.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from egemma_core.errors import ConfigError, ShapeError
from egemma_core.nn.pooling import AttentionPooler, first_pool, last_pool, make_pooler, mean_pool

POOLERS = ("mean", "first", "last", "attention")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def padded(texts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) hidden states with NaN where there is padding, and their mask."""
    longest = max(len(text) for text in texts)
    hidden = torch.full((len(texts), longest, texts[0].shape[1]), float("nan"))
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        part = slice(0, len(text)) if side == "right" else slice(longest - len(text), None)
        hidden[row, part], mask[row, part] = text, True
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POOLERS)
def test_padding_on_either_side_changes_nothing(name: str, side: str) -> None:
    pooler = make_pooler(name, 8)
    texts = [torch.randn(length, 8) for length in (1, 3, 7)]
    together = pooler(*padded(texts, side))
    alone = torch.cat(
        [pooler(text[None], torch.ones(1, len(text), dtype=torch.bool)) for text in texts]
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(mean_pool, "mean"), (first_pool, "cls"), (last_pool, "lasttoken")]
)
def test_the_plain_poolers_equal_those_of_sentence_transformers(ours, theirs: str) -> None:  # type: ignore[no-untyped-def]
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    hidden, mask = padded([torch.randn(length, 8) for length in (2, 5, 6)], "right")
    hidden = hidden.nan_to_num(3.0)
    wanted = modules.Pooling(8, theirs)(
        {"token_embeddings": hidden, "attention_mask": mask.long()}
    )["sentence_embedding"]
    torch.testing.assert_close(ours(hidden, mask), wanted)


def test_attention_pooling_is_the_reports_formula() -> None:
    # softmax(q Kᵀ / sqrt(D)) V with K and V projected, 4 heads: torch's own attention with one
    # query row per head and that scale.
    pooler, hidden = AttentionPooler(8, heads=4), torch.randn(1, 5, 8)
    query = pooler.query.view(1, 4, 1, 2)
    key, value = (
        layer(hidden).view(1, 5, 4, 2).transpose(1, 2) for layer in (pooler.key, pooler.value)
    )
    wanted = F.scaled_dot_product_attention(query, key, value, scale=8**-0.5).reshape(1, 8)
    torch.testing.assert_close(pooler(hidden, torch.ones(1, 5, dtype=torch.bool)), wanted)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="must agree"):
        mean_pool(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="pooling='max'"):
        make_pooler("max", 8)
    with pytest.raises(ConfigError, match="10 does not divide"):
        make_pooler("attention", 10)
