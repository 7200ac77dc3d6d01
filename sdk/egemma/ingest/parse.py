"""Files as text: what kind a file is, which characters its bytes are, and where its sections begin.

Nothing is guessed: bytes are UTF-8 unless a byte order mark, or an HTML page's own declaration,
says otherwise.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from egemma.chunks import Heading
from egemma.ingest.extract import squeeze_blanks
from egemma.ingest.sandbox import Sandbox
from egemma_core.errors import ConfigError, InputError

Kind = Literal["text", "markdown", "html", "pdf", "code"]
Reason = Literal[
    "binary",
    "charset",
    "damaged",
    "encrypted",
    "memory",
    "no text",
    "not a file",
    "too large",
    "too slow",
    "unreadable",
]

_KINDS: dict[Kind, str] = {
    "markdown": "md markdown mdown mkd mdx",
    "html": "html htm xhtml",
    "pdf": "pdf",
    "code": "py pyi pyx js mjs cjs jsx ts tsx java kt kts scala groovy swift m mm c h cc cpp cxx "
    "hpp hh hxx cs fs go rs rb php pl pm lua "
    "r jl hs ml mli ex exs erl clj lisp el dart zig nim v sv vhd sql sh bash zsh fish ps1 bat cmd "
    "awk sed tcl css scss less vue svelte "
    "proto thrift graphql cmake gradle make mk dockerfile tf asm s f f90 pas vb d",
}
_KIND_OF = {f".{ending}": kind for kind, endings in _KINDS.items() for ending in endings.split()}
_CODE_NAMES = frozenset(("makefile", "dockerfile", "cmakelists.txt", "rakefile", "gemfile"))
_MAGIC = {
    b"%PDF-": "a PDF whose name does not end in .pdf",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are",
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"RIFF": "sound or video",
    b"OggS": "sound or video",
    b"ID3": "sound",
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEAD_BYTES = 8192

# What an HTML page may declare, by the names that the HTML standard gives them, and what they mean
# there.
_DECLARED = re.compile(
    rb"<meta\s[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE
)
_CHARSETS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
    "iso-8859-1": "cp1252",
    "iso8859-1": "cp1252",
    "latin1": "cp1252",
    "windows-1252": "cp1252",
    "cp1252": "cp1252",
    "iso-8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "gb18030": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "sjis": "cp932",
    "x-sjis": "cp932",
    "windows-31j": "cp932",
    "euc-jp": "euc_jp",
    "iso-2022-jp": "iso2022_jp",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "koi8-r": "koi8_r",
    "koi8-u": "koi8_u",
    "windows-874": "cp874",
    "tis-620": "cp874",
    "macintosh": "mac_roman",
    **{f"windows-125{page}": f"cp125{page}" for page in "01345678"},
    **{f"iso-8859-{part}": f"iso8859_{part}" for part in (*range(2, 9), 10, 13, 14, 15, 16)},
}

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
_HASHES = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_OTHER_BLOCK = re.compile(
    r" {0,3}(?:>|[-+*](?:[ \t]|$)|\d{1,9}[.)](?:[ \t]|$)|<[A-Za-z!/?]|([-_*])[ \t]*(?:\1[ "
    r"\t]*){2,}$)|(?: {4}| {0,3}\t)"
)
_RULE = re.compile(r" {0,3}([-_*])[ \t]*(?:\1[ \t]*){2,}$")
_CONTAINER = re.compile(r" {0,3}(?:>|[-+*](?:[ \t]|$)|\d{1,9}[.)](?:[ \t]|$))")
# What ends a paragraph without a blank line.
_INTERRUPTS = re.compile(
    r" {0,3}(?:>|[-+*][ \t]+\S|1[.)][ "
    r"\t]+\S|<[!?]|</?(?:div|p|pre|table|ul|ol|script|style|section|details)\b"
    r"|([-_*])[ \t]*(?:\1[ \t]*){2,}$)",
    re.IGNORECASE,
)
_FRONT_END = re.compile(r"^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)


class UnreadableFileError(InputError):
    """A file whose text cannot be had, with the reason in one word or two for those who count
    them.
    """

    def __init__(self, path: str | Path, reason: Reason, detail: str) -> None:
        super().__init__(f"{path}: {detail}.")
        self.path, self.reason, self.detail = str(path), reason, detail


@dataclass(frozen=True, kw_only=True)
class ParseLimits:
    """How much one file may cost. What is above a limit is refused, never cut."""

    file_bytes: int = 64 * 2**20
    characters: int = 32 * 2**20  # of extracted text
    pdf_pages: int = 5_000
    stream_bytes: int = 75_000_000  # of one decompressed stream of a PDF
    memory_bytes: int = 2**30  # of the process that reads PDF and HTML
    time_s: float = 60.0  # for one PDF or HTML file

    def __post_init__(self) -> None:
        for name in (
            "file_bytes",
            "characters",
            "pdf_pages",
            "stream_bytes",
            "memory_bytes",
            "time_s",
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float) if name == "time_s" else int)
                or not value > 0
            ):
                raise ConfigError(
                    f"{name}={value!r}: a {'number' if name == 'time_s' else 'whole number'} above "
                    "0."
                )


@dataclass(frozen=True, kw_only=True)
class FileBytes:
    """A file as it was at one moment."""

    data: bytes
    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    looked_ns: int  # the clock before it was opened


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The text of a file."""

    text: str
    title: str | None  # of the document itself, not its file name
    headings: tuple[Heading, ...]
    kind: Kind
    notes: tuple[str, ...]  # what was left out or changed, for people


def read_file(
    path: str | Path, *, limits: ParseLimits | None = None, sandbox: Sandbox | None = None
) -> Parsed:
    """The text of one file.

    Args:
        limits: None for the defaults.
        sandbox: to read several PDF or HTML files with one process; None starts one for this file.

    Raises:
        UnreadableFileError: binary, damaged, encrypted, too large, not UTF-8 ...: see `reason`.
        RuntimeUnavailableError: the kind of file needs a library that is not installed.
    """
    limits = limits or ParseLimits()
    return parse(path, read_bytes(path, limits).data, limits=limits, sandbox=sandbox)


def kind_of(path: str | Path) -> Kind:
    """By its name alone."""
    name = Path(path).name.lower()
    return "code" if name in _CODE_NAMES else _KIND_OF.get(Path(name).suffix, "text")


def read_bytes(
    path: str | Path,
    limits: ParseLimits,
    *,
    follow: bool = True,
    clock_ns: Callable[[], int] = time.time_ns,
) -> FileBytes:
    """A regular file, whole.

    FIFOs and devices are told without waiting for them; binary files after their first bytes.

    Args:
        follow: False refuses a link.
        clock_ns: for `looked_ns`.

    Raises:
        UnreadableFileError: not a regular file, not readable, binary, too large.
    """
    looked_ns = clock_ns()
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_BINARY", 0)
        | getattr(os, "O_NOCTTY", 0)
    )
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise UnreadableFileError(
            path, "unreadable", f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableFileError(
                path, "not a file", "it is a folder, pipe, socket or device, not a file"
            )
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(_HEAD_BYTES)
            _check_binary(path, data)
            if facts.st_size <= limits.file_bytes:  # and some files have no size of their own
                data += file.read(limits.file_bytes + 1 - len(data))
    except OSError as error:
        raise UnreadableFileError(
            path, "unreadable", f"it cannot be read ({error.strerror})"
        ) from error
    finally:
        os.close(descriptor)
    if max(len(data), facts.st_size) > limits.file_bytes:
        raise UnreadableFileError(
            path,
            "too large",
            f"it has {max(len(data), facts.st_size)} bytes, the limit is {limits.file_bytes}. "
            "Split it, "
            "or raise ParseLimits.file_bytes",
        )
    return FileBytes(
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        size=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        ctime_ns=facts.st_ctime_ns,
        inode=facts.st_ino,
        looked_ns=looked_ns,
    )


def parse(
    path: str | Path, data: bytes, *, limits: ParseLimits, sandbox: Sandbox | None = None
) -> Parsed:
    """The text of a file whose bytes are here already; `path` gives the kind, and names it in
    errors.
    """
    kind = kind_of(path)
    if kind == "pdf":
        return _extracted(path, kind, data, limits, sandbox)
    text = decode(path, data, declared=_declared(path, data) if kind == "html" else None)
    if not text.strip():
        raise UnreadableFileError(path, "no text", "it is empty")
    if kind == "html":
        return _extracted(path, kind, text.encode(), limits, sandbox)
    if len(text) > limits.characters:
        raise UnreadableFileError(
            path,
            "too large",
            f"it has {len(text)} characters, the limit is {limits.characters}. Split it, "
            "or raise ParseLimits.characters",
        )
    text = text.rstrip()
    squeezed = squeeze_blanks(text)
    notes = (
        (f"{len(text) - len(squeezed)} blanks of long runs were left out",)
        if len(squeezed) < len(text)
        else ()
    )
    if kind != "markdown":
        return Parsed(text=squeezed, title=None, headings=(), kind=kind, notes=notes)
    title, headings = read_markdown(squeezed)
    return Parsed(text=squeezed, title=title, headings=tuple(headings), kind=kind, notes=notes)


def decode(path: str | Path, data: bytes, *, declared: str | None = None) -> str:
    """Bytes as text: by their byte order mark, else as declared, else as UTF-8.

    Raises:
        UnreadableFileError: names the first byte that does not fit.
    """
    mark, charset = next(
        ((mark, charset) for mark, charset in _MARKS if data.startswith(mark)),
        (b"", declared or "utf-8"),
    )
    try:
        text = data[len(mark) :].decode(charset)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        says = (
            "it declares"
            if declared and not mark
            else "its byte order mark says"
            if mark
            else "all text is taken for"
        )
        raise UnreadableFileError(
            path,
            "charset",
            f"byte {at} (0x{data[at]:02X}) is not {charset.upper()}, which {says}. Convert the "
            "file, "
            "for example with iconv, or leave it out",
        ) from error
    if "\0" in text:
        raise UnreadableFileError(
            path, "binary", f"it is binary: a NUL at character {text.index(chr(0))}"
        )
    return text


def read_markdown(text: str) -> tuple[str | None, list[Heading]]:
    """The title, from the front matter or else the only outermost heading, and the headings.

    The rules of CommonMark 0.31 for headings at the outer level: marked by # or underlined, not in
    fenced or indented code, HTML comments or quotes.
    """
    body = 0
    title = None
    if text.startswith(("---\n", "---\r\n")) and (end := _FRONT_END.search(text, 4, 10_000)):
        body = end.end()
        if found := _FRONT_TITLE.search(text, 0, body):
            title = found[1].strip("\"'").strip() or None
    headings = list(_markdown_headings(text, body))
    outermost = [heading for heading in headings if heading.level == 1]
    if title is None and len(outermost) == 1:
        title = outermost[0].title
    return title, headings


# (one branch per kind of line)
def _markdown_headings(text: str, body: int) -> Iterator[Heading]:  # noqa: PLR0912
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
            closing = bare.strip(" \t")
            if (
                len(closing) >= len(fence)
                and set(closing) == {fence[0]}
                and len(bare) - len(bare.lstrip(" ")) < 4
            ):
                fence = ""
        elif opening := _FENCE.match(bare):
            fence, paragraph, lazy = opening[1], None, False
        elif not bare.strip():
            paragraph, lazy = None, False
        elif marked := _HASHES.match(bare):
            paragraph, lazy = None, False
            name = _plain(marked[2] or "")
            if name:
                yield Heading(offset=start, level=len(marked[1]), title=name)
        elif paragraph and (underline := _UNDERLINE.match(bare)):
            if name := _plain(" ".join(paragraph[1])):
                yield Heading(
                    offset=paragraph[0], level=1 if underline[1][0] == "=" else 2, title=name
                )
            paragraph = None
        elif paragraph and not _INTERRUPTS.match(bare):
            paragraph[1].append(bare)
        elif _OTHER_BLOCK.match(bare):
            comment = bare.lstrip().startswith("<!--") and "-->" not in bare
            lazy = _RULE.match(bare) is None and (lazy or _CONTAINER.match(bare) is not None)
            paragraph = None
        elif not lazy:
            paragraph = start, [bare]


def _plain(marked: str) -> str:
    """A heading's words without the commonest marks: links, emphasis, code."""
    words = re.sub(r"!?\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])", r"\1", marked)
    return " ".join(re.sub(r"[*`]+|\\(?=[!-/:-@\[-`{-~])", "", words).split())


def _extracted(
    path: str | Path, kind: Kind, data: bytes, limits: ParseLimits, sandbox: Sandbox | None
) -> Parsed:
    if sandbox is None:
        with Sandbox() as own:
            return _extracted(path, kind, data, limits, own)
    answer = sandbox.extract(
        kind,
        data,
        memory_bytes=limits.memory_bytes,
        time_s=limits.time_s,
        pages=limits.pdf_pages,
        characters=limits.characters,
        stream_bytes=limits.stream_bytes,
    )
    if "reason" in answer:
        raise UnreadableFileError(path, answer["reason"], answer["detail"])
    headings = tuple(
        Heading(offset=offset, level=level, title=title)
        for offset, level, title in answer["headings"]
    )
    return Parsed(
        text=answer["text"],
        title=answer["title"],
        headings=headings,
        kind=kind,
        notes=tuple(answer["notes"]),
    )


def _check_binary(path: str | Path, head: bytes) -> None:
    if kind_of(path) == "pdf":
        return
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise UnreadableFileError(path, "binary", f"it is {what}, not text")
    if b"\0" in head and not any(head.startswith(mark) for mark, _ in _MARKS):
        raise UnreadableFileError(
            path,
            "binary",
            f"it is binary: byte {head.index(0)} is NUL. Text in UTF-16 needs its byte order mark",
        )


def _declared(path: str | Path, data: bytes) -> str | None:
    """The charset that a page gives in its first 1,024 bytes, where browsers look as well."""
    found = _DECLARED.search(data, 0, 1024)
    if found is None:
        return None
    name = found[1].decode().lower()
    if name not in _CHARSETS:
        raise UnreadableFileError(
            path,
            "charset",
            f"it declares the charset {name!r}, which is not known here. Convert it to UTF-8",
        )
    return _CHARSETS[name]
