"""A long text as chunks that the model reads whole, cut where the text itself says so.

Cuts depend on what stands near them, not on how far they are from the beginning: where a chunk is
two fifths full or more the strongest boundary wins, and among equal ones the one whose next
characters have the smallest checksum. So an edit moves the cuts beside it, and the chunks after
that are the same as before (docs/decisions/0007-ingestion.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from egemma.exported import exported
from egemma.units import Units
from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError, InputError

_TITLE_SHARE = 4  # a title takes at most this part of what the model reads
_TITLE_CHARACTERS = 200  # of each heading in it
_FEWEST_TEXT_TOKENS = 8  # beside prompt, title and overlap


@exported
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a document that is embedded by itself.

    The chunks of a document tile its text: the first starts at 0, the last stops at its end, and
    each starts at or before the stop of the one before. What lies before that stop is overlap.
    """

    start: int  # code points in the document's text
    stop: int
    # embedded as its title, the document's and the headings above it: "Guide > Install > Linux"
    title: str | None
    text: str  # document_text[start:stop]


@exported
@dataclass(frozen=True, kw_only=True)
class ChunkedDocument:
    """A document as an index stores it."""

    id: str
    title: str | None
    metadata: Mapping[str, Any] | None
    # where it came from and in which state, as JSON; None for what was not read from a file
    source: Mapping[str, Any] | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Where a section begins."""

    offset: int  # code points, of the heading itself
    level: int  # 1 for the outermost
    title: str


@exported
def split_text(
    text: str,
    *,
    title: str | None,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    overlap_tokens: int = 0,
    headings: Sequence[Heading] = (),
    prompt: Callable[[str | None], str] | None = None,
) -> list[Chunk]:
    """Split a text into chunks that the model reads whole, each counted as it will be embedded.

    Args:
        title: of the document, or None.
        count_tokens: of a string, as the model's tokenizer counts it.
        max_tokens: the most that `count_tokens` may give for one chunk.
        overlap_tokens: how much of the chunk before is repeated, in whole sentences or lines; never
            across a heading.
        headings: by rising offset.
        prompt: what stands in front of a text with this title, such as `Prompts.document`; it is
            counted with every chunk. Without it `count_tokens` and `max_tokens` are of the bare
            text, and the caller leaves room for what comes before it.

    Returns:
        Chunks in the order of the text; none for an empty one. A chunk is blank only where the text
        is, for longer than a chunk.

    Raises:
        ConfigError: prompt, title and overlap leave no room for text.
        TokenLimitError: a single character is longer than `max_tokens`.
        InputError: headings out of order.
    """
    splitter = _Splitter(text, count_tokens, max_tokens, overlap_tokens, prompt)
    return [
        chunk
        for start, stop, path in _sections(text, title, headings)
        for chunk in splitter.split(start, stop, path)
    ]


def _sections(
    text: str, title: str | None, headings: Sequence[Heading]
) -> Iterator[tuple[int, int, list[str]]]:
    """Give the start and stop of each section, and the titles from the document's down to its own.

    A heading without text of its own joins what follows it.
    """
    outer = [_one_line(title)] if title and title.strip() else []
    starts = [heading.offset for heading in headings]
    rising = all(earlier < later for earlier, later in pairwise(starts))
    if starts and not (rising and 0 <= starts[0] <= starts[-1] <= len(text)):
        raise InputError(
            f"headings stand at {starts[:8]}...; their offsets must rise, from 0 to the text's "
            f"{len(text)} characters."
        )
    path = outer
    open_headings: list[Heading] = []
    start = starts[0] if headings and text[: starts[0]].strip() else 0
    if start:
        yield 0, start, outer
    for heading, stop in zip(headings, [*starts, len(text)][1:], strict=True):
        while open_headings and open_headings[-1].level >= heading.level:
            open_headings.pop()
        open_headings.append(heading)
        inner = [_one_line(above.title) for above in open_headings]
        # a page's first heading often is its title
        path = outer + (inner[1:] if inner[:1] == outer else inner)
        if _has_body(text, heading.offset, stop):
            yield start, stop, path
            start = stop
    if start < len(text):
        yield start, len(text), path


def _has_body(text: str, start: int, stop: int) -> bool:
    """Say whether anything but an underline follows the heading's line."""
    _, _, body = text[start:stop].lstrip().partition("\n")
    return bool(body.strip("=-~ \t\r\n"))


def _one_line(title: str) -> str:
    line = " ".join(title.split())
    return line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1] + "…"


class _Splitter:
    """The numbers that all sections share, and the cutting of one section at a time."""

    def __init__(
        self,
        text: str,
        count_tokens: Callable[[str], int],
        max_tokens: int,
        overlap_tokens: int,
        prompt: Callable[[str | None], str] | None,
    ) -> None:
        self._text, self._count, self._prompt = text, count_tokens, prompt
        self._max = whole_number("max_tokens", max_tokens, 0)
        self._overlap = whole_number("overlap_tokens", overlap_tokens, 0)
        self._frame = count_tokens("")  # control tokens, which are counted once for every string
        self._untitled = self._count_framed(None, "")
        longest_title = max_tokens // _TITLE_SHARE
        left = max_tokens - self._untitled - longest_title - overlap_tokens
        if left < _FEWEST_TEXT_TOKENS:
            raise ConfigError(
                f"max_tokens={max_tokens}, overlap_tokens={overlap_tokens}: the prompt takes "
                f"{self._untitled}, a title up to {longest_title}; less than "
                f"{_FEWEST_TEXT_TOKENS} are left for text.",
                hint="Raise max_tokens.",
            )

    def split(self, start: int, stop: int, path: list[str]) -> Iterator[Chunk]:
        """Give the chunks of one section."""
        title, overhead = self._title(path)
        budget = self._max - overhead - self._overlap
        units = Units(self._text, start, stop, self._tokens, budget)
        first, previous_start = 0, start  # of the chunk before
        while first < len(units):
            begin, end = units.start(first), units.cut(first)
            start = units.back(first, self._overlap, no_further_than=previous_start)
            text = self._text[start : units.stop(end)]
            if start < begin and self._count_framed(title, text) > self._max:
                start, text = begin, self._text[begin : units.stop(end)]
            while start == begin and (found := self._count_framed(title, text)) > self._max:
                end = units.shorter(first, end, self._max / found)
                text = self._text[begin : units.stop(end)]
            yield Chunk(start=start, stop=units.stop(end), title=title, text=text)
            first, previous_start = end, begin

    def _tokens(self, text: str) -> int:
        return self._count(text) - self._frame

    def _count_framed(self, title: str | None, text: str) -> int:
        """Count a chunk as it will be embedded."""
        return self._count(text if self._prompt is None else self._prompt(title) + text)

    def _title(self, path: list[str]) -> tuple[str | None, int]:
        """Return the longest title that leaves room for text, and the tokens before the text."""
        if not path:
            return None, self._untitled
        shorter = path[-1]
        forms = [" > ".join(path), " > ".join([path[0], "…", shorter]), shorter]
        while len(shorter) > 1:
            half = shorter[: len(shorter) // 2].rstrip("… ") if len(shorter) > 3 else ""
            shorter = f"{half}…"
            forms.append(shorter)
        for form in forms:
            overhead = self._count_framed(form, "") if self._prompt else self._frame
            taken = overhead - self._untitled if self._prompt else self._tokens(form)
            if taken <= self._max // _TITLE_SHARE:
                return form, overhead
        return None, self._untitled
