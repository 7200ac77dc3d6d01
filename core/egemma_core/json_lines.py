"""JSON lines, read strictly: what is damaged, no object, no text or not Unicode is refused with its
line and field.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egemma_core.errors import InputError


class BadRowError(Exception):
    """What is wrong with one row; who reads the file adds its name and the line, and raises
    InputError.
    """


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl or .jsonl.gz file, with their numbers from 1.

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
            f"{path}: not readable after line {number} ({error}). Is the path right, and the file "
            "whole?"
        ) from error
    if number == 0:
        raise InputError(f"{path}: an empty file. Leave it out.")


def parse_row(line: bytes, number: int) -> dict[str, Any]:
    """The object of one line.

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
    """The value, which is a text.

    Raises:
        BadRowError: it is none, or blank, or holds a lone surrogate.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(
            f"field {field!r}: found {shortened(value)}, want a text that is not blank."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"field {field!r}: a lone surrogate U+{ord(value[error.start]):04X} at character "
            f"{error.start}, which is not Unicode text. Remove it."
        ) from error
    return value


def shortened(value: object) -> str:
    """Type and value, for a message."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
