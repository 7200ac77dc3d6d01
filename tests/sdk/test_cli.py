"""The `egemma` command as a shell sees it: stdout, stderr, exit code.

Most run in this process, a few in one of their own.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import egemma.cli.commands
from egemma.cli import main
from egemma.cli.progress import Progress
from egemma.embedder import Embedder
from egemma.index import describe_index, is_new
from tests.sdk.test_verify import certify
from tests.tiny import MAX_TOKENS, WIDTH, tiny_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    return certify(tiny_bundle(tmp_path_factory.mktemp("cli") / "tiny", tokenizer=tiny_spm))


@pytest.fixture(autouse=True)
def _at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EGEMMA_MODEL", str(bundle))


class Shell:
    """Runs `egemma` in this process and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments: object, stdin: str | bytes = b"") -> int:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *arguments: object, stdin: str | bytes = b"") -> Any:
        assert self(*arguments, "--json", stdin=stdin) == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def egemma_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "egemma", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )


# embed


def test_embed_prints_the_embedders_own_vectors_as_json_lines(egemma_: Shell, bundle: Path) -> None:
    assert egemma_("embed", "where is the pump", "ünï 水", "--json") == 0
    rows = [json.loads(line) for line in egemma_.out.splitlines()]
    with Embedder.open(bundle) as embedder:
        for row, text in zip(rows, ["where is the pump", "ünï 水"], strict=True):
            expected = embedder.embed_query(text)
            np.testing.assert_allclose(row["vector"], expected.vector, atol=1e-6)
            assert (row["text"], row["as"], row["task"], row["dim"]) == (
                text,
                "query",
                "search result",
                WIDTH,
            )
            assert (row["num_tokens"], row["truncated"], row["fingerprint"]) == (
                expected.num_tokens,
                False,
                expected.fingerprint,
            )


def test_embed_uses_the_prompt_of_its_role_task_and_title(egemma_: Shell, bundle: Path) -> None:
    def vector(*arguments: str) -> Any:
        return egemma_.json("embed", "the water pump", *arguments)["vector"]

    with Embedder.open(bundle) as embedder:
        np.testing.assert_allclose(
            vector("--task", "clustering"),
            embedder.embed_query("the water pump", task="clustering").vector,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            vector("--as", "document"),
            embedder.embed_documents(["the water pump"]).vectors[0],
            atol=1e-6,
        )
        np.testing.assert_allclose(
            vector("--as", "document", "--title", "Pumps"),
            embedder.embed_documents(["the water pump"], titles=["Pumps"]).vectors[0],
            atol=1e-6,
        )
        np.testing.assert_allclose(
            vector("--dim", "8"), embedder.embed_query("the water pump", dim=8).vector, atol=1e-6
        )


def test_embed_reads_lines_from_stdin_in_order_over_several_groups(
    egemma_: Shell, bundle: Path, tmp_path: Path
) -> None:
    lines = [f"line {number}" for number in range(egemma.cli.commands.GROUP * 2 + 3)]
    assert egemma_("embed", "--as", "document", "--out", "v.npy", stdin="\r\n".join(lines)) == 0
    assert egemma_.out == f"v.npy: {len(lines)} vectors of {WIDTH} float32\n"
    saved = np.load(tmp_path / "v.npy")
    assert saved.dtype == np.float32
    with Embedder.open(bundle) as embedder:
        np.testing.assert_allclose(saved, embedder.embed_documents(lines).vectors, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.npy"]
    assert egemma_("embed", "-", "--json", stdin="\ufeffone\ntwo\n") == 0
    assert [json.loads(line)["text"] for line in egemma_.out.splitlines()] == ["one", "two"]
    assert egemma_("embed", "--out", "none.npy", stdin="") == 0
    assert np.load(tmp_path / "none.npy").shape == (0, WIDTH)


def test_embed_says_which_text_cannot_be_embedded(egemma_: Shell) -> None:
    long = "word " * MAX_TOKENS
    assert egemma_("embed", stdin="fine\n" * 70 + long) == 1
    assert egemma_.err.startswith("egemma: stdin:71: the text has ")
    assert "--overflow truncate" in egemma_.err
    assert egemma_("embed", "fine", long, "--as", "document") == 1
    assert egemma_.err.startswith("egemma: TEXT 2: the text has ")
    assert egemma_("embed", stdin="fine\n\nfine") == 1
    assert "stdin:2 is blank" in egemma_.err
    assert egemma_("embed", stdin=b"fine\nbad \xff\n") == 1
    assert "stdin:2: byte 4 is not UTF-8" in egemma_.err
    assert egemma_("embed", long, "--overflow", "truncate") == 0
    assert "truncated" in egemma_.out


def test_the_culprit_of_a_batch_is_named_without_embedding_it_again(
    egemma_: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    for name in ("embed_query", "embed_documents"):
        honest = getattr(Embedder, name)

        def counted(self: Embedder, texts: Any, honest: Any = honest, **settings: Any) -> Any:
            calls.append(len(texts))
            return honest(self, texts, **settings)

        monkeypatch.setattr(Embedder, name, counted)
    texts = "one\ntwo\n" + "word " * MAX_TOKENS + "\nfour\n"
    for command in (["embed"], ["embed", "--as", "document"], ["add-lines", "a.egx"]):
        assert egemma_(*command, stdin=texts) == 1
        assert egemma_.err.startswith("egemma: stdin:3: the text has "), egemma_.err
    assert calls == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["embed", "x", "--dim", "300"], "dim=300"),
        (["embed", "x", "--task", "poetry"], "'poetry'"),
        (["embed", "x", "--threads", "0"], "threads"),
        (["embed", "x", "--model", "nowhere"], "nowhere: no such folder"),
        (["embed", "x", "--out", "no/such/folder.npy"], "cannot be written"),
        (["search", "none.egx", "x"], "none.egx: no such file"),
        (["add", "a.egx", "none.txt"], "none.txt"),
        (["add", "a.egx", "a\0b"], "cannot be read"),
        (["remove", "none.egx", "x"], "none.egx: no such file"),
        (["index", "check", "none.egx"], "none.egx: no such file"),
        (["index", "tune", "none.egx"], "none.egx: no such file"),
        (["index", "migrate", "none.egx", "--to", "builtin"], "none.egx: no such file"),
        (["index", "import", "a.egx", "none.jsonl"], "none.jsonl"),
        (["add", "no/such/a.egx"], "no such folder"),
        (["inspect", "none"], "none: no such folder"),
        (["verify", "none"], "none: no such folder"),
        (["bench", "none"], "none: no such folder"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_line(
    egemma_: Shell, arguments: list[str], says: str
) -> None:
    assert egemma_(*arguments, stdin="text") == 1
    assert egemma_.err.startswith("egemma: ")
    assert egemma_.err.count("\n") == 1
    assert says in egemma_.err
    assert egemma_.out == ""
    assert not Path("a.egx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["embed", "--as", "poem"],
        ["embed", "x", "--title", "t"],
        ["embed", "x", "--as", "document", "--task", "clustering"],
        ["search", "a.egx"],
        ["search", "a.egx", "x", "-k", "many"],
        ["add"],
        ["bench", "b", "--tokens", "a,b"],
        ["verify"],
        ["add", "a.egx", ".", "--overflow", "truncate"],
        ["add", "a.egx", "--plan"],
        ["add-lines", "a.egx", "--hidden"],
        ["search", "a.egx", "x", "--where", "{"],
        ["search", "a.egx", "x", "--where", "[]"],
        ["search", "a.egx", "x", "--approximate"],
        ["index", "graph", "a.egx"],
        ["index"],
        ["index", "polish", "a.egx"],
        ["index", "migrate", "a.egx"],
        ["embed", "--in", "a.parquet", "--out", "v"],
        ["add", "a.egx", "--lines"],
    ],
)
def test_a_wrong_command_line_ends_with_2(egemma_: Shell, arguments: list[str]) -> None:
    assert egemma_(*arguments) == 2
    assert "usage: egemma" in egemma_.err
    assert egemma_.out == ""


# add and search


def test_options_may_stand_before_between_and_after_files_and_texts(
    egemma_: Shell, tmp_path: Path
) -> None:
    for name in "xyz":
        (tmp_path / name).write_text(name)
    assert (
        egemma_.json(
            "add-lines", "--overflow", "truncate", "a.egx", "x", "y", "--threads", "1", "z"
        )["added"]
        == 3
    )
    assert egemma_("embed", "--dim", "8", "one", "--json", "two") == 0
    assert [json.loads(line)["text"] for line in egemma_.out.splitlines()] == ["one", "two"]
    assert egemma_("embed", "one", "--json", "--dmi", "8") == 2
    assert egemma_("inspect", "a.egx", "b.egx") == 2


def test_files_are_documents_under_their_full_path_and_are_found(
    egemma_: Shell, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.txt").write_text(
        "The forwarder lost its oil pressure", encoding="utf-8-sig"
    )
    (tmp_path / "two" / "a.txt").write_text("A recipe for bread:\nflour, water")
    report = egemma_.json("add", "notes.egx", "one/a.txt", "two/../two/a.txt")
    assert (report["new"], report["documents"], report["embedded"], report["skipped"]) == (
        2,
        2,
        2,
        [],
    )
    found = egemma_.json("search", "notes.egx", "The forwarder lost its oil pressure", "-k", "1")
    assert [hit["id"] for hit in found["hits"]] == [str(tmp_path / "one" / "a.txt")]
    assert found["hits"][0]["text"] == "The forwarder lost its oil pressure"
    (tmp_path / "two" / "a.txt").write_text("Now about something else")
    report = egemma_.json("add", "notes.egx", "two/a.txt")
    assert (report["new"], report["changed"], report["documents"]) == (0, 1, 2)
    hits = egemma_.json("search", "notes.egx", "bread")["hits"]
    assert {hit["text"] for hit in hits} == {
        "The forwarder lost its oil pressure",
        "Now about something else",
    }


def test_a_folder_is_planned_added_and_kept_up_with(egemma_: Shell, tmp_path: Path) -> None:
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "pump.md").write_text(
        "# Pumps\n\nGrease the water pump twice a year.\n\n## Hoses\n\nCheck for cracks.\n"
    )
    (tmp_path / "notes" / "deep" / "bread.txt").write_text("flour, water, salt")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert egemma_("add", "a.egx", "notes", "--plan") == 0
    assert egemma_.out.startswith("2 new, 0 changed, 0 unchanged, 0 deleted, 1 skipped")
    assert "to embed: 3 chunks" in egemma_.out
    assert "picture.png" in egemma_.out
    assert not Path("a.egx").exists()
    report = egemma_.json("add", "a.egx", "notes")
    assert (report["new"], report["embedded"], len(report["skipped"]), report["documents"]) == (
        2,
        3,
        1,
        2,
    )
    assert egemma_("search", "a.egx", "Check for cracks.", "-k", "1") == 0
    assert "Pumps > Hoses  [46:" in egemma_.out.replace(str(tmp_path), "")
    (tmp_path / "notes" / "deep" / "bread.txt").unlink()
    assert egemma_.json("add", "a.egx", "notes", "--plan")["deleted"] == [
        str(tmp_path / "notes" / "deep" / "bread.txt")
    ]
    assert describe_index("a.egx").documents == 2
    report = egemma_.json("add", "a.egx", "notes", "--exclude", "*.png")
    assert (report["unchanged"], report["removed"], report["embedded"], report["documents"]) == (
        1,
        1,
        0,
        1,
    )


def test_search_filters_and_joins_words_with_meaning(
    egemma_: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": f"n{number}", "text": f"note {number} about water", "metadata": {"page": number}}
        for number in range(20)
    ]
    egemma_.json("add-lines", "a.egx", "--jsonl", stdin="\n".join(map(json.dumps, rows)))
    found = egemma_.json("search", "a.egx", "water", "--where", '{"page": {"$gte": 17}}')
    assert {hit["id"] for hit in found["hits"]} == {"n17", "n18", "n19"}
    assert found["how"]["vectors"] == 3
    assert egemma_("search", "a.egx", "water", "--where", '{"page": {"$near": 1}}') == 1
    assert "$near" in egemma_.err
    found = egemma_.json("search", "a.egx", "17", "--mode", "hybrid")
    assert found["hits"][0]["id"] == "n17"
    assert found["how"]["mode"] == "hybrid"
    monkeypatch.setenv("EGEMMA_MODEL", "nowhere")
    Path("a.egx").rename("b.egx")
    # words need no model
    found = egemma_.json("search", "b.egx", 'note" OR 17', "--mode", "text", "-k", "1")
    assert [hit["id"] for hit in found["hits"]] == ["n17"]
    assert egemma_("search", "b.egx", "zzz", "--mode", "text") == 0
    assert "nothing found" in egemma_.err


def test_remove_takes_stored_ids_only(egemma_: Shell) -> None:
    egemma_.json(
        "add-lines",
        "a.egx",
        "--jsonl",
        stdin='{"text": "one", "id": "1"}\n{"text": "two", "id": "2"}\n{"text": "three", "id": "3"}',
    )
    assert egemma_("remove", "a.egx", "1", "4") == 1
    assert "no document '4'" in egemma_.err
    assert egemma_.json("remove", "a.egx", "1", "2") == {
        "index": "a.egx",
        "removed": 2,
        "documents": 1,
    }


def test_an_index_is_checked_copied_moved_and_given_another_model(
    egemma_: Shell, tmp_path: Path, tiny_spm: Path
) -> None:
    egemma_.json(
        "add-lines",
        "a.egx",
        stdin="".join(f"line {number} of water\n" for number in range(60)),
    )
    assert egemma_.json("index", "check", "a.egx")["findings"] == []
    assert egemma_.json("index", "backup", "a.egx", "b.egx")["documents"] == 60
    assert egemma_("index", "backup", "a.egx", "b.egx") == 1
    assert "on the command line --force" in egemma_.err
    assert egemma_.json("index", "export", "a.egx", "a.jsonl") == {
        "file": "a.jsonl",
        "documents": 60,
    }
    assert egemma_.json("index", "import", "c.egx", "a.jsonl") == {
        "documents": 60,
        "chunks": 60,
        "embedded": 0,
    }
    query = ["line 7 of water", "-k", "5"]
    hits = egemma_.json("search", "a.egx", *query)["hits"]
    for copy in ("b.egx", "c.egx"):
        assert egemma_.json("search", copy, *query)["hits"] == hits
    other = tiny_bundle(tmp_path / "other", tokenizer=tiny_spm, changes={"fingerprint": "f" * 64})
    report = egemma_.json("index", "migrate", "a.egx", "--to", other)
    assert (report["chunks"], report["embedded"]) == (60, 60)
    # the same weights under another fingerprint, and the path is remembered
    assert egemma_.json("search", "a.egx", *query)["hits"] == hits
    assert egemma_("index", "abandon", "a.egx") == 1
    report = egemma_.json("index", "tune", "b.egx", "--recall", "0.5", "-k", "3")
    assert report["chosen"]["low"] >= 0.5
    assert egemma_("index", "tune", "b.egx", "--recall", "0.5") == 0
    assert "Chosen and stored" in egemma_.out
    content = bytearray((tmp_path / "c.egx").read_bytes())
    content[content.index(b"line 33")] ^= 1
    (tmp_path / "c.egx").write_bytes(content)
    assert egemma_("index", "check", "c.egx") == 1
    assert "chunk 33" in egemma_.out


def test_lines_and_json_lines_are_documents(egemma_: Shell, tmp_path: Path) -> None:
    report = egemma_.json("add-lines", "a.egx", stdin="first line\n\n  \nsecond line\nfirst line\n")
    assert (report["added"], report["documents"]) == (3, 2)
    rows = [
        {"id": "x", "text": "with all", "title": "T", "metadata": {"page": 1}},
        {"text": "only text"},
        {"id": None, "text": "nulls", "title": None, "metadata": None},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = egemma_.json("add-lines", "a.egx", "--jsonl", "d.jsonl")
    assert (report["added"], report["documents"]) == (3, 5)
    hits = {
        hit["text"]: hit
        for hit in egemma_.json("search", "a.egx", "with all", "--dim", "8")["hits"]
    }
    assert (hits["with all"]["id"], hits["with all"]["title"], hits["with all"]["metadata"]) == (
        "x",
        "T",
        {"page": 1},
    )
    assert hits["nulls"]["metadata"] is None
    report = egemma_.json("add", "a.egx", "-", stdin="all of stdin\nis one document")
    assert report["documents"] == 6
    # a long one is cut into passages, as a file is
    report = egemma_.json("add", "a.egx", stdin="every word of this is found " * MAX_TOKENS)
    assert (report["added"], report["truncated"], report["documents"]) == (1, 0, 7)
    assert describe_index("a.egx").chunks > 8


def test_add_says_how_much_was_cut(egemma_: Shell) -> None:
    lines = "short\n" + "word " * MAX_TOKENS
    assert egemma_("add-lines", "a.egx", stdin=lines) == 1
    assert "egemma: stdin:2: the text has " in egemma_.err
    report = egemma_.json("add-lines", "a.egx", "--overflow", "truncate", stdin=lines)
    assert (report["added"], report["truncated"], len(report["truncated_ids"])) == (2, 1, 1)
    assert report["tokens"] > MAX_TOKENS
    assert egemma_("add-lines", "a.egx", "--overflow", "truncate", stdin=lines) == 0
    assert "added 2 documents" in egemma_.out
    assert "only the beginning of each can be found" in egemma_.out
    assert egemma_("search", "a.egx", "word") == 0
    assert "(only its beginning was embedded)" in egemma_.out


def test_an_error_in_the_middle_of_a_run_says_where_and_what_the_index_now_holds(
    egemma_: Shell,
) -> None:
    good = "".join(f"line {number}\n" for number in range(100))
    assert egemma_("add-lines", "a.egx", stdin=good.encode() + b"bad \xff\n") == 1
    assert "egemma: stdin:101: byte 4 is not UTF-8" in egemma_.err
    said = re.search(r"egemma: a\.egx now holds (\d+) documents", egemma_.err)
    assert said is not None
    assert int(said[1]) == describe_index("a.egx").documents > 0
    assert egemma_("add-lines", "b.egx", stdin=good + "nul \0\n") == 1
    assert re.search(r"egemma: stdin:101: .*holds a NUL character", egemma_.err)
    assert f"egemma: b.egx now holds {egemma.cli.commands.GROUP} documents" in egemma_.err
    assert describe_index("b.egx").documents == egemma.cli.commands.GROUP


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "one object per line"),
        ('{"id": "x"}', '"text"'),
        ('{"text": 7}', '"text"'),
        ('{"text": "a", "text": "b"}', "given twice"),
        ('{"text": "a", "tilte": "b"}', "nothing but"),
        ('{"text": "a", "id": 7}', "'id' is int"),
        ('{"text": "a", "metadata": [1]}', "'metadata' is list"),
        ('{"text": ""}', "is blank"),
        ('{"text": "a", "id": ""}', "is blank"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "a", "id": "good"}', "was given to stdin:1 already"),
    ],
)
def test_a_bad_json_line_is_named(egemma_: Shell, line: str, says: str) -> None:
    assert (
        egemma_("add-lines", "a.egx", "--jsonl", stdin='{"text": "good", "id": "good"}\n' + line)
        == 1
    )
    assert "egemma: stdin:2" in egemma_.err
    assert says in egemma_.err


def test_search_prints_rank_score_name_and_one_safe_line_of_text(egemma_: Shell) -> None:
    evil = "\x1b[2Jthe water\r\npump \u202e is " + "long " * 30
    egemma_.json(
        "add-lines",
        "a.egx",
        "--jsonl",
        "--overflow",
        "truncate",
        stdin=json.dumps({"id": "i\x1b[31md", "text": evil, "title": "Pumps\x07"})
        + '\n{"text": "bread", "id": "b"}',
    )
    assert egemma_("search", "a.egx", "water pump") == 0
    lines = egemma_.out.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"  1  0\.\d{3}  .*", lines[0])
    assert "Pumps" in egemma_.out
    assert lines[1].strip().endswith("...") or lines[3].strip().endswith("...")
    assert all(character.isprintable() or character == "\n" for character in egemma_.out)


def test_search_refuses_what_cannot_work(egemma_: Shell) -> None:
    egemma_.json("add-lines", "a.egx", stdin="one line")
    for arguments, says in (
        (["x", "-k", "0"], "k=0"),
        (["x", "--dim", "300"], "dim=300"),
        (["x", "--task", "poetry"], "poetry"),
        ([""], "at least one word"),
    ):
        assert egemma_("search", "a.egx", *arguments) == 1
        assert says in egemma_.err
        assert egemma_.out == ""


def test_an_index_remembers_its_model_and_refuses_another(
    egemma_: Shell, bundle: Path, tmp_path: Path, tiny_spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "mine"
    shutil.copytree(bundle, moved)
    other = tiny_bundle(tmp_path / "other", tokenizer=tiny_spm, changes={"fingerprint": "f" * 64})
    monkeypatch.delenv("EGEMMA_MODEL")
    egemma_.json("add-lines", "a.egx", "--model", moved, stdin="one line")
    assert describe_index("a.egx").model_path == str(moved)
    monkeypatch.setenv("EGEMMA_MODEL", str(other))
    # the index knows better than the environment
    assert egemma_.json("search", "a.egx", "line")["hits"]
    for command in (["search", "a.egx", "line"], ["add-lines", "a.egx"]):
        assert egemma_(*command, "--model", other, stdin="more") == 1
        assert re.search(
            r"holds vectors of tiny tiny-onnxruntime \(.{12}\), this is tiny tiny-onnxruntime "
            r"\(ffffffffffff\)",
            egemma_.err,
        )
    assert describe_index("a.egx").documents == 1
    moved.rename(tmp_path / "elsewhere")
    monkeypatch.delenv("EGEMMA_MODEL")
    assert egemma_("search", "a.egx", "line") == 1
    assert "which is gone" in egemma_.err
    assert "--model" in egemma_.err
    assert egemma_.json("search", "a.egx", "line", "--model", tmp_path / "elsewhere")["hits"]
    egemma_.json("add-lines", "a.egx", "--model", tmp_path / "elsewhere", stdin="two lines")
    assert egemma_.json("search", "a.egx", "line")["hits"]


# inspect, verify, bench


def test_inspect_tells_bundles_from_indexes(egemma_: Shell, bundle: Path) -> None:
    egemma_.json("add-lines", "a.egx", stdin="one line")
    about = egemma_.json("inspect", "a.egx")
    assert (about["kind"], about["documents"], about["damage"], about["dims"]) == (
        "index",
        1,
        None,
        [32, 16, 8],
    )
    about = egemma_.json("inspect", bundle)
    assert (about["kind"], about["target"], about["batch"]) == (
        "bundle",
        "tiny-onnxruntime",
        "dynamic",
    )
    for path in ("a.egx", bundle):
        assert egemma_("inspect", path) == 0
        assert about["fingerprint"] in egemma_.out


def test_inspect_finds_damage(egemma_: Shell, bundle: Path, tmp_path: Path) -> None:
    egemma_.json("add-lines", "a.egx", stdin="".join(f"line {number}\n" for number in range(200)))
    content = bytearray((tmp_path / "a.egx").read_bytes())
    at = content.index(b"line 77")
    content[at] ^= 1  # SQLite's own check does not see this
    (tmp_path / "a.egx").write_bytes(content)
    assert egemma_("inspect", "a.egx") == 1
    assert re.search(r"damage +chunk 77 is not what was stored", egemma_.out)
    at = len(content) // 4096 // 2 * 4096
    content[at : at + 50] = bytes(50)
    (tmp_path / "a.egx").write_bytes(content)
    assert egemma_("inspect", "a.egx") == 1
    assert "damage" in egemma_.out + egemma_.err
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "golden.json").write_text("{}")
    assert egemma_("inspect", copy) == 1
    assert "golden.json" in egemma_.err


def test_verify_passes_a_sound_bundle_and_ends_with_1_for_another(
    egemma_: Shell, bundle: Path
) -> None:
    report = egemma_.json("verify", bundle)
    assert report["passed"]
    assert report["failures"] == []
    assert egemma_("verify", bundle) == 0
    assert egemma_.out.endswith("passed\n")
    assert egemma_("verify", bundle, "--min-cosine-float", "1.0", "--json") == 1
    report = json.loads(egemma_.out)
    assert not report["passed"]
    assert "bound 1.0" in report["failures"][0]
    assert report["bounds"]["min_cosine_float"] == 1.0
    assert egemma_("verify", bundle, "--min-cosine-float", "1.0") == 1
    assert "FAILED" in egemma_.out


def test_verify_in_a_process_of_its_own_prints_exactly_one_json_document(bundle: Path) -> None:
    process = start("verify", bundle, "--json", cwd=ROOT)
    out, err = process.communicate()
    assert process.returncode == 0
    assert err == ""
    assert json.loads(out)["passed"]
    assert out.count("\n") == 1


def test_bench_measures_each_length(egemma_: Shell, bundle: Path) -> None:
    report = egemma_.json("bench", bundle, "--runs", "3", "--threads", "1")
    assert [row["tokens"] for row in report["latency"]] == [16, 64]  # the tiny model reads 128
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in report["latency"])
    assert (report["threads"], report["runs"]) == (1, 3)
    assert report["load_ms"] > 0
    assert report["peak_rss_mb"] > 10
    assert egemma_("bench", bundle, "--tokens", "3,128", "--runs", "1") == 0
    assert re.search(r"(?m)^ {5}3 +\d", egemma_.out)
    for arguments, says in (
        (["--tokens", "2"], "tokens=2"),
        (["--tokens", "16,129"], "tokens=129"),
        (["--runs", "0"], "runs=0"),
    ):
        assert egemma_("bench", bundle, *arguments) == 1
        assert says in egemma_.err


# As a program among others


def test_help_and_version_load_neither_numpy_nor_a_runtime() -> None:
    code = (
        "import sys; from egemma.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'onnxruntime', 'sentencepiece', 'torch'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["--version"], ["search", "--help"]):
        out = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        assert out.splitlines()[-1] == "[]"


def test_no_command_imports_torch(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from egemma.cli import main; model = sys.argv[1]\n"
        "sys.stdin = open(sys.argv[2])\n"
        "for line in (['embed', 'x'], ['add-lines', 'a.egx'], ['search', 'a.egx', 'x'], "
        "['inspect', model], ['verify', model],\n"
        "             ['bench', model, '--runs', '1']):\n"
        "    assert main(line) == 0, line\n"
        "assert 'torch' not in sys.modules"
    )
    (tmp_path / "lines").write_text("one\n")
    ended = subprocess.run(
        [sys.executable, "-c", code, str(bundle), str(tmp_path / "lines")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_reader_that_goes_away_ends_the_program_quietly(bundle: Path) -> None:
    process = start("embed", "--json", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("a line\n" * 5000)
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_ctrl_c_during_add_ends_with_130_and_leaves_a_sound_index_of_whole_groups(
    tmp_path: Path,
) -> None:
    process = start("add-lines", "a.egx", stdin=subprocess.PIPE, cwd=tmp_path)
    assert process.stdin is not None
    process.stdin.write(
        "".join(f"line {number}\n" for number in range(egemma.cli.commands.GROUP * 5))
    )
    process.stdin.flush()  # and left open: the program waits for more
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not is_new(tmp_path / "a.egx") and describe_index(tmp_path / "a.egx").documents >= 128:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    said = re.search(r"egemma: a\.egx now holds (\d+) documents", err)
    assert said is not None
    assert "Traceback" not in err
    facts = describe_index(tmp_path / "a.egx", check=True)
    assert facts.documents == int(said[1])
    assert facts.documents % egemma.cli.commands.GROUP == 0
    assert facts.damage is None


def test_json_is_utf8_whatever_the_locale_says() -> None:
    process = start(
        "embed",
        "--json",
        stdin=subprocess.PIPE,
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    out, err = process.communicate("水 ünï\n")
    assert process.returncode == 0, err
    assert json.loads(out)["text"] == "水 ünï"


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_file_name_that_is_not_utf8_can_be_named_in_an_error() -> None:
    process = start(
        "inspect",
        b"no\xff.egx".decode(errors="surrogateescape"),
        env={"PYTHONIOENCODING": "utf-8:strict"},
    )
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.startswith("egemma: no\\udcff.egx: no such folder")


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress("documents", 10) as progress:
        progress.advance(5)
    assert capfd.readouterr().err == ""
    outer, inner = pty.openpty()
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with Progress("documents", 10) as progress:
            progress.advance(5)
        terminal.flush()
        drawn = os.read(outer, 1000).decode()
        # a terminal may hand over what was written in parts; the timeout ends this if it never
        # comes
        while not drawn.endswith("\r\x1b[K"):
            drawn += os.read(outer, 1000).decode()
    os.close(outer)
    assert "5 documents [###############...............] of 10" in drawn
    assert drawn.endswith("\r\x1b[K")
