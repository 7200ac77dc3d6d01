"""Full text: a query of FTS5 from what a user types, and the chunks that it finds."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from egemma.index.checksums import Damage
from egemma.index.records import CHUNKS_WHERE
from egemma_core.errors import InputError

_WORD = re.compile(r"\w+")
# SQLite's idea of a letter is older than Python's, and has combining accents in it: a piece with
# one of these goes to it whole.
_NOT_FOR_PYTHON = re.compile(r"[^\x00-\x7f\w]")
_NEVER_STORED = re.compile(r"[\0\ud800-\udfff]")
MAX_WORDS = 1000


def match_of(query: str) -> str | None:
    """Return an FTS5 query for any of the words, or None where there is no word.

    Each word is quoted, so that no operator, column or quote of FTS5 can come from a user. FTS5
    cuts what stands in quotes once more, and finds it where the same words follow each other.
    """
    query = _NEVER_STORED.sub(" ", query)
    pieces = [piece.replace('"', '""') for piece in query.split() if _NOT_FOR_PYTHON.search(piece)]
    words = list(dict.fromkeys(_WORD.findall(query) + pieces))
    if len(words) > MAX_WORDS:
        raise InputError(
            f"the query has {len(words)} different words: full text takes {MAX_WORDS}. Shorten it, "
            "or use mode='vector'."
        )
    return " OR ".join(f'"{word}"' for word in words) or None


def best_words(
    connection: sqlite3.Connection,
    query: str,
    count: int,
    condition: tuple[str, list[Any]] | None,
) -> list[tuple[int, float]]:
    """Return chunk numbers and BM25 (higher is better), best first, equal ones by number.

    Args:
        condition: a filter on documents, as SQL and its parameters; None for all.
    """
    match = match_of(query)
    if match is None:
        return []
    sql, parameters = condition or ("", [])
    among = f"AND rowid IN ({CHUNKS_WHERE.format(sql)})" if condition else ""
    found = connection.execute(
        f"SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? {among} ORDER BY bm25(words), "
        "rowid LIMIT ?",
        (match, *parameters, count),
    ).fetchall()
    if any(not isinstance(score, float) for _, score in found):
        raise Damage("the full-text table is not what was stored")
    return found
