"""Hard negatives: for each query, documents that a teacher ranks high although they answer another
one.

Candidates are all positives of a dataset, with a corpus beside them where there is one. A candidate
that may well be right is a false negative, and teaches the opposite of the truth; so everything
near the positive's own score is left out.

How well that works depends on the teacher. With models/egemma-small, for which the positive comes
first in 52 % of 4,000 rows of nl2bash, 2 of 20 mined negatives that were read by eye were right
answers in fact, and 1 of 20 without the filter: commands have many synonyms. Source: filtering by a
share of the positive's score ("TopK-PercPos", 95 %) is the best of NV-Retriever, arXiv:2407.15831,
section 4.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import ConfigError, InputError
from egemma_train.data.datasets import Row, with_title
from egemma_train.teachers.mining_report import Example, MiningReport, without_extra_blanks
from egemma_train.teachers.teacher import Role, Teacher, Vectors

Pick = Literal["top", "random"]
QUERY_BLOCK, CANDIDATE_BLOCK = 1024, 16_384  # 64 MiB of scores at once
SHOWN_EXAMPLES = 5
NO_CANDIDATE = -1
_OFF = "None switches it off."


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Which of the ranked candidates are taken. Ranks count from 0 and leave out right answers."""

    per_query: int = 1
    depth: int = 100  # ranks that are looked at
    skip: int = 0  # first ranks that are not taken
    # of the score of the query's lowest positive; None for no such limit
    max_share_of_positive: float | None = 0.95
    # by which a score must lie below that of the query's lowest positive
    margin: float | None = None
    max_score: float | None = None  # cosine
    pick: Pick = "top"  # the first that pass, or any of them
    seed: int = 0  # of "random"

    def __post_init__(self) -> None:
        whole_number("per_query", self.per_query, 1)
        whole_number("skip", self.skip, 0)
        whole_number("depth", self.depth, 1)
        if self.depth - self.skip < self.per_query:
            raise ConfigError(
                f"per_query={self.per_query}, skip={self.skip}, depth={self.depth}: at least "
                "per_query ranks must lie from skip up to depth."
            )
        if self.max_share_of_positive is not None:
            share = self.max_share_of_positive
            number("max_share_of_positive", share, most=1, above=0, hint=_OFF)
        if self.margin is not None:  # a difference of cosines
            number("margin", self.margin, 0, below=2, hint=_OFF)
        if self.max_score is not None:  # a cosine
            number("max_score", self.max_score, most=1, above=-1, hint=_OFF)
        one_of("pick", self.pick, get_args(Pick))


class Document(NamedTuple):
    """A candidate."""

    title: str | None
    text: str

    @property
    def whole(self) -> str:
        """The text as a teacher reads it."""
        return with_title(self.title, self.text)


def mine(
    rows: Sequence[Row],
    teacher: Teacher,
    config: MiningConfig,
    corpus: Sequence[Document] = (),
    symmetric: bool = False,
) -> tuple[list[tuple[Document, ...]], MiningReport]:
    """Return the hard negatives of each row, the highest first; () where no candidate passed.

    Rows of the same query get the same negatives: none of them is a positive of any of these rows,
    or the query itself, also where only blanks differ. Memory: the vectors of both sides, and one
    block of scores.

    Args:
        corpus: more candidates.
        symmetric: candidates are embedded as queries too.

    Raises:
        InputError: there are no rows.
        ConfigError: no row at all got a negative.
    """
    if not rows:
        raise InputError("There are no rows to mine negatives for.")
    documents = list(dict.fromkeys([*(Document(row.title, row.positive) for row in rows), *corpus]))
    query_of = [without_extra_blanks(row.query) for row in rows]
    # the first spelling of each
    queries = {plain: row.query for plain, row in reversed(list(zip(query_of, rows, strict=True)))}
    order = {plain: number for number, plain in enumerate(dict.fromkeys(query_of))}
    place = {document: index for index, document in enumerate(documents)}
    by_text: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        by_text.setdefault(without_extra_blanks(document.text), []).append(index)
    # (rows, 2)
    own = np.array(
        [
            (order[plain], place[Document(row.title, row.positive)])
            for plain, row in zip(query_of, rows, strict=True)
        ]
    )
    right = np.unique(
        [
            (order[plain], index)
            for plain, row in zip(query_of, rows, strict=True)
            # (pairs, 2)
            for text in (without_extra_blanks(row.positive), plain)
            for index in by_text.get(text, ())
        ],
        axis=0,
    )

    side: Role = "query" if symmetric else "document"
    query_side = teacher.embed("query", [queries[plain] for plain in order])
    document_side = teacher.embed(side, [document.whole for document in documents])
    query_vectors, document_vectors = query_side.vectors, document_side.vectors
    # fmt: off
    scores, indices = rank(query_vectors, document_vectors, right, config.depth)  # (Q, depth) each
    own_scores = pair_scores(query_vectors, document_vectors, own)                # (rows,)
    lowest = np.full(len(order), np.inf, np.float32)                              # (Q,)
    # fmt: on
    np.minimum.at(lowest, own[:, 0], own_scores)

    passed, removed = filtered(scores, lowest, config)
    passed &= indices != NO_CANDIDATE
    chosen = [
        _picked(np.flatnonzero(passed[number]), plain, config) for plain, number in order.items()
    ]
    if not any(len(ranks) for ranks in chosen):
        examined = scores[indices != NO_CANDIDATE]
        if not len(examined):
            raise ConfigError(
                f"no query got a negative: the {len(documents)} candidates are right answers to "
                "all queries.",
                hint="Give a corpus with more documents.",
            )
        raise ConfigError(
            f"no query got a negative: {len(examined):,} candidates were examined, and removed "
            f"{removed}. Positives score {own_scores.mean():.3f} on average, examined candidates "
            f"{examined.mean():.3f}: if these are alike, the teacher cannot tell such texts apart.",
            hint="Then take another teacher; otherwise loosen a filter.",
        )
    negatives = [
        tuple(documents[indices[number, taken]] for taken in chosen[number]) for number in own[:, 0]
    ]
    floor = np.where(indices[:, -1] == NO_CANDIDATE, -np.inf, scores[:, -1])[right[:, 0]]
    taken_scores = [scores[number, chosen[number]] for number in own[:, 0]]
    report = MiningReport(
        rows=len(rows),
        queries=len(order),
        candidates=len(documents),
        rows_with=dict(sorted(Counter(map(len, negatives)).items())),
        examined=int((indices != NO_CANDIDATE).sum()),
        removed=removed,
        right_answers=int((pair_scores(query_vectors, document_vectors, right) >= floor).sum()),
        positive_first=float((scores[:, 0] <= lowest).mean()),
        mean_positive_score=float(own_scores.mean()),
        mean_negative_score=float(np.concatenate(taken_scores).mean()),
        truncated={
            "queries": int(query_side.truncated.sum()),
            "documents": int(document_side.truncated.sum()),
        },
        teacher=teacher.described(),
        config=asdict(config),
        examples=tuple(
            Example(
                rows[i].query,
                rows[i].positive,
                float(own_scores[i]),
                tuple(document.text for document in negatives[i]),
                tuple(map(float, taken_scores[i])),
            )
            for i in sorted(
                (i for i in range(len(rows)) if negatives[i]), key=lambda i: _seed(rows[i].query)
            )[:SHOWN_EXAMPLES]
        ),
    )
    return negatives, report


def rank(
    queries: Vectors,
    documents: Vectors,
    left_out: NDArray[np.int64],
    depth: int,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
) -> tuple[Vectors, NDArray[np.int64]]:
    """Return the `depth` best documents of each query, exactly.

    Every score is computed, block by block.

    Args:
        queries: (Q, D).
        documents: (N, D).
        left_out: (pairs, 2) query and document that are not ranked, ordered by query.

    Returns:
        (Q, depth) scores, falling, and which documents have them, the earlier first where scores
        are equal; -inf and NO_CANDIDATE where there are no more.
    """
    all_scores = np.full((len(queries), depth), -np.inf, np.float32)
    all_indices = np.full((len(queries), depth), NO_CANDIDATE, np.int64)
    columns = torch.from_numpy(documents)
    for top in range(0, len(queries), query_block):
        block = torch.from_numpy(queries[top : top + query_block])
        begin, end = np.searchsorted(left_out[:, 0], (top, top + len(block)))
        pairs = torch.from_numpy(left_out[begin:end]) - torch.tensor([top, 0])
        best = torch.empty(len(block), 0)
        places = torch.empty(len(block), 0, dtype=torch.int64)
        for left in range(0, len(columns), candidate_block):
            part = block @ columns[left : left + candidate_block].T  # (block, part)
            here = pairs[(pairs[:, 1] >= left) & (pairs[:, 1] < left + part.shape[1])]
            part[here[:, 0], here[:, 1] - left] = -torch.inf
            score, place = part.topk(min(depth, part.shape[1]), dim=1)
            best, places = torch.cat([best, score], dim=1), torch.cat([places, place + left], dim=1)
            best, kept = best.topk(min(depth, best.shape[1]), dim=1)
            places = places.gather(1, kept)
        order = np.lexsort((places.numpy(), -best.numpy()))
        found = np.take_along_axis(best.numpy(), order, 1)
        rows = slice(top, top + len(block))
        all_scores[rows, : found.shape[1]] = found
        all_indices[rows, : found.shape[1]] = np.where(
            np.isneginf(found), NO_CANDIDATE, np.take_along_axis(places.numpy(), order, 1)
        )
    return all_scores, all_indices


def filtered(
    scores: Vectors, positive: Vectors, config: MiningConfig
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Return which ranked candidates pass, and how many each filter that is on removed.

    Args:
        scores: (Q, depth), -inf where there is no candidate.
        positive: (Q,) scores of the positives.
    """
    left = np.isfinite(scores)
    removed: dict[str, int] = {}
    bad: dict[str, NDArray[np.bool_]] = {}
    if config.skip:
        bad["skip"] = np.broadcast_to(np.arange(scores.shape[1]) < config.skip, scores.shape)
    if config.max_share_of_positive is not None:  # a share of a negative score would lie above it
        bad["max_share_of_positive"] = (
            scores > (positive - np.abs(positive) * (1 - config.max_share_of_positive))[:, None]
        )
    if config.margin is not None:
        bad["margin"] = scores > (positive - config.margin)[:, None]
    if config.max_score is not None:
        bad["max_score"] = scores > config.max_score
    for name, mask in bad.items():
        removed[name] = int((left & mask).sum())
        left &= ~mask
    return left, removed


def pair_scores(queries: Vectors, documents: Vectors, pairs: NDArray[np.int64]) -> Vectors:
    """Return the (pairs,) cosines of (query, document) pairs, in blocks."""
    parts = [
        np.einsum("ij,ij->i", queries[block[:, 0]], documents[block[:, 1]])
        for block in (
            pairs[start : start + CANDIDATE_BLOCK]
            for start in range(0, len(pairs), CANDIDATE_BLOCK)
        )
    ]
    return np.concatenate(parts)


def _picked(ranks: NDArray[np.int64], query: str, config: MiningConfig) -> NDArray[np.int64]:
    """Return at most `per_query` of the ranks that passed, rising.

    "random" depends on seed and query alone.
    """
    if config.pick == "random" and len(ranks) > config.per_query:
        return np.sort(
            np.random.default_rng((config.seed, _seed(query))).choice(
                ranks, config.per_query, replace=False
            )
        )
    return ranks[: config.per_query]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
