"""What all strangers share: how they refuse, and how they read the cases.

A stranger is a reader that somebody wrote who has only the pages of contract/: the standard library,
NumPy, SentencePiece, and nothing of this project.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTRACT = Path(__file__).resolve().parents[2] / "contract"
# Python's own idea of white space, written out as chunks.md has it
WHITE = frozenset(
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


class Refused(Exception):  # noqa: N818 - it carries the name that the contract gives the error
    """What must be refused, with the class that every language gives it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def cases(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONTRACT / "cases" / f"{name}.json").read_text("utf-8"))
    return content


def text_of(value: Any) -> str:
    """A text as the cases write it."""
    if isinstance(value, str):
        return value
    return np.array(value["utf16"], "<u2").tobytes().decode("utf-16-le", "surrogatepass")


def array(text: str, kind: str, width: int | None = None) -> NDArray[Any]:
    flat = np.frombuffer(base64.b64decode(text), kind)
    return flat if width is None else flat.reshape(-1, width)


def trim(text: str) -> str:
    """Without white space at both ends."""
    start, stop = 0, len(text)
    while start < stop and text[start] in WHITE:
        start += 1
    while stop > start and text[stop - 1] in WHITE:
        stop -= 1
    return text[start:stop]


def blank(text: str) -> bool:
    return all(character in WHITE for character in text)


def is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)
