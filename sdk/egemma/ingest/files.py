"""A file's kind, by its name, and its bytes, unless they cannot be text."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from egemma.ingest.charsets import BYTE_ORDER_MARKS
from egemma.ingest.config import ParseLimits
from egemma.ingest.errors import UnreadableFileError

Kind = Literal["text", "markdown", "html", "pdf", "code"]

_ENDINGS: dict[Kind, str] = {
    "markdown": "md markdown mdown mkd mdx",
    "html": "html htm xhtml",
    "pdf": "pdf",
    "code": "py pyi pyx js mjs cjs jsx ts tsx java kt kts scala groovy swift m mm c h cc cpp cxx "
    "hpp hh hxx cs fs go rs rb php pl pm lua r jl hs ml mli ex exs erl clj lisp el dart zig nim v "
    "sv vhd sql sh bash zsh fish ps1 bat cmd awk sed tcl css scss less vue svelte proto thrift "
    "graphql cmake gradle make mk dockerfile tf asm s f f90 pas vb d",
}
_KIND_OF = {f".{ending}": kind for kind, endings in _ENDINGS.items() for ending in endings.split()}
_CODE_NAMES = frozenset(("makefile", "dockerfile", "cmakelists.txt", "rakefile", "gemfile"))
_SIGNATURES = {
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
_HEAD_BYTES = 8192
# A pipe must not be waited for, a terminal not be taken over; no system has all of these flags.
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NOCTTY", 0)
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


def kind_of(path: str | Path) -> Kind:
    """Return the kind of a file, by its name alone."""
    name = Path(path).name.lower()
    return "code" if name in _CODE_NAMES else _KIND_OF.get(Path(name).suffix, "text")


def read_bytes(
    path: str | Path,
    limits: ParseLimits,
    *,
    follow: bool = True,
    clock_ns: Callable[[], int] = time.time_ns,
) -> FileBytes:
    """Read a regular file, whole.

    Pipes and devices are refused without waiting for them, binary files after their first bytes.

    Args:
        follow: False refuses a link.
        clock_ns: for `looked_ns`.

    Raises:
        UnreadableFileError: not a regular file, not readable, binary, too large.
    """
    looked_ns = clock_ns()
    try:
        descriptor = os.open(path, _OPEN_FLAGS | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        found = getattr(error, "strerror", None) or error
        raise UnreadableFileError(path, "unreadable", f"it cannot be read ({found})") from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableFileError(
                path, "not a file", "it is a folder, pipe, socket or device, not a file"
            )
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(_HEAD_BYTES)
            _check_head(path, data)
            if facts.st_size <= limits.file_bytes:  # and some files have no size of their own
                data += file.read(limits.file_bytes + 1 - len(data))
    except OSError as error:
        raise UnreadableFileError(
            path, "unreadable", f"it cannot be read ({error.strerror})"
        ) from error
    finally:
        os.close(descriptor)
    size = max(len(data), facts.st_size)
    if size > limits.file_bytes:
        raise UnreadableFileError(
            path,
            "too large",
            f"it has {size} bytes, the limit is {limits.file_bytes}",
            hint="Split it, or raise ParseLimits.file_bytes.",
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


def _check_head(path: str | Path, head: bytes) -> None:
    """Refuse a file whose first bytes are not those of a text."""
    if kind_of(path) == "pdf":
        return
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            raise UnreadableFileError(path, "binary", f"it is {name}, not text")
    if b"\0" in head and not head.startswith(tuple(BYTE_ORDER_MARKS)):
        raise UnreadableFileError(
            path,
            "binary",
            f"it is binary: byte {head.index(0)} is NUL",
            hint="Text in UTF-16 needs its byte order mark.",
        )
