"""What a bulk run is: the model, the settings and the input.

`egemma-bulk.json` keeps it in the output folder, so that a rerun goes on with the same thing and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from egemma.identity import ModelIdentity, check_same_model
from egemma_core.errors import ConfigError, IndexFileError
from egemma_core.tokens import Overflow
from egemma_server.bulk.source import SourceFile

FORMAT = "egemma-bulk"
FORMAT_VERSION = 1
JOB_FILE = "egemma-bulk.json"
ATTEMPTS = ".attempts"  # folder: how often a shard was begun, on Ray
MADE_COLUMNS = ("vector", "num_tokens", "truncated", "error")
ID_COLUMN = "id"  # what ids are called that the input does not have
DEFAULT_SHARD_ROWS = 4096  # a kill costs each worker the shard that it was in
MAX_SHARDS = 1_000_000
ROLES = ("document", "query")


@dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """Everything about a run, beside the model and the input, that decides what its files hold."""

    text_column: str = "text"
    title_column: str | None = None  # of documents
    id_column: str | None = None  # None: ids are made, "FILE:ROW"
    keep: tuple[str, ...] = ()  # other columns that go along
    # False leaves texts and titles out, for files of half the size; an index cannot be filled from
    # them
    keep_text: bool = True
    role: str = "document"  # or "query": which prompt goes before the text
    task: str | None = None  # of queries; None: the model's default
    dim: int | None = None  # a trained width; None: the full one
    overflow: Overflow = "error"
    shard_rows: int = DEFAULT_SHARD_ROWS

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role={self.role!r}: one of {ROLES}.")
        if self.role == "query" and self.title_column is not None:
            raise ConfigError(
                f"title_column={self.title_column!r} with role='query': only documents have "
                "titles. Leave it out."
            )
        if self.role == "document" and self.task is not None:
            raise ConfigError(
                f"task={self.task!r} with role='document': a document is embedded the same for all "
                "tasks. Leave it out."
            )
        if self.overflow not in get_args(Overflow):
            raise ConfigError(f"overflow={self.overflow!r}: one of {get_args(Overflow)}.")
        if (
            isinstance(self.shard_rows, bool)
            or not isinstance(self.shard_rows, int)
            or not 1 <= self.shard_rows <= 1_000_000
        ):
            raise ConfigError(
                f"shard_rows={self.shard_rows!r}: a whole number from 1 to 1,000,000."
            )
        named = [
            column
            for column in (self.id_column, self.title_column, self.text_column)
            if column is not None
        ]
        if not all(isinstance(column, str) and column for column in (*named, *self.keep)):
            raise ConfigError(
                f"columns {named} and keep={self.keep!r}: names are non-empty str, keep is a list "
                "of them."
            )
        columns = self.output_columns
        if len(set(columns)) != len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            raise ConfigError(
                f"the output would have two columns {twice!r}. Name each input column once; "
                f"{', '.join(MADE_COLUMNS)} are made here, "
                f"and {ID_COLUMN!r} where no id_column is given: rename such a column of the input."
            )

    @property
    def input_columns(self) -> list[str]:
        """Columns that are read."""
        named = [self.id_column, self.title_column, self.text_column, *self.keep]
        return [column for column in named if column is not None]

    @property
    def output_columns(self) -> list[str]:
        texts = (
            [column for column in (self.title_column, self.text_column) if column is not None]
            if self.keep_text
            else []
        )
        return [self.id_column or ID_COLUMN, *texts, *self.keep, *MADE_COLUMNS]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows of one input file that become one output file."""

    number: int
    file: SourceFile
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.parquet"

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, complete; equal ids mean files of equal content."""

    identity: ModelIdentity
    target: str  # of the bundle, for people
    prompt: str  # what stands before each text; where documents have titles, as without one
    settings: BulkSettings  # dim and task resolved
    files: tuple[SourceFile, ...]
    id: str = field(init=False)

    def __post_init__(self) -> None:
        rows = [[file.name, file.sha256, file.rows] for file in self.files]
        content = {
            "fingerprint": self.identity.fingerprint,
            "prompt": self.prompt,
            "settings": asdict(self.settings),
            "files": rows,
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        object.__setattr__(self, "id", hashlib.sha256(canonical.encode()).hexdigest())

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def dim(self) -> int:
        return self.settings.dim or self.identity.dim

    def shards(self) -> list[Shard]:
        """The work, in the order of the input; the same job always gives the same shards.

        Raises:
            ConfigError: more than MAX_SHARDS.
        """
        size = self.settings.shard_rows
        if sum(-(-file.rows // size) for file in self.files) > MAX_SHARDS:
            raise ConfigError(
                f"{self.rows} rows in shards of {size} are more than {MAX_SHARDS} files. Raise "
                "shard_rows."
            )
        ranges = [(file, start) for file in self.files for start in range(0, file.rows, size)]
        return [
            Shard(number=number, file=file, start=start, stop=min(start + size, file.rows))
            for number, (file, start) in enumerate(ranges)
        ]

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "id": self.id,
            "identity": json.loads(self.identity.to_json()),
            "target": self.target,
            "prompt": self.prompt,
            "settings": asdict(self.settings),
            "files": [asdict(file) for file in self.files],
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> Job:
        """
        Raises:
            IndexFileError: not what `to_json` writes.
        """
        try:
            body = json.loads(text)
            if body.get("format") != FORMAT or body.get("format_version") != FORMAT_VERSION:
                raise IndexFileError(
                    f"{where}: format {body.get('format')!r} {body.get('format_version')!r}, this "
                    f"egemma reads {FORMAT!r} "
                    f"{FORMAT_VERSION}. Open it with the egemma that wrote it."
                )
            settings = BulkSettings(**body["settings"] | {"keep": tuple(body["settings"]["keep"])})
            job = cls(
                identity=ModelIdentity.from_json(json.dumps(body["identity"])),
                target=body["target"],
                prompt=body["prompt"],
                settings=settings,
                files=tuple(SourceFile(**file) for file in body["files"]),
            )
            if job.id != body["id"]:
                raise ValueError("its id does not belong to its content")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            ConfigError,
        ) as error:
            raise IndexFileError(
                f"{where} is damaged: {error}. Embed into another folder."
            ) from error
        return job


def read_job(out: Path) -> Job | None:
    """The job of a folder, or None where none was begun.

    Raises:
        IndexFileError: the file cannot be read or is damaged.
    """
    path = out / JOB_FILE
    try:
        return Job.from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise IndexFileError(
            f"{path} cannot be read: {error}. Embed into another folder."
        ) from error


def check_same_job(out: Path, stored: Job, mine: Job) -> None:
    """
    Raises:
        IndexMismatchError: the folder holds vectors of another model.
        ConfigError: it holds a run with other settings or another input.
    """
    check_same_model(
        out, stored.identity, mine.identity, "Give that bundle, or another output folder."
    )
    settings = [
        f"{one.name}={getattr(stored.settings, one.name)!r} instead of "
        f"{getattr(mine.settings, one.name)!r}"
        for one in fields(BulkSettings)
        if getattr(stored.settings, one.name) != getattr(mine.settings, one.name)
    ]
    if settings:
        raise ConfigError(
            f"{out} was begun with {', '.join(settings)}. Give the same settings, or another "
            "output folder."
        )
    before, now = ({file.name: file for file in job.files} for job in (stored, mine))
    changes = [
        *(f"{name} is new" for name in now if name not in before),
        *(f"{name} is gone" for name in before if name not in now),
        *(f"{name} changed" for name in now if name in before and now[name] != before[name]),
    ]
    if changes:
        shown = ", ".join(changes[:3]) + (
            f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        )
        raise ConfigError(
            f"{out} was begun with another input: {shown}. Restore it, or give another output "
            "folder."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path`, durably, when the block ends well, and leaves
    nothing otherwise.

    Raises:
        IndexFileError: the disk is full or the folder cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with scratch.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise IndexFileError(
            f"{path} cannot be written: {error}. Finished shards are kept: run again when it can "
            "be."
        ) from error
