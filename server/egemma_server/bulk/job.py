"""What a bulk run is: the model, the settings and the input.

`egemma-bulk.json` keeps it in the output folder, so that a rerun goes on with the same thing and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from egemma.identity import ModelIdentity, check_same_model
from egemma_core.checks import one_of, whole_number
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
MAX_SHARD_ROWS = 1_000_000
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
        one_of("role", self.role, ROLES)
        one_of("overflow", self.overflow, get_args(Overflow))
        rows = whole_number("shard_rows", self.shard_rows, 1, MAX_SHARD_ROWS)
        object.__setattr__(self, "shard_rows", rows)  # an int, whatever kind of number came in
        if self.role == "query" and self.title_column is not None:
            raise ConfigError(
                f"title_column={self.title_column!r} was given with role='query', but only "
                "documents have titles.",
                hint="Leave title_column out.",
            )
        if self.role == "document" and self.task is not None:
            raise ConfigError(
                f"task={self.task!r} was given with role='document', but a document is embedded "
                "the same for all tasks.",
                hint="Leave task out.",
            )
        self._check_columns()

    def _check_columns(self) -> None:
        named = [
            column
            for column in (self.id_column, self.title_column, self.text_column)
            if column is not None
        ]
        if not all(isinstance(column, str) and column for column in (*named, *self.keep)):
            raise ConfigError(
                f"the columns {named} and keep={self.keep!r} hold what is no name.",
                hint="Give each column's name as a str that is not empty, and keep as a list.",
            )
        columns = self.output_columns
        if len(set(columns)) != len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            raise ConfigError(
                f"the output would have two columns {twice!r}. The run itself makes "
                f"{', '.join(MADE_COLUMNS)}, and {ID_COLUMN!r} where no id_column is given.",
                hint="Name each input column once, and rename one that is called like these.",
            )

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold what is embedded, which must be strings."""
        named = [self.text_column, self.title_column]
        return [column for column in named if column is not None]

    @property
    def input_columns(self) -> list[str]:
        """The columns that are read from the input, in the order of the output."""
        named = [self.id_column, self.title_column, self.text_column, *self.keep]
        return [column for column in named if column is not None]

    @property
    def output_columns(self) -> list[str]:
        """The columns of the output, in their order."""
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
        """The name of its output file."""
        return f"shard-{self.number:06d}.parquet"

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run embeds, and with which model; equal ids mean output files of equal content."""

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
        """How many rows the input has."""
        return sum(file.rows for file in self.files)

    @property
    def dim(self) -> int:
        """The width of the vectors that are written."""
        return self.settings.dim or self.identity.dim

    def shards(self) -> list[Shard]:
        """Return the shards in the order of the input; the same job always has the same ones.

        Raises:
            ConfigError: more than MAX_SHARDS.
        """
        size = self.settings.shard_rows
        if sum(-(-file.rows // size) for file in self.files) > MAX_SHARDS:
            raise ConfigError(
                f"{self.rows} rows in shards of {size} would be more than {MAX_SHARDS} files.",
                hint="Raise shard_rows.",
            )
        ranges = [(file, start) for file in self.files for start in range(0, file.rows, size)]
        return [
            Shard(number=number, file=file, start=start, stop=min(start + size, file.rows))
            for number, (file, start) in enumerate(ranges)
        ]

    def to_json(self) -> str:
        """Return what the job file holds."""
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
        """Return the job that `to_json` wrote.

        Args:
            where: the file that `text` is from, for the message.

        Raises:
            IndexFileError: `text` is not what `to_json` writes.
        """
        try:
            body = json.loads(text)
            if body.get("format") != FORMAT or body.get("format_version") != FORMAT_VERSION:
                raise IndexFileError(
                    f"{where} has the format {body.get('format')!r} "
                    f"{body.get('format_version')!r}, and this egemma reads {FORMAT!r} "
                    f"{FORMAT_VERSION}.",
                    hint="Use the egemma that wrote it.",
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
                f"{where} is damaged: {error}.", hint="Embed into another folder."
            ) from error
        return job


def read_job(out: Path) -> Job | None:
    """Return the job of a folder, or None where none was begun.

    Raises:
        IndexFileError: the job file cannot be read or is damaged.
    """
    path = out / JOB_FILE
    try:
        return Job.from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise IndexFileError(
            f"{path} cannot be read: {error}.", hint="Embed into another folder."
        ) from error


def check_same_job(out: Path, stored: Job, mine: Job) -> None:
    """Refuse to go on with a folder that another job was begun in.

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
            f"{out} was begun with {', '.join(settings)}.",
            hint="Give the same settings, or another output folder.",
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
            f"{out} was begun with another input: {shown}.",
            hint="Restore the input, or give another output folder.",
        )
