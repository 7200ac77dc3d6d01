"""The text of a PDF, its title, and its bookmarks as headings.

Runs in the process that `sandbox` starts and limits: what it reads may be hostile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from egemma.ingest.extracted import (
    Extracted,
    ExtractError,
    check_length,
    clean_title,
    replace_non_unicode,
    squeeze_blanks,
)

_MAX_LEVEL = 6


def extract_pdf(data: bytes, *, pages: int, characters: int, stream_bytes: int) -> Extracted:
    """Return the text layer of a PDF, its title, and its outline as headings.

    Args:
        pages, characters, stream_bytes: the limits, as in `ParseLimits`.

    Raises:
        ExtractError: encrypted, without text, above a limit.
        Exception: whatever the parser raises on a damaged file.
    """
    reader = _open(data, stream_bytes)
    count = len(reader.pages)
    if count > pages:
        raise ExtractError(
            "too large",
            f"{count} pages, the limit is {pages}",
            hint="Split it, or raise ParseLimits.pdf_pages.",
        )
    parts: list[str] = []
    starts: list[int] = []
    length = empty = replaced = 0
    for page in reader.pages:
        text, bad = replace_non_unicode(page.extract_text())
        text = squeeze_blanks(text).strip()
        replaced += bad
        starts.append(length)
        empty += not text
        if text:
            parts.append(text + "\n\n")
            length += len(text) + 2
        check_length(length, characters)
    if not parts:
        raise ExtractError(
            "no text",
            f"its {count} pages hold no text, only images",
            hint="Recognise the text first, for example with OCRmyPDF.",
        )
    whole = "".join(parts).rstrip()
    notes = [f"{empty} of {count} pages hold no text"] if empty else []
    if replaced:
        notes.append(f"{replaced} characters that are not Unicode were replaced")
    headings, problem = _headings(reader, whole, starts)
    if problem:
        notes.append(problem)
    title = reader.metadata.title if reader.metadata else None
    return Extracted(text=whole, title=clean_title(title), headings=headings, notes=notes)


def _open(data: bytes, stream_bytes: int) -> Any:
    """Open a PDF with pypdf, unlocked if it needs no password."""
    import io
    import logging

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings about repaired files
    pypdf.overwrite_configuration(
        pypdf.Configuration().with_overwrites(
            zlib_maximum_output_length=stream_bytes,
            lzw_maximum_output_length=stream_bytes,
            run_length_maximum_output_length=stream_bytes,
            array_based_stream_maximum_output_length=stream_bytes,
            maximum_declared_stream_length=stream_bytes,
        )
    )
    reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
    if reader.is_encrypted:
        _unlock(reader)
    return reader


def _unlock(reader: Any) -> None:
    """Try the empty password: many encrypted files only forbid printing.

    Raises:
        ExtractError: it does not open the file.
    """
    from pypdf.errors import DependencyError

    try:
        unlocked = reader.decrypt("")
    except DependencyError as error:
        raise ExtractError(
            "encrypted",
            "it is encrypted with AES, and the library that decrypts it is not installed",
            hint="Install it with `pip install 'pypdf[crypto]'`.",
        ) from error
    if not unlocked:
        raise ExtractError("encrypted", "it is encrypted", hint="Save it without its password.")


def _headings(
    reader: Any, text: str, starts: Sequence[int]
) -> tuple[list[tuple[int, int, str]], str | None]:
    """Return bookmarks as headings, and what was wrong with them.

    A heading stands where its words are on its page, or at the page's top. A damaged outline costs
    the headings only.

    Args:
        starts: where each page begins in the text.
    """
    headings: list[tuple[int, int, str]] = []
    last = -1
    try:
        for level, entry in _bookmarks(reader.outline):
            page = reader.get_destination_page_number(entry)
            title = clean_title(entry.title)
            if title is None or not isinstance(page, int) or not 0 <= page < len(starts):
                continue
            stop = starts[page + 1] if page + 1 < len(starts) else len(text)
            found = text.find(title, max(last + 1, starts[page]), stop)
            offset = starts[page] if found < 0 else found
            if last < offset < len(text):
                headings.append((offset, min(level, _MAX_LEVEL), title))
                last = offset
    except MemoryError:
        raise
    except Exception as error:  # the text is there; any damage here is the outline's
        return headings, f"its bookmarks are damaged ({type(error).__name__})"
    return headings, None


def _bookmarks(outline: Any) -> Iterator[tuple[int, Any]]:
    """Yield (level, entry) of an outline, without recursion."""
    stack = [iter(outline)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, list):
            stack.append(iter(entry))
        else:
            yield len(stack), entry
