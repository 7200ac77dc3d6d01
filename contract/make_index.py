"""contract/index.db: an index with several languages, blocks, deletions and replacements."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, cast

import numpy as np

from contract import texts
from contract.library import Chunk, ChunkedDocument, Heading, Index, ModelIdentity, split_text
from contract.notation import FOLDER, unit_rows
from contract.words_model import WordsModel

INDEX = FOLDER / "index.db"

_LONG = {
    "en/lighthouse.md": (texts.ENGLISH, "en", "The lighthouse"), "de/pumpe.md": (texts.GERMAN, "de", "Die Pumpe"),
    "es/lluvia.md": (texts.SPANISH, "es", None), "fr/pont.md": (texts.FRENCH, "fr", "Le pont"), "ja/tower.md": (texts.JAPANESE, "ja", "東京タワー"),
    "zh/learning.md": (texts.CHINESE, "zh", None), "ko/spring.md": (texts.KOREAN, "ko", "봄"), "th/science.md": (texts.THAI, "th", None),
    "ar/rain.md": (texts.ARABIC, "ar", "المطر"), "he/rain.md": (texts.HEBREW, "he", None), "hi/rain.md": (texts.HINDI, "hi", None),
    "ru/rain.md": (texts.RUSSIAN, "ru", "Дождь"), "code/table.py": (texts.CODE, "en", "table.py"), "en/shopping.md": (texts.LIST, "en", None),
}  # fmt: skip
_SUBJECTS = [
    "The pump",
    "A gardener",
    "The lighthouse keeper",
    "My neighbour",
    "The old engine",
    "A visitor",
    "The river",
    "Der Motor",
    "La lluvia",
    "La voisine",
]
_VERBS = [
    "loses oil near",
    "waters the tomatoes behind",
    "was painted beside",
    "makes noise under",
    "waits in front of",
    "fell into",
    "crosses",
]
_PLACES = [
    "the harbour",
    "the stone bridge",
    "a warm stove",
    "the quiet garden",
    "the red barn",
    "station 7",
    "der Brücke",
    "the café",
    "the roof",
]
_TAGS = ["red", "green", "blue", "draft", "done"]


def make_index(path: Path) -> None:
    """Write the index to `path`, where no file is."""
    model = WordsModel()
    with Index.open(path, cast(Any, model)) as index:
        index.put([_document(model, id_, *rest) for id_, rest in _LONG.items()])
        index.put([_guide(model)])
        notes = [_note(number) for number in range(440)]
        for start in (0, 100, 300):
            part = notes[start : start + (100 if start == 0 else 200)]
            index.add(
                [note["text"] for note in part],
                ids=[note["id"] for note in part],
                titles=[note["title"] for note in part],
                metadata=[note["metadata"] for note in part],
            )
        index.add_vectors(
            unit_rows("vectors alone", 12, model.dim),
            ids=[f"vector {number}" for number in range(12)],
            metadata=[{"n": number, "kind": "vector"} for number in range(12)],
            num_tokens=[9] * 12,
            truncated=[number % 5 == 0 for number in range(12)],
        )
        # Two of the same direction as an older one: equal scores, in the order of their numbers.
        twin = model.vector(str(notes[33]["text"]))
        index.add_vectors(np.stack([twin, twin]), ids=["twin a", "twin b"], texts=["", "a twin"])
        index.remove([note["id"] for note in notes[4:200:9]])
        index.remove([str(note["id"]) for note in notes[210:240]])
        # Replaced: one as it was, one with a new end, one moved, one with other metadata alone.
        lighthouse = texts.ENGLISH + "\nHe never saw the boat again."
        index.put([_document(model, "en/lighthouse.md", lighthouse, "en", "The lighthouse")])
        index.put([_document(model, "de/pumpe.md", "Neu.\n\n" + texts.GERMAN, "de", "Die Pumpe")])
        index.put([_document(model, "fr/pont.md", *_LONG["fr/pont.md"])])
        index.add(
            [str(notes[300]["text"]), "Something else stands here now."],
            ids=[str(notes[300]["id"]), str(notes[301]["id"])],
            metadata=[{"changed": True, "ü": {"ß": [1, None, "x"]}}, None],
        )
        index.remove(["hi/rain.md", "not there"])


def identity() -> ModelIdentity:
    """Of the model that the index was made with."""
    return ModelIdentity.of(WordsModel().manifest)


def tables_of(path: Path) -> dict[str, Any]:
    """All that an index holds, whatever SQLite wrote it: rows, and the words of the full text."""
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        names = ("facts", "documents", "chunks", "vectors", "blocks", "heads")
        found: dict[str, Any] = {
            name: database.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in names
        }
        database.execute("CREATE VIRTUAL TABLE temp.seen USING fts5vocab(main, words, instance)")
        found["words"] = database.execute(
            "SELECT doc, col, offset, term FROM seen ORDER BY 1, 2, 3"
        ).fetchall()
        for pragma in ("application_id", "user_version", "journal_mode"):
            found[pragma] = database.execute(f"PRAGMA {pragma}").fetchone()[0]
        found["schema"] = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'words\\_%' ESCAPE '\\' ORDER BY 1"
        ).fetchall()
        return found
    finally:
        database.close()


def _document(
    model: WordsModel, id_: str, text: str, lang: str, title: str | None
) -> ChunkedDocument:
    chunks = split_text(
        text,
        title=title,
        count_tokens=model.count_tokens,
        max_tokens=model.max_tokens,
        overlap_tokens=8,
        prompt=model.document_prompt,
    )
    return _stored(id_, title, lang, chunks, len(text))


def _guide(model: WordsModel) -> ChunkedDocument:
    text = texts.MARKDOWN
    headings = [
        Heading(offset=text.index(line), level=len(line.split()[0]), title=line.lstrip("# "))
        for line in text.splitlines()
        if line.startswith("#")
    ]
    chunks = split_text(
        text,
        title="Guide",
        count_tokens=model.count_tokens,
        max_tokens=model.max_tokens,
        headings=headings,
        prompt=model.document_prompt,
    )
    return _stored("guide.md", "Guide", "en", chunks, len(text))


def _stored(
    id_: str, title: str | None, lang: str, chunks: list[Chunk], size: int
) -> ChunkedDocument:
    metadata = {"lang": lang, "path": id_, "size": size, "checked": lang in ("en", "ja")}
    return ChunkedDocument(
        id=id_, title=title, metadata=metadata, source={"path": id_, "size": size}, chunks=tuple(chunks)
    )  # fmt: skip


def _note(number: int) -> dict[str, Any]:
    text = f"{_SUBJECTS[number * 7 % 10]} {_VERBS[number * 3 % 7]} {_PLACES[number * 5 % 9]}, day {number % 61}."
    metadata: dict[str, Any] = {"n": number, "year": 2000 + number % 30}
    if number % 3:
        metadata["tags"] = [_TAGS[number % 5], _TAGS[number * 2 % 5]]
    if number % 4 == 0:
        metadata["score"] = number / 8
    if number % 11 == 0:
        metadata["where"] = {"city": "Łódź" if number % 2 else "東京", "floor": number % 5}
    title = f"Note {number}" if number % 6 == 0 else None
    return {
        "id": f"note {number}",
        "text": text,
        "title": title,
        "metadata": metadata if number % 13 else None,
    }
