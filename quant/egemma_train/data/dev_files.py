"""Dev sets from disk: retrieval folders and similarity files.

A row that is no row is an error that names its file, line and field.

| file | row |
| --- | --- |
| FOLDER/queries.jsonl | {"id", "text"} |
| FOLDER/corpus.jsonl | {"id", "text"}, and "title" where there is one |
| FOLDER/qrels.jsonl | {"q", "d", "rel"}: how right a document is; 0 is wrong |
| a similarity file | {"a", "b", "score"}, and "lang" where languages are chosen |

Each may be gzipped (.jsonl.gz).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egemma_core.errors import InputError
from egemma_core.json_lines import BadRowError, checked_text, lines_of, parse_row, shortened
from egemma_train.data.rows import Dataset


@dataclass(frozen=True)
class Retrieval:
    """Queries, the documents they search, and which are right."""

    queries: Mapping[str, str]  # id to text
    documents: Mapping[str, tuple[str | None, str]]  # id to title and text
    # query id to document id to degree, above 0; queries without one are absent
    relevant: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Judged:
    """Two texts, and how alike people found them."""

    a: str
    b: str
    score: float


def read_retrieval(folder: Path) -> Retrieval:
    """
    Raises:
        InputError: a file is absent or damaged, a row is bad, an id is unknown or given twice, or
            no query has a right document.
    """
    queries: dict[str, str] = {}
    documents: dict[str, tuple[str | None, str]] = {}
    path = _path(folder, "queries")
    for number, row in _rows(path):
        queries[_new(row, "id", queries, path, number)] = _text(row, "text", path, number)
    path = _path(folder, "corpus")
    for number, row in _rows(path):
        title = _text(row, "title", path, number) if row.get("title") else None
        documents[_new(row, "id", documents, path, number)] = (
            title,
            _text(row, "text", path, number),
        )
    relevant: dict[str, dict[str, float]] = {}
    judged: set[tuple[str, str]] = set()
    path = _path(folder, "qrels")
    for number, row in _rows(path):
        query, document, degree = (
            _text(row, "q", path, number),
            _text(row, "d", path, number),
            _number(row, "rel", path, number),
        )
        if query not in queries or document not in documents:
            raise InputError(
                f"{path}, line {number}: "
                + (
                    f"no query has the id {query!r}."
                    if query not in queries
                    else f"no document has the id {document!r}."
                )
            )
        if degree < 0 or (query, document) in judged:
            raise InputError(
                f"{path}, line {number}: "
                + (
                    f"rel={degree}, want 0 or more."
                    if degree < 0
                    else f"{query!r} and {document!r} were judged before."
                )
            )
        judged.add((query, document))
        if degree > 0:
            relevant.setdefault(query, {})[document] = degree
    if not relevant:
        raise InputError(f"{path}: no query has a right document (rel above 0).")
    return Retrieval(
        queries, documents, {query: relevant[query] for query in queries if query in relevant}
    )


def read_similarity(path: Path, languages: Sequence[str] | None = None) -> list[Judged]:
    """
    Raises:
        InputError: the file is absent or damaged, a row is bad, or a language has no row.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: want a .jsonl or .jsonl.gz file.")
    pairs, seen = [], set()
    for number, row in _rows(path):
        if languages is not None:
            seen.add(_text(row, "lang", path, number))
        if languages is None or row["lang"] in languages:
            pairs.append(
                Judged(
                    _text(row, "a", path, number),
                    _text(row, "b", path, number),
                    _number(row, "score", path, number),
                )
            )
    absent = sorted(set(languages or ()) - seen)
    if absent or not pairs:
        raise InputError(
            f"{path}: no row has lang {absent}; there are {sorted(seen)}."
            if absent
            else f"{path}: no rows."
        )
    return pairs


def from_pairs(dataset: Dataset) -> Retrieval:
    """Each query of a dataset against all of its positives; right are the positives of all rows
    with that query.
    """
    queries = {row.query: row.query for row in dataset.rows}
    documents: dict[str, tuple[str | None, str]] = {}
    relevant: dict[str, dict[str, float]] = {}
    for row in dataset.rows:
        document = f"{row.title}\n{row.positive}" if row.title else row.positive
        documents[document] = (row.title, row.positive)
        relevant.setdefault(row.query, {})[document] = 1.0
    return Retrieval(queries, documents, relevant)


def _path(folder: Path, name: str) -> Path:
    found = [
        path for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if path.is_file()
    ]
    if len(found) != 1:
        raise InputError(
            f"{folder}: {'no' if not found else 'both a'} {name}.jsonl "
            f"{'or' if not found else 'and a'} {name}.jsonl.gz; "
            "a retrieval set is a folder with one each of queries, corpus and qrels."
        )
    return found[0]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines_of(path):
        try:
            yield number, parse_row(line, number)
        except BadRowError as error:
            raise InputError(f"{path}, line {number}: {error}") from error


def _new(
    row: Mapping[str, Any], field: str, known: Mapping[str, object], path: Path, number: int
) -> str:
    value = _text(row, field, path, number)
    if value in known:
        raise InputError(f"{path}, line {number}: field {field!r}: {value!r} was given before.")
    return value


def _text(row: Mapping[str, Any], field: str, path: Path, number: int) -> str:
    if field not in row:
        raise InputError(
            f"{path}, line {number}: field {field!r}: found only {sorted(row)}, want a text that "
            "is not blank."
        )
    try:
        return checked_text(row[field], field)
    except BadRowError as error:
        raise InputError(f"{path}, line {number}: {error}") from error


def _number(row: Mapping[str, Any], field: str, path: Path, number: int) -> float:
    value = row.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(
            f"{path}, line {number}: field {field!r}: found "
            f"{shortened(value) if field in row else f'only {sorted(row)}'}, want a number."
        )
    return float(value)
