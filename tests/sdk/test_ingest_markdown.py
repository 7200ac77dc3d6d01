"""Headings and titles of Markdown are those of CommonMark, also where the text is hostile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egemma.ingest import read_file
from egemma.ingest.markdown import read_markdown
from tests.sdk.ingest_files import write

MARKDOWN = """\
Not a heading # here
# One #
text
#hash

Two
words
===

- list
---
* * *
Three
---
```python
# comment
```
~~~~ `odd`
# in a fence
~~~
# still
~~~~
    # indented

> # quoted
> text
#### Four `code` and [a link](http://x)
<!-- a comment
# hidden
-->
##
####### seven
\\# escaped
   ## Five ##
"""


def test_markdown_headings_and_their_places() -> None:
    title, headings = read_markdown(MARKDOWN)
    assert [(heading.level, heading.title) for heading in headings] == [
        (1, "One"),
        (1, "Two words"),
        (2, "Three"),
        (4, "Four code and a link"),
        (2, "Five"),
    ]
    assert [MARKDOWN[heading.offset :].partition("\n")[0] for heading in headings] == [
        "# One #",
        "Two",
        "Three",
        "#### Four `code` and [a link](http://x)",
        "   ## Five ##",
    ]
    assert title is None  # two outermost headings: neither is the title


def test_a_markdown_title_is_in_the_front_matter_or_the_only_outermost_heading() -> None:
    assert read_markdown("# Only\n\n## Part\n")[0] == "Only"
    title, headings = read_markdown("---\ndate: 2026\ntitle: 'Front'\n---\n# Only\n")
    assert title == "Front"
    assert [(heading.offset, heading.title) for heading in headings] == [(34, "Only")]
    assert [heading.title for heading in read_markdown("---\n# A\n")[1]] == ["A"]


def oracle(text: str) -> list[tuple[int, int]]:
    """(line, level) of the outer headings, by a CommonMark parser that we did not write."""
    markdown_it = pytest.importorskip("markdown_it")
    found, depth = [], 0
    for token in markdown_it.MarkdownIt("commonmark").parse(text):
        if token.type == "heading_open" and depth == 0 and token.map:
            found.append((token.map[0], int(token.tag[1])))
        depth += (
            token.nesting
            if token.type.startswith(("blockquote", "bullet_list", "ordered_list", "list_item"))
            else 0
        )
    return found


MARKDOWN_LINES = [
    "# One",
    "## Two ##",
    "#no",
    "text",
    "more text",
    "===",
    "---",
    "",
    "",
    "```",
    "~~~",
    "````",
    "    code",
    "   # three",
    "####### x",
    "#\ttab",
    "``` a`b",
    "* * *",
    "1. item",
    "- item",
    "> quote",
    "# `code`",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(MARKDOWN_LINES), max_size=12))
@example(["text", "    # lazy", "==="])
def test_markdown_headings_are_those_of_commonmark(parts: list[str]) -> None:
    # What is indented into a list is a heading for us, and inside the list for CommonMark: a
    # paragraph ends every list. A line of --- at the very beginning opens front matter, which
    # CommonMark does not know.
    text = "start\n\n" + "\n".join(
        f"{part}\nlazy\n\nparagraph\n" if part.startswith(("1.", "- i", ">")) else part
        for part in parts
    )
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    # headings without words are none of ours
    empty = [line for line, source in enumerate(text.split("\n")) if source.strip("# \t") == ""]
    assert [
        (starts.index(heading.offset), heading.level) for heading in read_markdown(text)[1]
    ] == [pair for pair in oracle(text) if pair[0] not in empty]


@pytest.mark.parametrize(
    "text",
    [
        "#" * 200_000,
        "[" * 200_000,
        "# " + "a [" * 60_000,
        "> " * 100_000,
        "```\n" * 50_000,
        "a\n===\n" * 30_000,
        "# " + "`*" * 100_000,
        "<!--\n" * 50_000,
        "- " * 100_000,
        "# a" + " #" * 100_000 + "b",
        "---\n" * 50_000,
        "[a](" * 60_000,
        "text\n" * 60_000 + "===",
    ],
)
@pytest.mark.timeout(20)  # what is quadratic takes minutes
def test_hostile_markdown_takes_no_time(tmp_path: Path, text: str) -> None:
    read_file(write(tmp_path, "a.md", text))
