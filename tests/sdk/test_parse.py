"""Files to text: what is read, what is refused and why, and that a hostile file costs what the
limits say and no more.
"""

from __future__ import annotations

import codecs
import importlib.util
import io
import json
import os
import re
import signal
import socket
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egemma.ingest import extract
from egemma.ingest.parse import (
    ParseLimits,
    UnreadableFileError,
    kind_of,
    parse,
    read_bytes,
    read_file,
    read_markdown,
)
from egemma.ingest.sandbox import Sandbox, check_libraries
from egemma_core.errors import ConfigError, RuntimeUnavailableError

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits the memory of the process"
)
with_pdf = pytest.mark.skipif(
    importlib.util.find_spec("pypdf") is None, reason="needs pypdf: pip install 'egemma[ingest]'"
)
with_html = pytest.mark.skipif(
    importlib.util.find_spec("selectolax") is None,
    reason="needs selectolax: pip install 'egemma[ingest]'",
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, sandbox: Sandbox | None = None, **limits: Any) -> UnreadableFileError:
    with pytest.raises(UnreadableFileError) as caught:
        read_file(path, limits=ParseLimits(**limits), sandbox=sandbox)
    assert str(path) in str(caught.value)
    return caught.value


# A PDF by hand: what a library would repair on writing can be put in.


def pdf(
    *pages: bytes | None,
    extra: tuple[bytes, ...] = (),
    catalog: bytes = b"",
    filters: bytes = b"",
    trailer: bytes = b"",
) -> bytes:
    """Pages of content streams (None is a page without one), then `extra` objects, numbered from 4
    + 2 * len(pages) on.
    """
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog,
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R /Resources << "
            b"/Font << /F 3 0 R >> >> >>" % (5 + 2 * number)
        )
        body = content or b""
        objects.append(b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(body), filters, body))
    objects += extra
    out, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(
        b"%010d 00000 n \n" % offset for offset in offsets
    )
    return (
        out
        + table
        + b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, trailer, len(out))
    )


def lines(*texts: str) -> bytes:
    shown = b" ".join(b"(%s) Tj 0 -20 Td" % text.encode("latin-1") for text in texts)
    return b"BT /F 12 Tf 50 700 Td %s ET" % shown


def test_kinds_are_told_by_the_name() -> None:
    assert [
        kind_of(name)
        for name in (
            "a.md",
            "A.MARKDOWN",
            "b.html",
            "c.PDF",
            "d.py",
            "Makefile",
            "e.txt",
            "f",
            "g.rst",
            "h.json",
        )
    ] == ["markdown", "markdown", "html", "pdf", "code", "code", "text", "text", "text", "text"]


def test_text_and_code_come_as_they_are(tmp_path: Path) -> None:
    source = "def f():\r\n    return '日本 🎉'\n\n\n\tx = 1"
    parsed = read_file(write(tmp_path, "a.py", source + "\n\n"))
    assert (parsed.text, parsed.title, parsed.headings, parsed.kind, parsed.notes) == (
        source,
        None,
        (),
        "code",
        (),
    )
    assert read_file(write(tmp_path, "a.rst", "Title\n=====\n")).headings == ()


@pytest.mark.parametrize(
    ("mark", "charset"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_decides_the_charset(tmp_path: Path, mark: bytes, charset: str) -> None:
    assert (
        read_file(write(tmp_path, "a.txt", mark + "Käse 日本 🎉".encode(charset))).text
        == "Käse 日本 🎉"
    )


@pytest.mark.parametrize(
    ("content", "byte", "charset"),
    [
        (b"caf\xe9 au lait", r"byte 3 \(0xE9\)", "UTF-8"),
        (codecs.BOM_UTF8 + b"a\xff", "byte 4", "UTF-8"),
        (b"surrogate \xed\xa0\x80", "byte 10", "UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0\x00\xd8", "byte 4", "UTF-16-LE"),
    ],
)
def test_another_charset_is_refused_with_the_byte_and_never_guessed(
    tmp_path: Path, content: bytes, byte: str, charset: str
) -> None:
    error = refusal(write(tmp_path, "a.txt", content))
    assert error.reason == "charset"
    assert isinstance(error.__cause__, UnicodeDecodeError)
    assert charset in str(error)
    assert re.search(byte, str(error))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"\x89PNG\r\n\x1a\n", "PNG"),
        ("a.docx", b"PK\x03\x04rest", r"\.docx"),
        ("a", b"\x7fELF\2", "program"),
        ("a.db", b"SQLite format 3\0", "SQLite"),
        ("a.txt", b"%PDF-1.7", r"not end in \.pdf"),
        ("a.bin", b"abc\0def", "byte 3 is NUL"),
        ("a.txt", b"a" * 9000 + b"\0", "NUL at character 9000"),
        ("a.html", b"\x1f\x8b\x08", "gzip"),
        ("a.txt", "Text".encode("utf-16-le"), "byte order mark"),
    ],
)
def test_binary_files_are_named_as_what_they_are(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    error = refusal(write(tmp_path, name, content))
    assert error.reason == "binary"
    assert re.search(what, str(error))


@pytest.mark.parametrize("content", [b"", b" \n\t\n", codecs.BOM_UTF8])
def test_an_empty_file_has_no_text(tmp_path: Path, content: bytes) -> None:
    assert refusal(write(tmp_path, "a.md", content)).reason == "no text"


def test_what_is_above_a_limit_is_refused_not_cut(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "word " * 100)
    assert len(read_file(path, limits=ParseLimits(file_bytes=500)).text) == 499
    assert refusal(path, file_bytes=499).reason == "too large"
    assert refusal(path, characters=498).reason == "too large"
    huge = tmp_path / "huge.txt"
    with open(huge, "wb") as file:
        file.write(b"text")
        file.truncate(2**40)  # a sparse terabyte: neither read nor waited for
    assert refusal(huge).reason == "binary"
    assert (
        refusal(write(tmp_path, "b.txt", b"text " * 20_000), file_bytes=50_000).reason
        == "too large"
    )


def test_long_runs_of_blanks_are_shortened_and_told(tmp_path: Path) -> None:
    parsed = read_file(write(tmp_path, "a.txt", "start" + " \n" * 50_000 + "end"))
    assert parsed.text == "start" + " \n" * 64 + "end"
    assert parsed.notes == ("99872 blanks of long runs were left out",)


@posix
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for name, reason in (
            ("pipe", "not a file"),
            ("s", "unreadable"),
            (".", "not a file"),
            ("absent", "unreadable"),
        ):
            assert refusal(tmp_path / name).reason == reason
    assert refusal(Path("/dev/zero")).reason == "not a file"
    (tmp_path / "link").symlink_to(write(tmp_path, "a.txt", "text"))
    assert read_file(tmp_path / "link").text == "text"
    with pytest.raises(UnreadableFileError):
        read_bytes(tmp_path / "link", ParseLimits(), follow=False)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_file("a\0b.txt")


@pytest.mark.parametrize(
    "settings",
    [
        {"file_bytes": 0},
        {"time_s": -1.0},
        {"pdf_pages": 1.5},
        {"memory_bytes": True},
        {"time_s": float("nan")},
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ParseLimits(**settings)


# Markdown

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


# HTML

PAGE = """<!doctype html><html><head><title> My
 page </title><style>p {}</style></head><body><h1>Top <b>one</b></h1><p>Some <i>wor</i>ds,&nbsp;&lt;here&gt;
and   there.<br>Next line<script>bad()</script></p><div hidden>unseen 1</div><div style="color: red; DISPLAY : none">unseen 2</div>
<ul><li>a<li>b</ul><h2>Second</h2><table><tr><td>1<td>2<tr><td>3<td>4</table><pre>  x = 1
    y</pre><!-- comment --><template>unseen 3</template><noscript>unseen 4</noscript><svg><text>unseen 5</text></svg>tail</body></html>"""


@with_html
def test_html_gives_what_a_reader_sees(tmp_path: Path, sandbox: Sandbox) -> None:
    parsed = read_file(write(tmp_path, "a.html", PAGE), sandbox=sandbox)
    assert parsed.text == (
        "Top one\n\nSome words,\xa0<here> and there.\nNext line\n\na\nb\n\nSecond\n\n1\t2\n3\t4\n\n"
        "  x = 1\n    y\n\ntail"
    )
    assert parsed.title == "My page"
    assert [(heading.level, heading.title) for heading in parsed.headings] == [
        (1, "Top one"),
        (2, "Second"),
    ]
    assert all(
        parsed.text[heading.offset :].startswith(heading.title) for heading in parsed.headings
    )


@with_html
def test_html_words_are_those_of_another_parser(tmp_path: Path, sandbox: Sandbox) -> None:
    from html.parser import HTMLParser

    class Words(HTMLParser):
        words = ""

        def handle_data(self, data: str) -> None:
            self.words += data

    body = "".join(
        f"<h{1 + place % 3}>Head {place}</h{1 + place % 3}><p>Some <em>text {place}</em> &amp; "
        "more.</p>"
        for place in range(300)
    )
    other = Words()
    other.feed(body)
    parsed = read_file(write(tmp_path, "a.html", body), sandbox=sandbox)
    assert "".join(parsed.text.split()) == "".join(other.words.split())
    assert len(parsed.headings) == 300


@with_html
@pytest.mark.parametrize(
    ("declared", "charset"),
    [
        ("iso-8859-1", "cp1252"),
        ("Shift_JIS", "cp932"),
        ("utf-8", "utf-8"),
        ("windows-1251", "cp1251"),
    ],
)
def test_a_page_may_declare_its_charset(
    tmp_path: Path, sandbox: Sandbox, declared: str, charset: str
) -> None:
    words = {"cp932": "日本語", "cp1251": "Привет"}.get(charset, "Käse")
    source = f"<meta http-equiv=content-type content='text/html; charset={declared}'><p>{words}"
    assert (
        read_file(write(tmp_path, "a.html", source.encode(charset)), sandbox=sandbox).text == words
    )


@pytest.mark.parametrize(
    "declared", ["rot13", "utf-7", "idna", "unicode_escape", "zip_codec", "x-user-defined"]
)
def test_a_charset_that_is_not_one_of_the_web_is_refused(tmp_path: Path, declared: str) -> None:
    assert (
        refusal(write(tmp_path, "a.html", f"<meta charset={declared}><p>text")).reason == "charset"
    )


@with_html
def test_a_page_that_only_scripts_fill_has_no_text(tmp_path: Path, sandbox: Sandbox) -> None:
    error = refusal(
        write(tmp_path, "a.html", "<title>App</title><div id=root></div><script>start()</script>"),
        sandbox,
    )
    assert error.reason == "no text"


@with_html
@pytest.mark.parametrize(
    "source",
    [
        "<div>" * 20_000 + "x",
        "<b>" * 50_000 + "x",
        "<a><b><i><p>" * 5_000 + "x",
        "<table><tr><td>" * 10_000 + "x",
        "<p>x" + "<" * 100_000,
        "x&#xD800;&#0;&#x110000;",
        "<svg><p>x</svg>",
        "<h1>" * 5_000 + "x",
        "x</p></div>" * 9_000,
        "<!--x",
        "<![CDATA[x]]>x",
        "x<textarea>" * 1000,
        "<plaintext>x<b>",
    ],
)
def test_malformed_pages_are_read_or_refused(tmp_path: Path, sandbox: Sandbox, source: str) -> None:
    path = write(tmp_path, "a.html", source)
    try:
        parsed = read_file(path, sandbox=sandbox)
    except UnreadableFileError as error:
        assert error.reason in ("damaged", "no text", "too slow")  # noqa: PT017
    else:
        assert parsed.text.encode()
        assert "\0" not in parsed.text


@with_html
@pytest.mark.parametrize(
    "source",
    ["<div>" * 1_000_000 + "x", "<p " + " ".join(f"a{place}=1" for place in range(200_000)) + ">x"],
)
def test_a_page_that_takes_quadratic_time_is_given_up(
    tmp_path: Path, sandbox: Sandbox, source: str
) -> None:
    assert refusal(write(tmp_path, "a.html", source), sandbox, time_s=1.0).reason == "too slow"
    # by a new process
    assert read_file(write(tmp_path, "b.html", "<p>next"), sandbox=sandbox).text == "next"


# PDF


@with_pdf
def test_pdf_gives_text_title_and_bookmarks(tmp_path: Path, sandbox: Sandbox) -> None:
    pages = (
        lines("Chapter One", "First words."),
        lines("More of it.", "Chapter Two", "Last words."),
    )
    outline = (
        b"<< /Type /Outlines /First 9 0 R /Last 10 0 R /Count 2 >>",
        b"<< /Title (Chapter One) /Parent 8 0 R /Next 10 0 R /Dest [4 0 R /Fit] >>",
        b"<< /Title (Chapter Two) /Parent 8 0 R /Prev 9 0 R /Dest [6 0 R /Fit] >>",
        b"<< /Title (The Manual) >>",
    )
    parsed = read_file(
        write(
            tmp_path,
            "a.pdf",
            pdf(*pages, extra=outline, catalog=b"/Outlines 8 0 R", trailer=b"/Info 11 0 R"),
        ),
        sandbox=sandbox,
    )
    assert parsed.text == "Chapter One\nFirst words.\n\nMore of it.\nChapter Two\nLast words."
    assert parsed.title == "The Manual"
    assert [(heading.level, heading.title) for heading in parsed.headings] == [
        (1, "Chapter One"),
        (1, "Chapter Two"),
    ]
    assert all(
        parsed.text[heading.offset :].startswith(heading.title) for heading in parsed.headings
    )


@with_pdf
def test_a_scanned_pdf_has_no_text_and_a_half_scanned_one_says_so(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    error = refusal(write(tmp_path, "scan.pdf", pdf(None, None)), sandbox)
    assert (error.reason, "OCR" in str(error)) == ("no text", True)
    parsed = read_file(
        write(tmp_path, "half.pdf", pdf(lines("words"), None, None)), sandbox=sandbox
    )
    assert (parsed.text, parsed.notes) == ("words", ("2 of 3 pages hold no text",))


@with_pdf
def test_an_encrypted_pdf_is_refused_unless_it_opens_without_a_password(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    import pypdf

    for password, algorithm, reason in (("secret", "RC4-128", "encrypted"), ("", "RC4-128", None)):
        writer = pypdf.PdfWriter(clone_from=write(tmp_path, "plain.pdf", pdf(lines("words"))))
        writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
        path = tmp_path / "locked.pdf"
        writer.write(path)
        if reason is None:
            assert read_file(path, sandbox=sandbox).text == "words"
        else:
            assert refusal(path, sandbox).reason == reason


@with_pdf
def test_a_pdf_bomb_meets_the_bound_on_streams_and_no_memory(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    bomb = zlib.compress(zlib.compress(b" " * 200_000_000, 9), 9)  # a few hundred bytes
    assert len(bomb) < 5_000
    path = write(tmp_path, "bomb.pdf", pdf(bomb, filters=b"/Filter [/FlateDecode /FlateDecode]"))
    error = refusal(path, sandbox)
    assert error.reason in ("damaged", "memory", "too slow")
    assert refusal(path, sandbox, memory_bytes=2**28, stream_bytes=10**10, time_s=20.0).reason in (
        "damaged",
        "memory",
        "too slow",
    )


@linux
@with_pdf
def test_memory_is_limited_by_the_system_not_by_the_parser(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    text = b"(" + b"a" * 30_000_000 + b") Tj"
    path = write(tmp_path, "wide.pdf", pdf(b"BT /F 12 Tf %s ET" % text))
    error = refusal(path, sandbox, memory_bytes=180 * 2**20)
    assert error.reason == "memory"
    assert "180 MB" in str(error)


@with_pdf
def test_pages_and_characters_are_bounded(tmp_path: Path, sandbox: Sandbox) -> None:
    path = write(tmp_path, "a.pdf", pdf(*[lines("some words here")] * 12))
    assert refusal(path, sandbox, pdf_pages=11).reason == "too large"
    assert refusal(path, sandbox, characters=100).reason == "too large"
    assert (
        len(read_file(path, sandbox=sandbox, limits=ParseLimits(pdf_pages=12)).text) == 12 * 17 - 2
    )


LOOP = pdf(lines("words")).replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]")
MALFORMED = {
    "empty": b"",
    "only a head": b"%PDF-1.7\n",
    "not one": b"hello, I am no PDF",
    "pages in a loop": LOOP,
    "cut off": pdf(lines("words"))[:300],
    "no trailer": pdf(lines("words")).replace(b"trailer", b"trailar"),
    "missing page": pdf(lines("words")).replace(b"4 0 obj", b"99 0 obj"),
    "wrong length": pdf(lines("words")).replace(b"/Length", b"/Lengtx"),
    "negative count": pdf(lines("words")).replace(b"/Count 1", b"/Count -9"),
    "huge xref": pdf(lines("words")).replace(b"xref\n0 6", b"xref\n0 99999999"),
    "deep arrays": pdf(b"[" * 50_000),
    "deep dictionaries": pdf(lines("words"), extra=(b"<< /A " * 20_000,)),
    "looping outline": pdf(
        lines("words"),
        extra=(
            b"<< /First 7 0 R /Last 7 0 R >>",
            b"<< /Title (x) /Next 7 0 R /Dest [4 0 R /Fit] >>",
        ),
        catalog=b"/Outlines 6 0 R",
    ),
    "broken flate": pdf(b"not zlib", filters=b"/Filter /FlateDecode"),
    "bad filter": pdf(b"x", filters=b"/Filter /Nonsense"),
    "many strings": pdf(b"BT /F 12 Tf " + b"(a) Tj " * 30_000 + b"ET"),
    "zeros": b"%PDF-1.7\n" + b"\0" * 100_000,
}


@with_pdf
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_pdf_is_read_or_refused(tmp_path: Path, sandbox: Sandbox, name: str) -> None:
    path = write(tmp_path, "a.pdf", MALFORMED[name])
    try:
        parsed = read_file(path, sandbox=sandbox, limits=ParseLimits(time_s=15.0))
    except UnreadableFileError as error:
        assert error.reason in ("damaged", "no text", "memory", "too large")  # noqa: PT017
    else:
        assert parsed.text.strip()


@with_pdf
@settings(max_examples=15, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12
    ),
    stop=st.integers(200, 2000),
)
def test_a_pdf_with_flipped_bytes_is_read_or_refused(
    sandbox: Sandbox, places: list[tuple[int, int]], stop: int
) -> None:
    data = bytearray(pdf(lines("Chapter One", "words"), lines("more"))[:stop])
    for place, value in places:
        data[place % len(data)] = value
    try:
        parse("a.pdf", bytes(data), limits=ParseLimits(time_s=20.0), sandbox=sandbox)
    except UnreadableFileError as error:
        assert error.reason not in ("too slow", "memory"), data  # noqa: PT017


@with_pdf
def test_characters_that_are_no_unicode_are_replaced_and_told(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    cmap = (
        b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange 2 beginbfchar <41> <D800> "
        b"<42> <0000> endbfchar endcmap"
    )
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R >>"
    stream = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(cmap), cmap)
    data = pdf(lines("xABx"), extra=(stream,)).replace(
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", font
    )
    parsed = read_file(write(tmp_path, "a.pdf", data), sandbox=sandbox)
    assert parsed.text.encode()
    assert "\0" not in parsed.text
    assert any("not Unicode were replaced" in note for note in parsed.notes)


# The process


@posix
@with_html
def test_a_process_that_dies_is_told_and_replaced(tmp_path: Path) -> None:
    page = write(tmp_path, "a.html", "<p>text")
    with Sandbox() as sandbox:
        assert read_file(page, sandbox=sandbox).text == "text"
        process = sandbox._process
        assert process is not None
        assert read_file(page, sandbox=sandbox).text == "text"
        assert sandbox._process is process  # one for all files
        os.kill(process.pid, signal.SIGSEGV)
        process.wait()
        assert read_file(page, sandbox=sandbox).text == "text"
    assert sandbox._process is None


@posix
@with_html
def test_a_process_that_hangs_without_computing_is_given_up(tmp_path: Path) -> None:
    page = write(tmp_path, "a.html", "<p>text")
    with Sandbox() as sandbox:
        read_file(page, sandbox=sandbox)
        assert sandbox._process is not None
        os.kill(sandbox._process.pid, signal.SIGSTOP)
        assert refusal(page, sandbox, time_s=0.3).reason == "too slow"
        assert read_file(page, sandbox=sandbox).text == "text"


@posix
@with_html
def test_the_process_is_limited_as_said() -> None:
    import resource

    with Sandbox() as sandbox:
        sandbox.extract("html", b"<p>text", memory_bytes=300 * 2**20, time_s=7.0, characters=100)
        assert sandbox._process is not None
        if sys.platform == "linux":
            pid = sandbox._process.pid
            assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == 300 * 2**20
            assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] == 0
            assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
            assert 7 <= resource.prlimit(pid, resource.RLIMIT_CPU)[0] <= 12
            assert os.getsid(pid) == pid  # Ctrl-C at the terminal does not reach it


def test_a_library_that_prints_does_not_disturb_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def extract_html(source: str, characters: int) -> dict[str, Any]:
        print("a warning on standard output")
        return {"text": source}

    request = (
        json.dumps(
            {"kind": "html", "bytes": 4, "memory_bytes": 1, "cpu_s": 1, "characters": 9}
        ).encode()
        + b"\ntext"
    )
    answers = io.BytesIO()
    shown = io.TextIOWrapper(answers)
    monkeypatch.setattr(extract, "extract_html", extract_html)
    monkeypatch.setattr(extract, "_limit", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(request)))
    monkeypatch.setattr(sys, "stdout", shown)
    extract.main()
    assert json.loads(answers.getvalue()) == {"text": "text"}


def test_a_missing_library_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"PDF needs pypdf.*pip install 'egemma\[ingest\]'.*exclude=\['\*\.pdf'\]",
    ):
        check_libraries("pdf")
    check_libraries("markdown")
    with pytest.raises(RuntimeUnavailableError, match="HTML needs selectolax"):
        read_file(write(tmp_path, "a.html", "<p>text"))


def test_blanks_are_squeezed_to_the_same_in_both_processes() -> None:
    assert (
        extract.squeeze_blanks("a" + " " * 128 + "b" + " " * 129 + "c")
        == "a" + " " * 128 + "b" + " " * 128 + "c"
    )
