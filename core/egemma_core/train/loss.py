"""The contrastive loss, at every Matryoshka width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from egemma_core.errors import ShapeError


def contrastive_loss(queries: Tensor, documents: Tensor, masked: Tensor, temperature: float) -> Tensor:
    """How surprised a softmax over the documents is by each query's own positive (InfoNCE), averaged.

    Args:
        queries: (B, D) unit vectors.
        documents: (M, D) unit vectors, M >= B; document i is the positive of query i, the rest are hard negatives.
        masked: (B, M) bool, true where a document is no wrong answer to a query; never on the own positive.
        temperature: divides the cosines.

    Returns:
        A float32 scalar.

    Raises:
        ShapeError: the shapes disagree.

    Source: arXiv:2509.20354, equations 2 and 3. Unlike there, every hard negative of the batch is a wrong answer to every
    query, with weight 1: they are encoded anyway, and a small batch has few wrong answers.
    """
    if queries.shape[1] != documents.shape[1] or len(documents) < len(queries) or masked.shape != (len(queries), len(documents)):
        raise ShapeError(
            f"queries {tuple(queries.shape)}, documents {tuple(documents.shape)}, masked {tuple(masked.shape)}: "
            "want (B, D), (M, D) with M >= B, and (B, M)."
        )
    scores = queries.float() @ documents.float().T / temperature  # (B, M)
    scores = scores.masked_fill(masked, torch.finfo(torch.float32).min)
    return F.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def matryoshka_loss(queries: Tensor, documents: Tensor, masked: Tensor, temperature: float, dims: Sequence[int]) -> Tensor:
    """The sum of the contrastive losses of the first `dim` channels, at unit length again, for each of `dims`.

    Source: arXiv:2509.20354, section 2.2: overlapping prefixes, summed without weights.
    """
    losses = [
        contrastive_loss(
            F.normalize(queries[:, :dim].float(), dim=-1), F.normalize(documents[:, :dim].float(), dim=-1), masked, temperature
        )
        for dim in dims
    ]
    return torch.stack(losses).sum()
