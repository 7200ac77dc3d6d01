"""The losses of the recipe, as pure functions of unit vectors.

Each says which equation it is, and where it had to choose.

Source: arXiv:2509.20354 ("EmbeddingGemma"), section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from egemma_core.checks import number
from egemma_core.errors import ConfigError, ShapeError

Distance = Literal["l2", "mse", "cosine"]
DISTANCES = ("l2", "mse", "cosine")
HARDNESS = 5.0  # alpha; "experimentally set" in the report


def nce_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    duplicates: Tensor | None = None,
    has_negative: Tensor | None = None,
    temperature: float,
    hardness: float = HARDNESS,
    share_negatives: bool = False,
    shared_duplicates: Tensor | None = None,
    literal_mask: bool = False,
) -> Tensor:
    """Return the noise-contrastive loss of a batch (equations 2 and 3).

    Negatives are the batch's other positives and one hard negative per query; duplicates are
    masked.

    The report's mask, read literally, is 0 for j = i as well, because q_i = q_i: the positive would
    stand in the numerator alone, and the loss could fall below zero. The usual form keeps it, and
    so do we, unless `literal_mask`.

    Args:
        queries: (B, D) unit vectors.
        positives: (B, D) unit vectors; row i is the positive of query i.
        negatives: (B, D) hard negatives, or None.
        duplicates: (B, B) bool, true where positive j is no wrong answer to query i, because its
            text or its query's is equal; never read at j = i. None for no duplicates.
        has_negative: (B,) bool, false where a row of `negatives` is a placeholder; None for all
            true.
        temperature: tau, divides the cosines.
        hardness: alpha of the weight exp(alpha * sg(cosine)) of a hard negative; 0 weighs all
            alike.
        share_negatives: the hard negatives of all rows are wrong answers to every query, with
            weight 1 to the others (as in sentence-transformers); the report counts each against its
            own query only.
        shared_duplicates: (B, B) bool, true where the hard negative of row j is a right answer to
            query i. Only with `share_negatives`.
        literal_mask: leave the positive out of the denominator, as the report prints it.

    Returns:
        A float32 scalar, the mean over queries.

    Raises:
        ShapeError: shapes disagree.
        ConfigError: a number cannot work, or `literal_mask` leaves a query without any wrong
            answer.
    """
    rows = len(queries)
    if positives.shape != queries.shape or queries.ndim != 2:
        raise ShapeError(
            f"queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must both be "
            "(B, D)."
        )
    if negatives is not None and negatives.shape != queries.shape:
        raise ShapeError(
            f"negatives {tuple(negatives.shape)} must be one for each query, "
            f"{tuple(queries.shape)}; see has_negative."
        )
    for name, mask in (("duplicates", duplicates), ("shared_duplicates", shared_duplicates)):
        if mask is not None and mask.shape != (rows, rows):
            raise ShapeError(f"{name} {tuple(mask.shape)} must be {(rows, rows)}.")
    number("temperature", temperature, above=0)
    number("hardness", hardness, 0)
    queries = queries.float()
    scores = queries @ positives.float().T / temperature  # (B, B)
    own = torch.eye(rows, dtype=torch.bool, device=queries.device)
    masked = (
        own & literal_mask if duplicates is None else torch.where(own, literal_mask, duplicates)
    )
    wrong = [scores.masked_fill(masked, float("-inf"))]
    if negatives is not None:
        kept = (
            torch.ones(rows, dtype=torch.bool, device=queries.device)
            if has_negative is None
            else has_negative
        )
        if share_negatives:
            cosines = queries @ negatives.float().T  # (B, B)
            left_out = ~kept if shared_duplicates is None else ~kept | (shared_duplicates & ~own)
            wrong.append(
                (cosines / temperature + hardness * cosines.detach() * own).masked_fill(
                    left_out, float("-inf")
                )
            )
        else:
            cosine = (queries * negatives.float()).sum(1)  # (B,)
            wrong.append(
                (cosine / temperature + hardness * cosine.detach()).masked_fill(
                    ~kept, float("-inf")
                )[:, None]
            )
    everything = torch.cat(wrong, dim=1)
    if literal_mask and bool(torch.isneginf(everything.detach()).all(1).any()):
        raise ConfigError(
            "literal_mask=True leaves a query without any wrong answer: its loss would be minus "
            "infinity. Take a larger batch."
        )
    return (torch.logsumexp(everything, dim=1) - scores.diagonal()).mean()


def spread_out_loss(vectors: Tensor) -> Tensor:
    """Return the mean squared cosine of different vectors (equation 4, one term).

    The second moment of points spread evenly over a sphere is 1/D. The report uses neither the mean
    term nor the hinge max(0, M2 - 1/D) of the original GOR, so this has neither.

    Args:
        vectors: (B, D) unit vectors.

    Returns:
        A float32 scalar.

    Raises:
        ShapeError: fewer than two vectors.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ShapeError(f"vectors {tuple(vectors.shape)} must be at least two of the same width.")
    squared = (vectors.float() @ vectors.float().T).square()  # (B, B)
    return (squared.sum() - squared.diagonal().sum()) / (len(vectors) * (len(vectors) - 1))


def matching_loss(student: Tensor, teacher: Tensor, distance: Distance = "l2") -> Tensor:
    """Return how far vectors are from a teacher's, averaged (equation 5, one term).

    The report names neither the distance nor how widths are matched. Ours is "l2", the metric of
    EmbedDistill (arXiv:2301.12005), which the report cites; widths are matched by `TeacherSpace`.

    Args:
        student: (B, D) vectors in the teacher's space.
        teacher: (B, D) unit vectors; no gradient.

    Returns:
        A float32 scalar: mean Euclidean distance, mean squared difference of a channel times D, or
            mean of 1 - cosine.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape.",
            hint="Match the widths first.",
        )
    student, teacher = student.float(), teacher.detach().float()
    if distance == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    squared = (student - teacher).square().sum(1)  # (B,)
    if distance == "mse":
        return squared.mean()
    if distance != "l2":
        raise ConfigError(f"distance={distance!r} must be one of {list(DISTANCES)}.")
    # the root has no derivative at 0
    return (squared + torch.finfo(torch.float32).tiny).sqrt().mean()


def matryoshka(loss: Callable[..., Tensor], dims: Sequence[int], *vectors: Tensor | None) -> Tensor:
    """Return the sum of a loss over prefixes of the vectors, each at unit length again.

    "Overlapping", "summed", no weights (section 2.2).

    Args:
        loss: takes the vectors in their order; None stays None.
        dims: prefix widths; none above the vectors' own.
    """

    def prefix(rows: Tensor | None, dim: int) -> Tensor | None:
        if rows is not None and dim > rows.shape[1]:
            raise ConfigError(f"dim={dim}, but the vectors have {rows.shape[1]} channels.")
        return None if rows is None else F.normalize(rows[:, :dim].float(), dim=1)

    return torch.stack([loss(*(prefix(rows, dim) for rows in vectors)) for dim in dims]).sum()


def false_negatives(queries: Sequence[str], positives: Sequence[str]) -> Tensor:
    """Return where positive j is no wrong answer to query i (equation 3).

    That is where q_i = q_j or p_i = p_j as texts.

    Returns:
        (B, B) bool, false at j = i.
    """
    query, positive = _numbered(queries), _numbered(positives)
    same = (query[:, None] == query[None, :]) | (positive[:, None] == positive[None, :])
    return same.fill_diagonal_(False)


def right_negatives(
    queries: Sequence[str], positives: Sequence[str], negatives: Sequence[str | None]
) -> Tensor:
    """Return where the hard negative of row j is a right answer to query i.

    That is where it is, as a text, the positive of query i or of a query equal to it.

    Returns:
        (B, B) bool.
    """
    texts = _numbered([*positives, *("" if text is None else text for text in negatives)])
    positive, negative = texts[: len(positives)], texts[len(positives) :]
    query = _numbered(queries)
    equal = (query[:, None] == query[None, :]).float() @ (
        positive[:, None] == negative[None, :]
    ).float()  # (B, B)
    present = torch.tensor([text is not None for text in negatives], dtype=torch.bool)
    return (equal > 0) & present


def _numbered(texts: Sequence[str]) -> Tensor:
    """Return (n,) int64 numbers that are equal where texts are."""
    numbers: dict[str, int] = {}
    return torch.tensor(
        [numbers.setdefault(text, len(numbers)) for text in texts], dtype=torch.int64
    )
