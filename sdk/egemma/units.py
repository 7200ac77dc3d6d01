"""The units of a text: what stands between places where a chunk may end.

unit        a sentence or a line, the blanks behind it included; a chunk is a row of whole units
boundary    the end of a unit, and how strong it is: CHARACTER, WORD, LINE, SENTENCE, PARAGRAPH
            (a blank line before indented text) or BLOCK (a blank line before anything else)
piece       a part of a sentence or line that alone would fill more than half a chunk
anchor      a checksum of the characters behind a boundary, which decides between equal ones
budget      the tokens that a chunk has for text
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from itertools import accumulate

from egemma_core.errors import TokenLimitError

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
# from here on a chunk may end; lower, and more edits meet a cut that stays; higher, and there are
# fewer chunks
_FULL_ENOUGH = 0.4


class Units:
    """A section as units, each with its boundary and its cost in tokens."""

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
        total = sum(self._costs)
        self._rests = [total - passed for passed in accumulate(self._costs)]  # behind each unit

    def __len__(self) -> int:
        return len(self._stops)

    def start(self, number: int) -> int:
        return self._stops[number - 1] if number else self._begin

    def stop(self, end: int) -> int:
        """Return where a chunk of the units before `end` stops."""
        return self._stops[end - 1]

    def cut(self, first: int) -> int:
        """Return the number of the unit behind the chunk that begins with unit `first`."""
        best, best_rank, filled = first + 1, None, 0
        for number in range(first, len(self)):
            filled += self._costs[number]
            if filled > self._budget:
                return best
            if filled >= _FULL_ENOUGH * self._budget and number + 1 < len(self):
                # The strongest boundary; among those one that leaves no crumb; then the anchor, the
                # later of equal ones.
                crumb = 4 * self._rests[number] < self._budget
                rank = (self._levels[number], not crumb, -self._anchor(number))
                if best_rank is None or rank >= best_rank:
                    best, best_rank = number + 1, rank
            elif best_rank is None:
                best = number + 1
        return len(self)

    def back(self, first: int, tokens: int, *, no_further_than: int) -> int:
        """Return where an overlap of up to `tokens` in front of unit `first` starts."""
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
        """Return an earlier end, after counting showed that only about this part of it fits.

        A unit that stands alone is split.
        """
        if end == first + 1:
            return self._halve(first)
        filled = sum(self._costs[first:end])
        most = int(filled * fits)
        while end > first + 1 and filled > most:
            end -= 1
            filled -= self._costs[end]
        return end

    def _halve(self, number: int) -> int:
        start, stop = self.start(number), self._stops[number]
        if stop - start < 2:
            raise TokenLimitError(
                f"the character U+{ord(self._text[start]):04X} at {start} alone is longer than a "
                "chunk may be.",
                hint="Raise max_tokens.",
            )
        middle = start + (stop - start) // 2
        self._stops.insert(number, middle)
        self._levels.insert(number, _CHARACTER)
        halves = self._text[start:middle], self._text[middle:stop]
        self._costs[number : number + 1] = [self._tokens(half) for half in halves]
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
            inner = _WORD if self._text[piece_stop - 1].isspace() else _CHARACTER
            piece_level = level if piece_stop == stop else inner
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
        behind = self._text[stop : stop + _ANCHOR_CHARACTERS]
        return zlib.crc32(behind.encode(errors="surrogatepass"))


def _natural_units(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Give the stop and the boundary of each sentence and line, the blanks behind it included."""
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
    """Give the stops of pieces of up to `size` characters, of text without sentences or lines.

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
    """Say whether a cut here would part one visible character."""
    before, after = text[position - 1], text[position]
    if before == "\u200d" or after in _JOINERS or before + after == "\r\n":
        return True
    return unicodedata.combining(after) != 0
