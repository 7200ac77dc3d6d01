"""A long text as chunks that the model reads whole, cut where the text itself says so.

Cuts depend on what stands near them, not on how far they are from the beginning: where a chunk is
two fifths full or more the strongest boundary wins, and among equal ones the one whose next
characters have the smallest checksum. So an edit moves the cuts beside it, and the chunks after
that are the same as before (docs/decisions/0007-ingestion.md has the numbers).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from egemma_core.errors import ConfigError, InputError, TokenLimitError

# How strong a boundary is. Headings are above all of these: chunks never cross one.
_CHARACTER, _WORD, _LINE, _SENTENCE, _PARAGRAPH, _BLOCK = range(6)
_NEWLINE = r"(?:\r\n|[\n\r\x85\u2028\u2029])"
_CLOSERS = "\"'”’»)\\]」』】）》〉"
_BREAKS = re.compile(
    rf"(?P<lines>{_NEWLINE}(?:[ \t]*{_NEWLINE})*)"
    rf"|[.!?…][{_CLOSERS}]{{0,4}}[ \t]+(?=[^\sa-z])"  # "e.g. this" goes on, "here. That" does not
    rf"|[。！？｡]{{1,8}}[{_CLOSERS}]{{0,4}}"
)
_ENDS_A_SENTENCE = frozenset(".!?…。！？｡" + _CLOSERS.replace("\\", ""))
_JOINERS = frozenset("\u200d\ufe0e\ufe0f\u20e3")
_ANCHOR_CHARACTERS = 32  # what stands behind a boundary and decides between equal ones
_TITLE_SHARE = 4  # a title takes at most this part of what the model reads
_TITLE_CHARACTERS = 200  # of each heading in it
# from here on a chunk may end; lower, and more edits meet a cut that stays; higher, and there are
# fewer chunks
_FULL_ENOUGH = 0.4
_FEWEST_TEXT_TOKENS = 8  # beside prompt, title and overlap


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a document that is embedded by itself.

    The chunks of a document tile its text: the first starts at 0, the last stops at its end, and
    each starts at or before the stop of the one before. What lies before that stop is overlap.
    """

    start: int  # code points in the document's text
    stop: int
    # embedded as its title: that of the document and the headings above it, "Guide > Install >
    # Linux"
    title: str | None
    text: str  # document_text[start:stop]


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
    """Chunks of which none is longer than the model reads: each was counted as it will be embedded.

    Args:
        text: of the document.
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
    """(start, stop, titles from the document's down to the section's).

    A heading without text of its own joins what follows it.
    """
    outer = [_one_line(title)] if title and title.strip() else []
    starts = [heading.offset for heading in headings]
    if any(later <= earlier for earlier, later in pairwise(starts)) or (
        starts and not 0 <= starts[0] <= starts[-1] <= len(text)
    ):
        raise InputError(
            f"headings at {starts[:8]}...: their offsets must rise, from 0 to the text's "
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
    """Whether anything but an underline follows the heading's line."""
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
        for name, value in (("max_tokens", max_tokens), ("overlap_tokens", overlap_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: a whole number of tokens.")
        self._text, self._count, self._max, self._overlap = (
            text,
            count_tokens,
            max_tokens,
            overlap_tokens,
        )
        self._prompt = prompt
        self._frame = count_tokens("")  # control tokens, which are counted once for every string
        self._untitled = self._count_framed(None, "")
        if (
            max_tokens - self._untitled - max_tokens // _TITLE_SHARE - overlap_tokens
            < _FEWEST_TEXT_TOKENS
        ):
            raise ConfigError(
                f"max_tokens={max_tokens}, overlap_tokens={overlap_tokens}: the prompt takes "
                f"{self._untitled}, a title up to "
                f"{max_tokens // _TITLE_SHARE}; less than {_FEWEST_TEXT_TOKENS} are left for text. "
                "Raise max_tokens."
            )

    def split(self, start: int, stop: int, path: list[str]) -> Iterator[Chunk]:
        """Chunks of one section."""
        title, overhead = self._title(path)
        budget = self._max - overhead - self._overlap
        units = _Units(self._text, start, stop, self._tokens, budget)
        first, previous_start = 0, start  # of the chunk before
        while first < len(units):
            begin = units.start(first)
            end = units.cut(first)
            overlapped = units.back(first, self._overlap, no_further_than=previous_start)
            if (
                overlapped < begin
                and self._count_framed(title, self._text[overlapped : units.stop(end)]) <= self._max
            ):
                yield self._chunk(overlapped, units.stop(end), title)
            else:
                while (
                    found := self._count_framed(title, self._text[begin : units.stop(end)])
                ) > self._max:
                    end = units.shorter(first, end, self._max / found)
                yield self._chunk(begin, units.stop(end), title)
            first, previous_start = end, begin

    def _chunk(self, start: int, stop: int, title: str | None) -> Chunk:
        return Chunk(start=start, stop=stop, title=title, text=self._text[start:stop])

    def _tokens(self, text: str) -> int:
        return self._count(text) - self._frame

    def _count_framed(self, title: str | None, text: str) -> int:
        """Of a chunk as it will be embedded."""
        return self._count(text if self._prompt is None else self._prompt(title) + text)

    def _title(self, path: list[str]) -> tuple[str | None, int]:
        """The longest form of a title that leaves room for text, and the tokens before the text."""
        if not path:
            return None, self._untitled
        forms = [" > ".join(path), " > ".join([path[0], "…", path[-1]]), path[-1]]
        while len(forms[-1]) > 1:
            forms.append(
                forms[-1][: len(forms[-1]) // 2].rstrip("… ") + "…" if len(forms[-1]) > 3 else "…"
            )
        for form in forms:
            overhead = self._count_framed(form, "") if self._prompt else self._frame
            taken = overhead - self._untitled if self._prompt else self._tokens(form)
            if taken <= self._max // _TITLE_SHARE:
                return form, overhead
        return None, self._untitled


class _Units:
    """A section as units: sentences and lines, and smaller pieces of those that would fill half a
    chunk.

    A unit is what stands in front of a possible cut, the blanks behind it included.
    """

    def __init__(
        self, text: str, start: int, stop: int, tokens: Callable[[str], int], budget: int
    ) -> None:
        self._text, self._begin, self._tokens, self._budget = text, start, tokens, budget
        # at most half a chunk, at four bytes and tokens a character
        self._piece_characters = max(2, min(64, budget // 8))
        self._stops: list[int] = []
        self._levels: list[int] = []
        self._costs: list[int] = []
        content = start
        for unit_stop, level in _natural_units(text, start, stop):
            content = self._append(content, unit_stop, level)
        rest = 0
        self._rests = [0] * len(self._costs)  # tokens behind each unit
        for number in range(len(self._costs) - 1, -1, -1):
            self._rests[number] = rest
            rest += self._costs[number]

    def __len__(self) -> int:
        return len(self._stops)

    def start(self, number: int) -> int:
        return self._stops[number - 1] if number else self._begin

    def stop(self, end: int) -> int:
        """Where a chunk of the units before `end` stops."""
        return self._stops[end - 1]

    def cut(self, first: int) -> int:
        """The end of the chunk that begins with unit `first`, as a number of the unit behind it."""
        best, best_rank, filled = first + 1, None, 0
        for number in range(first, len(self)):
            filled += self._costs[number]
            if filled > self._budget:
                return best
            if filled >= _FULL_ENOUGH * self._budget and number + 1 < len(self):
                # The strongest boundary; among those one that leaves no crumb; then the anchor, the
                # later of equal ones.
                rank = (
                    self._levels[number],
                    4 * self._rests[number] >= self._budget,
                    -self._anchor(number),
                )
                if best_rank is None or rank >= best_rank:
                    best, best_rank = number + 1, rank
            elif best_rank is None:
                best = number + 1
        return len(self)

    def back(self, first: int, tokens: int, *, no_further_than: int) -> int:
        """Where an overlap of up to `tokens` in front of unit `first` starts."""
        number = first
        while (
            number > 0
            and self._costs[number - 1] <= tokens
            and self.start(number - 1) > no_further_than
        ):
            number -= 1
            tokens -= self._costs[number]
        return self.start(number)

    def shorter(self, first: int, end: int, fits: float) -> int:
        """An earlier end, after counting showed that only about this part fits; splits a unit where
        it stands alone.
        """
        if end == first + 1:
            return self._halve(first)
        filled = sum(self._costs[first:end])
        wanted = int(filled * fits)
        while end > first + 1 and filled > wanted:
            end -= 1
            filled -= self._costs[end]
        return end

    def _halve(self, number: int) -> int:
        start, stop = self.start(number), self._stops[number]
        if stop - start < 2:
            raise TokenLimitError(
                f"the character U+{ord(self._text[start]):04X} at {start} alone is longer than a "
                "chunk may be. Raise max_tokens."
            )
        middle = start + (stop - start) // 2
        self._stops.insert(number, middle)
        self._levels.insert(number, _CHARACTER)
        self._costs[number : number + 1] = [
            self._tokens(self._text[start:middle]),
            self._tokens(self._text[middle:stop]),
        ]
        self._rests.insert(number, self._rests[number] + self._costs[number + 1])
        return number + 1

    def _append(self, content: int, stop: int, level: int) -> int:
        """Add the unit between the last one and `stop`.

        Args:
            content: where the content of the last unit ended. A unit is counted with the blanks
                before it, not those behind it: that is how the tokenizer's pieces lie ("▁word").

        Returns:
            Where the content of this one ended.
        """
        start = self._stops[-1] if self._stops else self._begin
        whole = self._text[start:stop]
        content_stop = start + len(whole.rstrip()) if whole.strip() else stop
        # a longer one would cost more tokens than half a chunk has
        if len(whole) <= 4 * self._budget:
            cost = self._tokens(self._text[content:content_stop])
            if 2 * cost <= self._budget or len(whole) <= self._piece_characters:
                self._add(stop, level, cost)
                return content_stop
        for piece_stop in _pieces(self._text, start, stop, self._piece_characters):
            piece_level = (
                level
                if piece_stop == stop
                else _WORD
                if self._text[piece_stop - 1].isspace()
                else _CHARACTER
            )
            cost = self._tokens(self._text[content:piece_stop])
            blank = self._stops and not self._text[self._stops[-1] : piece_stop].strip()
            # blanks belong to what they follow
            if blank and 2 * (self._costs[-1] + cost) <= self._budget:
                self._stops[-1], self._levels[-1] = piece_stop, max(self._levels[-1], piece_level)
                self._costs[-1] += cost
            else:
                self._add(piece_stop, piece_level, cost)
            content = piece_stop
        return content

    def _add(self, stop: int, level: int, cost: int) -> None:
        self._stops.append(stop)
        self._levels.append(level)
        self._costs.append(cost)

    def _anchor(self, number: int) -> int:
        stop = self._stops[number]
        return zlib.crc32(
            self._text[stop : stop + _ANCHOR_CHARACTERS].encode(errors="surrogatepass")
        )


def _natural_units(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(stop, level) of sentences and lines; blanks belong to the unit before them."""
    pending: tuple[int, int] | None = None
    unit_start = start
    for match in _BREAKS.finditer(text, start, stop):
        end = match.end()
        level = _level(text, match) if match["lines"] else _SENTENCE
        # only blanks since the last boundary: that one lies behind them
        if not text[unit_start:end].strip():
            if pending is not None:
                pending, unit_start = (end, max(level, pending[1])), end
            continue
        if pending is not None:
            yield pending
        pending, unit_start = (end, level), end
    if pending is not None:
        if not text[unit_start:stop].strip():
            pending, unit_start = (stop, pending[1]), stop
        yield pending
    if unit_start < stop:
        yield stop, _LINE


def _level(text: str, match: re.Match[str]) -> int:
    newlines = match.group().replace("\r\n", "\n")
    if len(newlines.replace(" ", "").replace("\t", "")) > 1:
        indented = text[match.end() : match.end() + 1].isspace()
        return _PARAGRAPH if indented else _BLOCK
    return _SENTENCE if text[match.start() - 1 : match.start()] in _ENDS_A_SENTENCE else _LINE


def _pieces(text: str, start: int, stop: int, size: int) -> Iterator[int]:
    """Stops of pieces of up to `size` characters, for text without sentences or lines.

    A cut stands before the largest character of its window, so that an edit does not move all later
    ones; or at the blank nearest to it, if the window has one. Letters and their accents, and
    joined emoji, stay together where they fit.
    """
    while stop - start > size:
        window = text[start + size // 2 : start + size]
        peak = window.index(max(window))
        blank = next(
            (at + 1 for at in range(peak, len(window)) if window[at].isspace()),
            next((at + 1 for at in range(peak - 1, -1, -1) if window[at].isspace()), None),
        )
        if blank is not None:
            start += size // 2 + blank
        else:
            cut = start + size // 2 + peak
            whole = cut
            while whole > start and _joined(text, whole):
                whole -= 1
            start = whole if whole > start else max(cut, start + 1)
        yield start
    yield stop


def _joined(text: str, position: int) -> bool:
    """Whether a cut here would part one visible character."""
    before, after = text[position - 1], text[position]
    return (
        before == "\u200d"
        or after in _JOINERS
        or (before == "\r" and after == "\n")
        or unicodedata.combining(after) != 0
    )
