"""words.json: the words of a text, and what a user's query becomes in FTS5."""

from __future__ import annotations

import sqlite3
from typing import Any

from contract.library import EgemmaError, match_of
from contract.notation import plain_text
from contract.texts import CHINESE, CODE, GERMAN, HARD_TEXTS, JAPANESE, RUSSIAN, scattered

TOKENIZE = "unicode61 remove_diacritics 2"

_QUERIES = [
    "", " ", "...", '"', '""', "'", "*", "(", ")", "NEAR", "NEAR(a b)", "AND", "a AND b", "a OR b", "NOT a", "title:a", "a*", "^a",
    "-a", "a+b", "a.b", "a-b", "snake_case", "don't", "it\u2019s", "hello world", "Hello", "HELLO", "hello hello Hello", "world! (hello)",
    "cafe", "café", "cafe\u0301", "CAFÉ", "naive", "nai\u0308ve", "Straße", "STRASSE", "strasse", "İstanbul", "istanbul", "ﬁ", "fi",
    "ｆｕｌｌ", "full", "½", "2", "²", "٣٤٥", "345", "日本語", "日本", "東京", "水", "서울의", "서울", "ภาษาไทย", "ไทย", "हिन्दी", "हिन", "क्षि",
    "العربية", "العَرَبِيَّة", "שלום", "שָׁלוֹם", "Русский", "русский", "ё", "Ёжик", "ежик", "Ελληνικά", "ελληνικα", "🎉", "👍🏽", "a🎉b",
    "<bos>", "unused3", "1958", "3.14159", "14159", "x = 1", "def f(x):", "e\u0301\u0302\u0303\u0304\u0305", "\u0300", "a\x00b", "a\ud800b",
    "\u212b", "å", "K", "k", "µ", "Ω", "lo\u0301dz", "Łódź", "lodz", "Tiếng Việt", "tieng viet", "a\u200db", "می‌خواهم", "𠮷野家", "𠮷",
    "ŉ", "ǆ", "ﷺ", "a\u00adb", "foo\u00a0bar", "a\u2028b", "path/to/file.txt", "C++", "C#", ".NET", "@user", "#tag", "user@example.org",
    "what is the pump's pressure?", "quote\"inside", "\"hello world\"", "hello\tworld\nagain", "ა", "አማርኛ", "བོད་སྐད", "1️⃣",
]  # fmt: skip


def words() -> dict[str, Any]:
    """Texts as FTS5's tokens; queries as MATCH expressions, and which of the texts they find."""
    texts = list(dict.fromkeys([*HARD_TEXTS, GERMAN, JAPANESE, CHINESE, RUSSIAN, CODE]))
    texts += [scattered(f"words {number}", 40) for number in range(20)]
    texts = [text for text in texts if "\0" not in text]  # no stored text has one
    database = sqlite3.connect(":memory:")
    create = f"USING fts5(title, text, content='', tokenize='{TOKENIZE}')"
    database.execute(f"CREATE VIRTUAL TABLE words {create}")
    database.executemany(
        "INSERT INTO words (rowid, title, text) VALUES (?, '', ?)", list(enumerate(texts))
    )
    database.execute("CREATE VIRTUAL TABLE seen USING fts5vocab('words', 'instance')")
    tokens: list[list[str]] = [[] for _ in texts]
    for row, token in database.execute("SELECT doc, term FROM seen ORDER BY doc, offset"):
        tokens[row].append(token)
    many = " ".join(f"w{number}" for number in range(1001))
    queries: list[dict[str, Any]] = []
    for query in [*_QUERIES, *(scattered(f"query {number}", 12) for number in range(20))]:
        match = match_of(query)
        found = [] if match is None else database.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid", (match,)
        ).fetchall()  # fmt: skip
        queries.append(
            {"query": plain_text(query), "match": match, "finds": [row for (row,) in found]}
        )
    for query in (many, many.rsplit(" ", 1)[0]):
        try:
            result: dict[str, Any] = {"num_words": match_of(query).count(" OR ") + 1}  # type: ignore[union-attr]
        except EgemmaError as error:
            result = {"error": type(error).__name__}
        queries.append({"query": query, **result})
    return {
        "about": f"`texts`: a text and the tokens that FTS5's tokenizer `{TOKENIZE}` makes of it, in order. `queries`: "
        "the MATCH expression of what a user types (null where it has no word: nothing is found), and the numbers of "
        "the texts that it finds in a table with the columns title (empty here) and text.",
        "made_by": "contract/make.py from egemma.index.words.match_of and SQLite's FTS5",
        "tolerance": "none",
        "texts": [{"text": text, "tokens": tokens[row]} for row, text in enumerate(texts)],
        "queries": queries,
    }
