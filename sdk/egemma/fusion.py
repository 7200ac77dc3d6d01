"""Join several rankings of the same things by their places alone.

Scores of different kinds cannot be added.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

RANK_CONSTANT = 60  # Source: Cormack, Clarke and Büttcher, "Reciprocal rank fusion", SIGIR 2009


def reciprocal_rank_fusion(
    lists: Sequence[Sequence[Key]], k: int = RANK_CONSTANT
) -> list[tuple[Key, float]]:
    """Rank everything that is in any list by the sum of 1 / (k + rank) over the lists it is in.

    Ranks begin at 1.

    Args:
        lists: each best first and without repetitions.
        k: the larger, the less a first place counts against several middle ones.

    Returns:
        Keys and scores by falling score; equal scores in the order of the first list, then of the
        second, and so on.
    """
    shares: dict[Key, list[float]] = {}
    for ranking in lists:
        assert len(set(ranking)) == len(ranking), "a ranking names something twice"
        for rank, key in enumerate(ranking, start=1):
            shares.setdefault(key, []).append(1 / (k + rank))
    # fsum, so that the same places in other lists tie; sorted keeps the order of what ties.
    return sorted(
        ((key, math.fsum(parts)) for key, parts in shares.items()), key=lambda pair: -pair[1]
    )
