"""The text of one file, by its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from egemma.chunks import Heading
from egemma.ingest.charsets import declared_charset, decode
from egemma.ingest.config import ParseLimits
from egemma.ingest.errors import UnreadableFileError
from egemma.ingest.extracted import squeeze_blanks
from egemma.ingest.files import Kind, kind_of, read_bytes
from egemma.ingest.markdown import read_markdown
from egemma.ingest.sandbox import Sandbox


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The text of a file."""

    text: str
    title: str | None  # of the document itself, not its file name
    headings: tuple[Heading, ...]
    kind: Kind
    notes: tuple[str, ...]  # what was left out or changed, for people


def read_file(
    path: str | Path, *, limits: ParseLimits | None = None, sandbox: Sandbox | None = None
) -> Parsed:
    """Read the text of one file.

    Args:
        limits: None for the defaults.
        sandbox: to read several PDF or HTML files with one process; None starts one for this file.

    Raises:
        UnreadableFileError: binary, damaged, encrypted, too large, not UTF-8 ...: see `reason`.
        MissingDependencyError: the kind of file needs a library that is not installed.
    """
    limits = limits or ParseLimits()
    return parse(path, read_bytes(path, limits).data, limits=limits, sandbox=sandbox)


def parse(
    path: str | Path, data: bytes, *, limits: ParseLimits, sandbox: Sandbox | None = None
) -> Parsed:
    """Return the text of a file whose bytes were read already; otherwise as `read_file`.

    Args:
        path: gives the kind, and names the file in errors.
    """
    kind = kind_of(path)
    if kind == "pdf":
        return _extract(path, kind, data, limits, sandbox)
    declared = declared_charset(path, data) if kind == "html" else None
    text = decode(path, data, declared=declared)
    if not text.strip():
        raise UnreadableFileError(path, "no text", "it is empty")
    if kind == "html":
        return _extract(path, kind, text.encode(), limits, sandbox)
    if len(text) > limits.characters:
        raise UnreadableFileError(
            path,
            "too large",
            f"it has {len(text)} characters, the limit is {limits.characters}",
            hint="Split it, or raise ParseLimits.characters.",
        )
    text = text.rstrip()
    squeezed = squeeze_blanks(text)
    blanks = len(text) - len(squeezed)
    notes = (f"{blanks} blanks of long runs were left out",) if blanks else ()
    title, headings = read_markdown(squeezed) if kind == "markdown" else (None, [])
    return Parsed(text=squeezed, title=title, headings=tuple(headings), kind=kind, notes=notes)


def _extract(
    path: str | Path, kind: Kind, data: bytes, limits: ParseLimits, sandbox: Sandbox | None
) -> Parsed:
    """Return the text that the process for PDF and HTML finds."""
    if sandbox is None:
        with Sandbox() as own:
            return _extract(path, kind, data, limits, own)
    answer = sandbox.extract(
        kind,
        data,
        memory_bytes=limits.memory_bytes,
        time_s=limits.time_s,
        pages=limits.pdf_pages,
        characters=limits.characters,
        stream_bytes=limits.stream_bytes,
    )
    if "reason" in answer:
        hint = answer.get("hint", "")
        raise UnreadableFileError(path, answer["reason"], answer["problem"], hint=hint)
    headings = tuple(
        Heading(offset=offset, level=level, title=title)
        for offset, level, title in answer["headings"]
    )
    return Parsed(
        text=answer["text"],
        title=answer["title"],
        headings=headings,
        kind=kind,
        notes=tuple(answer["notes"]),
    )
