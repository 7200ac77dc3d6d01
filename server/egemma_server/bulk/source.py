"""The input: which Parquet files there are, whether they can be embedded, and any range of their
rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from egemma_core.errors import ConfigError, InputError, RuntimeUnavailableError
from egemma_core.files import sha256_of

Source = str | Path | Sequence[str | Path]
_READ_ROWS = 1024
# a stream of this size instead of whole column chunks, which may be gigabytes
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One input file, as it was when the run began."""

    name: str  # path below the folder that all inputs share, with "/"
    file_bytes: int
    sha256: str
    rows: int


def require_pyarrow() -> None:
    """
    Raises:
        RuntimeUnavailableError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise RuntimeUnavailableError(
            "Parquet needs pyarrow. Install it with `pip install 'egemma[bulk]'`."
        )


def find_files(source: Source) -> tuple[Path, list[str]]:
    """The folder that all input files share, and their names in it, sorted.

    Args:
        source: a file, a folder (every `*.parquet` in it, at any depth; as everywhere with Parquet,
            names that begin with "." or "_" are other programs' notes), or a list of files.

    Raises:
        InputError: nothing there, or a file is given twice.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        folder = Path(os.path.abspath(source))
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*.parquet")
            if path.is_file()
            and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        )
        if not names:
            raise InputError(
                f"{source} holds no *.parquet file. Give the folder or the files that hold the "
                "texts."
            )
        return folder, names
    given = [source] if isinstance(source, (str, Path)) else list(source)
    if not given:
        raise InputError("the list of input files is empty: give at least one Parquet file.")
    paths = [Path(os.path.abspath(path)) for path in given]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"{path} is no file. Give a Parquet file, a folder of them, or a list of files."
            )
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(
            f"{twice} is given twice; its texts would be embedded twice. Give it once."
        )
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, sorted(path.relative_to(folder).as_posix() for path in paths)


def describe_file(folder: Path, name: str) -> SourceFile:
    """
    Raises:
        InputError: not a Parquet file.
    """
    path = folder / name
    with opened(path) as file:
        return SourceFile(
            name=name,
            file_bytes=path.stat().st_size,
            sha256=sha256_of(path),
            rows=file.metadata.num_rows,
        )


def check_columns(
    folder: Path, names: Sequence[str], texts: Sequence[str], others: Sequence[str]
) -> None:
    """Refuse, before an hour of work and not after, files that lack a column, hold numbers for
    texts, or disagree.

    Args:
        texts: columns that must be strings.
        others: columns of any type.

    Raises:
        ConfigError: as said.
    """
    import pyarrow as pa

    first: dict[str, Any] = {}
    for name in names:
        with opened(folder / name) as file:
            schema = file.schema_arrow
        for column in dict.fromkeys([*texts, *others]):
            found = len(schema.get_all_field_indices(column))
            if found != 1:
                raise ConfigError(
                    f"{name} has {found or 'no'} columns {column!r}, wanted is one. Its columns "
                    f"are {schema.names}."
                )
            kind = schema.field(column).type
            bare = kind.value_type if pa.types.is_dictionary(kind) else kind
            if column in texts and not (
                pa.types.is_string(bare)
                or pa.types.is_large_string(bare)
                or pa.types.is_string_view(bare)
            ):
                raise ConfigError(
                    f"{name}: column {column!r} is {kind}, wanted is string. Cast it, or name "
                    "another column."
                )
            if kind != first.setdefault(column, kind):
                raise ConfigError(
                    f"{name}: column {column!r} is {kind}, but {first[column]} in {names[0]}. Cast "
                    "one of them."
                )


def read_rows(folder: Path, file: SourceFile, start: int, stop: int, columns: Sequence[str]) -> Any:
    """Rows [start, stop) of a file as a pyarrow.Table with these columns.

    Raises:
        InputError: the file is damaged, or no longer the one that the run began with.
    """
    import pyarrow as pa

    path = folder / file.name
    wanted = list(dict.fromkeys(columns))
    with opened(path) as parquet:
        if path.stat().st_size != file.file_bytes or parquet.metadata.num_rows != file.rows:
            raise InputError(
                f"{file.name} changed since the run began. Let nobody write to the input, and run "
                "again into another folder."
            )
        groups, position = [], 0
        first_row = None
        for number in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if position < stop and position + rows > start:
                groups.append(number)
                first_row = position if first_row is None else first_row
            position += rows
        position = first_row or 0
        pieces = []
        with _reading(path):
            for batch in parquet.iter_batches(
                batch_size=_READ_ROWS, row_groups=groups, columns=wanted, use_threads=False
            ):
                if position + batch.num_rows > start:
                    pieces.append(
                        batch.slice(max(0, start - position), stop - max(start, position))
                    )
                position += batch.num_rows
                if position >= stop:
                    break
            schema = pa.schema([parquet.schema_arrow.field(column) for column in wanted])
            table = pa.Table.from_batches(pieces).select(wanted) if pieces else schema.empty_table()
            table.validate(full=False)
    if table.num_rows != stop - start:
        raise InputError(
            f"{file.name} is damaged: rows {start} to {stop} were promised, {table.num_rows} could "
            "be read. Copy it again."
        )
    return table


def place_of(folder: Path, file: SourceFile, row: int) -> str:
    """Where a row is, for an error: `part.parquet, row group 2, row 17 (row 2017 of the file)`; all
    count from 0.
    """
    with opened(folder / file.name) as parquet:
        first = 0
        for number in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if row < first + rows:
                return f"{file.name}, row group {number}, row {row - first} (row {row} of the file)"
            first += rows
    return f"{file.name}, row {row}"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile.

    Raises:
        InputError: no such file, or not Parquet.
    """
    import pyarrow.parquet as pq

    with _reading(path):
        file = pq.ParquetFile(
            path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    with file:
        yield file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable Parquet: {error}. Copy it again.") from error
