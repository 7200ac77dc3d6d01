"""Words of a text as every store compares them."""

from __future__ import annotations

import re
import unicodedata

# PostgreSQL's words have at most 2,046 bytes; equal beginnings of longer ones count as the same
# word.
_MAX_LETTERS = 500
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Return the words without case and accents, as the local index compares them."""
    letters = (
        letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter)
    )
    plain = unicodedata.normalize("NFC", "".join(letters)).lower()
    return [word[:_MAX_LETTERS] for word in _WORD.findall(plain)]
