"""What the extractors of PDF and HTML share: limits, clean text, and the error they raise."""

from __future__ import annotations

import re
from typing import TypedDict

from egemma.ingest.errors import Reason

MAX_BLANKS = 128  # of a run; longer ones carry nothing and could fill chunks
_LONG_BLANKS = re.compile(rf"(\s{{{MAX_BLANKS}}})\s+")
_SURROGATES_AND_NUL = re.compile(r"[\0\ud800-\udfff]")


class Extracted(TypedDict):
    """The text of a PDF or HTML file, as JSON carries it between the processes."""

    text: str
    title: str | None
    headings: list[tuple[int, int, str]]  # offset in the text, level, title
    notes: list[str]  # what was left out or changed, for people


class ExtractError(Exception):
    """The text cannot be had; the parent process raises it as an UnreadableFileError."""

    def __init__(self, reason: Reason, problem: str, *, hint: str = "") -> None:
        super().__init__(reason, problem, hint)
        self.reason, self.problem, self.hint = reason, problem, hint


def squeeze_blanks(text: str) -> str:
    """Return the text with runs of more than MAX_BLANKS blanks cut to their first MAX_BLANKS."""
    return _LONG_BLANKS.sub(r"\1", text)


def replace_non_unicode(text: str) -> tuple[str, int]:
    """Return the text with NUL and lone surrogates as U+FFFD, and how many there were."""
    return _SURROGATES_AND_NUL.subn("\ufffd", text)


def clean_title(title: object) -> str | None:
    """Return a title in one line of at most 500 characters; None where there is none."""
    if not isinstance(title, str):
        return None
    return " ".join(replace_non_unicode(title[:2000])[0].split())[:500] or None


def check_length(length: int, characters: int) -> None:
    """Refuse a text that is longer than `characters`.

    Raises:
        ExtractError: it is.
    """
    if length > characters:
        raise ExtractError(
            "too large",
            f"more than {characters} characters of text",
            hint="Split it, or raise ParseLimits.characters.",
        )
