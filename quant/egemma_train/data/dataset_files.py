"""The rows of a dataset, read from its files, and the part of them that is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError, InputError
from egemma_core.json_lines import BadRowError, lines_of, parse_row
from egemma_train.data.datasets import Dataset, DatasetConfig, Row
from egemma_train.data.labels import check_labels, hash_of, with_partners
from egemma_train.data.rows import read_row

SHOWN_FAULTS = 10


def read_dataset(config: DatasetConfig, data: Path) -> Dataset:
    """Read all rows of a dataset, in the order of its files.

    A query that equals its positive is an error in `pairs`, where it is a column given twice; in
    symmetric sets and the other kinds such rows occur as a matter of course and are dropped. A
    negative that equals the positive is always an error.

    Args:
        data: the folder that paths start from.

    Raises:
        InputError: a file is absent or damaged, rows are bad (the first ten are named, and how many
            there are), or none is left.
    """
    found = _Found()
    for path in _files(config, data):
        for number, line in lines_of(path):
            try:
                row = read_row(parse_row(line, number), config, found.languages)
            except BadRowError as bad:
                found.num_faults += 1
                if len(found.faults) < SHOWN_FAULTS:
                    found.faults.append(f"{path}, line {number}: {bad}")
                continue
            if isinstance(row, str):
                found.dropped[row] += 1
            else:
                found.rows.append(row)
                found.where.append(f"{path}, line {number}")
    _check(found, config)
    rows, dropped = found.rows, found.dropped
    if config.limit is not None and len(rows) > config.limit:
        kept = _chosen(rows, config.limit)
        dropped["limit"] = len(rows) - len(kept)
        rows = [rows[index] for index in kept]
    if config.positive == "same":
        return with_partners(config, rows, dropped)
    return Dataset(config, tuple(rows), dict(dropped))


@dataclass
class _Found:
    """What the files of a dataset hold."""

    rows: list[Row] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # file and line of each row
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out, by reason
    languages: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)  # the first ones
    num_faults: int = 0


def _check(found: _Found, config: DatasetConfig) -> None:
    """Refuse files with bad rows, without rows, or without a language that was asked for."""
    here = f"dataset {config.name!r}"
    if found.faults:
        shown, count = len(found.faults), found.num_faults
        more = "" if count == shown else f" (first {shown} of {count:,})"
        raise InputError(
            f"{here} has {'a bad row' if count == 1 else 'bad rows'}{more}:\n  "
            + "\n  ".join(found.faults)
        )
    absent = sorted(set(config.languages or ()) - found.languages)
    if absent:
        raise InputError(
            f"{here}: no row has lang {', '.join(map(repr, absent))}; there are "
            f"{sorted(found.languages)[:50]}."
        )
    if not found.rows:
        raise InputError(
            f"{here}: no row is left of {sum(found.dropped.values()):,}; left out: "
            f"{dict(found.dropped) or 'none, the files are empty'}."
        )
    if config.kind == "labels":
        check_labels(found.rows, found.where, config)


def _chosen(rows: Sequence[Row], count: int) -> list[int]:
    """Return the indices of the `count` rows with the smallest hashes, rising."""

    def key(index: int) -> tuple[int, int]:
        return hash_of(rows[index].query + "\0" + rows[index].positive), index

    return sorted(sorted(range(len(rows)), key=key)[:count])


def hold_out(dataset: Dataset, one_in: int) -> tuple[Dataset, Dataset]:
    """Return the dataset without about one row in `one_in`, and those rows as another dataset.

    Rows are chosen by the hash of the positive, so that equal positives stay together and every run
    holds out the same ones; by that of the text where rows are `labels`, because labels are few.

    Raises:
        ConfigError: a part would be empty.
    """
    whole_number("one_in", one_in, 2)
    parts: tuple[list[int], list[int]] = ([], [])
    for index, row in enumerate(dataset.rows):
        text = row.query if dataset.config.kind == "labels" else row.positive
        parts[hash_of(text) % one_in == 0].append(index)
    if not all(parts):
        raise ConfigError(
            f"dataset {dataset.name!r}: of {len(dataset.rows)} rows {len(parts[1])} would be held "
            "out, so that a part is empty.",
            hint=f"Choose another one_in than {one_in}.",
        )
    kept = _part(dataset, parts[0], {"held out": len(parts[1])})
    return kept, _part(dataset, parts[1], {"not held out": len(parts[0])})


def _part(dataset: Dataset, indices: Sequence[int], others: Mapping[str, int]) -> Dataset:
    """Return these rows of a dataset; texts of one part are no partners of the other's."""
    rows = [dataset.rows[index] for index in indices]
    dropped = Counter({**dataset.dropped, **others})
    if dataset.labels is None:
        return Dataset(dataset.config, tuple(rows), dict(dropped))
    labelled = [
        replace(row, positive=dataset.labels[index], negatives=())
        for index, row in zip(indices, rows, strict=True)
    ]
    return with_partners(dataset.config, labelled, dropped)


def _files(config: DatasetConfig, data: Path) -> list[Path]:
    """Return the files that `path` names, each once."""
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
