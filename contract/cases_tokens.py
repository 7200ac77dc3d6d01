"""tokens.json and prompts.json: texts as ids, and what stands before a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from contract.library import EMBEDDING_GEMMA, EgemmaError, Prompts, Tokenizer
from contract.notation import BUILTIN, ROOT, plain_text
from contract.texts import ENGLISH, HARD_TEXTS, scattered

_LIMITS = [3, 4, 5, 8, 16]


def tokens(path: Path | None = None, max_tokens: int | None = None) -> dict[str, Any]:
    """Cases of the built-in vocabulary, or of another SentencePiece file with that limit."""
    settings = dict(json.loads((BUILTIN / "manifest.json").read_text("utf-8"))["tokenizer"])
    if path is None:
        path = BUILTIN / "tokenizer.model"
        file = path.relative_to(ROOT).as_posix()
    else:
        file = path.name
        settings |= {"vocab_size": _pieces(path), "max_tokens": max_tokens or 2048}
    tokenizer = Tokenizer(path, **settings)
    texts = [*HARD_TEXTS, *(scattered(f"tokens {n}", 4 + 3 * n) for n in range(40)), ENGLISH]
    cases = [{"text": text, **_encoded(tokenizer, text, {})} for text in dict.fromkeys(texts)]
    for text in (
        "a",
        "the cat sat on the mat",
        "日本語の短い文です。",
        "👩‍🚀🎉",
        "x" * 40,
        ENGLISH,
    ):
        for limit in _LIMITS:
            for overflow in ("error", "truncate"):
                limits = {"max_tokens": limit, "overflow": overflow}
                cases.append({"text": text, **limits, **_encoded(tokenizer, text, limits)})
    most = settings["max_tokens"]
    for times in (most // 2, most - 2, most - 1, 2 * most):
        for overflow in ("error", "truncate"):
            asked = {"overflow": overflow}
            found = _encoded(tokenizer, "🎉\n" * times, asked)
            if "ids" in found:  # long, and all alike: its length and its last three say enough
                found = {
                    "num_ids": len(found["ids"]),
                    "last_ids": found["ids"][-3:],
                    "num_tokens": found["num_tokens"],
                }
            cases.append({"text": "🎉\n", "times": times, **asked, **found})
    refused: list[dict[str, Any]] = [
        {"text": "a", "max_tokens": 2},
        {"text": "a", "max_tokens": 0},
        {"text": "a", "max_tokens": -1},
        {"text": "a", "max_tokens": most + 1},
        {"text": "a", "overflow": "cut"},
        {"text": "a", "overflow": ""},
        {"text": "a\ud800b"},
        {"text": "\udc00"},
        {"text": "\ude00\ud83d"},
    ]
    for case in refused:
        asked = {name: value for name, value in case.items() if name != "text"}
        found = _encoded(tokenizer, case["text"], asked)
        cases.append({**case, "text": plain_text(case["text"]), **found})
    return {
        "about": "A text, its prompt already in front, as token ids: BOS first, EOS last, num_tokens of the "
        "whole text. `times`: the text is repeated so often. `max_tokens` and `overflow` as "
        "asked; without them the tokenizer's own limit and `error`. `error`: it is refused, "
        "with this class. A text {`utf16`} is a list of UTF-16 units that is not Unicode text; "
        "a language whose texts cannot hold it passes the case over.",
        "made_by": "contract/make.py from egemma_core.tokens.Tokenizer.encode",
        "tolerance": "none: ids and numbers are equal",
        "tokenizer": {"file": file, "sha256": _sha256(path), **settings},
        "cases": cases,
    }


def prompts() -> dict[str, Any]:
    """What `Prompts` puts before a text, for several models' tables of prompts."""
    tables: dict[str, dict[str, str]] = {
        "embeddinggemma": dict(EMBEDDING_GEMMA.by_name),
        "small": {
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "STS": "task: sentence similarity | query: ",
        },
        "another form": {"query": "query: ", "document": "passage: ", "code": "code: "},
        "title in the middle": {"query": "q: ", "document": "[title: none | text] title: none | "},
    }
    refused: dict[str, dict[str, str]] = {
        "without a query": {"document": "title: none | text: "},
        "without a document": {"query": "query: "},
        "an empty query": {"query": "", "document": "title: none | text: "},
    }
    cases: list[dict[str, Any]] = []
    for name, table in refused.items():
        try:
            Prompts(by_name=table)
        except EgemmaError as error:
            cases.append({"table": table, "name": name, "error": type(error).__name__})
    tasks = [
        "search result", "question answering", "fact checking", "code retrieval", "clustering", "sentence similarity",
        "classification", "summarization", "STS", "Clustering", "query", "document", "Retrieval-document", "code",
        "Search result", "search result ", "", "none", "translation",
    ]  # fmt: skip
    titles = [
        None, "", " ", "\t\n", "\u00a0", "\u3000", "A title", "  A title  ", "none", "None", "a | b", "title: none |",
        "a\nb", "タイトル", "\u00a0x\u00a0", "\u200bx", "x" * 300, "🎉",
    ]  # fmt: skip
    for table_name, table in tables.items():
        made = Prompts(by_name=table)
        cases.append({"prompts": table_name, "tasks": list(made.tasks)})
        for task in tasks:
            cases.append({"prompts": table_name, "task": task, **_prompt(made.query, task)})
        cases.append({"prompts": table_name, **_prompt(made.query)})
        for title in titles:
            cases.append({"prompts": table_name, "title": title, **_prompt(made.document, title)})
    return {
        "about": "The prompt that stands before a text. `task`: before a query of that task (a case with neither "
        "task nor title is a query of the default task); `title`: before a document with it, null for "
        "none; `tasks`: what a model's table says it knows. `table` cases are tables that are refused "
        "as a whole.",
        "made_by": "contract/make.py from egemma_core.prompts.Prompts",
        "tolerance": "none: texts are equal",
        "tables": tables,
        "cases": cases,
    }


def _encoded(tokenizer: Tokenizer, text: str, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        found = tokenizer.encode(text, **asked)
    except EgemmaError as error:
        return {"error": type(error).__name__}
    return {"ids": list(found.ids), "num_tokens": found.num_tokens}


def _prompt(make: Any, *asked: Any) -> dict[str, Any]:
    try:
        return {"prompt": make(*asked)}
    except EgemmaError as error:
        return {"error": type(error).__name__}


def _pieces(path: Path) -> int:
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()).vocab_size())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
