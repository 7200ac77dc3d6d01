"""Files and stdin as texts, each with where it came from, so that an error can say it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from egemma_core.errors import EgemmaError, InputError

STDIN = "-"
_KEYS = {"id", "text", "title", "metadata"}


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """One document on its way into an index."""

    where: str  # "notes.txt:12", "TEXT 3" for what was typed, or "stdin"
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
                raise InputError(
                    f"{name} is a folder.", hint=f"Give its files, such as {path / '*.txt'}."
                )
            with _open(name):
                pass


def read_documents(names: Sequence[str], form: Literal["lines", "jsonl"]) -> Iterator[Incoming]:
    """Read the documents in these files, one after the other.

    Args:
        names: file names; "-" is stdin.
        form: "lines" for one document per line that is not blank, "jsonl" for one JSON object per
            line.

    Raises:
        InputError: a file cannot be read, is not UTF-8, or a line is not what `form` says.
    """
    for name in names:
        for where, line in _lines(name):
            if line.strip():
                text = Incoming(where=where, text=line)
                yield text if form == "lines" else _from_json(line, where)


def read_stdin() -> Incoming:
    """Read all of stdin as one document.

    Raises:
        InputError: it is not UTF-8.
    """
    with _open(STDIN) as file:
        return Incoming(where="stdin", text=_decode(file.read(), "stdin"))


def read_lines(names: Iterable[str]) -> Iterator[Incoming]:
    """Read each line as a text.

    Raises:
        InputError: a line is blank, so that output rows would no longer be input lines.
    """
    for name in names:
        for where, line in _lines(name):
            if not line.strip():
                raise InputError(
                    f"{where} is blank: there is nothing to embed.", hint="Remove the line."
                )
            yield Incoming(where=where, text=line)


def once_each(documents: Iterable[Incoming]) -> Iterator[Incoming]:
    """Give the same documents; refuse an id that comes twice, as the later would replace the other.

    Raises:
        InputError: it does.
    """
    seen: dict[str, str] = {}
    for document in documents:
        if document.id is not None:
            first = seen.setdefault(document.id, document.where)
            if first != document.where:
                raise InputError(
                    f"{document.where}: id {document.id!r} was given to {first} already.",
                    hint="Give each its own.",
                )
        yield document


@contextmanager
def locating(group: Sequence[Incoming]) -> Iterator[None]:
    """Say in an error about one of these texts where that text came from."""
    try:
        yield
    except EgemmaError as error:
        if error.position is None:
            raise
        raise error.at(group[error.position].where) from error


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
            f"{where}: byte {error.start} is not UTF-8.",
            hint="Convert the file, for example with iconv, or leave it out.",
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
    known = isinstance(body, dict) and body.keys() <= _KEYS
    if not known or not isinstance(body.get("text"), str):
        raise InputError(
            f'{where} must be a JSON object with "text", and nothing but {sorted(_KEYS)}.'
        )
    for key, kind in (("id", str), ("title", str), ("metadata", dict)):
        if body.get(key) is not None and not isinstance(body[key], kind):
            raise InputError(
                f"{where}: {key!r} is {type(body[key]).__name__}, it must be {kind.__name__}."
            )
    return Incoming(where=where, **body)
