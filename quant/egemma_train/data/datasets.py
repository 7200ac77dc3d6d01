"""What a dataset is: where its rows lie, what they mean, and the pairs that they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import ConfigError

RowKind = Literal["pairs", "labels", "similarity", "translations"]
Positive = Literal["label", "same"]

SIMILARITY_TASK = "sentence similarity"
# Scores of a similarity row: below the first, two sentences differ in more than details.
MIN_SCORE, MAX_SCORE = 4.0, 5.0
# Settings that belong to one kind of rows.
_ONLY_FOR = {"only_task": "pairs", "positive": "labels", "min_score": "similarity"}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where a dataset lies, and what its rows mean."""

    name: str
    path: tuple[str, ...]  # .jsonl or .jsonl.gz files in the data folder; * and ? as in a shell
    kind: RowKind  # which fields a row has; see egemma_train.data.rows
    task: str  # of the query prompt, as Prompts.query takes it
    group: str | None = None  # what even sampling counts as one type of task; None for `task`
    only_task: str | None = None  # pairs: keep rows of this `task`
    languages: tuple[str, ...] | None = None  # keep rows of these `lang`; None keeps all
    # share of batches against the other sets', where sampling is by rates
    rate: float | None = None
    limit: int | None = None  # at most this many rows, chosen by hash
    # labels: the label in words (None too), or another text of the label
    positive: Positive | None = None
    # similarity: lowest score of a pair that means the same; None for 4 of 5
    min_score: float | None = None
    symmetric: bool | None = None  # both sides are queries of the task; None: see `is_symmetric`

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.path or not self.task.strip():
            raise ConfigError(
                f"name={self.name!r}, path={self.path}, task={self.task!r}: a dataset needs a "
                "name, a path and a task."
            )
        one_of("kind", self.kind, get_args(RowKind))
        for setting, kind in _ONLY_FOR.items():
            if getattr(self, setting) is not None and self.kind != kind:
                raise ConfigError(
                    f"{setting}={getattr(self, setting)!r} is for rows of kind {kind!r}, these "
                    f"are {self.kind!r}.",
                    hint="Leave it out.",
                )
        if self.positive is not None:
            one_of("positive", self.positive, get_args(Positive))
        if self.rate is not None:
            number("rate", self.rate, 0)
        if self.limit is not None:
            whole_number("limit", self.limit, 1, hint="Leave it out to keep all rows.")
        if self.min_score is not None:
            number("min_score", self.min_score, 0, MAX_SCORE)
        if self.languages is not None and not self.languages:
            raise ConfigError("languages=() keeps no row.", hint="Leave it out to keep all.")

    @property
    def is_symmetric(self) -> bool:
        """Say whether both sides carry the query prompt: `symmetric` decides it where it is given.

        Otherwise they do where both are texts of one kind, of which none answers the other.
        """
        if self.symmetric is not None:
            return self.symmetric
        return (
            self.kind in ("similarity", "translations")
            or self.positive == "same"
            or self.task == SIMILARITY_TASK
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A pair of texts that belong together, without prompts."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()  # hard negatives; one is drawn each time
    title: str | None = None  # of the positive
    negative_titles: tuple[str | None, ...] = ()  # of the negatives; () for none


@dataclass(frozen=True)
class Dataset:
    """The rows of one dataset; every batch comes from one of these."""

    config: DatasetConfig
    rows: tuple[Row, ...]
    dropped: Mapping[str, int]  # how many rows were left out, by reason
    # of the rows, where positives are other texts of the same label
    labels: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The dataset's name in the recipe."""
        return self.config.name

    @property
    def group(self) -> str:
        """What even sampling counts as one type of task."""
        return self.config.group or self.config.task

    @property
    def symmetric(self) -> bool:
        """Say whether both sides carry the query prompt."""
        return self.config.is_symmetric


def with_title(title: str | None, text: str) -> str:
    """Return a text as a teacher reads it: its title, where there is one, on a line in front."""
    return f"{title}\n{text}" if title else text
