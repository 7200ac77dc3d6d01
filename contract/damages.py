"""damaged.json: the committed bundle and index, damaged, and what must be said of each."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any, cast

from contract.library import (
    EgemmaError,
    Embedder,
    Index,
    check_index,
    describe_files,
    facts_crc32,
    read_bundle,
    search_vector,
)
from contract.make_bundle import BUNDLES
from contract.make_index import INDEX
from contract.words_model import WordsModel

QUERY = "the pump loses oil"


def damaged() -> dict[str, Any]:
    """Makes every damage on a copy and asks the library about it."""
    with tempfile.TemporaryDirectory() as scratch:
        edits = [*_INDEX, ("vectors of another model", _sql(*_another_model()))]
        index = [_of_index(Path(scratch), number, one) for number, one in enumerate(edits)]
        bundle = [_of_bundle(Path(scratch), number, one) for number, one in enumerate(_BUNDLE)]
    return {
        "about": "The good files with edits, made one after the other. `at`: these bytes (hexadecimal) from that offset on; `find`: "
        "its first occurrence becomes `bytes`; `truncate`: to that many bytes, from the end where negative; `append`; `write`: these, `times` over, are the whole "
        "file; `remove`; `sql`: statements, run by SQLite; `set`: a field of the JSON in the file, by its path, becomes `value`; "
        "`unset`: it goes; `rehash`: the manifest says size and SHA-256 of what is there now. In `bundle` edits name a `file`. "
        "`expect`: what each operation gives: `ok` (the same answer as from the good file), the class of its error, or of `check` "
        "`sound` or `damaged`. What cannot be opened is asked no more. `other answer` stands where nothing but `check` can notice.",
        "made_by": "contract/make.py from egemma.Index, egemma.index.upkeep.check, egemma_core.bundle.read_bundle, egemma.Embedder",
        "tolerance": "none; a reader may be stricter where `other answer` or `ok` stands beside a `damaged`",
        "operations": {
            "open": "open the file, or the bundle's folder",
            "vector": f"search exactly for the vector of {QUERY!r} in queries.json, k 10",
            "text": f"search for the words of {QUERY!r}, k 10",
            "filter": "the ids of all documents with lang en",
            "get": "the document note 0",
            "check": "read everything and compare it with everything else",
            "read": "read the manifest, compare sizes and SHA-256",
            "embed": "the vector of the text 'a', without a prompt",
        },
        "index": index,
        "bundle": bundle,
    }


def apply(edits: list[dict[str, Any]], path: Path) -> None:
    """Make these edits in a copy: of the index, or of the bundle's folder."""
    for edit in edits:
        file = path / edit["file"] if "file" in edit else path
        if "rehash" in edit:
            manifest = json.loads((path / "manifest.json").read_text("utf-8"))
            manifest["files"] = describe_files(path)
            (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        elif "sql" in edit:
            _run_sql(file, edit["sql"])
        elif "set" in edit or "unset" in edit:
            _edit_json(file, edit)
        elif "remove" in edit:
            file.unlink()
        else:
            file.write_bytes(_edited(file.read_bytes() if file.exists() else b"", edit))


def _edited(content: bytes, edit: dict[str, Any]) -> bytes:
    new = bytes.fromhex(edit.get("bytes", ""))
    if "at" in edit:
        return content[: edit["at"]] + new + content[edit["at"] + len(new) :]
    if "find" in edit:
        old = bytes.fromhex(edit["find"])
        assert old in content, f"{edit['find']} is not in the file"
        return content.replace(old, new, 1)
    if "truncate" in edit:
        return content[: edit["truncate"]]
    if "append" in edit:
        return content + bytes.fromhex(edit["append"])
    times: int = edit.get("times", 1)
    return bytes.fromhex(edit["write"]) * times


def _run_sql(file: Path, statements: list[str]) -> None:
    database = sqlite3.connect(file, isolation_level=None)
    try:
        for statement in statements:
            database.execute(statement)
    finally:
        database.close()


def _edit_json(file: Path, edit: dict[str, Any]) -> None:
    content = json.loads(file.read_text("utf-8"))
    path = edit.get("set") or edit["unset"]
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    if "set" in edit:
        inside[path[-1]] = edit["value"]
    else:
        del inside[path[-1]]
    file.write_text(json.dumps(content), "utf-8")


def _sql(*statements: str) -> list[dict[str, Any]]:
    return [{"sql": list(statements)}]


def _hex(text: str) -> str:
    return text.encode().hex()


# What stands in chunks.text of the index only, so that a search for its bytes meets a page of it.
_STORED = "Take the archive and unpack it."

_INDEX: list[tuple[str, list[dict[str, Any]]]] = [
    ("nothing", []),
    ("an empty file", [{"write": ""}]),
    ("a file of text", [{"write": _hex("This is not an index.\n" * 40)}]),
    ("a header that is not SQLite's", [{"at": 0, "bytes": "ff" * 16}]),
    ("cut off in the header", [{"truncate": 50}]),
    ("cut off behind the first page", [{"truncate": 8192}]),
    ("cut off in the middle", [{"truncate": 200_000}]),
    ("the last page is missing", [{"truncate": -8192}]),
    ("the last byte is missing", [{"truncate": -1}]),
    ("zeros instead of the first page", [{"at": 0, "bytes": "00" * 8192}]),
    ("zeros instead of a page", [{"at": 8192 * 10, "bytes": "00" * 8192}]),
    ("another program's file", _sql("PRAGMA application_id = 1")),
    ("no application_id", _sql("PRAGMA application_id = 0")),
    ("a newer version", _sql("PRAGMA user_version = 3")),
    ("a much newer version", _sql("PRAGMA user_version = 2000000000")),
    ("an older version", _sql("PRAGMA user_version = 1")),
    ("version 0", _sql("PRAGMA user_version = 0")),
    ("a negative version", _sql("PRAGMA user_version = -1")),
    ("a table too many", _sql("CREATE TABLE extra (a)")),
    ("a view", _sql("CREATE VIEW extra AS SELECT 1")),
    ("a trigger", _sql("CREATE TRIGGER extra AFTER INSERT ON chunks BEGIN SELECT 1; END")),
    ("an index too many", _sql("CREATE INDEX extra ON chunks (position)")),
    ("an index is missing", _sql("DROP INDEX chunks_of_document")),
    ("a table is missing", _sql("DROP TABLE heads")),
    ("a column too many", _sql("ALTER TABLE chunks ADD COLUMN extra TEXT")),
    ("no facts", _sql("DELETE FROM facts")),
    ("a fact is missing", _sql("DELETE FROM facts WHERE name = 'generation'")),
    ("the checksum of the facts is missing", _sql("DELETE FROM facts WHERE name = 'crc32'")),
    ("another fingerprint in the facts", _sql("UPDATE facts SET value = printf('%064d', 7) WHERE name = 'fingerprint'")),
    ("a fact was changed", _sql("UPDATE facts SET value = '499' WHERE name = 'chunks'")),
    ("a scan width that is none", _sql("UPDATE facts SET value = '17' WHERE name = 'scan_width'")),
    ("dims that are none", _sql("UPDATE facts SET value = '[64, 48' WHERE name = 'dims'")),
    ("a fact that is no number", _sql("UPDATE facts SET value = 'many' WHERE name = 'next_number'")),
    ("a byte of a text", [{"find": _hex(_STORED), "bytes": _hex(_STORED.replace("unpack", "umpack"))}]),
    ("a text that is not UTF-8", [{"find": _hex(_STORED), "bytes": "ff" + _hex(_STORED)[2:]}]),
    ("a text of a hit", _sql("UPDATE chunks SET text = replace(text, 'oil', 'ail') WHERE text LIKE 'The pump loses oil%'")),
    ("a title of a chunk", _sql("UPDATE chunks SET title = 'Another' WHERE title IS NOT NULL")),
    ("a span of a chunk", _sql("UPDATE chunks SET stop = stop + 1 WHERE number = (SELECT min(number) FROM chunks)")),
    ("a hash of a chunk", _sql("UPDATE chunks SET hash = zeroblob(16)")),
    ("a chunk is missing", _sql("DELETE FROM chunks WHERE number = 30")),
    ("all chunks are missing", _sql("DELETE FROM chunks")),
    ("a chunk of no document", _sql("UPDATE chunks SET document = 99999 WHERE number = 30")),
    ("a number of a chunk", _sql("UPDATE chunks SET number = 10000 WHERE number = 30")),
    ("metadata of a document", _sql("UPDATE documents SET metadata = replace(metadata, '\"en\"', '\"de\"')")),
    ("metadata that is no JSON", _sql("UPDATE documents SET metadata = '{' WHERE metadata IS NOT NULL")),
    ("an id of a document", _sql("UPDATE documents SET id = 'note x' WHERE id = 'note 0'")),
    ("a document is missing", _sql("DELETE FROM documents WHERE id = 'note 0'")),
    ("a document without chunks", _sql("INSERT INTO documents (id, crc32) VALUES ('lost', 0)")),
    ("scales of a vector", _sql("UPDATE vectors SET scales = zeroblob(16) WHERE number = 40")),
    ("a scale is missing", _sql("UPDATE vectors SET scales = substr(scales, 1, 12)")),
    ("rests of all vectors", _sql("UPDATE vectors SET rest = zeroblob(56)")),
    ("floats where there are none", _sql("UPDATE vectors SET floats = zeroblob(256) WHERE number = 40")),
    ("two vectors changed places", _sql("UPDATE vectors SET number = -1 WHERE number = 40", "UPDATE vectors SET number = 40 WHERE number = 41",
                                         "UPDATE vectors SET number = 41 WHERE number = -1")),
    ("a vector is missing", _sql("DELETE FROM vectors WHERE number = 40")),
    ("a vector too many", _sql("INSERT INTO vectors SELECT 20000, crc32, scales, rest, floats FROM vectors WHERE number = 40")),
    ("codes of a block", _sql("UPDATE heads SET codes = zeroblob(4096) WHERE block = 1")),
    ("squares of a block", _sql("UPDATE heads SET squares = zeroblob(1024) WHERE block = 0")),
    ("a block of heads is missing", _sql("DELETE FROM heads WHERE block = 1")),
    ("two blocks changed places", _sql("UPDATE heads SET block = -1 WHERE block = 0", "UPDATE heads SET block = 0 WHERE block = 1",
                                        "UPDATE heads SET block = 1 WHERE block = -1")),
    ("a live bit", _sql("UPDATE blocks SET live = x'00' || substr(live, 2) WHERE number = 0")),
    ("live bits too short", _sql("UPDATE blocks SET live = x'ff' WHERE number = 0")),
    ("a block of live bits is missing", _sql("DELETE FROM blocks WHERE number = 2")),
    ("a block of the future", _sql("UPDATE blocks SET changed = 1000")),
    ("a block too many", _sql("INSERT INTO blocks SELECT 3, changed, crc32, live FROM blocks WHERE number = 2")),
    ("a text where a number is due", _sql("UPDATE blocks SET crc32 = 'x' WHERE number = 0")),
    ("a word is missing", _sql("INSERT INTO words (words, rowid, title, text) SELECT 'delete', number, coalesce(title, ''), text FROM chunks WHERE number = 30")),
    ("a word too many", _sql("INSERT INTO words (rowid, title, text) VALUES (30, '', 'pump oil loses')")),
    ("all words are missing", _sql("INSERT INTO words (words) VALUES ('delete-all')")),
    ("words of another text", _sql(
        "INSERT INTO words (words, rowid, title, text) SELECT 'delete', number, coalesce(title, ''), text FROM chunks WHERE number = 30",
        "INSERT INTO words (rowid, title, text) VALUES (30, '', 'zebra')")),
    ("lengths in the full-text table", _sql("UPDATE words_docsize SET sz = x'0563' WHERE id = 101")),
    ("a page of the full-text table", _sql("DELETE FROM words_data WHERE id > 10")),
    ("a half migration", _sql("CREATE TABLE next_vectors (number INTEGER PRIMARY KEY)")),
]  # fmt: skip

_MANIFEST = "manifest.json"


def _set(value: Any, *path: str) -> list[dict[str, Any]]:
    return [{"file": _MANIFEST, "set": list(path), "value": value}]


def _unset(*path: str) -> list[dict[str, Any]]:
    return [{"file": _MANIFEST, "unset": list(path)}]


_REHASH: list[dict[str, Any]] = [{"rehash": True}]

_BUNDLE: list[tuple[str, list[dict[str, Any]]]] = [
    ("nothing", []),
    ("no manifest", [{"file": _MANIFEST, "remove": True}]),
    ("an empty manifest", [{"file": _MANIFEST, "write": ""}]),
    ("a manifest that is no JSON", [{"file": _MANIFEST, "truncate": -20}]),
    ("a manifest that is not UTF-8", [{"file": _MANIFEST, "at": 5, "bytes": "ff"}]),
    ("a manifest that is a list", [{"file": _MANIFEST, "write": _hex("[]")}]),
    ("a manifest of a hundred thousand brackets", [{"file": _MANIFEST, "write": "5b", "times": 100_000}]),
    ("another format", _set("other-bundle", "format")),
    ("no format", _unset("format")),
    ("a newer version", _set(2, "format_version")),
    ("an older version", _set(0, "format_version")),
    ("a version that is a text", _set("1", "format_version")),
    ("no version", _unset("format_version")),
    ("a field too many", _set(1, "extra")),
    *[(f"no {name}", _unset(name)) for name in ("target", "runtime", "fingerprint", "source", "architecture", "tokenizer", "prompts",
                                                 "dims", "scheme", "batch", "verification", "tools", "files")],
    ("an unknown runtime", _set("coreml", "runtime")),
    ("a runtime that is null", _set(None, "runtime")),
    ("a runtime of another file", _set("executorch", "runtime")),
    ("a fingerprint that is a number", _set(7, "fingerprint")),
    ("an unknown batch", _set("many", "batch")),
    ("no widths", _set([], "dims")),
    ("a width that is a text", _set(["64"], "dims")),
    ("a width of nothing", _set([64, 0], "dims")),
    ("a width that the model does not have", _set([128, 64, 32, 16], "dims")),
    ("a table that is a list", _set([], "source")),
    ("prompts that are numbers", _set(7, "prompts", "query")),
    ("no query prompt", _unset("prompts", "query")),
    ("no document prompt", _unset("prompts", "document")),
    ("a field of the tokenizer is missing", _unset("tokenizer", "eos_id")),
    ("a field of the tokenizer too many", _set(3, "tokenizer", "unk_id")),
    ("a negative id", _set(-1, "tokenizer", "pad_id")),
    ("an id that is a text", _set("2", "tokenizer", "bos_id")),
    ("a limit without room", _set(2, "tokenizer", "max_tokens")),
    ("another BOS than the tokenizer's", _set(3, "tokenizer", "bos_id")),
    ("a vocabulary that is too small", _set(100, "tokenizer", "vocab_size")),
    ("a shape without width", _unset("architecture", "width")),
    ("no entry of the model", _unset("files", "model.onnx")),
    ("no entry of the tokenizer", _unset("files", "tokenizer.model")),
    ("no entry of the golden texts", _unset("files", "golden.json")),
    ("an entry without a hash", _unset("files", "model.onnx", "sha256")),
    ("an entry of a file that is not there", _set({"bytes": 1, "sha256": "0" * 64}, "files", "more.bin")),
    ("an entry outside of the folder", _set({"bytes": 1, "sha256": "0" * 64}, "files", "../a")),
    ("another size", _set(1, "files", "model.onnx", "bytes")),
    ("another hash", _set("0" * 64, "files", "model.onnx", "sha256")),
    ("no model", [{"file": "model.onnx", "remove": True}]),
    ("no tokenizer", [{"file": "tokenizer.model", "remove": True}]),
    ("no golden texts", [{"file": "golden.json", "remove": True}]),
    ("a byte of the model", [{"file": "model.onnx", "at": 50_000, "bytes": "a55aa55a"}]),
    ("a byte of the tokenizer", [{"file": "tokenizer.model", "at": 3000, "bytes": "a55aa55a"}]),
    ("a model cut off", [{"file": "model.onnx", "truncate": 1000}]),
    ("a model with more behind", [{"file": "model.onnx", "append": "00"}]),
    ("an empty tokenizer", [{"file": "tokenizer.model", "truncate": 0}]),
    ("a model cut off, with its hash", [{"file": "model.onnx", "truncate": 1000}, *_REHASH]),
    ("a model that is none, with its hash", [{"file": "model.onnx", "write": _hex("no model")}, *_REHASH]),
    ("a tokenizer that is none, with its hash", [{"file": "tokenizer.model", "write": _hex("no tokenizer")}, *_REHASH]),
    ("a tokenizer cut off, with its hash", [{"file": "tokenizer.model", "truncate": 6000}, *_REHASH]),
    ("a model that takes other names, with its hash", [{"file": "model.onnx", "find": _hex("sentence_embedding"),
                                                         "bytes": _hex("sentence_embeddinX")}, *_REHASH]),
]  # fmt: skip


def _another_model() -> list[str]:
    """Statements that make all of it fit together, for a model that is not ours."""
    database = sqlite3.connect(f"{INDEX.as_uri()}?mode=ro&immutable=1", uri=True)
    facts = dict(database.execute("SELECT name, value FROM facts WHERE name != 'crc32'"))
    database.close()
    facts["fingerprint"] = "7" * 64
    new = {"fingerprint": facts["fingerprint"], "crc32": facts_crc32(facts)}
    return [f"UPDATE facts SET value = '{new[name]}' WHERE name = '{name}'" for name in new]


def _of_index(
    scratch: Path, number: int, damage: tuple[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    name, edits = damage
    path = scratch / f"{number}.db"
    copyfile(INDEX, path)
    apply(edits, path)
    return {"name": name, "edits": edits, "expect": index_answers(path)}


def _of_bundle(
    scratch: Path, number: int, damage: tuple[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    name, edits = damage
    folder = scratch / f"bundle-{number}"
    copytree(BUNDLES["onnx-int4"], folder)
    apply(edits, folder)
    return {"name": name, "edits": edits, "expect": bundle_answers(folder)}


def index_answers(path: Path) -> dict[str, str]:
    """What the library says of an index, operation by operation."""
    model = WordsModel()
    good = _good_answers()
    found: dict[str, str] = {}
    try:
        index = Index.open(path, cast(Any, model), create=False)
    except EgemmaError as error:
        return {"open": type(error).__name__, "check": _checked(path)}
    found["open"] = "ok"
    with index:
        for name, operation in _operations(index, model).items():
            try:
                found[name] = "ok" if operation() == good[name] else "other answer"
            except EgemmaError as error:
                found[name] = type(error).__name__
    return found | {"check": _checked(path)}


def bundle_answers(folder: Path) -> dict[str, str]:
    """What the library says of a bundle."""
    try:
        read_bundle(folder)
    except EgemmaError as error:
        return {"read": type(error).__name__}
    try:
        with Embedder.open(folder, threads=1) as embedder:
            embedder.embed_raw(["a"])
    except EgemmaError as error:
        return {"read": "ok", "embed": type(error).__name__}
    return {"read": "ok", "embed": "ok"}


def _operations(index: Index, model: WordsModel) -> dict[str, Callable[[], Any]]:
    vector = model.vector(QUERY)
    return {
        "vector": lambda: _pairs(search_vector(index, vector, exact=True)),
        "text": lambda: _pairs(index.search(QUERY, mode="text")),
        "filter": lambda: index.ids({"lang": "en"}),
        "get": lambda: index.get(["note 0"]),
    }


def _pairs(hits: Any) -> list[Any]:
    return [(hit.id, hit.position, hit.text, hit.score) for hit in hits]


_GOOD: dict[str, Any] = {}


def _good_answers() -> dict[str, Any]:
    if not _GOOD:
        with tempfile.TemporaryDirectory() as scratch:
            copyfile(INDEX, Path(scratch, "good.db"))
            model = WordsModel()
            with Index.open(Path(scratch, "good.db"), cast(Any, model)) as index:
                for name, operation in _operations(index, model).items():
                    _GOOD[name] = operation()
    return _GOOD


def _checked(path: Path) -> str:
    try:
        return "damaged" if check_index(path) else "sound"
    except EgemmaError as error:
        return type(error).__name__
