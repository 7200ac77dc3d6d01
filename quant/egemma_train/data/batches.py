"""The batch of any step: which dataset, which of its rows, and their tokens.

A pure function of (seed, step), so a run can resume anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import ConfigError
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.tokens import Tokenizer
from egemma_train.data.datasets import Dataset, with_title

Ids = tuple[int, ...]
Sampling = Literal["even", "rates", "size"]
_GOLDEN = (math.sqrt(5) - 1) / 2
_BLOCK = 4096  # steps between two remembered counts
_DRAW, _ORDER = 1, 2  # keep the random numbers of different uses apart


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What a step sees."""

    batch_size: int  # pairs of a step, over all ranks
    # longer ones are cut and counted; prompt, BOS and EOS included. Both sides of symmetric sets
    max_query_tokens: int = 128
    max_document_tokens: int = 256
    hard_negatives: bool = False  # one of each row that has any
    # "even": groups alike, in a group by the root of the rows; "rates": as datasets say; "size": by
    # rows
    sampling: Sampling = "even"
    # of batches that carry the default query prompt: who searches mixed notes does not name a task
    default_task_share: float = 0.0
    lower_case_share: float = 0.0  # of queries in lower case, as people type them
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, 2)
        whole_number("max_query_tokens", self.max_query_tokens, 3)
        whole_number("max_document_tokens", self.max_document_tokens, 3)
        whole_number("seed", self.seed, 0)
        one_of("hard_negatives", self.hard_negatives, (False, True))
        one_of("sampling", self.sampling, get_args(Sampling))
        number("default_task_share", self.default_task_share, 0, 1)
        number("lower_case_share", self.lower_case_share, 0, 1)


@dataclass(frozen=True)
class Batch:
    """What one step sees: B pairs of one dataset.

    The texts are as the file has them, without prompts, in the file's case.
    """

    dataset: str
    symmetric: bool  # both sides are queries of one task
    queries: list[Ids]  # B token rows; prompt, BOS and EOS included
    positives: list[Ids]  # B
    negatives: list[Ids]  # only of the rows that have one
    has_negative: list[bool]  # B
    query_texts: list[str]  # B
    positive_texts: list[str]  # B; a title, where there is one, stands in front: "title\ntext"
    negative_texts: list[str]  # as `negatives`
    truncated: int  # texts of this batch that were cut


class Batches:
    """Draws batches.

    Datasets take turns so that after any number of steps each has had its share to within a few
    batches: step t goes to the dataset whose part of [0, 1) holds start + t * golden ratio mod 1, a
    sequence that fills every interval evenly. Rows of a dataset come in epochs of ceil(rows / B)
    batches, each epoch in an order of its own; the last batch of an epoch is filled up with rows
    that the epoch has had.

    Raises:
        ConfigError: there is no dataset or two have one name, one is smaller than a batch, rates
            are missing or all 0, or a limit of tokens leaves no room beside the prompt.
        PromptError: a dataset's task or titles have no prompt in this checkpoint.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        tokenizer: Tokenizer,
        prompts: Prompts,
        config: BatchConfig,
    ) -> None:
        if not datasets:
            raise ConfigError(
                "There is no dataset to train on.", hint="Add a table [data.NAME] to the recipe."
            )
        twice = [
            name
            for name, count in Counter(dataset.name for dataset in datasets).items()
            if count > 1
        ]
        if twice:
            raise ConfigError(f"Two datasets are named {', '.join(twice)}; give each its own name.")
        small = [
            f"{dataset.name!r} has {len(dataset.rows):,} rows"
            for dataset in datasets
            if len(dataset.rows) < config.batch_size
        ]
        if small:
            raise ConfigError(
                f"{', '.join(small)}, fewer than batch_size={config.batch_size}.",
                hint="Lower batch_size, or leave such datasets out.",
            )
        self.datasets, self.config = tuple(datasets), config
        self.tokenizer, self.prompts = tokenizer, prompts
        self.rates = rates_of(datasets, config.sampling)
        for dataset in datasets:
            self._check_room(dataset)
        self._ends = np.cumsum(list(self.rates.values()))
        # also of sets behind the last that has a rate, so that none of these is ever drawn
        self._ends[self._ends == self._ends[-1]] = 1.0
        self._start = _key("start", config.seed) / 2**64
        # batches of each dataset before step 0, _BLOCK, 2 * _BLOCK, ...
        self._counts = {0: np.zeros(len(datasets), np.int64)}
        # of each dataset, the epoch at hand and its order
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def at(self, step: int) -> Batch:
        """Return the global batch of a step; each process takes its slice of it."""
        index, earlier = self._turn(step)
        dataset = self.datasets[index]
        draw = np.random.default_rng((_DRAW, self.config.seed, step))
        rows = [dataset.rows[row] for row in self._rows(index, earlier)]
        by_default = draw.random() < self.config.default_task_share and not dataset.symmetric
        query_prompt = self.prompts.query(DEFAULT_TASK if by_default else dataset.config.task)
        # Sentences and code of symmetric sets are not typed by a searcher: their case stays.
        lower = draw.random(len(rows)) < (0 if dataset.symmetric else self.config.lower_case_share)
        which = draw.random(len(rows))
        max_queries = self.config.max_query_tokens
        max_documents = max_queries if dataset.symmetric else self.config.max_document_tokens

        def document_prompt(title: str | None) -> str:
            return query_prompt if dataset.symmetric else self.prompts.document(title)

        query_texts, positive_texts, negative_texts, has_negative = [], [], [], []
        queries, positives, negatives = [], [], []
        for row, in_lower, chance in zip(rows, lower.tolist(), which.tolist(), strict=True):
            query_texts.append(row.query)
            queries.append((query_prompt, row.query.lower() if in_lower else row.query))
            positive_texts.append(with_title(row.title, row.positive))
            positives.append((document_prompt(row.title), row.positive))
            has_negative.append(self.config.hard_negatives and bool(row.negatives))
            if has_negative[-1]:
                chosen = int(chance * len(row.negatives))
                title = row.negative_titles[chosen] if row.negative_titles else None
                negative_texts.append(with_title(title, row.negatives[chosen]))
                negatives.append((document_prompt(title), row.negatives[chosen]))
        cut: list[bool] = []
        return Batch(
            dataset=dataset.name,
            symmetric=dataset.symmetric,
            queries=self._tokens(queries, max_queries, cut),
            positives=self._tokens(positives, max_documents, cut),
            negatives=self._tokens(negatives, max_documents, cut),
            has_negative=has_negative,
            query_texts=query_texts,
            positive_texts=positive_texts,
            negative_texts=negative_texts,
            truncated=sum(cut),
        )

    def _turn(self, step: int) -> tuple[int, int]:
        """Return which dataset a step takes, and how many batches of it earlier steps took."""
        if step < 0:
            raise ConfigError(f"step={step}: steps count from 0.")
        last = step // _BLOCK
        for block in range(max(self._counts), last):
            turns = self._turns(block * _BLOCK, (block + 1) * _BLOCK)
            self._counts[block + 1] = self._counts[block] + np.bincount(
                turns, minlength=len(self.datasets)
            )
        turns = self._turns(last * _BLOCK, step + 1)
        index = int(turns[-1])
        return index, int(self._counts[last][index] + np.count_nonzero(turns[:-1] == index))

    def _turns(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the index of the dataset of each step, (last - first,)."""
        return np.searchsorted(
            self._ends, (self._start + np.arange(first, last) * _GOLDEN) % 1.0, side="right"
        )

    def _rows(self, index: int, earlier: int) -> NDArray[np.int64]:
        """Return the (B,) rows of a dataset's batch number `earlier`."""
        dataset, size = self.datasets[index], self.config.batch_size
        epoch, batch = divmod(earlier, -(-len(dataset.rows) // size))
        at_hand, order = self._orders.get(index, (-1, np.empty(0, np.int64)))
        if at_hand != epoch:
            order = np.random.default_rng(
                (_ORDER, self.config.seed, _key(dataset.name), epoch)
            ).permutation(len(dataset.rows))
            self._orders[index] = (epoch, order)
        start = min(batch * size, len(order) - size)
        return order[start : start + size]

    def _tokens(self, texts: Sequence[tuple[str, str]], limit: int, cut: list[bool]) -> list[Ids]:
        """Return the token rows of (prompt, text); adds to `cut` whether each was cut."""
        encoded = [
            self.tokenizer.encode(prompt + text, max_tokens=limit, overflow="truncate")
            for prompt, text in texts
        ]
        cut += [tokens.truncated for tokens in encoded]
        return [tokens.ids for tokens in encoded]

    def _check_room(self, dataset: Dataset) -> None:
        if not dataset.symmetric and any(
            row.title or any(row.negative_titles) for row in dataset.rows
        ):
            self.prompts.document("title")
        prompts = [("max_query_tokens", self.prompts.query(dataset.config.task))]
        if not dataset.symmetric:
            prompts.append(("max_document_tokens", self.prompts.document()))
            if self.config.default_task_share:
                prompts.append(("max_query_tokens", self.prompts.query()))
        for setting, prompt in prompts:
            limit, needed = (
                getattr(self.config, setting),
                self.tokenizer.encode(prompt).num_tokens + 1,
            )
            if not needed <= limit <= self.tokenizer.max_tokens:
                raise ConfigError(
                    f"{setting}={limit} must lie from {needed}, what the prompt {prompt!r} and one "
                    f"token of text need, to the model's {self.tokenizer.max_tokens}."
                )


class BatchesAhead:
    """The same batches, the next one made by a thread while the step computes.

    Close it, or use it in a `with`.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def at(self, step: int) -> Batch:
        """Return the batch of a step, which is ready if it is the one after the last.

        An error in making it is raised here.
        """
        prepared = self._next
        if prepared is not None and prepared[0] == step:
            future = prepared[1]
        else:
            if prepared is not None:
                prepared[1].cancel()
            future = self._thread.submit(self._batches.at, step)
        self._next = (step + 1, self._thread.submit(self._batches.at, step + 1))
        return future.result()

    def close(self) -> None:
        """Wait for the batch at hand, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def rates_of(datasets: Sequence[Dataset], sampling: Sampling) -> dict[str, float]:
    """Return the share of batches that each dataset gets; they sum to 1.

    Raises:
        ConfigError: sampling is by rates, and one is missing or all are 0.
    """
    if sampling == "rates":
        missing = [dataset.name for dataset in datasets if dataset.config.rate is None]
        if missing:
            raise ConfigError(
                f"sampling='rates', but {', '.join(map(repr, missing))} has no rate.",
                hint="Give every dataset one, or sample 'even' or by 'size'.",
            )
        weights = [float(dataset.config.rate or 0) for dataset in datasets]
    elif sampling == "size":
        weights = [float(len(dataset.rows)) for dataset in datasets]
    else:
        roots = [math.sqrt(len(dataset.rows)) for dataset in datasets]
        of_group: defaultdict[str, float] = defaultdict(float)
        for dataset, root in zip(datasets, roots, strict=True):
            of_group[dataset.group] += root
        weights = [
            root / of_group[dataset.group] for dataset, root in zip(datasets, roots, strict=True)
        ]
    total = sum(weights)
    if total <= 0:
        raise ConfigError("sampling='rates', but all rates are 0.")
    return {dataset.name: weight / total for dataset, weight in zip(datasets, weights, strict=True)}


def _key(*parts: object) -> int:
    """Return 64 bits that follow from these parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
