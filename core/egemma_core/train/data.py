"""Query-document pairs from disk, and the batch of any step: a pure function of (seed, step), so a run can resume."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from egemma_core.errors import ConfigError, InputError
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.tokens import Tokenizer

# Kinds of pair that are named after how they were found, not after a prompt, search with the default prompt.
_TASK_OF_KIND = {"title-body": DEFAULT_TASK, "search result": DEFAULT_TASK}
SIMILARITY = "sentence similarity"  # both sides are queries of this task


@dataclass(frozen=True)
class Pair:
    """One row of training data, without prompts."""

    query: str
    positive: str
    negative: str | None = None  # a hard negative


@dataclass(frozen=True)
class PairSet:
    """The pairs of one dataset; every batch comes from one of these."""

    name: str
    kind: str  # the file's `task`: "question answering", "title-body", ...
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Batch:
    """What one step sees. Documents are the B positives, then the hard negatives."""

    name: str
    queries: list[tuple[int, ...]]  # B token rows, prompts, BOS and EOS included
    documents: list[tuple[int, ...]]  # B + hard negatives
    masked: Tensor  # (B, documents) bool, true where a document may not count as a wrong answer


def read_pairs(path: Path, languages: Sequence[str] | None = None) -> list[PairSet]:
    """The pairs of one `NAME.train.jsonl.gz`, one set per kind of task in it.

    Args:
        languages: values of `lang` to keep; None keeps all.

    Raises:
        InputError: the file cannot be read, or a row lacks query, positive or task.
    """
    by_kind: dict[str, list[Pair]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if languages is None or row["lang"] in languages:
                    by_kind.setdefault(row["task"], []).append(Pair(row["query"], row["positive"], row.get("negative")))
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not readable as training pairs ({error!r}); one JSON object per line with query, positive, task, lang."
        ) from error
    return [PairSet(path.name.split(".")[0], kind, tuple(pairs)) for kind, pairs in sorted(by_kind.items())]


def hold_out(pair_set: PairSet, one_in: int) -> tuple[PairSet, list[Pair]]:
    """Split off about one positive in `one_in`, with all its queries, by hash: the same ones in every run."""
    held = [int(hashlib.sha256(pair.positive.encode()).hexdigest(), 16) % one_in == 0 for pair in pair_set.pairs]
    kept = tuple(pair for pair, out in zip(pair_set.pairs, held, strict=True) if not out)
    return PairSet(pair_set.name, pair_set.kind, kept), [pair for pair, out in zip(pair_set.pairs, held, strict=True) if out]


def false_negatives(pairs: Sequence[Pair]) -> Tensor:
    """Which documents of a batch are no wrong answer to which query.

    A document equal to the query's own positive, or the positive of an equal query, is a right answer; texts are
    compared, not vectors. The own positive is not masked here.

    Returns:
        (B, B + hard negatives) bool, in the order of `Batch.documents`.

    Source: arXiv:2509.20354, equation 3, extended to hard negatives.
    """
    documents = [(pair.positive, pair.query) for pair in pairs] + [(pair.negative, None) for pair in pairs if pair.negative]
    rows = [
        [index != own and (text == pair.positive or query == pair.query) for index, (text, query) in enumerate(documents)]
        for own, pair in enumerate(pairs)
    ]
    return torch.tensor(rows, dtype=torch.bool)


class Batches:
    """Draws batches. Which set a step takes follows the square root of the sets' sizes, each capped.

    Args:
        max_tokens: documents are cut to this many tokens, queries to half.
        hard_negatives: at most this many per batch, those of its first pairs; every query sees them all.
        default_task_share: share of queries that carry the default prompt instead of their own kind's, because
            someone who searches mixed notes does not name a task.
        lower_case_share: share of queries in lower case, as people type them.
    """

    def __init__(
        self,
        sets: Sequence[PairSet],
        tokenizer: Tokenizer,
        prompts: Prompts,
        *,
        batch_size: int,
        max_tokens: int,
        hard_negatives: int,
        seed: int,
        set_cap: int = 20_000,
        default_task_share: float = 0.5,
        lower_case_share: float = 0.25,
    ) -> None:
        small = [s.name for s in sets if len(s.pairs) < batch_size]
        if small or not sets:
            raise ConfigError(f"{small or 'no set'} has {batch_size} pairs; lower batch_size or leave the set out.")
        self.sets, self.tokenizer, self.prompts = tuple(sets), tokenizer, prompts
        self.batch_size, self.max_tokens, self.hard_negatives, self.seed = batch_size, max_tokens, hard_negatives, seed
        self.default_task_share, self.lower_case_share = default_task_share, lower_case_share
        share = np.sqrt([min(len(s.pairs), set_cap) for s in sets])
        self.rates = share / share.sum()

    def at(self, step: int) -> Batch:
        """The batch of that step."""
        draw = np.random.default_rng((self.seed, step))
        chosen = self.sets[draw.choice(len(self.sets), p=self.rates)]
        drawn = [chosen.pairs[i] for i in draw.choice(len(chosen.pairs), self.batch_size, replace=False)]
        pairs = [pair if i < self.hard_negatives else Pair(pair.query, pair.positive) for i, pair in enumerate(drawn)]
        task = _TASK_OF_KIND.get(chosen.kind, chosen.kind)
        if task != SIMILARITY and draw.random() < self.default_task_share:
            task = DEFAULT_TASK
        query_prompt = self.prompts.query(task)
        document_prompt = query_prompt if task == SIMILARITY else self.prompts.document()
        lower = draw.random(len(pairs)) < self.lower_case_share
        queries = [pair.query.lower() if low else pair.query for pair, low in zip(pairs, lower, strict=True)]
        documents = [pair.positive for pair in pairs] + [pair.negative for pair in pairs if pair.negative]
        return Batch(
            name=chosen.name,
            queries=tokenize(self.tokenizer, query_prompt, queries, self.max_tokens // 2),
            documents=tokenize(self.tokenizer, document_prompt, documents, self.max_tokens),
            masked=false_negatives(pairs),
        )


def tokenize(tokenizer: Tokenizer, prompt: str, texts: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
    """Prompted token rows, cut at `max_tokens`."""
    # No piece is longer than 16 characters by default, so this cut never reaches a token that would be kept.
    return [tokenizer.encode(prompt + text[: 16 * max_tokens], max_tokens=max_tokens, overflow="truncate").ids for text in texts]


def pad(rows: Sequence[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids padded on the right, and the (B, T) bool mask that is true on real tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask
