"""Which files are opened, made, brought up to date or refused, and what each refusal says."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from egemma.identity import ModelIdentity
from egemma.index import Index, describe_index, file, is_new
from egemma.index.file import APPLICATION_ID
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
            assert (
                index.search_vector(WordEmbedder().vector("the cat sat on the mat"), k=1)[0].id
                == "cat"
            )
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


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    open_index(tmp_path / "a.egx").close()
    change(tmp_path / "a.egx", "PRAGMA user_version = 3")
    for call in (open_index, describe_index):
        with pytest.raises(
            IndexFileError, match=r"format version 3, this egemma reads up to 2\. Update"
        ):
            call(tmp_path / "a.egx")


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
    switch = file._switch_to_wal

    def overtaken(connection: sqlite3.Connection) -> None:
        monkeypatch.setattr(file, "_switch_to_wal", switch)
        with open_index(tmp_path / "a.egx") as other:
            other.add(TEXTS)
        switch(connection)

    monkeypatch.setattr(file, "_switch_to_wal", overtaken)
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
        assert index._reader.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        for connection in (index._reader, cast(sqlite3.Connection, index._writer)):
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


# Version 1.

VERSION_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL);
CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT, metadata TEXT, num_tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL, vector_crc32 INTEGER NOT NULL, vector BLOB NOT NULL, text_crc32 INTEGER NOT NULL, text TEXT NOT NULL);
PRAGMA application_id = 0x65474D41;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def write_version_1(path: Path, count: int) -> None:
    """A file as the first egemma made it, from the description of that version."""
    embedder = WordEmbedder()
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    facts = {
        "fingerprint": embedder.fingerprint,
        "model": "words-1 test (an old name)",
        "dims": "[64, 32, 16]",
        "model_path": "/models/one",
    }
    connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
    for number in range(count):
        id_, text = f"id {number}", f"ünï words {number} 🦊" if number else "the cat sat on the mat"
        title, metadata, truncated = (
            (None, "A title", "")[number % 3],
            (None, f'{{"n": {number}, "ü": [null]}}')[number % 2],
            int(number == 2),
        )
        vector = embedder.vector(text).astype("<f4").tobytes()
        fields = "\0".join(
            "" if field is None else str(field)
            for field in (id_, title, metadata, number + 3, truncated, text)
        )
        connection.execute(
            "INSERT INTO documents (id, title, metadata, num_tokens, truncated, vector_crc32, "
            "vector, text_crc32, text) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                id_,
                title,
                metadata,
                number + 3,
                truncated,
                zlib.crc32(vector, zlib.crc32(id_.encode())),
                vector,
                zlib.crc32(fields.encode()),
                text,
            ),
        )
    connection.execute("DELETE FROM documents WHERE id = 'id 7'")
    connection.commit()
    connection.close()


def rows(path: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(path)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


def test_an_index_of_version_1_is_brought_up_to_date_with_all_it_holds(tmp_path: Path) -> None:
    write_version_1(tmp_path / "a.egx", 1500)
    with pytest.raises(IndexFileError, match=r"version 1 .*Open it once"):
        describe_index(tmp_path / "a.egx")
    with open_index(tmp_path / "a.egx", create=False) as index:
        # as of any other reader
        assert index._reader.execute("PRAGMA busy_timeout").fetchone()[0] == 10_000
        assert len(index) == 1499
        assert index.ids() == [f"id {number}" for number in range(1500) if number != 7]
        for number in (0, 1, 2, 3, 1499):
            document = index.get([f"id {number}"])[0]
            assert document.text == (
                f"ünï words {number} 🦊" if number else "the cat sat on the mat"
            )
            assert document.title == ("A title" if number % 3 == 1 else None)
            assert document.metadata == ({"n": number, "ü": [None]} if number % 2 else None)
            assert (
                document.num_tokens,
                document.truncated,
                document.num_chunks,
                document.source,
            ) == (number + 3, number == 2, 1, None)
        hit = index.search("the cat sat on the mat", k=1, where={"n": {"$exists": False}})[0]
        assert (hit.id, hit.position, hit.start, hit.stop) == ("id 0", 0, 0, 22)
        assert hit.score == pytest.approx(1, abs=1e-3)
        assert index.search("fox words 1234", mode="text", k=1)[0].id == "id 1234"
        facts = index.facts(check=True)
        assert (facts.format_version, facts.model, facts.model_path, facts.dims, facts.damage) == (
            2,
            "words-1 test (an old name)",
            "/models/one",
            DIMS,
            None,
        )
        embedder = cast(Any, index._embedder)
        index.add(["the cat sat on the mat", "new words"], ids=["id 0", "new"])
        assert embedder.embedded == ["new words"]  # what was stored before keeps its vector
    with pytest.raises(IndexMismatchError, match="an old name"):
        open_index(tmp_path / "a.egx", "words-2")


def test_vectors_of_version_1_score_as_they_did(tmp_path: Path) -> None:
    write_version_1(tmp_path / "a.egx", 50)
    stored = {
        id_: np.frombuffer(vector, "<f4").astype(np.float64)
        for id_, vector in rows(tmp_path / "a.egx", "SELECT id, vector FROM documents")
    }
    with open_index(tmp_path / "a.egx") as index:
        query = WordEmbedder().vector("words 13 ünï").astype(np.float64)
        for hit in index.search("words 13 ünï", k=49):
            # 8 bits beyond the head
            assert hit.score == pytest.approx(float(stored[hit.id] @ query), abs=3e-3)


KILLED = """
import os, signal, sys
from egemma.index import rows
from tests.sdk.fakes import open_index
before = rows.Change.add_chunks
calls = 0
def add_chunks(self, *arguments):
    global calls
    before(self, *arguments)
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
rows.Change.add_chunks = add_chunks
open_index(sys.argv[1])
"""


def test_an_upgrade_that_is_killed_in_the_middle_leaves_version_1_and_begins_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.egx"
    write_version_1(path, 1500)
    before = rows(path, "SELECT * FROM documents")
    process = python(KILLED, path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert rows(path, "PRAGMA user_version") == [(1,)]
    assert rows(path, "SELECT * FROM documents") == before
    assert rows(path, "SELECT count(*) FROM sqlite_master WHERE name NOT LIKE 'sqlite%'") == [(2,)]
    with open_index(path) as index:
        assert len(index) == 1499
        assert index.facts(check=True).damage is None


def test_several_processes_may_upgrade_the_same_file_at_once(tmp_path: Path) -> None:
    write_version_1(tmp_path / "a.egx", 300)
    script = (
        "import sys; from tests.sdk.fakes import open_index; print('ready', flush=True); "
        "sys.stdin.readline(); "
        "print(len(open_index(sys.argv[1])))"
    )
    openers = [python(script, tmp_path / "a.egx") for _ in range(4)]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("\n")
        opener.stdin.flush()
    assert [opener.communicate() for opener in openers] == [("299\n", "")] * 4
    assert describe_index(tmp_path / "a.egx", check=True).damage is None


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE documents SET vector = substr(vector, 1, 100) WHERE id = 'id 3'",
        "UPDATE documents SET vector = zeroblob(256) WHERE id = 'id 3'",
        "UPDATE documents SET vector = 'text' WHERE id = 'id 3'",
        "UPDATE documents SET vector = x'0000c07f' || substr(vector, 5) WHERE id = 'id 3'",
        "UPDATE documents SET (vector, vector_crc32) = (SELECT vector, vector_crc32 FROM documents "
        "WHERE id = 'id 4') WHERE id = 'id 3'",
        "UPDATE documents SET id = x'696420' WHERE id = 'id 3'",
        "UPDATE documents SET id = 'id 7' WHERE id = 'id 3'",
        "UPDATE documents SET title = 'another' WHERE id = 'id 3'",
        "UPDATE documents SET metadata = '{' WHERE id = 'id 3'",
        "UPDATE documents SET text = 'another' WHERE id = 'id 3'",
        "UPDATE documents SET text = x'ff' WHERE id = 'id 3'",
        "UPDATE documents SET text = CAST(x'ff61' AS TEXT) WHERE id = 'id 3'",
        "UPDATE documents SET truncated = 1 WHERE id = 'id 3'",
        "UPDATE documents SET num_tokens = 'many' WHERE id = 'id 3'",
        "DELETE FROM facts WHERE name = 'fingerprint'",
        "UPDATE facts SET value = 'no' WHERE name = 'fingerprint'",
        "UPDATE facts SET value = 'no' WHERE name = 'dims'",
        "UPDATE facts SET value = '[16, 32]' WHERE name = 'dims'",
        "UPDATE facts SET value = '[0]' WHERE name = 'dims'",
        "UPDATE facts SET value = '[128]' WHERE name = 'dims'",
        "UPDATE facts SET value = '[' || '1' || ']' WHERE name = 'dims'",
        "UPDATE facts SET value = x'ff' WHERE name = 'dims'",
        "UPDATE facts SET value = '[99999999999999999999]' WHERE name = 'dims'",
        "DROP TABLE documents",
        "ALTER TABLE documents DROP COLUMN truncated",
        "ALTER TABLE documents RENAME TO papers",
        "CREATE TABLE notes (text TEXT)",
        "CREATE TABLE chunks (text TEXT)",
        "CREATE VIEW all_texts AS SELECT text FROM documents",
        "CREATE TRIGGER late AFTER DELETE ON facts BEGIN DELETE FROM documents; END",
    ],
)
def test_a_damaged_or_altered_file_of_version_1_is_refused_and_stays_as_it_was(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "a.egx"
    write_version_1(path, 20)
    change(path, damage)
    before = rows(path, "SELECT name, sql FROM sqlite_master")
    with pytest.raises(IndexFileError, match="damaged"):
        open_index(path)
    assert rows(path, "PRAGMA user_version") == [(1,)]
    assert rows(path, "SELECT name, sql FROM sqlite_master") == before


@pytest.mark.parametrize(
    "vector",
    [
        b"",
        b"\0",
        bytes(256),
        np.ones(64, "<f4").tobytes(),
        np.full(64, np.nan, "<f4").tobytes(),
        np.full(16, 0.25, "<f4").tobytes(),
        np.full(65, 65**-0.5, "<f4").tobytes(),
        bytes(255),
    ],
)
def test_a_vector_that_cannot_be_is_damage_though_its_checksum_fits(
    tmp_path: Path, vector: bytes
) -> None:
    path = tmp_path / "a.egx"
    write_version_1(path, 20)
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE documents SET vector = ?, vector_crc32 = ? WHERE id = 'id 3'",
        (vector, zlib.crc32(vector, zlib.crc32(b"id 3"))),
    )
    connection.commit()
    connection.close()
    with pytest.raises(IndexFileError, match="damaged"):
        open_index(path)
    assert rows(path, "PRAGMA user_version") == [(1,)]


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_refused(tmp_path: Path, version: int) -> None:
    open_index(tmp_path / "a.egx").close()
    change(tmp_path / "a.egx", f"PRAGMA user_version = {version}")
    with pytest.raises(IndexFileError, match=f"format version {version}"):
        open_index(tmp_path / "a.egx")


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
