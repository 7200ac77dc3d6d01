"""The text of an HTML page as its reader sees it, its title and its headings.

Runs in the process that `sandbox` starts and limits: what it reads may be hostile.
"""

from __future__ import annotations

import re
from typing import Any

from egemma.ingest.extracted import (
    Extracted,
    ExtractError,
    check_length,
    clean_title,
    squeeze_blanks,
)

_BLANKS = re.compile(r"[ \t\n\r\f]+")
_TAGS = {
    # their content is not text of the page, or is shown only where something else is not
    "unseen": "script style template noscript svg math iframe object canvas audio video head "
    "select datalist",
    "paragraph": "p h1 h2 h3 h4 h5 h6 pre blockquote table ul ol dl section article aside header "
    "footer main nav figure form hr fieldset address details",
    "line": "div li tr dt dd br caption figcaption legend summary center thead tbody tfoot",
}
_KIND_OF_TAG = {tag: kind for kind, tags in _TAGS.items() for tag in tags.split()}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_HIDDEN_STYLE = re.compile(
    r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE
)


def extract_html(source: str, *, characters: int) -> Extracted:
    """Return what a reader of the page sees, its headings and its title.

    Raises:
        ExtractError: there is nothing to see, or more than `characters`.
    """
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(source)
    out = _PageText(characters)
    if page.body is not None:
        _walk(page.body, out)
    text = "".join(out.parts).rstrip()
    if not text.strip():
        raise ExtractError(
            "no text",
            "it shows no text",
            hint="Pages that scripts fill must be saved as the browser shows them.",
        )
    title = page.css_first("head > title")
    return Extracted(
        text=text,
        title=clean_title(None if title is None else title.text()),
        headings=out.headings,
        notes=[],
    )


def _walk(body: Any, out: _PageText) -> None:
    """Write all that is seen, depth first and without recursion: a page may nest a million tags."""
    node, depth = body, 0
    while True:
        child = None
        if node.is_text_node:
            out.write(node.text_content or "")
        elif node.is_element_node and not _is_hidden(node):
            out.enter(node.tag)
            child = node.child
            if child is None:
                out.leave(node.tag)
        if child is not None:
            node, depth = child, depth + 1
            continue
        while depth and node.next is None:
            node, depth = node.parent, depth - 1
            out.leave(node.tag)
        if not depth:
            return
        node = node.next


def _is_hidden(node: Any) -> bool:
    if _KIND_OF_TAG.get(node.tag) == "unseen":
        return True
    attributes = node.attributes
    return "hidden" in attributes or _HIDDEN_STYLE.search(attributes.get("style") or "") is not None


class _PageText:
    """The text of a page as it grows.

    Line breaks and blanks are kept back until a word follows them.
    """

    def __init__(self, characters: int) -> None:
        self.parts: list[str] = []
        self.headings: list[tuple[int, int, str]] = []
        self._length, self._max_length = 0, characters
        self._newlines, self._blank = 0, ""
        self._preformatted = 0
        self._heading: tuple[int, int, int] | None = None  # offset, level, number of its first part

    def enter(self, tag: str) -> None:
        self._break(tag)
        if tag == "pre":
            self._preformatted += 1
        if tag in _HEADINGS and self._heading is None:
            self._put_gap()
            self._heading = self._length, _HEADINGS[tag], len(self.parts)

    def leave(self, tag: str) -> None:
        if tag == "pre":
            self._preformatted -= 1
        if tag in _HEADINGS and self._heading is not None and self._heading[1] == _HEADINGS[tag]:
            offset, level, first = self._heading
            title = clean_title("".join(self.parts[first:]))
            if title is not None:
                self.headings.append((offset, level, title))
            self._heading = None
        self._break(tag)

    def write(self, text: str) -> None:
        if self._preformatted:
            if text:
                self._put(squeeze_blanks(text.replace("\0", "\ufffd")))
            return
        words = _BLANKS.sub(" ", text)
        if words[:1] == " ":
            self._blank = self._blank or " "
        if words.strip(" "):
            self._put(words.strip(" "))
            self._blank = " " if words[-1] == " " else ""

    def _break(self, tag: str) -> None:
        kind = _KIND_OF_TAG.get(tag)
        if kind == "paragraph":
            self._newlines = 2
        elif kind == "line":
            self._newlines = max(self._newlines, 1)
        elif tag in ("td", "th"):
            self._blank = "\t"

    def _put_gap(self) -> None:
        gap = "\n" * self._newlines or self._blank
        if self._length and gap:
            self.parts.append(gap)
            self._length += len(gap)
        self._newlines, self._blank = 0, ""

    def _put(self, text: str) -> None:
        self._put_gap()
        self.parts.append(text)
        self._length += len(text)
        check_length(self._length, self._max_length)
