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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egemma_core.errors import InputError
from egemma_core.json_lines import BadRowError, checked_text, shortened
from egemma_train.data.datasets import Dataset, with_title
from egemma_train.data.json_rows import checking_row, rows_of


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
    """Read a folder of queries, documents and judgements.

    Raises:
        InputError: a file is absent or damaged, a row is bad, an id is unknown or given twice, or
            no query has a right document.
    """
    queries: dict[str, str] = {}
    documents: dict[str, tuple[str | None, str]] = {}
    path = _path(folder, "queries")
    for line, row in rows_of(path):
        with checking_row(path, line):
            queries[_new_id(row, queries)] = _text(row, "text")
    path = _path(folder, "corpus")
    for line, row in rows_of(path):
        with checking_row(path, line):
            title = _text(row, "title") if row.get("title") else None
            documents[_new_id(row, documents)] = (title, _text(row, "text"))
    relevant: dict[str, dict[str, float]] = {}
    judged: set[tuple[str, str]] = set()
    path = _path(folder, "qrels")
    for line, row in rows_of(path):
        with checking_row(path, line):
            query, document, degree = _text(row, "q"), _text(row, "d"), _number(row, "rel")
            if query not in queries:
                raise BadRowError(f"no query has the id {query!r}.")
            if document not in documents:
                raise BadRowError(f"no document has the id {document!r}.")
            if degree < 0:
                raise BadRowError(f"rel={degree} must be 0 or more.")
            if (query, document) in judged:
                raise BadRowError(f"{query!r} and {document!r} were judged before.")
        judged.add((query, document))
        if degree > 0:
            relevant.setdefault(query, {})[document] = degree
    if not relevant:
        raise InputError(f"{path}: no query has a right document (rel above 0).")
    in_order = {query: relevant[query] for query in queries if query in relevant}
    return Retrieval(queries, documents, in_order)


def read_similarity(path: Path, languages: Sequence[str] | None = None) -> list[Judged]:
    """Read a file of judged pairs.

    Args:
        languages: keep rows of these `lang`; None keeps all.

    Raises:
        InputError: the file is absent or damaged, a row is bad, or a language has no row.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path} is not a .jsonl or .jsonl.gz file.")
    pairs, seen = [], set()
    for line, row in rows_of(path):
        with checking_row(path, line):
            if languages is not None:
                seen.add(_text(row, "lang"))
            if languages is None or row["lang"] in languages:
                pairs.append(Judged(_text(row, "a"), _text(row, "b"), _number(row, "score")))
    absent = sorted(set(languages or ()) - seen)
    if absent:
        raise InputError(f"{path}: no row has lang {absent}; there are {sorted(seen)}.")
    if not pairs:
        raise InputError(f"{path} has no rows.")
    return pairs


def from_pairs(dataset: Dataset) -> Retrieval:
    """Return each query of a dataset against all of its positives.

    Right are the positives of all rows with that query.
    """
    queries = {row.query: row.query for row in dataset.rows}
    documents: dict[str, tuple[str | None, str]] = {}
    relevant: dict[str, dict[str, float]] = {}
    for row in dataset.rows:
        document = with_title(row.title, row.positive)
        documents[document] = (row.title, row.positive)
        relevant.setdefault(row.query, {})[document] = 1.0
    return Retrieval(queries, documents, relevant)


def _path(folder: Path, name: str) -> Path:
    """Return the one file of that name, plain or gzipped."""
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    found = [path for path in (plain, packed) if path.is_file()]
    if len(found) == 1:
        return found[0]
    names = f"both a {plain.name} and a" if found else f"no {plain.name} or"
    raise InputError(
        f"{folder} has {names} {packed.name}; a retrieval set is a folder with one each of "
        "queries, corpus and qrels."
    )


def _new_id(row: Mapping[str, Any], known: Mapping[str, object]) -> str:
    value = _text(row, "id")
    if value in known:
        raise BadRowError(f"field 'id': {value!r} was given before.")
    return value


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise BadRowError(
            f"field {field!r}: found only {sorted(row)}, want a text that is not blank."
        )
    return checked_text(row[field], field)


def _number(row: Mapping[str, Any], field: str) -> float:
    value = row.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        found = shortened(value) if field in row else f"only {sorted(row)}"
        raise BadRowError(f"field {field!r}: found {found}, want a number.")
    return float(value)
