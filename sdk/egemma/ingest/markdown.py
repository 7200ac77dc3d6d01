"""The title and the headings of a Markdown text, by the rules of CommonMark 0.31.

Lines are enough for that: a whole parser would be a dependency, and is not built for hostile input.
See docs/decisions/0007-ingestion.md.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from egemma.chunks import Heading

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
_HASHES = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_THEMATIC_BREAK = re.compile(r" {0,3}([-_*])[ \t]*(?:\1[ \t]*){2,}$")
# A line that begins a quote or a list.
_CONTAINER = re.compile(r" {0,3}(?:>|[-+*](?:[ \t]|$)|\d{1,9}[.)](?:[ \t]|$))")
# A line that begins anything but a paragraph or a heading.
_OTHER_BLOCK = re.compile(
    r" {0,3}(?:>|[-+*](?:[ \t]|$)|\d{1,9}[.)](?:[ \t]|$)|<[A-Za-z!/?]"
    r"|([-_*])[ \t]*(?:\1[ \t]*){2,}$)|(?: {4}| {0,3}\t)"
)
# A line that ends a paragraph although no blank line stands before it.
_INTERRUPTION = re.compile(
    r" {0,3}(?:>|[-+*][ \t]+\S|1[.)][ \t]+\S"
    r"|<[!?]|</?(?:div|p|pre|table|ul|ol|script|style|section|details)\b"
    r"|([-_*])[ \t]*(?:\1[ \t]*){2,}$)",
    re.IGNORECASE,
)
_FRONT_MATTER_END = re.compile(r"^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE)
_FRONT_MATTER_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_FRONT_MATTER_CHARACTERS = 10_000
_LINK = re.compile(r"!?\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])")
_EMPHASIS_CODE_ESCAPE = re.compile(r"[*`]+|\\(?=[!-/:-@\[-`{-~])")


def read_markdown(text: str) -> tuple[str | None, list[Heading]]:
    """Return the title and the headings of a Markdown text.

    The title is that of the front matter, or else the only outermost heading. Headings are those
    at the outer level: marked by # or underlined, not in fenced or indented code, HTML comments or
    quotes.
    """
    body = 0
    title = None
    if text.startswith(("---\n", "---\r\n")) and (
        end := _FRONT_MATTER_END.search(text, 4, _FRONT_MATTER_CHARACTERS)
    ):
        body = end.end()
        if found := _FRONT_MATTER_TITLE.search(text, 0, body):
            title = found[1].strip("\"'").strip() or None
    headings = list(_headings(text, body))
    outermost = [heading for heading in headings if heading.level == 1]
    if title is None and len(outermost) == 1:
        title = outermost[0].title
    return title, headings


# one branch for each kind of line
def _headings(text: str, body: int) -> Iterator[Heading]:  # noqa: PLR0912
    """Yield the headings of a text from the character `body` on, line by line."""
    fence = ""  # the characters that will close it
    comment = False
    lazy = False  # inside a quote or list whose paragraph goes on without its mark
    # where the lines began that an underline would make a heading
    paragraph: tuple[int, list[str]] | None = None
    position = body
    for line in io.StringIO(text[body:], newline=""):
        start, position = position, position + len(line)
        bare = line.rstrip("\r\n")
        if comment:
            comment = "-->" not in bare
        elif fence:
            if _closes(bare, fence):
                fence = ""
        elif opening := _FENCE.match(bare):
            fence, paragraph, lazy = opening[1], None, False
        elif not bare.strip():
            paragraph, lazy = None, False
        elif marked := _HASHES.match(bare):
            paragraph, lazy = None, False
            if title := _plain(marked[2] or ""):
                yield Heading(offset=start, level=len(marked[1]), title=title)
        elif paragraph and (underline := _UNDERLINE.match(bare)):
            if title := _plain(" ".join(paragraph[1])):
                level = 1 if underline[1][0] == "=" else 2
                yield Heading(offset=paragraph[0], level=level, title=title)
            paragraph = None
        elif paragraph and not _INTERRUPTION.match(bare):
            paragraph[1].append(bare)
        elif _OTHER_BLOCK.match(bare):
            comment = bare.lstrip().startswith("<!--") and "-->" not in bare
            lazy = _THEMATIC_BREAK.match(bare) is None and (
                lazy or _CONTAINER.match(bare) is not None
            )
            paragraph = None
        elif not lazy:
            paragraph = start, [bare]


def _closes(line: str, fence: str) -> bool:
    """Whether a line ends the code that `fence` began."""
    closing = line.strip(" \t")
    indent = len(line) - len(line.lstrip(" "))
    return len(closing) >= len(fence) and set(closing) == {fence[0]} and indent < 4


def _plain(marked: str) -> str:
    """Return a heading's words without the commonest marks: links, emphasis, code."""
    words = _LINK.sub(r"\1", marked)
    return " ".join(_EMPHASIS_CODE_ESCAPE.sub("", words).split())
