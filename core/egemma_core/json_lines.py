"""JSON lines, read strictly: what is damaged or not Unicode is refused with its line and field."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egemma_core.checks import unicode_text
from egemma_core.errors import InputError


class BadRowError(Exception):
    """Something is wrong with one row.

    Who reads the file adds its name and the line, and raises InputError.
    """


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a .jsonl or .jsonl.gz file, with their numbers from 1.

    Raises:
        InputError: the file cannot be read, is damaged or empty.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not readable after line {number} ({error}).",
            hint="Check the path, and whether the file is whole.",
        ) from error
    if number == 0:
        raise InputError(f"{path}: an empty file.", hint="Leave it out.")


def parse_row(line: bytes, number: int) -> dict[str, Any]:
    """Read the JSON object of one line.

    Raises:
        BadRowError: it is no UTF-8, no JSON or no object, or gives a field twice.
    """
    if number == 1 and line.startswith(codecs.BOM_UTF8):
        raise BadRowError("starts with a byte order mark. Save the file as UTF-8 without one.")
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"byte {error.start} is {line[error.start]:#04x}, which is not UTF-8. Decode the "
            "source as what it is, and write UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            f"not JSON ({error}): {shortened(line.decode().strip())}. Write one object per line."
        ) from error
    if not isinstance(fields, dict):
        raise BadRowError(f"found {shortened(fields)}: write one object per line.")
    return fields


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        raise BadRowError(
            f"field {Counter(key for key, _ in items).most_common(1)[0][0]!r} is given twice."
        )
    return fields


def checked_text(value: object, field: str) -> str:
    """Return `value` when it is a text that is not blank.

    Raises:
        BadRowError: it is none, or blank, or holds a lone surrogate.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(
            f"field {field!r}: found {shortened(value)}, it must be a text that is not blank."
        )
    try:
        return unicode_text(f"field {field!r}", value)
    except InputError as error:
        raise BadRowError(str(error)) from error


def shortened(value: object) -> str:
    """Return the type and the value, cut for a message."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
