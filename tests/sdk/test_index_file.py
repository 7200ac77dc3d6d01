"""Which files are opened, made, brought up to date or refused, and what each refusal says."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from egemma.identity import ModelIdentity
from egemma.index import Index, describe_index, file, is_new
from egemma.index.facts import APPLICATION_ID
from egemma.upkeep import check
from egemma_core.errors import ConfigError, IndexFileError, IndexMismatchError
from tests.sdk.fakes import DIMS, TEXTS, WordEmbedder, open_index

ROOT = Path(__file__).parents[2]


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_an_index_refuses_another_model_and_names_both_and_what_differs(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", "model-one") as first:
        first.add(TEXTS)
    with pytest.raises(
        IndexMismatchError,
        match=r"holds vectors of model-one .*, this is model-two .*differ in weights\. .*egemma "
        r"index migrate",
    ):
        open_index(tmp_path / "a.egx", "model-two")
    with open_index(tmp_path / "a.egx", "model-one") as again:
        assert len(again) == 4


def test_another_name_for_the_same_model_is_the_same_model(tmp_path: Path) -> None:
    open_index(tmp_path / "a.egx").close()
    renamed = WordEmbedder()
    renamed.manifest.source = {"model": "another name", "weights": "elsewhere"}
    with Index.open(tmp_path / "a.egx", cast(Any, renamed)) as index:
        assert index.identity.name.startswith("words-1")


def test_a_file_can_be_opened_by_identity_or_by_nobody_and_then_embeds_nothing(
    tmp_path: Path,
) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
        identity = index.identity
    for key in (identity, None):
        with Index.open(tmp_path / "a.egx", key) as index:
            assert index.search(WordEmbedder().vector("the cat sat on the mat"), k=1)[0].id == "cat"
            assert index.search("cat", mode="text")[0].id == "cat"
            for call in (
                lambda: index.search("cat"),
                lambda: index.search("cat", mode="hybrid"),
                lambda: index.add(["x"]),
            ):
                with pytest.raises(ConfigError, match="without a model"):
                    call()
            assert index.remove(["dog"]) == (1 if key else 0)
    with pytest.raises(IndexFileError, match="no such file"):
        Index.open(tmp_path / "b.egx", None)
    assert not (tmp_path / "b.egx").exists()


def test_a_model_wider_than_the_format_takes_is_refused_before_there_is_a_file(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="16384"):
        Index.open(
            tmp_path / "a.egx",
            ModelIdentity(fingerprint="0" * 64, name="wide", dims=(16_385,), parts={}),
        )
    assert not (tmp_path / "a.egx").exists()


def test_a_file_that_is_no_index_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("this is a text file, long enough to have a header of a hundred bytes. " * 4)
    other = tmp_path / "other.db"
    change(other, "CREATE TABLE contacts (name TEXT)")
    named = tmp_path / "named.db"
    change(named, "PRAGMA application_id = 7")
    short = tmp_path / "short"
    short.write_bytes(b"SQLite form")
    for path, says in (
        (text, "not an index"),
        (other, "SQLite file of another program"),
        (named, "SQLite file of another program .*0x7"),
        (short, "not an index"),
    ):
        before = path.read_bytes()
        for call in (open_index, describe_index):
            with pytest.raises(IndexFileError, match=f"{path.name}.*{says}"):
                call(path)
        assert path.read_bytes() == before


def test_a_missing_file_folder_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="no such file"):
        open_index(tmp_path / "none.egx", create=False)
    with pytest.raises(IndexFileError, match="no such file"):
        describe_index(tmp_path / "none.egx")
    with pytest.raises(IndexFileError, match="no such folder"):
        open_index(tmp_path / "none" / "a.egx")
    with pytest.raises(IndexFileError, match="is a folder"):
        open_index(tmp_path)
    with pytest.raises(IndexFileError, match="NUL"):
        open_index(tmp_path / "a\0b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [-1, 0, 1, 3])
def test_an_older_or_newer_format_is_refused_with_the_way_out(tmp_path: Path, version: int) -> None:
    open_index(tmp_path / "a.egx").close()
    change(tmp_path / "a.egx", f"PRAGMA user_version = {version}")
    before = (tmp_path / "a.egx").read_bytes()
    for call in (open_index, describe_index, check):
        with pytest.raises(
            IndexFileError,
            match=rf"format version {version}, and this egemma reads version 2\. "
            r"Export it as JSON lines with the egemma that wrote it .* and import these here",
        ):
            call(tmp_path / "a.egx")
    assert (tmp_path / "a.egx").read_bytes() == before


def test_an_empty_file_becomes_an_index_only_when_it_may_be_created(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"  # what a process leaves that dies before its first commit
    assert is_new(path)
    path.touch()
    assert is_new(path)
    with pytest.raises(IndexFileError, match="empty"):
        open_index(path, create=False)
    with pytest.raises(IndexFileError, match="empty"):
        Index.open(path, None)
    with pytest.raises(IndexFileError, match="empty"):
        describe_index(path)
    with open_index(path) as index:
        index.add(TEXTS)
    assert not is_new(path)
    assert describe_index(path).documents == 4


def test_a_file_that_another_process_makes_an_index_in_the_last_moment_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for = file._wait_for

    def overtaken(connection: sqlite3.Connection, statement: str) -> None:
        assert "WAL" in statement
        monkeypatch.setattr(file, "_wait_for", wait_for)
        with open_index(tmp_path / "a.egx") as other:
            other.add(TEXTS)
        wait_for(connection, statement)

    monkeypatch.setattr(file, "_wait_for", overtaken)
    with open_index(tmp_path / "a.egx") as index:
        assert len(index) == 4


def test_names_that_mean_something_in_an_sqlite_uri_are_plain_file_names(tmp_path: Path) -> None:
    for name in ("a?mode=memory", "b#c", "100%20", "ü 🦊", ":memory:", "file:x"):
        with open_index(tmp_path / name) as index:
            index.add(["one"])
        assert describe_index(tmp_path / name).documents == 1
    assert len(list(tmp_path.iterdir())) == 6


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.egx").symlink_to(tmp_path / "real" / "a.egx")
    with open_index(tmp_path / "link.egx") as index:
        index.add(TEXTS)
        with open_index(tmp_path / "real" / "a.egx") as direct:  # both names lead to the same locks
            direct.add(["one more"])
        assert len(index) == 5
    assert (tmp_path / "link.egx").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["a.egx"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(IndexFileError, match="loop"):
        open_index(tmp_path / "loop")


@pytest.mark.parametrize(
    "addition",
    [
        "CREATE TABLE notes (text TEXT)",
        "CREATE VIEW all_texts AS SELECT text FROM chunks",
        "CREATE INDEX by_position ON chunks (position)",
        "CREATE TRIGGER late AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TRIGGER words_late AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TRIGGER words_data2 AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TRIGGER next_late AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TRIGGER field_late AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TRIGGER sqliteXlate AFTER INSERT ON documents BEGIN DELETE FROM chunks; END",
        "CREATE TABLE next_vectors (number INTEGER)",
        "CREATE VIRTUAL TABLE more USING fts5(text)",
        "ALTER TABLE documents RENAME TO papers",
        "ALTER TABLE chunks ADD COLUMN more",
        "DROP INDEX chunks_of_document",
        "DROP TABLE words",
        "DROP TABLE heads",
        "DROP TABLE facts",
    ],
)
def test_a_file_with_other_tables_indexes_triggers_or_views_is_refused(
    tmp_path: Path, addition: str
) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.add(TEXTS)
    change(tmp_path / "a.egx", addition)
    for call in (open_index, describe_index):
        with pytest.raises(IndexFileError, match="damaged"):
            call(tmp_path / "a.egx")


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.remember_model_path("/models/one")
        index.add(
            ["a b c", "word " * 60],
            ids=["x", "long"],
            titles=["t", None],
            metadata=[{"k": 1}, None],
            overflow="truncate",
        )
        index.add(["word " * 100], ids=["chunked"], overflow="chunk")
        assert index._session._reader.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        for connection in (
            index._session._reader,
            cast(sqlite3.Connection, index._session._writer),
        ):
            assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
            assert connection.execute("PRAGMA trusted_schema").fetchone()[0] == 0
        inside = index.facts(check=True)
    with sqlite3.connect(tmp_path / "a.egx") as connection:
        assert (
            connection.execute("PRAGMA application_id").fetchone()[0]
            == APPLICATION_ID
            == int.from_bytes(b"eGMA", "big")
        )
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
        chunks = connection.execute("SELECT count(*) FROM chunks").fetchone()[0]
    connection.close()
    described = describe_index(tmp_path / "a.egx", check=True)
    assert (described.fingerprint, described.model) == (
        WordEmbedder().fingerprint,
        f"words-1 test ({WordEmbedder().fingerprint[:12]})",
    )
    assert (described.model_path, described.dims, described.scan_width, described.floats) == (
        "/models/one",
        DIMS,
        DIMS[-1],
        False,
    )
    assert (described.documents, described.chunks, described.truncated_chunks) == (3, chunks, 1)
    assert chunks > 4
    assert (described.format_version, described.migrating_to, described.damage) == (2, None, None)
    assert described.file_bytes == (tmp_path / "a.egx").stat().st_size
    assert inside.damage is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.egx"]


# Files that cannot be written.

READER = """
import json, os, sys
from pathlib import Path
from egemma_core.errors import IndexFileError
from tests.sdk.fakes import WordEmbedder, open_index
WordEmbedder().embed_query("all that is imported late lies where only root may read")
if os.geteuid() == 0:
    os.setuid(65534)
with open_index(Path(sys.argv[1]), create=False) as index:
    hits = [hit.id for hit in index.search("the cat sat on the mat", k=2)]
    try:
        index.add(["x"])
        refused = ""
    except IndexFileError as error:
        refused = str(error)
    print(json.dumps({"hits": hits, "refused": refused, "read_only": index.read_only}), flush=True)
    sys.stdin.readline()
    try:
        print(json.dumps([hit.id for hit in index.search("the cat sat on the mat", k=2)]))
    except IndexFileError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of Unix")
@pytest.mark.parametrize("folder_mode", [0o777, 0o555])
def test_a_file_that_cannot_be_written_can_be_searched(open_folder: Path, folder_mode: int) -> None:
    path = open_folder / "a.egx"
    with open_index(path) as index:
        index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
    path.chmod(0o444)
    open_folder.chmod(folder_mode)
    reader = python(READER, path)
    out, complaint = reader.communicate("\n")
    assert complaint == ""
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["hits"][0] == "cat" == second[0]
    assert first["read_only"]
    assert "search only" in first["refused"]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0,
    reason="needs a second user to write while the first may only read",
)
def test_a_file_read_as_unchanging_is_given_up_when_somebody_changes_it(open_folder: Path) -> None:
    path = open_folder / "a.egx"
    with open_index(path) as index:
        index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
    open_folder.chmod(0o555)
    path.chmod(0o444)
    reader = python(READER, path)
    assert reader.stdout is not None
    assert json.loads(reader.stdout.readline())["hits"][0] == "cat"
    with open_index(path) as index:
        index.remove(["cat"])
        out, _ = reader.communicate("\n")
    assert "changed while it was open" in json.loads(out)


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="needs a second user who may only read"
)
def test_a_file_whose_newest_changes_cannot_be_read_is_refused(
    open_folder: Path, tmp_path: Path
) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.add(TEXTS)
        for name in ("a.egx", "a.egx-wal"):  # copied while it was open, without what readers share
            (open_folder / name).write_bytes((tmp_path / name).read_bytes())
            (open_folder / name).chmod(0o444)
    open_folder.chmod(0o555)
    _, complaint = python(READER, open_folder / "a.egx").communicate("\n")
    assert "a.egx-wal beside it holds newer changes" in complaint
