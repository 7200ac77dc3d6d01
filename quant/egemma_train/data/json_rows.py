"""The rows of a JSON-lines file, where a bad row is an error that names its file and line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from egemma_core.errors import InputError
from egemma_core.json_lines import BadRowError, lines_of, parse_row


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the fields of every row of a .jsonl or .jsonl.gz file.

    Raises:
        InputError: the file cannot be read or is empty, or a line holds no JSON object.
    """
    for number, line in lines_of(path):
        try:
            fields = parse_row(line, number)
        except BadRowError as error:
            raise bad_row(path, number, error) from error
        yield number, fields


@contextmanager
def checking_row(path: Path, number: int) -> Iterator[None]:
    """Turn a BadRowError of the block into an InputError that names the file and the line.

    Raises:
        InputError: the block raised BadRowError.
    """
    try:
        yield
    except BadRowError as error:
        raise bad_row(path, number, error) from error


def bad_row(path: Path, number: int, problem: object, *, hint: str = "") -> InputError:
    """Return the error that says what is wrong with line `number` of a file."""
    return InputError(f"{path}, line {number}: {problem}", hint=hint)
