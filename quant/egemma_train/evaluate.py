"""How good an encoder is on texts that it was not trained on: nDCG@10 where a query has right
documents, Spearman where pairs have degrees.

Every main score is a plain mean over queries or pairs, so that two models can be compared query by
query (`paired_difference`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from egemma_core.checks import one_of, whole_number
from egemma_core.errors import ConfigError, InputError
from egemma_core.nn.encode import Ids, encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.tokens import Tokenizer
from egemma_core.vectors import shorten
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import Dataset, DatasetConfig
from egemma_train.data.dev_files import (
    Judged,
    Retrieval,
    from_pairs,
    read_retrieval,
    read_similarity,
)
from egemma_train.metrics import best_hits, judge, rank_products

Kind = Literal["retrieval", "similarity", "pairs"]
MAIN = {"retrieval": "ndcg@10", "similarity": "spearman", "pairs": "ndcg@10"}
BLOCK = 64  # queries whose scores against all documents are held at once
SCORE = "score"  # the mean of the sets' main scores
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class DevConfig:
    """A dev set, as a recipe's table names it."""

    name: str
    kind: Kind
    path: str  # in the data folder: a folder (retrieval), or a .jsonl or .jsonl.gz file
    task: str = DEFAULT_TASK  # of the query prompt; both sides of a similarity pair carry it
    # rows of these `lang`; None keeps all. Not for retrieval
    languages: tuple[str, ...] | None = None
    max_queries: int | None = None  # queries, or rows of similarity, chosen by hash; None keeps all
    # right ones are always kept, the others chosen by hash. Fewer documents, higher scores
    max_documents: int | None = None
    # longer texts are cut, and counted; None for the model's own limit
    max_tokens: int | None = None
    dim: int | None = None  # a trained width; None for the full one

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(Kind))
        if not self.name.strip() or "/" in self.name or self.name == SCORE or not self.path:
            raise ConfigError(
                f"name={self.name!r}, path={self.path!r}: a dev set needs a path and a name of "
                f"its own, without '/', other than {SCORE!r}."
            )
        for setting in ("max_queries", "max_documents"):
            if getattr(self, setting) is not None:
                whole_number(setting, getattr(self, setting), 1, hint="Or leave it out.")
        if self.languages is not None and self.kind == "retrieval":
            raise ConfigError("kind='retrieval' has no languages.", hint="Leave them out.")
        if self.max_documents is not None and self.kind == "similarity":
            raise ConfigError("kind='similarity' has no max_documents.", hint="Leave it out.")


@dataclass(frozen=True)
class _DevSet:
    """A dev set as tokens."""

    name: str
    kind: Kind
    dim: int | None
    queries: list[Ids]  # or the left sides
    documents: list[Ids]  # or the right sides
    degrees: list[dict[int, float]]  # of each query's right documents, by index; [] for similarity
    scores: NDArray[np.float64]  # how alike people found each pair; () for retrieval
    facts: dict[str, int]


class DevSets:
    """Dev sets, read and tokenized once.

    Args:
        data: the folder that paths start from.
        held_out: rows kept out of training, as further sets named after their datasets: a query's
            own positive among all positives.
        max_tokens: of the texts in `held_out`.
        max_queries: of each set in `held_out`, chosen by hash.
        precision: of the matrix products.
        chunk_tokens: padded tokens that go through the encoder together.

    Raises:
        InputError: a file is absent or damaged, or a row is bad; names file, line and field.
        ConfigError: no set at all, a name given twice, or limits that cannot be kept.
        PromptError: the model has no prompt for a set's task.
    """

    def __init__(
        self,
        configs: Sequence[DevConfig],
        data: Path,
        tokenizer: Tokenizer,
        prompts: Prompts,
        *,
        held_out: Sequence[Dataset] = (),
        max_queries: int | None = None,
        max_tokens: int | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        chunk_tokens: int = 8192,
    ) -> None:
        names = [config.name for config in configs] + [dataset.name for dataset in held_out]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"The dev sets are named {names}; give at least one, and each name once."
            )
        one_of(
            "precision",
            precision,
            ("float32", "bfloat16"),
            hint="In this model float16 overflows.",
        )
        self.tokenizer, self.prompts = tokenizer, prompts
        self.precision, self.chunk_tokens = precision, chunk_tokens
        self.sets = [self._prepare(config, data) for config in configs]
        for dataset in held_out:
            config = DevConfig(
                name=dataset.name,
                kind="pairs",
                path=dataset.config.path[0],
                task=dataset.config.task,
                max_queries=max_queries,
                max_tokens=max_tokens,
            )
            self.sets.append(self._retrieval(config, from_pairs(dataset), dataset.symmetric))

    def described(self) -> dict[str, dict[str, int]]:
        """Return how many queries and documents (or pairs) of each set are used, of how many.

        It also counts the texts that were cut. Scores of a part of a set are no scores of the set.
        """
        return {found.name: dict(found.facts) for found in self.sets}

    def score(self, encoder: Encoder) -> dict[str, float]:
        """Return the scores of an encoder, each from 0 (Spearman: -1) to 1.

        They are "NAME/ndcg@10", "NAME/recall@10" and "NAME/accuracy@1" (the first hit is right) or
        "NAME/spearman" of each set, and "score", the mean of the sets' nDCG@10 and Spearman.

        Documents of equal score rank in the order of the file. The encoder is left in the mode in
        which it came.

        Raises:
            InputError: a vector is NaN or infinite.
            DimensionError: a set's `dim` was not trained.
        """
        measured = {found.name: self._measure(encoder, found) for found in self.sets}
        scores = {
            f"{name}/{metric}": float(values.mean())
            for name, metrics in measured.items()
            for metric, values in metrics.items()
        }
        return {
            SCORE: float(
                np.mean([scores[f"{found.name}/{MAIN[found.kind]}"] for found in self.sets])
            ),
            **scores,
        }

    def per_query(self, encoder: Encoder) -> dict[str, NDArray[np.float64]]:
        """Return the values of each set whose mean is its main score.

        They are the nDCG@10 of each query, or each pair's product of standardized ranks.
        """
        return {found.name: self._measure(encoder, found)[MAIN[found.kind]] for found in self.sets}

    def _prepare(self, config: DevConfig, data: Path) -> _DevSet:
        if config.kind == "retrieval":
            return self._retrieval(config, read_retrieval(data / config.path), False)
        if config.kind == "similarity":
            return self._similarity(config, read_similarity(data / config.path, config.languages))
        dataset = read_dataset(
            DatasetConfig(
                name=config.name,
                path=(config.path,),
                kind="pairs",
                task=config.task,
                languages=config.languages,
            ),
            data,
        )
        return self._retrieval(config, from_pairs(dataset), dataset.symmetric)

    def _retrieval(self, config: DevConfig, found: Retrieval, symmetric: bool) -> _DevSet:
        queries = _choose(list(found.relevant), config.max_queries)
        right = {document for query in queries for document in found.relevant[query]}
        if config.max_documents is not None and len(right) > config.max_documents:
            raise ConfigError(
                f"dev set {config.name!r}: {len(right)} documents are right answers to its "
                f"{len(queries)} queries, max_documents={config.max_documents}.",
                hint="Raise it, or lower max_queries.",
            )
        others = [document for document in found.documents if document not in right]
        most = None if config.max_documents is None else config.max_documents - len(right)
        kept = right.union(_choose(others, most))
        documents = [document for document in found.documents if document in kept]
        place = {document: index for index, document in enumerate(documents)}
        prompt = self.prompts.query(config.task)
        left, cut_queries = self._tokenize(
            [prompt + found.queries[query] for query in queries], config
        )
        right_texts = [
            (prompt if symmetric else self.prompts.document(title)) + text
            for title, text in (found.documents[document] for document in documents)
        ]
        rows, cut_documents = self._tokenize(right_texts, config)
        facts = {
            "queries": len(queries),
            "of_queries": len(found.queries),
            "without_answer": len(found.queries) - len(found.relevant),
            "documents": len(documents),
            "of_documents": len(found.documents),
            "cut_queries": cut_queries,
            "cut_documents": cut_documents,
        }
        degrees = [
            {place[document]: degree for document, degree in found.relevant[query].items()}
            for query in queries
        ]
        return _DevSet(
            config.name, config.kind, config.dim, left, rows, degrees, np.zeros(0), facts
        )

    def _similarity(self, config: DevConfig, found: Sequence[Judged]) -> _DevSet:
        pairs = [
            found[index]
            for index in _choose(
                range(len(found)), config.max_queries, [pair.a + "\0" + pair.b for pair in found]
            )
        ]
        scores = np.array([pair.score for pair in pairs], np.float64)
        if len(set(scores.tolist())) < 2:
            raise InputError(
                f"dev set {config.name!r}: of its {len(pairs)} pairs no two differ in score, so "
                "there is no order to compare with."
            )
        prompt = self.prompts.query(config.task)
        left, cut_left = self._tokenize([prompt + pair.a for pair in pairs], config)
        right, cut_right = self._tokenize([prompt + pair.b for pair in pairs], config)
        facts = {"pairs": len(pairs), "of_pairs": len(found), "cut_texts": cut_left + cut_right}
        return _DevSet(config.name, config.kind, config.dim, left, right, [], scores, facts)

    def _tokenize(self, texts: Sequence[str], config: DevConfig) -> tuple[list[Ids], int]:
        encoded = [
            self.tokenizer.encode(text, max_tokens=config.max_tokens, overflow="truncate")
            for text in texts
        ]
        return [tokens.ids for tokens in encoded], sum(tokens.truncated for tokens in encoded)

    def _measure(self, encoder: Encoder, found: _DevSet) -> dict[str, NDArray[np.float64]]:
        queries = self._embed(encoder, found.queries, found.dim)
        documents = self._embed(encoder, found.documents, found.dim)
        if found.kind == "similarity":
            cosines = (queries.astype(np.float64) * documents).sum(1)
            return {"spearman": rank_products(cosines, found.scores)}
        best = np.concatenate(
            [
                best_hits(queries[start : start + BLOCK] @ documents.T)
                for start in range(0, len(queries), BLOCK)
            ]
        )
        return judge(best, found.degrees)

    def _embed(self, encoder: Encoder, rows: list[Ids], dim: int | None) -> NDArray[np.float32]:
        """Return the (rows, dim) float32 unit vectors of token rows."""
        # equal texts get equal vectors, to the last bit: ties stay ties
        texts = {row: index for index, row in enumerate(dict.fromkeys(rows))}
        was_training = encoder.training
        device = next(encoder.parameters()).device
        encoder.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"),
            ):
                vectors = encode_rows(
                    encoder, list(texts), self.tokenizer.pad_id, self.chunk_tokens, device
                )
        finally:
            encoder.train(was_training)
        short = shorten(vectors.float().cpu().numpy(), dim, encoder.config.dims)
        return short[[texts[row] for row in rows]]


def _choose(items: Sequence[T], count: int | None, texts: Sequence[str] | None = None) -> list[T]:
    """Return `count` items in their order: those with the smallest hashes of their ids or `texts`.

    They are the same ones on every machine.
    """
    if count is None or count >= len(items):
        return list(items)
    named = texts or [str(item) for item in items]
    keys = [hashlib.sha256(text.encode()).digest() for text in named]
    by_hash = sorted(range(len(items)), key=lambda index: (keys[index], index))
    return [items[index] for index in sorted(by_hash[:count])]
