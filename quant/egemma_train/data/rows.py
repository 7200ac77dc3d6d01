"""Training rows from JSON lines, as pairs of texts.

A row that is no row is an error that names its file, line and field; a good row that teaches
nothing (both sides equal, too low a score, another language) is left out and counted in
`Dataset.dropped`.

| kind | a row's fields | becomes |
| --- | --- | --- |
| pairs | query, positive; negative, title, negative_title, task, lang where there are any | itself;
`negative` is one text or a list | | labels | text, label | the text, and its label in words or
another text of that label | | similarity | a, b, score from 0 to 5 | a, b, if the score is high
enough | | translations | a, b | a, b |
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from egemma_core.errors import ConfigError, InputError
from egemma_core.json_lines import BadRowError, checked_text, lines_of, parse_row, shortened

SIMILARITY_TASK = "sentence similarity"
# of a similarity row: below the first, two sentences differ in more than details
MIN_SCORE, MAX_SCORE = 4.0, 5.0
SHOWN_FAULTS = 10
_FIELDS = {
    "pairs": ("query", "positive"),
    "labels": ("text", "label"),
    "similarity": ("a", "b", "score"),
    "translations": ("a", "b"),
}
_OPTIONAL = {"pairs": ("negative", "title", "negative_title")}
# settings that one kind has
_OF_KIND = {"only_task": "pairs", "positive": "labels", "min_score": "similarity"}

_Check = tuple[str, Callable[[Any], bool]]
_TEXT: _Check = ("a string", lambda value: isinstance(value, str))
_TEXTS: _Check = (
    "a string or a list of strings",
    lambda value: (
        isinstance(value, str)
        or (isinstance(value, list | tuple) and all(isinstance(text, str) for text in value))
    ),
)
_NUMBER: _Check = (
    "a number",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool),
)
_COUNT: _Check = (
    "a whole number",
    lambda value: isinstance(value, int) and not isinstance(value, bool),
)
_SWITCH: _Check = ("true or false", lambda value: isinstance(value, bool))
_SETTINGS = {
    "path": _TEXTS,
    "kind": _TEXT,
    "task": _TEXT,
    "group": _TEXT,
    "only_task": _TEXT,
    "languages": _TEXTS,
    "rate": _NUMBER,
    "limit": _COUNT,
    "positive": _TEXT,
    "min_score": _NUMBER,
    "symmetric": _SWITCH,
}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where a dataset lies, and what its rows mean."""

    name: str
    path: tuple[str, ...]  # .jsonl or .jsonl.gz files in the data folder; * and ? as in a shell
    kind: str  # a key of the table above
    task: str  # of the query prompt, as Prompts.query takes it
    group: str | None = None  # what even sampling counts as one type of task; None for `task`
    only_task: str | None = None  # pairs: keep rows of this `task`
    languages: tuple[str, ...] | None = None  # keep rows of these `lang`; None keeps all
    # share of batches against the other sets', where sampling is by rates
    rate: float | None = None
    limit: int | None = None  # at most this many rows, chosen by hash
    # labels: the label in words (None too), or another text of the label
    positive: Literal["label", "same"] | None = None
    # similarity: lowest score of a pair that means the same; None for 4 of 5
    min_score: float | None = None
    symmetric: bool | None = None  # both sides are queries of the task; None: see `is_symmetric`

    def __post_init__(self) -> None:
        here = f"dataset {self.name!r}"
        if not self.name.strip() or not self.path or not self.task.strip():
            raise ConfigError(
                f"{here}: path={self.path}, task={self.task!r}: a dataset needs a name, a path and "
                "a task."
            )
        if self.kind not in _FIELDS:
            raise ConfigError(f"{here}: kind={self.kind!r}: one of {list(_FIELDS)}.")
        for setting, kind in _OF_KIND.items():
            if getattr(self, setting) is not None and self.kind != kind:
                raise ConfigError(
                    f"{here}: {setting}={getattr(self, setting)!r} is for rows of kind {kind!r}, "
                    f"these are {self.kind!r}. Leave it out."
                )
        if self.positive not in (None, "label", "same"):
            raise ConfigError(f"{here}: positive={self.positive!r}: 'label' or 'same'.")
        if self.rate is not None and not 0 <= self.rate < float("inf"):
            raise ConfigError(f"{here}: rate={self.rate}: a share, 0 or more.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"{here}: limit={self.limit}: at least 1; leave it out to keep all rows."
            )
        if self.min_score is not None and not 0 <= self.min_score <= MAX_SCORE:
            raise ConfigError(f"{here}: min_score={self.min_score}: from 0 to {MAX_SCORE:g}.")
        if self.languages is not None and not self.languages:
            raise ConfigError(f"{here}: languages=(): leave it out to keep all.")

    @classmethod
    def of(cls, name: str, table: Mapping[str, Any]) -> DatasetConfig:
        """From a recipe's table [data.NAME].

        Raises:
            ConfigError: a key is unknown, missing or of the wrong type, or a value cannot work.
        """
        for key, value in table.items():
            if key not in _SETTINGS:
                near = difflib.get_close_matches(key, _SETTINGS, 1)
                raise ConfigError(
                    f"dataset {name!r}: no setting is named {key!r}; "
                    f"{f'did you mean {near[0]!r}?' if near else f'there are {list(_SETTINGS)}.'}"
                )
            wanted, fits = _SETTINGS[key]
            if not fits(value):
                raise ConfigError(
                    f"dataset {name!r}: {key}={value!r} is {type(value).__name__}, not {wanted}."
                )
        missing = [key for key in ("path", "kind", "task") if key not in table]
        if missing:
            raise ConfigError(
                f"dataset {name!r}: no {', no '.join(missing)}; it has {list(table)}."
            )
        lists = {
            key: (table[key],) if isinstance(table[key], str) else tuple(table[key])
            for key in ("path", "languages")
            if key in table
        }
        return cls(name=name, **{**table, **lists})

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides carry the query prompt: texts of one kind, none of which answers the
        other, unless `symmetric` says it.
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
        return self.config.name

    @property
    def group(self) -> str:
        return self.config.group or self.config.task

    @property
    def symmetric(self) -> bool:
        return self.config.is_symmetric


def read_dataset(config: DatasetConfig, data: Path) -> Dataset:
    """All rows of a dataset.

    A query that equals its positive is an error in `pairs`, where it is a column given twice; in
    symmetric sets and the other kinds such rows occur as a matter of course and are dropped. A
    negative that equals the positive is always an error.

    Args:
        data: the folder that paths start from.

    Raises:
        InputError: a file is absent or damaged, rows are bad (the first ten are named, and how many
            there are), or none is left.
    """
    faults: list[str] = []
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    where: list[str] = []
    languages: set[str] = set()
    num_faults = 0
    for path in _files(config, data):
        for number, line in lines_of(path):
            try:
                row = _row(parse_row(line, number), config, languages)
                if isinstance(row, str):
                    dropped[row] += 1
                else:
                    rows.append(row)
                    where.append(f"{path}, line {number}")
            except BadRowError as bad:
                num_faults += 1
                if len(faults) < SHOWN_FAULTS:
                    faults.append(f"{path}, line {number}: {bad}")
    if faults:
        more = "" if num_faults == len(faults) else f" (first {len(faults)} of {num_faults:,})"
        raise InputError(
            f"dataset {config.name!r} has {'a bad row' if num_faults == 1 else 'bad rows'}{more}:\n"
            "  " + "\n  ".join(faults)
        )
    absent = sorted(set(config.languages or ()) - languages)
    if absent:
        raise InputError(
            f"dataset {config.name!r}: no row has lang {', '.join(map(repr, absent))}; there are "
            f"{sorted(languages)[:50]}."
        )
    if not rows:
        raise InputError(
            f"dataset {config.name!r}: no row is left of {sum(dropped.values()):,}; left out: "
            f"{dict(dropped) or 'none, the files are empty'}."
        )
    if config.kind == "labels":
        _check_labels(rows, where, config)
    if config.limit is not None and len(rows) > config.limit:
        kept = sorted(
            sorted(
                range(len(rows)), key=lambda i: (_hash(rows[i].query + "\0" + rows[i].positive), i)
            )[: config.limit]
        )
        dropped["limit"] = len(rows) - len(kept)
        rows = [rows[i] for i in kept]
    return (
        _with_partners(config, rows, dropped)
        if config.positive == "same"
        else Dataset(config, tuple(rows), dict(dropped))
    )


def hold_out(dataset: Dataset, one_in: int) -> tuple[Dataset, Dataset]:
    """The dataset without about one row in `one_in`, and those rows: by hash, so the same ones in
    every run.

    The hash is of the positive, so that equal positives stay together; of the text where rows are
    `labels`, because labels are few.

    Raises:
        ConfigError: a part would be empty.
    """
    if one_in < 2:
        raise ConfigError(f"one_in={one_in}: at least 2.")
    parts: tuple[list[int], list[int]] = ([], [])
    for index, row in enumerate(dataset.rows):
        parts[
            _hash(row.query if dataset.config.kind == "labels" else row.positive) % one_in == 0
        ].append(index)
    if not all(parts):
        raise ConfigError(
            f"dataset {dataset.name!r}: of {len(dataset.rows)} rows {len(parts[1])} would be held "
            f"out; choose another one_in than {one_in}."
        )
    made = []
    for indices, others, reason in (
        (parts[0], parts[1], "held out"),
        (parts[1], parts[0], "not held out"),
    ):
        rows, dropped = (
            [dataset.rows[index] for index in indices],
            Counter({**dataset.dropped, reason: len(others)}),
        )
        if dataset.labels is None:
            made.append(Dataset(dataset.config, tuple(rows), dict(dropped)))
        else:  # texts of one part are no partners of the other's
            made.append(
                _with_partners(
                    dataset.config,
                    [
                        replace(row, positive=dataset.labels[i], negatives=())
                        for i, row in zip(indices, rows, strict=True)
                    ],
                    dropped,
                )
            )
    return made[0], made[1]


def _files(config: DatasetConfig, data: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in config.path:
        matches = sorted(data.glob(pattern)) if set("*?[") & set(pattern) else [data / pattern]
        if not matches or not all(path.is_file() for path in matches):
            raise InputError(
                f"dataset {config.name!r}: no file {data / pattern}. Paths start from the data "
                "folder."
            )
        found += matches
    wrong = [str(path) for path in found if not path.name.endswith((".jsonl", ".jsonl.gz"))]
    if wrong or len(set(found)) < len(found):
        problem = "a file is named twice by path"
        if wrong:
            problem = f"{wrong[0]} is not a .jsonl or .jsonl.gz file"
        raise InputError(f"dataset {config.name!r}: {problem}.")
    return found


def _row(fields: Mapping[str, Any], config: DatasetConfig, languages: set[str]) -> Row | str:
    """The row, its texts checked, or the reason why it is left out; adds its language to
    `languages` where these are filtered.
    """
    if config.languages is not None:
        language = _text(fields, "lang", config.kind)
        languages.add(language)
        if language not in config.languages:
            return "other language"
    if config.only_task is not None and _text(fields, "task", config.kind) != config.only_task:
        return "other task"
    _check_names(config.kind, tuple(fields))
    first, second = _FIELDS[config.kind][:2]
    query, positive = _text(fields, first, config.kind), _text(fields, second, config.kind)
    if config.kind == "similarity":
        score = fields.get("score")
        # NaN is in no range
        if (
            not isinstance(score, int | float)
            or isinstance(score, bool)
            or not 0 <= score <= MAX_SCORE
        ):
            raise BadRowError(
                f"field 'score': found {shortened(score)}, want a number from 0 to {MAX_SCORE:g}."
            )
        lowest = MIN_SCORE if config.min_score is None else config.min_score
        if score < lowest:
            return f"score below {lowest:g}"
    if config.positive == "same":
        return Row(query, positive)  # the label, until the row has a partner
    if config.kind == "labels":
        positive = positive.replace("_", " ")
    if query == positive:
        if config.kind == "pairs" and not config.is_symmetric:
            raise BadRowError(
                f"query and positive are both {shortened(query)}: such a row teaches nothing. Is a "
                "column given twice?"
            )
        return "both sides equal"
    return (
        Row(query, positive, *_beside(fields, config, query, positive))
        if config.kind == "pairs"
        else Row(query, positive)
    )


def _beside(
    fields: Mapping[str, Any], config: DatasetConfig, query: str, positive: str
) -> tuple[tuple[str, ...], str | None, tuple[str | None, ...]]:
    """Negatives, title and the negatives' titles of a row of `pairs`."""
    negatives = tuple(checked_text(text, "negative") for text in _listed(fields.get("negative")))
    title = _title(fields.get("title"), "title")
    titles = tuple(_title(text, "negative_title") for text in _listed(fields.get("negative_title")))
    for right, name in ((positive, "positive"), (query, "query")):
        if right in negatives and (name == "positive" or config.is_symmetric):
            raise BadRowError(
                f"field 'negative': equals the {name}, {shortened(right)}. Leave it out."
            )
    if titles and len(titles) != len(negatives):
        raise BadRowError(
            f"field 'negative_title': {len(titles)} titles for {len(negatives)} negatives."
        )
    if config.is_symmetric and (title or any(titles)):
        raise BadRowError(
            "field 'title': both sides of a symmetric dataset are queries, which have none. Put it "
            "into the text."
        )
    if title and negatives and not titles:
        raise BadRowError(
            "field 'negative_title': absent, but the positive has a title: the model would learn "
            "to look for titles. Add the negatives' titles too."
        )
    return negatives, title, titles


def _text(fields: Mapping[str, Any], field: str, kind: str) -> str:
    if field not in fields:
        raise BadRowError(
            f"no field {field!r}, only {list(fields)}; a row of kind {kind!r} has "
            f"{list(_FIELDS[kind])}."
        )
    return checked_text(fields[field], field)


def _listed(value: object) -> Sequence[object]:
    return () if value is None else value if isinstance(value, list) else (value,)


def _title(value: object, field: str) -> str | None:
    return None if value is None or value == "" else checked_text(value, field)


@functools.lru_cache(maxsize=1024)
def _check_names(kind: str, names: tuple[str, ...]) -> None:
    """Refuse a field that looks like an optional one with its name misspelled: it would be
    ignored.
    """
    known = (*_FIELDS[kind], *_OPTIONAL.get(kind, ()), "task", "lang", "id")
    for name in set(names) - set(known):
        near = difflib.get_close_matches(
            name.lower(),
            [field for field in _OPTIONAL.get(kind, ()) if field not in names],
            1,
            0.75,
        )
        if near:
            raise BadRowError(
                f"field {name!r} is not read; is it {near[0]!r}? Rename it, or remove it."
            )


def _check_labels(rows: Sequence[Row], where: Sequence[str], config: DatasetConfig) -> None:
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row.positive, set()).add(row.query)
    if len(texts) < 2:
        raise InputError(
            f"dataset {config.name!r}: all {len(rows):,} rows have the label "
            f"{next(iter(texts))!r}: there is nothing to tell apart."
        )
    alone = (
        [place for row, place in zip(rows, where, strict=True) if len(texts[row.positive]) == 1]
        if config.positive == "same"
        else []
    )
    if alone:
        raise InputError(
            f"dataset {config.name!r}: {len(alone):,} rows have a label that no other text has "
            f"(first: {alone[0]}), so positive='same' has no "
            "partner for them. Add texts, remove the rows, or take positive='label'."
        )


def _with_partners(config: DatasetConfig, rows: Sequence[Row], dropped: Counter[str]) -> Dataset:
    """Rows (text, label) as (text, another text of the label, a text of another label).

    The texts of a label stand in a circle by hash, and each one's partner is the next; the negative
    is drawn by hash as well. So the rows depend on nothing but the texts. A text left alone with
    its label, by a limit or a split, is dropped.
    """
    by_label: dict[str, list[str]] = {}
    for label, text in sorted(
        {(row.positive, row.query) for row in rows},
        key=lambda pair: (pair[0], _hash(pair[1]), pair[1]),
    ):
        by_label.setdefault(label, []).append(text)
    texts = sorted(
        {text for group in by_label.values() for text in group},
        key=lambda text: (_hash(text), text),
    )
    partner = {
        (label, text): group[(i + 1) % len(group)]
        for label, group in by_label.items()
        for i, text in enumerate(group)
    }
    labels_of: dict[str, set[str]] = {}
    for label, text in partner:
        labels_of.setdefault(text, set()).add(label)
    made, labels = [], []
    for row in rows:
        positive = partner[row.positive, row.query]
        start = _hash(row.query + "\0" + row.positive)
        after = (
            texts[(start + i) % len(texts)]
            for i in range(len(texts) if len(by_label[row.positive]) < len(texts) else 0)
        )
        wrong = next((text for text in after if row.positive not in labels_of[text]), None)
        if positive == row.query or wrong is None:
            dropped["no other text of its label, or none of another"] += 1
        else:
            made.append(Row(row.query, positive, (wrong,)))
            labels.append(row.positive)
    if not made:
        raise InputError(
            f"dataset {config.name!r}: no row is left of {len(rows):,}: none has both another text "
            "of its label and one of another label."
        )
    return Dataset(config, tuple(made), dict(dropped), tuple(labels))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
