"""Files to text: what is read, what is refused and why, and that a file costs what the limits say and
no more.
"""

from __future__ import annotations

import codecs
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from egemma.ingest import ParseLimits, UnreadableFileError, read_file
from egemma.ingest.files import kind_of, read_bytes
from egemma_core.errors import ConfigError, InputError
from tests.sdk.ingest_files import posix, refusal, write


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


def test_an_unreadable_file_carries_reason_and_next_step(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "a.txt", "word " * 100), file_bytes=10)
    assert isinstance(error, InputError)
    assert error.hint == "Split it, or raise ParseLimits.file_bytes."
    assert error.detail == (
        "it has 500 bytes, the limit is 10. Split it, or raise ParseLimits.file_bytes"
    )
    placed = error.at("row 3")
    assert (type(placed), placed.reason) == (UnreadableFileError, "too large")
    assert str(placed) == f"row 3: {error}"
    assert refusal(write(tmp_path, "b.txt", "")).detail == "it is empty"
