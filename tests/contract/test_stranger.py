"""The pages of contract/ are enough: readers written from them alone pass every case.

The strangers import nothing of this project; the last test sees to it.
"""

from __future__ import annotations

import ast
import base64
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import numpy as np
import pytest

from contract import damages
from contract.cases_tokens import tokens as make_tokens
from contract.library import check_index
from tests.contract import stranger_bundle, stranger_filters, stranger_index, stranger_writer
from tests.contract.stranger import CONTRACT, Refused, array, cases, text_of
from tests.contract.stranger_text import Prompts, Tokenizer, chunks, match_expression

TOKENS = cases("tokens")
QUERIES = cases("queries")
WRITES = cases("writes")
DAMAGED = cases("damaged")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the name of the error that refuses it."""
    try:
        return call()
    except Refused as refused:
        return {"error": refused.name}


def refusal(case: dict[str, Any]) -> Any:
    return {"error": case["error"]} if "error" in case else None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CONTRACT.parent / TOKENS["tokenizer"]["file"], TOKENS["tokenizer"])


def test_tokens(tokenizer: Tokenizer) -> None:
    assert_tokens(tokenizer, TOKENS["cases"])


def test_tokens_of_gemmas_vocabulary(gemma_tokenizer: Path) -> None:
    made = json.loads(json.dumps(make_tokens(gemma_tokenizer)))
    assert_tokens(Tokenizer(gemma_tokenizer, made["tokenizer"]), made["cases"])


def assert_tokens(tokenizer: Tokenizer, wanted: list[dict[str, Any]]) -> None:
    for case in wanted:
        text = text_of(case["text"]) * case.get("times", 1)
        asked = {name: case[name] for name in ("max_tokens", "overflow") if name in case}
        found = outcome(lambda text=text, asked=asked: tokenizer.encode(text, **asked))
        if "error" in case:
            assert found == refusal(case), case
        elif "ids" in case:
            assert found == (case["ids"], case["num_tokens"]), case
        else:
            ids, num_tokens = found
            assert (len(ids), ids[-3:]) == (case["num_ids"], case["last_ids"]), case
            assert num_tokens == case["num_tokens"], case


def test_prompts() -> None:
    content = cases("prompts")
    for case in content["cases"]:
        table = case.get("table") or content["tables"][case["prompts"]]

        def found(case: dict[str, Any] = case, table: dict[str, str] = table) -> Any:
            prompts = Prompts(table)
            if "tasks" in case:
                return prompts.tasks
            if "title" in case:
                return prompts.document(case["title"])
            return prompts.query(*([case["task"]] if "task" in case else []))

        wanted = refusal(case) or case.get("tasks", case.get("prompt"))
        assert outcome(found) == wanted, case


def test_shortening() -> None:
    content = cases("vectors")
    for case in content["cases"]:
        rows = array(content["inputs"][case["vectors"]], "<f4", case["dims"][0])
        found = outcome(
            lambda rows=rows, case=case: stranger_bundle.shorten(rows, case["dim"], case["dims"])
        )
        if "error" in case:
            assert found == refusal(case), case
        else:
            wanted = array(case["expected"], "<f4", found.shape[1])
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1.2e-7)


def test_codes_and_checksums() -> None:
    content = cases("codes")
    for case in content["cases"]:
        layout = stranger_index.Layout(case["dims"], case["scan_width"])
        rows = array(case["vectors"], "<f4", case["dims"][0])
        coded = [layout.encode(row) for row in rows]
        for position, name in enumerate(("heads", "scales", "rests")):
            assert b"".join(row[position] for row in coded) == base64.b64decode(case[name]), name
        squares = [int((np.frombuffer(head, np.int8).astype(int) ** 2).sum()) for head, *_ in coded]
        assert squares == case["squares"]
        decoded = [np.array(layout.decode(*row), "<f8") for row in coded]
        assert [stranger_index.zlib.crc32(row.tobytes()) for row in decoded] == case[
            "decoded_crc32"
        ]
        if "decoded" in case:
            assert np.array_equal(np.stack(decoded), array(case["decoded"], "<f8", layout.D))
        for number, parts, row, crc, with_floats in zip(
            case["numbers"], coded, rows, case["crc32"], case["crc32_with_floats"], strict=True
        ):
            assert stranger_index.number_crc(number, *parts) == crc
            assert stranger_index.number_crc(number, *parts, row.tobytes()) == with_floats
        squared = np.array(squares, "<i4").tobytes()
        heads = b"".join(head for head, *_ in coded)
        assert stranger_index.number_crc(case["block"], squared, heads) == case["heads_crc32"]
        live = base64.b64decode(case["live"])
        assert stranger_index.number_crc(case["block"], live) == case["blocks_crc32"]
    for case in content["rows"]:
        row = case["row"]
        if case["table"] == "facts":
            assert stranger_index.facts_crc(row) == case["crc32"]
        else:
            assert stranger_index.fields_crc(*row.values()) == case["crc32"]
        if "hash" in case:
            assert stranger_index.chunk_hash(row["title"], row["text"]).hex() == case["hash"]


def test_chunk_cuts(tokenizer: Tokenizer) -> None:
    content = cases("chunks")
    prompts = Prompts(
        {"query": "task: search result | query: ", "document": "title: none | text: "}
    )
    for case in content["cases"]:
        found = outcome(
            lambda case=case: chunks(
                content["texts"][case["name"]],
                case["title"],
                case["headings"],
                tokenizer.count,
                case["max_tokens"],
                case["overlap_tokens"],
                prompts.document if case["prompt"] else None,
            )
        )
        assert found == (refusal(case) or case["chunks"]), case["name"]


def test_filters() -> None:
    content = cases("filters")
    for case in content["cases"]:

        def found(case: dict[str, Any] = case) -> list[int]:
            where = stranger_filters.meant(case["where"], case.get("stand_ins", {}))
            stranger_filters.check(where)
            pairs = enumerate(content["metadata"])
            return [row for row, one in pairs if stranger_filters.holds(where, one)]

        assert outcome(found) == (refusal(case) or case["true_for"]), case


def test_words() -> None:
    content = cases("words")
    for case in content["queries"]:
        found = outcome(lambda case=case: match_expression(text_of(case["query"])))
        if "num_words" in case:
            assert found.count(" OR ") + 1 == case["num_words"]
        else:
            assert found == (refusal(case) or case["match"]), case
    database = stranger_index.sqlite3.connect(":memory:")
    database.execute(
        "CREATE VIRTUAL TABLE words USING fts5(title, text, content='', tokenize='unicode61 remove_diacritics 2')"
    )
    for row, case in enumerate(content["texts"]):
        database.execute("INSERT INTO words (rowid, title, text) VALUES (?, '', ?)", (row, case["text"]))  # fmt: skip
    database.execute("CREATE VIRTUAL TABLE seen USING fts5vocab('words', 'instance')")
    tokens: list[list[str]] = [[] for _ in content["texts"]]
    for row, token in database.execute("SELECT doc, term FROM seen ORDER BY doc, offset"):
        tokens[row].append(token)
    assert tokens == [case["tokens"] for case in content["texts"]]
    for case in content["queries"]:
        if case.get("match"):
            rows = database.execute(
                "SELECT rowid FROM words WHERE words MATCH ? ORDER BY 1", (case["match"],)
            )
            assert [row for (row,) in rows] == case["finds"], case


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stranger_index.Index]:
    path = tmp_path_factory.mktemp("index") / "index.db"
    copyfile(CONTRACT / "index.db", path)
    index = stranger_index.Index(path, QUERIES["index"]["fingerprint"])
    yield index
    index.db.close()


def test_searches_of_the_index(index: stranger_index.Index) -> None:
    index.check()
    for case in QUERIES["cases"]:
        names = ("k", "dim", "where", "exact", "shortlist", "mode", "text")
        asked = {name: case[name] for name in names if name in case}
        if "vector" in case:
            asked["vector"] = array(QUERIES["vectors"][case["vector"]], "<f4")[: case.get("width")]
        found = outcome(lambda asked=asked: index.search(**asked))
        if "error" in case:
            assert found == refusal(case), case
            continue
        assert [hit[:2] for hit in found] == [hit[:2] for hit in case["hits"]], case
        for hit, wanted in zip(found, case["hits"], strict=True):
            for score, other in zip(hit[2:], wanted[2:], strict=True):
                assert (score is None) is (other is None), case
                assert score is None or abs(score - other) <= 1e-6, case


def test_documents_of_the_index(index: stranger_index.Index) -> None:
    for case in QUERIES["documents"]:
        found = outcome(lambda case=case: index.get(case["id"]))
        assert found == (refusal(case) or case), case["id"]
    for case in QUERIES["ids"]:
        assert index.ids(case["where"]) == case["ids"], case["where"]


@pytest.mark.parametrize("run", WRITES["runs"], ids=lambda run: str(run["identity"]["dims"]))
def test_writes(run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    writer = stranger_writer.Writer(path, run["identity"], floats=run["floats"])
    writer.db.execute("CREATE VIRTUAL TABLE temp.seen USING fts5vocab(main, words, instance)")
    for step in run["steps"]:
        writer.write(step)
        for name, wanted in step["tables"].items():
            if name == "facts":
                assert dict(writer.db.execute("SELECT name, value FROM facts")) == wanted
                continue
            columns = ", ".join(WRITES["columns"].get(name, ("doc", "col", "offset", "term")))
            table = "seen" if name == "words" else name
            rows = writer.db.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3").fetchall()
            found = [[one.hex() if isinstance(one, bytes) else one for one in row] for row in rows]
            assert found == wanted, (step, name)
    writer.db.close()
    reader = stranger_index.Index(path, run["identity"]["fingerprint"])
    reader.check()
    reader.db.close()
    # what the stranger wrote, the library opens, and finds sound
    assert check_index(path) == []


@pytest.mark.parametrize("case", DAMAGED["index"], ids=lambda case: case["name"])
def test_damaged_indexes(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    copyfile(CONTRACT / "index.db", path)
    damages.apply(case["edits"], path)
    expect = case["expect"]
    opened = outcome(lambda: stranger_index.Index(path, QUERIES["index"]["fingerprint"]))
    if expect["open"] != "ok":
        assert opened == {"error": expect["open"]}
        return
    assert isinstance(opened, stranger_index.Index), opened
    try:
        checked = outcome(opened.check)
        assert (checked is None) is (expect["check"] == "sound"), checked
        text = "the pump loses oil"
        vector = array(QUERIES["vectors"][text], "<f4")
        operations: dict[str, Callable[[], Any]] = {
            "vector": lambda: opened.search(vector=vector, exact=True),
            "text": lambda: opened.search(text=text, mode="text"),
            "filter": lambda: opened.ids({"lang": "en"}),
            "get": lambda: opened.get("note 0"),
        }
        for name, operation in operations.items():
            found = outcome(operation)
            if expect[name] in ("ok", "other answer"):
                assert not isinstance(found, dict) or "error" not in found, (name, found)
            else:
                assert found == {"error": expect[name]}, name
    finally:
        opened.db.close()


@pytest.mark.parametrize("case", DAMAGED["bundle"], ids=lambda case: case["name"])
def test_damaged_bundles(case: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    copytree(CONTRACT / "bundle", folder)
    damages.apply(case["edits"], folder)

    def embed() -> None:
        manifest = stranger_bundle.read_manifest(folder)
        Prompts(manifest["prompts"])
        tokenizer = Tokenizer(folder / "tokenizer.model", manifest["tokenizer"])
        model = stranger_bundle.Model(folder, manifest)
        model.run([tokenizer.encode("a")[0]])

    expect = case["expect"]
    wanted = next((found for found in expect.values() if found != "ok"), None)
    assert outcome(embed) == ({"error": wanted} if wanted else None)


def test_the_bundle_runs_and_gives_its_golden_vectors() -> None:
    folder = CONTRACT / "bundle"
    manifest = stranger_bundle.read_manifest(folder)
    assert stranger_bundle.fingerprint(manifest) == manifest["fingerprint"]
    tokenizer = Tokenizer(folder / "tokenizer.model", manifest["tokenizer"])
    model = stranger_bundle.Model(folder, manifest)
    golden = json.loads((folder / "golden.json").read_text("utf-8"))
    bounds, vectors = manifest["verification"]["bounds"], {}
    for case in golden["cases"]:
        ids, num_tokens = tokenizer.encode(case["text"], overflow="truncate")
        assert (ids, num_tokens) == (case["ids"], case["num_tokens"]), case["name"]
        vectors[case["name"]] = model.run([ids])
        for dim in manifest["dims"]:
            rows = np.array([case["vector"], case["quantized_vector"]], np.float32)
            wanted = stranger_bundle.shorten(rows, dim, manifest["dims"])
            found = stranger_bundle.shorten(vectors[case["name"]], dim, manifest["dims"])
            cosines = (wanted @ found.T)[:, 0]
            assert cosines[0] >= bounds["min_cosine_float"], (case["name"], dim)
            assert cosines[1] >= bounds["min_cosine_quantized"], (case["name"], dim)
    ids_of = {case["name"]: case["ids"] for case in golden["cases"]}
    for batch in golden["batches"]:
        together = model.run([ids_of[name] for name in batch])
        for name, vector in zip(batch, together, strict=True):
            assert np.abs(vector - vectors[name][0]).max() <= bounds["max_batch_difference"]


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("stranger*.py")), ids=lambda path: path.stem)  # fmt: skip
def test_a_stranger_knows_nothing_of_this_project(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
            if node.module == "tests.contract":
                names = [f"tests.contract.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            outside = {"numpy", "sentencepiece", "onnxruntime"} | set(sys.stdlib_module_names)
            assert name.split(".")[0] in outside or name.startswith("tests.contract.stranger"), name
