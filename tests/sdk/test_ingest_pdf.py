"""PDF to text: its words, title and bookmarks, and that a hostile one costs what the limits say."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egemma.ingest import ParseLimits, UnreadableFileError, read_file
from egemma.ingest.parse import parse
from egemma.ingest.sandbox import Sandbox
from tests.sdk.ingest_files import lines, linux, pdf, refusal, with_pdf, write


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


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
