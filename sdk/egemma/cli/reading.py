"""Files and stdin as texts. Each text knows where it came from, so that an error can say it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from egemma_core.errors import InputError

STDIN = "-"
_KEYS = {"id", "text", "title", "metadata"}


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """One document on its way into an index."""

    where: str  # "notes.txt", or "notes.txt:12" for a line
    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] | None = None


def check_files(names: Sequence[str]) -> None:
    """Find a mistyped name before an hour of work, not after.

    Raises:
        InputError: a name is no file that can be read.
    """
    for name in names:
        if name != STDIN:
            path = Path(name)
            if path.is_dir():
                raise InputError(f"{name} is a folder: give its files, such as {path / '*.txt'}.")
            with _open(name):
                pass


def read_documents(names: Sequence[str], form: str) -> Iterator[Incoming]:
    """The documents in these files, one after the other.

    Args:
        names: file names; "-" is stdin.
        form: "file" for one document per file, "lines" for one per line that is not blank, "jsonl"
            for one JSON object per line.

    Raises:
        InputError: a file cannot be read, is not UTF-8, or a line is not what `form` says.
    """
    for name in names:
        if form == "file":
            where = _shown(name)
            with _open(name) as file:
                text = _decode(file.read(), where)
            # The full path: two folders may each have a notes.txt, and one would replace the other.
            yield Incoming(
                where=where,
                text=text,
                id=None if name == STDIN else Path(name).resolve().as_posix(),
            )
        else:
            for where, line in _lines(name):
                if line.strip():
                    yield (
                        Incoming(where=where, text=line)
                        if form == "lines"
                        else _from_json(line, where)
                    )


def read_lines(names: Iterable[str]) -> Iterator[Incoming]:
    """Each line as a text.

    Raises:
        InputError: a line is blank, so that output rows would no longer be input lines.
    """
    for name in names:
        for where, line in _lines(name):
            if not line.strip():
                raise InputError(f"{where} is blank: there is nothing to embed. Remove the line.")
            yield Incoming(where=where, text=line)


def _lines(name: str) -> Iterator[tuple[str, str]]:
    with _open(name) as file:
        for number, line in enumerate(file, start=1):
            where = f"{_shown(name)}:{number}"
            yield where, _decode(line.rstrip(b"\r\n"), where)


def _shown(name: str) -> str:
    return "stdin" if name == STDIN else name


def _decode(content: bytes, where: str) -> str:
    try:
        # some editors begin a file with this mark
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} is not UTF-8. Convert the file, for example with iconv, "
            "or leave it out."
        ) from error


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    if name == STDIN:
        if sys.stdin.isatty():
            print("reading from the terminal; end with Ctrl-D", file=sys.stderr)
        return nullcontext(sys.stdin.buffer)  # not ours to close
    try:
        return open(name, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{name!r} cannot be read: {reason}.") from error


def _from_json(line: str, where: str) -> Incoming:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}.") from error
    if (
        not isinstance(body, dict)
        or not isinstance(body.get("text"), str)
        or not body.keys() <= _KEYS
    ):
        raise InputError(
            f'{where}: each line is a JSON object with "text", and nothing but {sorted(_KEYS)}.'
        )
    for key, kind in (("id", str), ("title", str), ("metadata", dict)):
        if body.get(key) is not None and not isinstance(body[key], kind):
            raise InputError(
                f"{where}: {key!r} is {type(body[key]).__name__}, it must be {kind.__name__}."
            )
    return Incoming(where=where, **body)
