"""How good a ranking is: nDCG, recall, accuracy and Spearman, and how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import InputError, MissingDependencyError

CUT = 10  # hits that count


def best_hits(scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return the indices of each query's best documents, best first, equal ones in their order.

    Args:
        scores: (Q, N).

    Returns:
        (Q, 10), or (Q, N) where there are fewer documents.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :CUT]


def judge(
    hits: NDArray[np.int64], degrees: Sequence[Mapping[int, float]]
) -> dict[str, NDArray[np.float64]]:
    """Return nDCG@10 with linear gains, recall@10 and accuracy@1 of each query.

    They are defined as in sentence-transformers and trec_eval.

    Args:
        hits: (Q, 10) indices of documents, best first.
        degrees: of each query, how right its right documents are, by index; positive, at least one.

    Returns:
        Each (Q,) float64.
    """
    ndcg, recall, first = [], [], []
    for row, right in zip(hits.tolist(), degrees, strict=True):
        gain = sum(
            right.get(document, 0.0) / math.log2(rank + 2) for rank, document in enumerate(row)
        )
        most = sum(
            degree / math.log2(rank + 2)
            for rank, degree in enumerate(sorted(right.values(), reverse=True)[:CUT])
        )
        ndcg.append(gain / most)
        recall.append(sum(document in right for document in row) / len(right))
        first.append(float(row[0] in right))
    return {"ndcg@10": np.array(ndcg), "recall@10": np.array(recall), "accuracy@1": np.array(first)}


def rank_products(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n,) products of standardized ranks; their mean is Spearman's correlation.

    Equal values share the mean of their ranks. All products are 0 where one side has a single
    value, which orders nothing.
    """
    ranks = [_ranks(values) for values in (one, other)]
    spreads = [float(rank.std()) for rank in ranks]
    if min(spreads) == 0:
        return np.zeros(len(one))
    products: NDArray[np.float64] = (
        (ranks[0] - ranks[0].mean()) / spreads[0] * (ranks[1] - ranks[1].mean()) / spreads[1]
    )
    return products


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return ranks


def paired_difference(
    one: NDArray[np.float64], other: NDArray[np.float64], seed: int = 0, samples: int = 10_000
) -> tuple[float, float, float]:
    """Return the mean of one - other over the same queries, and the ends of its 95 % interval.

    The ends are percentiles of the mean over queries drawn again with replacement. They say what
    other queries would change, not what another training seed would; for that see `t_interval`.

    Raises:
        InputError: the two do not have one value for each query.
    """
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise InputError(
            f"The values have shapes {one.shape} and {other.shape}; give one value of each model "
            "for the same queries."
        )
    difference, draw = one - other, np.random.default_rng(seed)
    means = [
        difference[draw.integers(len(difference), size=len(difference))].mean()
        for _ in range(samples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over training seeds, and the ends of its 95 % interval by Student's t.

    Raises:
        InputError: there are fewer than two values.
        MissingDependencyError: SciPy is missing.
    """
    try:
        from scipy.stats import t  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError(
            "Intervals over seeds need SciPy.", hint="pip install 'egemma[train]'"
        ) from error
    if len(values) < 2:
        raise InputError(f"An interval needs at least two seeds, and there is {len(values)}.")
    mean = float(np.mean(values))
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half
