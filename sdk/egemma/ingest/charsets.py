"""Bytes to characters.

Nothing is guessed: bytes are UTF-8 unless a byte order mark, or an HTML page's own declaration,
says otherwise.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from egemma.ingest.errors import UnreadableFileError

# UTF-32's mark begins with UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

# What an HTML page may declare, by the names that the HTML standard gives them, and what they mean
# there.
_META_CHARSET = re.compile(
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


def decode(path: str | Path, data: bytes, *, declared: str | None = None) -> str:
    """Return bytes as text: by their byte order mark, else as declared, else as UTF-8.

    Args:
        path: names the file in errors.
        declared: the charset that a page declares, from `declared_charset`.

    Raises:
        UnreadableFileError: a byte does not fit, and is named; or the text holds a NUL.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    charset = BYTE_ORDER_MARKS[mark] if mark else declared or "utf-8"
    try:
        text = data[len(mark) :].decode(charset)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        because = "it declares" if declared else "all text is taken for"
        because = "its byte order mark says" if mark else because
        raise UnreadableFileError(
            path,
            "charset",
            f"byte {place} (0x{data[place]:02X}) is not {charset.upper()}, which {because}",
            hint="Convert the file, for example with iconv, or leave it out.",
        ) from error
    if "\0" in text:
        raise UnreadableFileError(
            path, "binary", f"it is binary: a NUL at character {text.index(chr(0))}"
        )
    return text


def declared_charset(path: str | Path, data: bytes) -> str | None:
    """Return the charset that an HTML page declares in its first 1,024 bytes, as browsers do.

    Raises:
        UnreadableFileError: it is not a charset of the web.
    """
    found = _META_CHARSET.search(data, 0, 1024)
    if found is None:
        return None
    name = found[1].decode().lower()
    if name not in _CHARSETS:
        raise UnreadableFileError(
            path,
            "charset",
            f"it declares the charset {name!r}, which is not known here",
            hint="Convert it to UTF-8.",
        )
    return _CHARSETS[name]
