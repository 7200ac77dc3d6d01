"""Tokens, prompts, words and chunk cuts, from tokens.md, words.md and chunks.md alone."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from tests.contract.stranger import WHITE, Refused, blank, is_unicode, trim

Prompt = Callable[[str | None], str]


class Tokenizer:
    """tokens.md, "Tokens"."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise Refused("BundleError") from error
        found = (self.model.bos_id(), self.model.eos_id(), self.model.pad_id())
        if found != tuple(settings[name] for name in ("bos_id", "eos_id", "pad_id")):
            raise Refused("CheckpointError")
        if self.model.vocab_size() > settings["vocab_size"]:
            raise Refused("CheckpointError")
        self.settings = settings

    def encode(
        self, text: str, max_tokens: int | None = None, overflow: str = "error"
    ) -> tuple[list[int], int]:
        most = self.settings["max_tokens"]
        limit = most if max_tokens is None else max_tokens
        if not 3 <= limit <= most or overflow not in ("error", "truncate"):
            raise Refused("ConfigError")
        if not is_unicode(text):
            raise Refused("InputError")
        pieces = self.model.encode(text)
        if len(pieces) + 2 > limit and overflow == "error":
            raise Refused("TokenLimitError")
        bos, eos = self.settings["bos_id"], self.settings["eos_id"]
        return [bos, *pieces[: limit - 2], eos], len(pieces) + 2

    def count(self, text: str) -> int:
        return len(self.model.encode(text)) + 2


class Prompts:
    """tokens.md, "Prompts"."""

    def __init__(self, table: dict[str, str]) -> None:
        if not table.get("query") or not table.get("document"):
            raise Refused("CheckpointError")
        self.table = table
        named = [re.fullmatch(r"task: (.+) \| query: ", prompt) for prompt in table.values()]
        tasks = {match.group(1) for match in named if match}
        more = {"question answering", "fact checking", "code retrieval"} if tasks else set()
        self.tasks = sorted(tasks | more)

    def query(self, task: str = "search result") -> str:
        if task in self.tasks:
            return f"task: {task} | query: "
        if task in self.table:
            return self.table[task]
        if task == "search result":
            return self.table["query"]
        raise Refused("PromptError")

    def document(self, title: str | None = None) -> str:
        prompt = self.table["document"]
        if title is None or blank(title):
            return prompt
        if "title: none |" not in prompt:
            raise Refused("PromptError")
        return prompt.replace("title: none |", f"title: {trim(title)} |", 1)


def match_expression(query: str) -> str | None:
    """words.md."""
    query = "".join(" " if c == "\0" or 0xD800 <= ord(c) < 0xE000 else c for c in query)

    def in_word(character: str) -> bool:
        return character == "_" or unicodedata.category(character)[0] in "LN"

    words, word = [], ""
    for character in query + " ":
        if in_word(character):
            word += character
        elif word:
            words.append(word)
            word = ""
    pieces = [
        piece.replace('"', '""')
        for piece in _split(query)
        if any(ord(c) > 0x7F and not in_word(c) for c in piece)
    ]
    parts = list(dict.fromkeys(words + pieces))
    if len(parts) > 1000:
        raise Refused("InputError")
    return " OR ".join(f'"{part}"' for part in parts) or None


def _split(text: str) -> list[str]:
    return "".join(" " if c in WHITE else c for c in text).split(" ") if trim(text) else []


# chunks.md from here on

CLOSERS = "\"'”’»)]」』】）》〉"
STOPS = ".!?…。！？｡"
_NL = r"(?:\r\n|\n|\r|\x85|\u2028|\u2029)"
_CLOSER = "[" + re.escape(CLOSERS) + "]"
_WHITE = "".join(re.escape(c) for c in sorted(WHITE))
_BREAK = re.compile(
    rf"({_NL}(?:[ \t]*{_NL})*)"
    rf"|[.!?…]{_CLOSER}{{0,4}}[ \t]+(?=[^{_WHITE}a-z])"
    rf"|[。！？｡]{{1,8}}{_CLOSER}{{0,4}}"
)


def chunks(
    text: str,
    title: str | None,
    headings: list[list[Any]],
    count: Callable[[str], int],
    M: int,
    overlap: int,
    prompt: Prompt | None,
) -> list[list[Any]]:
    """[start, stop, title, text] of each chunk."""
    if M < 0 or overlap < 0:
        raise Refused("ConfigError")
    frame = count("")

    def tokens(string: str) -> int:
        return count(string) - frame

    def framed(name: str | None, string: str) -> int:
        return count((prompt(name) if prompt else "") + string)

    untitled = framed(None, "")
    if M - untitled - M // 4 - overlap < 8:
        raise Refused("ConfigError")
    made: list[list[Any]] = []
    for start, stop, path in _sections(text, title, headings):
        name, overhead = None, untitled
        for form in _forms(path):
            cost = framed(form, "") - untitled if prompt else tokens(form)
            if cost <= M // 4:
                name, overhead = form, framed(form, "") if prompt else frame
                break
        units = _Units(text, start, stop, tokens, M - overhead - overlap)
        made += [
            [a, b, name, text[a:b]]
            for a, b in _cut(text, units, M, overlap, lambda string, name=name: framed(name, string))
        ]  # fmt: skip
    return made


def _line(title: str) -> str:
    line = " ".join(word for word in _split(title) if word)
    return line if len(line) <= 200 else line[:199] + "…"


def _sections(
    text: str, title: str | None, headings: list[list[Any]]
) -> list[tuple[int, int, list[str]]]:
    document = [_line(title)] if title is not None and not blank(title) else []
    offsets = [offset for offset, _, _ in headings]
    if offsets != sorted(set(offsets)) or any(not 0 <= offset <= len(text) for offset in offsets):
        raise Refused("InputError")
    found: list[tuple[int, int, list[str]]] = []
    begin, path, stack = 0, document, []
    if offsets and not blank(text[: offsets[0]]):
        found.append((0, offsets[0], document))
        begin = offsets[0]
    for number, (offset, level, name) in enumerate(headings):
        until = offsets[number + 1] if number + 1 < len(headings) else len(text)
        while stack and stack[-1][0] >= level:
            stack.pop()
        stack.append((level, _line(name)))
        names = [line for _, line in stack]
        path = document + (names[1:] if document and names[0] == document[0] else names)
        body = text[offset:until]
        while body and body[0] in WHITE:
            body = body[1:]
        body = body.split("\n", 1)[1] if "\n" in body else ""
        if any(character not in "=-~ \t\r\n" for character in body):
            found.append((begin, until, path))
            begin = until
    if begin < len(text):
        found.append((begin, len(text), path))
    return found


def _forms(path: list[str]) -> list[str]:
    if not path:
        return []
    forms = [" > ".join(path), " > ".join([path[0], "…", path[-1]]), path[-1]]
    while len(forms[-1]) > 1:
        last = forms[-1]
        if len(last) <= 3:
            forms.append("…")
            continue
        half = last[: len(last) // 2]
        while half and half[-1] in "… ":
            half = half[:-1]
        forms.append(half + "…")
    return forms


def _stretches(text: str, start: int, stop: int) -> list[list[int]]:
    """[end, level] of what stands between breaks."""
    found: list[list[int]] = []
    begin = start
    for match in _BREAK.finditer(text, start, stop):
        end, level = match.end(), 3
        if match.group(1) is not None:
            ends = len(re.findall(_NL, match.group(1)))
            if ends > 1:
                level = 4 if end < len(text) and text[end] in WHITE else 5
            else:
                before = text[match.start() - 1] if match.start() else ""
                level = 3 if before and before in STOPS + CLOSERS else 2
        if not blank(text[begin:end]):
            found.append([end, level])
            begin = end
        elif found:
            found[-1] = [end, max(level, found[-1][1])]
            begin = end
    if begin < stop:
        if found and blank(text[begin:stop]):
            found[-1][0] = stop
        else:
            found.append([stop, 2])
    return found


class _Units:
    """Ends, levels and costs; the first begins at `begin`."""

    def __init__(
        self, text: str, start: int, stop: int, tokens: Callable[[str], int], budget: int
    ) -> None:
        self.text, self.begin, self.tokens, self.budget = text, start, tokens, budget
        self.ends: list[int] = []
        self.levels: list[int] = []
        self.costs: list[int] = []
        most = max(2, min(64, budget // 8))
        content = start
        begin = start
        for end, level in _stretches(text, start, stop):
            inner = begin + len(text[begin:end])
            if not blank(text[begin:end]):
                while text[inner - 1] in WHITE:
                    inner -= 1
            whole = end - begin <= 4 * budget
            cost = tokens(text[content:inner]) if whole else 0
            if whole and (2 * cost <= budget or end - begin <= most):
                self.add(end, level, cost)
                content = inner
            else:
                for piece in _pieces(text, begin, end, most):
                    self.piece(content, piece, level if piece == end else None)
                    content = piece
            begin = end

    def add(self, end: int, level: int, cost: int) -> None:
        self.ends.append(end)
        self.levels.append(level)
        self.costs.append(cost)

    def piece(self, content: int, end: int, level: int | None) -> None:
        if level is None:
            level = 1 if self.text[end - 1] in WHITE else 0
        cost = self.tokens(self.text[content:end])
        if (
            self.ends
            and blank(self.text[self.ends[-1] : end])
            and 2 * (cost + self.costs[-1]) <= self.budget
        ):
            self.ends[-1] = end
            self.levels[-1] = max(level, self.levels[-1])
            self.costs[-1] += cost
        else:
            self.add(end, level, cost)

    def start(self, number: int) -> int:
        return self.ends[number - 1] if number else self.begin

    def halve(self, number: int) -> None:
        start, end = self.start(number), self.ends[number]
        if end - start < 2:
            raise Refused("TokenLimitError")
        middle = start + (end - start) // 2
        self.ends.insert(number, middle)
        self.levels.insert(number, 0)
        self.costs[number : number + 1] = [
            self.tokens(self.text[start:middle]),
            self.tokens(self.text[middle:end]),
        ]

    def end_of_chunk(self, first: int) -> int:
        """The number of the unit behind the chunk."""
        filled, taken = 0, first
        best: tuple[tuple[int, bool, int, int], int] | None = None
        for number in range(first, len(self.ends)):
            filled += self.costs[number]
            if filled > self.budget:
                return best[1] if best else max(taken, first + 1)
            taken = number + 1
            if 5 * filled >= 2 * self.budget and number + 1 < len(self.ends):
                behind = sum(self.costs[number + 1 :])
                end = self.ends[number]
                anchor = zlib.crc32(self.text[end : end + 32].encode())
                rank = (self.levels[number], 4 * behind >= self.budget, -anchor, number)
                best = max(best, (rank, number + 1)) if best else (rank, number + 1)
        return len(self.ends)


def _pieces(text: str, start: int, stop: int, most: int) -> list[int]:
    ends = []
    while stop - start > most:
        window = range(start + most // 2, start + most)
        peak = max(window, key=lambda at: (ord(text[at]), -at))
        behind = [at + 1 for at in window if at >= peak and text[at] in WHITE]
        before = [at + 1 for at in window if at < peak and text[at] in WHITE]
        if behind or before:
            cut = behind[0] if behind else before[-1]
        else:
            cut = peak
            while cut > start and _parts(text, cut):
                cut -= 1
            if cut <= start:
                cut = max(peak, start + 1)
        ends.append(cut)
        start = cut
    return [*ends, stop]


def _parts(text: str, at: int) -> bool:
    before, after = text[at - 1], text[at]
    return (
        before == "\u200d"
        or after in "\u200d\ufe0e\ufe0f\u20e3"
        or (before, after) == ("\r", "\n")
        or unicodedata.combining(after) != 0
    )


def _cut(
    text: str, units: _Units, M: int, overlap: int, framed: Callable[[str], int]
) -> list[tuple[int, int]]:
    made = []
    first, before = 0, units.begin
    while first < len(units.ends):
        end, begin = units.end_of_chunk(first), units.start(first)
        number, left = first, overlap
        while number and units.costs[number - 1] <= left and units.start(number - 1) > before:
            number -= 1
            left -= units.costs[number]
        back = units.start(number)
        if back < begin and framed(text[back : units.ends[end - 1]]) <= M:
            made.append((back, units.ends[end - 1]))
        else:
            while (found := framed(text[begin : units.ends[end - 1]])) > M:
                if end == first + 1:
                    units.halve(first)
                    continue
                filled = sum(units.costs[first:end])
                wanted = int(filled * (M / found))
                while end > first + 1 and filled > wanted:
                    end -= 1
                    filled -= units.costs[end]
            made.append((begin, units.ends[end - 1]))
        first, before = end, begin
    return made
