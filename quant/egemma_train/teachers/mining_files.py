"""A file of pairs becomes the same file with hard negatives, which `mining` finds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from egemma_core.errors import ConfigError
from egemma_core.files import write_file
from egemma_core.json_lines import BadRowError, checked_text, shortened
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import DatasetConfig
from egemma_train.data.json_rows import checking_row, rows_of
from egemma_train.teachers.mining import Document, MiningConfig, mine
from egemma_train.teachers.mining_report import MiningReport
from egemma_train.teachers.sources import open_teacher
from egemma_train.teachers.teacher_cache import CachedTeacher


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """A file of pairs, and where the same pairs go with their negatives."""

    rows: Path  # .jsonl or .jsonl.gz of pairs; `negative` fields there are replaced
    out: Path  # .jsonl or .jsonl.gz; must not exist
    teacher: str  # see `open_teacher`
    corpus: Path | None = None  # more candidates: {"text", "title"?} per line
    symmetric: bool = False  # both sides are queries, as in sentence similarity
    # the teacher's vectors are kept there, so that a second run goes on; None keeps none
    cache: Path | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    document_prompt_name: str | None = None
    device: str | None = None
    mining: MiningConfig = field(default_factory=MiningConfig)

    def __post_init__(self) -> None:
        for path in (self.rows, self.out, *([] if self.corpus is None else [self.corpus])):
            if not path.name.endswith((".jsonl", ".jsonl.gz")):
                raise ConfigError(f"{path} is not named .jsonl or .jsonl.gz, as files of rows are.")


def mine_file(config: MineConfig) -> MiningReport:
    """Write the rows of `config.rows` with their negatives to `config.out`, whole or not at all.

    They keep their fields and get `negative` (a text, or a list where per_query is above 1) and,
    where candidates have titles, `negative_title`. Rows that got none have neither.

    Raises:
        ConfigError: `out` exists, or a setting cannot work.
        InputError: a row is bad.
    """
    if config.out.exists():
        raise ConfigError(f"{config.out} exists.", hint="Remove it, or choose another name.")
    dataset = read_dataset(
        DatasetConfig(
            name=config.rows.name,
            path=(config.rows.name,),
            kind="pairs",
            task="search result",
            symmetric=config.symmetric,
        ),
        config.rows.parent,
    )
    corpus = [] if config.corpus is None else read_corpus(config.corpus)
    teacher = open_teacher(
        config.teacher,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        device=config.device,
        query_prompt_name=config.query_prompt_name,
        document_prompt_name=config.document_prompt_name,
    )
    if config.cache is not None:
        teacher = CachedTeacher(teacher, config.cache)
    negatives, report = mine(dataset.rows, teacher, config.mining, corpus, config.symmetric)
    # rows with equal sides were refused, or dropped, when reading
    fields = [row for _, row in rows_of(config.rows) if row["query"] != row["positive"]]
    lines = [
        json.dumps(
            _with_negatives(row, found, config.mining), ensure_ascii=False, separators=(",", ":")
        )
        for row, found in zip(fields, negatives, strict=True)
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    if config.out.name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no clock: the same rows give the same file
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(config.out, content)
    return replace(report, dropped=dict(dataset.dropped))


def read_corpus(path: Path) -> list[Document]:
    """Return the documents of a .jsonl or .jsonl.gz file, {"text", "title"?} per line.

    Other fields are not read.

    Raises:
        InputError: the file cannot be read, or a line is not as above; file and line are named.
    """
    documents = []
    for number, row in rows_of(path):
        with checking_row(path, number):
            title = row.get("title")
            if not isinstance(title, str | None):
                raise BadRowError(f"field 'title': found {shortened(title)}, want a text.")
            documents.append(Document(title or None, checked_text(row.get("text"), "text")))
    return documents


def _with_negatives(
    row: Mapping[str, Any], negatives: Sequence[Document], config: MiningConfig
) -> dict[str, Any]:
    """Return a row's fields with its negatives in place of those that it had."""
    made = {
        name: value for name, value in row.items() if name not in ("negative", "negative_title")
    }
    if negatives:
        made["negative"] = (
            [document.text for document in negatives] if config.per_query > 1 else negatives[0].text
        )
        if row.get("title") or any(document.title for document in negatives):
            titles = [document.title or "" for document in negatives]
            made["negative_title"] = titles if config.per_query > 1 else titles[0]
    return made
