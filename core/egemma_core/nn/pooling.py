"""From token vectors to one vector per text.

EmbeddingGemma uses the mean; the others are the report's ablation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from egemma_core.errors import ConfigError, ShapeError


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average each text's token vectors, leaving padding out. BOS, EOS and the prompt count.

    Args:
        hidden: (B, T, D) last hidden states, any float dtype.
        mask: (B, T) bool, True on real tokens; at least one per row.

    Returns:
        (B, D) float32.

    Raises:
        ShapeError: `hidden` and `mask` disagree on B or T.

    Source: EmbeddingGemma report, arXiv:2509.20354; 1_Pooling/config.json of the checkpoint.
    """
    _check(hidden, mask)
    # `where`, not a product: a NaN in a padded row times 0 would still be NaN.
    # fmt: off
    kept = torch.where(mask.unsqueeze(-1), hidden.float(), 0.0)  # (B, T, D)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)       # (B, D)
    # fmt: on


def first_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (B, D) float32: each text's first real token (BOS), wherever the padding is."""
    _check(hidden, mask)
    return _at(hidden, mask.int().argmax(dim=1))


def last_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (B, D) float32: each text's last real token (EOS), wherever the padding is."""
    _check(hidden, mask)
    return _at(hidden, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))


class MeanPooler(nn.Module):
    """`mean_pool` as a module."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return mean_pool(hidden, mask)


class FirstPooler(nn.Module):
    """`first_pool` as a module."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return first_pool(hidden, mask)


class LastPooler(nn.Module):
    """`last_pool` as a module."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return last_pool(hidden, mask)


class AttentionPooler(nn.Module):
    """softmax(q Kᵀ / sqrt(D)) V over the real tokens; q is learned, and the projections to K and V.

    Source: arXiv:2509.20354 section 4.1 (ablation, 4 heads).
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width={width} does not divide into {heads} pooling heads.")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        _check(hidden, mask)
        B, T, D = hidden.shape
        shape = (B, T, self.heads, D // self.heads)
        lowest = torch.finfo(torch.float32).min
        query = self.query.float().view(shape[2:])
        # fmt: off
        key = self.key(hidden).float().view(shape)                               # (B, T, heads, C)
        value = self.value(hidden).float().view(shape)                           # (B, T, heads, C)
        scores = torch.einsum("hc,bthc->bht", query, key) / D**0.5               # (B, heads, T)
        weights = scores.masked_fill(~mask[:, None, :], lowest).softmax(-1)      # (B, heads, T)
        # fmt: on
        value = torch.where(mask[:, :, None, None], value, 0.0)
        return torch.einsum("bht,bthc->bhc", weights, value).reshape(B, D)


def make_pooler(name: str, width: int) -> nn.Module:
    """Return the pooler of that name; see `egemma_core.checkpoint.config.POOLINGS`."""
    if name == "attention":
        return AttentionPooler(width)
    poolers: dict[str, type[nn.Module]] = {
        "mean": MeanPooler,
        "first": FirstPooler,
        "last": LastPooler,
    }
    if name not in poolers:
        raise ConfigError(f"pooling={name!r} must be one of {[*poolers, 'attention']}.")
    return poolers[name]()


def _at(hidden: Tensor, position: Tensor) -> Tensor:
    index = position.view(-1, 1, 1).expand(-1, 1, hidden.shape[2])  # (B, 1, D)
    return hidden.gather(1, index).squeeze(1).float()  # (B, D)


def _check(hidden: Tensor, mask: Tensor) -> None:
    if hidden.shape[:2] != mask.shape:
        raise ShapeError(
            f"mask is {tuple(mask.shape)}, hidden {tuple(hidden.shape)}: B and T must agree."
        )
