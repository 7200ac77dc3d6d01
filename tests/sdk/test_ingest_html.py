"""HTML pages to text: what a reader sees, in the charset that the page declares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from egemma.ingest import UnreadableFileError, read_file
from egemma.ingest.sandbox import Sandbox
from tests.sdk.ingest_files import refusal, with_html, write

PAGE = """<!doctype html><html><head><title> My
 page </title><style>p {}</style></head><body><h1>Top <b>one</b></h1><p>Some <i>wor</i>ds,&nbsp;&lt;here&gt;
and   there.<br>Next line<script>bad()</script></p><div hidden>unseen 1</div><div style="color: red; DISPLAY : none">unseen 2</div>
<ul><li>a<li>b</ul><h2>Second</h2><table><tr><td>1<td>2<tr><td>3<td>4</table><pre>  x = 1
    y</pre><!-- comment --><template>unseen 3</template><noscript>unseen 4</noscript><svg><text>unseen 5</text></svg>tail</body></html>"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


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
