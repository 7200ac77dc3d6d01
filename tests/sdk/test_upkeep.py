"""Looking after an index: every damage is found, a copy is whole, compacting changes no answer, and
an export comes back as it was.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from egemma import upkeep
from egemma.chunks import Chunk, ChunkedDocument
from egemma.identity import ModelIdentity
from egemma.index import Index, describe_index
from egemma.index.upkeep.check import MAX_FINDINGS
from egemma.upkeep import backup, check, compact
from egemma_core.errors import IndexFileError, IndexMismatchError, InputError
from tests.sdk.conftest import ROOT
from tests.sdk.fakes import DIMS, TEXTS, WordEmbedder, open_index

WORDS = [f"w{number}" for number in range(60)]
QUERIES = ["w1 w2 w3", "w7", "w11 w30 w31 w32", "harbour w5"]


def filled(path: Path, count: int = 600, **settings: Any) -> Index:
    """Titles, metadata, several chunks, edits and deletions; the caller closes it."""
    rng = np.random.default_rng(0)
    index = open_index(path, **settings)
    texts = [" ".join(rng.choice(WORDS, size=6)) for _ in range(count)]
    ids = [f"d{number}" for number in range(count)]
    index.add(
        texts,
        ids=ids,
        titles=[None if number % 3 else f"title {number}" for number in range(count)],
        metadata=[{"number": number, "even": number % 2 == 0} for number in range(count)],
    )
    whole = "First part. Second part w7. Third."
    chunks = tuple(
        Chunk(start=start, stop=stop, title="Guide > Install", text=whole[start:stop])
        for start, stop in ((0, 20), (12, 27), (27, 34))
    )
    index.put(
        [
            ChunkedDocument(
                id="parts",
                title="Guide",
                metadata=None,
                source={"path": "/somewhere/../guide.md"},
                chunks=chunks,
            )
        ]
    )
    index.add([f"edited w{number}" for number in range(20)], ids=ids[:20])
    return index


def answers(index: Index) -> list[Any]:
    by_words = [
        index.search(query, 12, mode=mode, where={"even": True} if mode == "hybrid" else None).hits
        for query in QUERIES
        for mode in ("vector", "hybrid", "text")
    ]
    return [
        *by_words,
        *(index.search(QUERIES[0], 700, dim=dim).hits for dim in DIMS),
        index.get(sorted(index.ids())),
    ]


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA writable_schema = ON")
    for statement in statements:
        connection.execute(statement)
    connection.close()


# check


def test_a_sound_index_has_no_findings_before_and_after_everything(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index:
        assert upkeep.check(index.path) == []
        index.remove([f"d{number}" for number in range(0, 600, 2)])
        assert upkeep.check(index.path) == check(tmp_path / "a.egx") == []
        index.remove(index.ids())
        assert upkeep.check(index.path) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            "UPDATE documents SET title = 'x' WHERE id = 'd1'",
            "document 'd1' is not what was stored",
        ),
        (
            "UPDATE documents SET metadata = '{}' WHERE id = 'd1'",
            "document 'd1' is not what was stored",
        ),
        (
            "UPDATE documents SET source = NULL WHERE id = 'parts'",
            "document 'parts' is not what was stored",
        ),
        ("DELETE FROM documents WHERE id = 'd1'", "belongs to nothing in documents"),
        ("INSERT INTO documents (id, crc32) SELECT 'empty', 2453473475", "document 'empty'"),
        ("UPDATE chunks SET text = 'other' WHERE number = 45", "chunk 45 is not what was stored"),
        (
            "UPDATE chunks SET hash = zeroblob(16) WHERE number = 45",
            "chunk 45 is not what was stored",
        ),
        ("UPDATE chunks SET document = 3 WHERE number = 45", "chunk 45 is not what was stored"),
        ("DELETE FROM chunks WHERE number = 601", "is not whole"),
        ("DELETE FROM chunks WHERE number = 50", "belongs to nothing in chunks"),
        ("UPDATE chunks SET number = 99999 WHERE number = 70", "belongs to nothing in chunks"),
        ("DELETE FROM vectors WHERE number = 50", "vector 50 is not what was stored"),
        (
            "UPDATE vectors SET rest = zeroblob(length(rest)) WHERE number = 300",
            "vector 300 is not what was stored",
        ),
        (
            "UPDATE vectors SET scales = zeroblob(length(scales)) WHERE number = 300",
            "vector 300 is not what was stored",
        ),
        (
            "UPDATE vectors SET floats = zeroblob(4) WHERE number = 300",
            "vector 300 is not what was stored",
        ),
        (
            "UPDATE heads SET codes = zeroblob(length(codes)) WHERE block = 1",
            "block 1 of the vectors is not what was stored",
        ),
        ("DELETE FROM heads WHERE block = 1", "block 1 of the vectors is not what was stored"),
        ("DELETE FROM blocks WHERE number = 2", "2 blocks of vectors for"),
        (
            "UPDATE blocks SET live = zeroblob(32) WHERE number = 0",
            "block 0 of the vectors is not what was stored",
        ),
        ("UPDATE blocks SET changed = 77 WHERE number = 0", "changed in write 77"),
        ("UPDATE facts SET value = 3 WHERE name = 'chunks'", "its table `facts`"),
        ("INSERT INTO words (words) VALUES ('delete-all')", "the full-text table knows 0 chunks"),
        ("UPDATE words_docsize SET sz = x'0909' WHERE id = 47", "other lengths of texts"),
        (
            "INSERT INTO words (words, rowid, title, text) VALUES ('delete', 30, '', 'w1'); "
            "INSERT INTO words (rowid, title, text) VALUES (30, '', 'w1')",
            "finds 'w1' in other chunks than have it",
        ),
        ("UPDATE sqlite_master SET rootpage = 3 WHERE name = 'chunks_of_document'", ""),
    ],
)
def test_every_damage_to_a_row_is_found(tmp_path: Path, damage: str, says: str) -> None:
    filled(tmp_path / "a.egx").close()
    sql(tmp_path / "a.egx", *damage.split("; "))
    found = check(tmp_path / "a.egx")
    assert found
    assert any(says in finding for finding in found), found
    try:
        assert describe_index(tmp_path / "a.egx", check=True).damage in found
    except IndexFileError as error:  # where even the facts cannot be read
        assert says in str(error)  # noqa: PT017


def index_without_rows(path: Path, name: str) -> None:
    """An index of SQLite's that is another, empty one: what a torn page can look like."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE other (a TEXT UNIQUE, b INTEGER)")
    connection.execute("CREATE INDEX other_b ON other (b)")
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = ?) "
        "WHERE name = ?",
        ("sqlite_autoindex_other_1" if "auto" in name else "other_b", name),
    )
    connection.execute("DELETE FROM sqlite_master WHERE tbl_name = 'other'")
    connection.close()


@pytest.mark.parametrize(
    "doing",
    [
        len,
        lambda index: index.ids(),
        lambda index: index.sources(),
        lambda index: index.search("w1", where={"number": 1}),
        lambda index: index.search("w1", mode="text", where={"number": 1}),
        lambda index: index.search("w1", mode="hybrid", where={"number": {"$gt": 1}}),
    ],
)
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE documents SET metadata = '{}' WHERE id = 'd40'",
        "DELETE FROM documents WHERE id = 'd40'",
        "chunks_of_document",
    ],
)
def test_a_document_that_damage_hides_from_a_filter_or_list_is_an_error(
    tmp_path: Path, damage: str, doing: Callable[[Index], object]
) -> None:
    path = tmp_path / "a.egx"
    filled(path, 80).close()
    if " " in damage:
        sql(path, damage)
    else:
        index_without_rows(path, damage)
    with open_index(path) as index, pytest.raises(IndexFileError, match="damaged"):
        doing(index)


def test_an_id_that_only_the_table_knows_is_damage_and_not_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"
    filled(path, 80).close()
    index_without_rows(path, "sqlite_autoindex_documents_1")
    with open_index(path) as index:
        with pytest.raises(IndexFileError, match="document 'd40' is there"):
            index.get(["d40"])
        with pytest.raises(InputError, match="has no document 'd999'"):
            index.get(["d999"])
    assert check(path)


def test_all_that_is_damaged_is_said_up_to_a_hundred(tmp_path: Path) -> None:
    filled(tmp_path / "a.egx").close()
    sql(
        tmp_path / "a.egx",
        "UPDATE documents SET title = 'x' WHERE id IN ('d1', 'd9')",
        "UPDATE chunks SET text = 'x' WHERE number = 44",
    )
    found = check(tmp_path / "a.egx")
    assert [finding for finding in found if "is not what was stored" in finding] == [
        "document 'd1' is not what was stored",
        "document 'd9' is not what was stored",
        "chunk 44 is not what was stored",
    ]
    sql(tmp_path / "a.egx", "UPDATE documents SET title = 'x'")
    assert len(check(tmp_path / "a.egx")) == MAX_FINDINGS


def test_a_page_that_cannot_be_read_is_a_finding_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"
    filled(path).close()
    sound = path.read_bytes()
    for page in range(2, len(sound) // 8192):
        path.write_bytes(sound[: 8192 * page] + b"\xa5" * 8192 + sound[8192 * (page + 1) :])
        assert check(path), page


def test_an_index_of_a_folder_that_cannot_be_written_can_be_checked(tmp_path: Path) -> None:
    filled(tmp_path / "a.egx").close()
    (tmp_path / "a.egx").chmod(0o444)
    script = (
        "import os, sys; from egemma.upkeep import check; os.setuid(65534); "
        "print(check(sys.argv[1]))"
    )
    if os.geteuid() == 0:
        for folder in tmp_path.parents:
            if folder.owner() == "root" and "pytest" in str(folder):
                folder.chmod(0o755)
        tmp_path.chmod(0o555)
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "a.egx")],
            check=False,
            capture_output=True,
            text=True,
            env=variables,
        )
        tmp_path.chmod(0o755)
        assert done.stdout == "[]\n", done.stderr


# backup


def test_a_backup_is_the_index_as_it_was_while_others_write(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index, open_index(tmp_path / "a.egx") as other:
        done = threading.Event()

        def write() -> None:
            number = 0
            while not done.is_set():
                other.add(
                    [f"passing {number} one", f"passing {number} two"], ids=["pair one", "pair two"]
                )
                number += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for copy in range(3):
                facts = upkeep.backup(index.path, tmp_path / f"copy{copy}.egx")
                assert facts.path == str(tmp_path / f"copy{copy}.egx")
                with open_index(facts.path) as copied:
                    assert upkeep.check(copied.path) == []
                    pair = copied.get(["pair one", "pair two"]) if len(copied) > 601 else []
                    # both of one write, or none
                    assert len({document.text.split()[1] for document in pair}) <= 1
        finally:
            done.set()
            thread.join()
        upkeep.backup(index.path, tmp_path / "last.egx")
        with open_index(tmp_path / "last.egx") as copied:
            assert answers(copied) == answers(index)
    assert not [
        path.name
        for path in tmp_path.iterdir()
        if path.suffix == ".part" or path.name.startswith(".")
    ]


def test_a_backup_overwrites_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index:
        upkeep.backup(index.path, tmp_path / "b.egx")
        before = (tmp_path / "b.egx").read_bytes()
        index.remove(["d30"])
        with pytest.raises(IndexFileError, match=r"b\.egx exists already"):
            upkeep.backup(index.path, tmp_path / "b.egx")
        assert (tmp_path / "b.egx").read_bytes() == before
        upkeep.backup(index.path, tmp_path / "b.egx", force=True)
        with open_index(tmp_path / "b.egx") as copied:
            assert answers(copied) == answers(index)
        for where in (tmp_path, tmp_path / "no" / "b.egx"):
            with pytest.raises(IndexFileError):
                upkeep.backup(index.path, where, force=True)


def test_a_backup_does_not_take_the_place_of_an_index_that_is_open(tmp_path: Path) -> None:
    """Its `-wal` would be mixed into the new file."""
    with filled(tmp_path / "a.egx") as index, open_index(tmp_path / "b.egx") as other:
        other.add(TEXTS)
        with pytest.raises(
            IndexFileError, match=r"b\.egx-wal belongs to .*open or was left by a crash"
        ):
            upkeep.backup(index.path, tmp_path / "b.egx", force=True)
        assert upkeep.check(other.path) == []


def test_a_damaged_index_replaces_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"
    filled(path).close()
    backup(path, tmp_path / "b.egx")
    good = (tmp_path / "b.egx").read_bytes()
    sql(path, "UPDATE vectors SET rest = zeroblob(length(rest)) WHERE number = 300")
    with pytest.raises(IndexFileError, match="cannot be backed up: vector 300"):
        backup(path, tmp_path / "b.egx", force=True)
    assert (tmp_path / "b.egx").read_bytes() == good
    assert sorted(found.name for found in tmp_path.iterdir() if found.name.startswith(".")) == []


def test_what_a_killed_backup_left_goes_with_the_next_one_and_that_of_a_live_one_stays(
    tmp_path: Path,
) -> None:
    alive, dead = (
        tmp_path / f".b.egx.{os.getppid()}.abc.part",
        tmp_path / ".b.egx.99999999.abc_1.part",
    )
    others = [
        tmp_path / ".b.egx.part",
        tmp_path / ".c.egx.99999999.abc.part",
        tmp_path / "b.egx.99999999.abc.part",
    ]
    for left in (alive, dead, dead.with_name(dead.name + "-wal"), *others):
        left.write_bytes(b"left")
    with filled(tmp_path / "a.egx", 30) as index:
        upkeep.backup(index.path, tmp_path / "b.egx")
    assert sorted(found.name for found in tmp_path.iterdir() if ".part" in found.name) == sorted(
        found.name for found in (alive, *others)
    )


def test_a_full_disk_refuses_backup_and_compaction_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(tmp_path / "a.egx") as index:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        )  # type: ignore[attr-defined]
        for doing in (
            lambda: upkeep.backup(index.path, tmp_path / "b.egx"),
            lambda: upkeep.compact(index.path),
        ):
            with pytest.raises(IndexFileError, match="MB free"):
                doing()
        assert not (tmp_path / "b.egx").exists()


# compact


def test_compacting_changes_no_answer_and_wipes_what_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"
    with filled(path) as index:
        index.add(
            [f"secretword{number} {'zebra' if number < 10 else 'gone'}" for number in range(300)],
            ids=[f"gone{number}" for number in range(300)],
        )
        for some, renumbered in ((10, False), (300, True)):
            index.remove([f"gone{number}" for number in range(some)])
            before, facts = answers(index), index.facts()
            report = upkeep.compact(index.path)
            assert answers(index) == before
            assert upkeep.check(index.path) == []
            assert report.renumbered == renumbered
            assert report.chunks == facts.chunks == index.facts().chunks
            assert report.bytes_after <= report.bytes_before
            assert b"zebra" not in path.read_bytes()
            with open_index(path) as fresh:
                assert answers(fresh) == before
            with sqlite3.connect(path) as connection:
                live = {row[0] for row in connection.execute("SELECT number FROM chunks")}
                heads = np.concatenate(
                    [
                        np.frombuffer(row[0], np.int8)
                        for row in connection.execute("SELECT codes FROM heads ORDER BY block")
                    ]
                )
                next_number = int(
                    connection.execute(
                        "SELECT value FROM facts WHERE name = 'next_number'"
                    ).fetchone()[0]
                )
                if renumbered:
                    assert live == set(range(report.chunks))
                    assert next_number == report.chunks
                dead = sorted(set(range(next_number)) - live)
                assert not heads.reshape(next_number, -1)[dead].any()
            connection.close()
        index.add(["after w1"], ids=["after"])
        assert index.search("after w1").hits[0].id == "after"
        assert upkeep.check(index.path) == []
    assert b"secretword" not in path.read_bytes()


def test_an_index_that_others_have_open_goes_on_after_it_was_compacted(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index, open_index(tmp_path / "a.egx") as other:
        index.remove([f"d{number}" for number in range(100, 500)])
        before = answers(other)
        compact(tmp_path / "a.egx")
        assert answers(other) == before == answers(index)
        other.add(["more w1"] * 1, ids=["more"])
        compact(tmp_path / "a.egx")
        index.add(
            [f"again w{number % 60}" for number in range(400)],
            ids=[f"again{number}" for number in range(400)],
        )
        assert answers(other) == answers(index)
        with open_index(tmp_path / "a.egx") as fresh:
            assert answers(fresh) == answers(other)


def test_an_emptied_index_becomes_small(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index:
        index.remove(index.ids())
        report = upkeep.compact(index.path)
        assert report.chunks == 0
        assert report.bytes_after < 20 * 8192
        assert upkeep.check(index.path) == []
        index.add(TEXTS)
        assert index.search("cat").hits[0].text == TEXTS[0]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE chunks SET text = 'other' WHERE number = 590",
        "UPDATE chunks SET num_tokens = 9 WHERE number = 590",
        "UPDATE vectors SET rest = zeroblob(length(rest)) WHERE number = 590",
        "UPDATE heads SET codes = zeroblob(length(codes)) WHERE block = 2",
        "DELETE FROM vectors WHERE number = 590",
        "UPDATE facts SET value = value + 1 WHERE name = 'chunks'",
    ],
)
@pytest.mark.parametrize("dead", [3, 300])
def test_damage_gets_no_new_checksum(tmp_path: Path, damage: str, dead: int) -> None:
    path = tmp_path / "a.egx"
    with filled(path) as index:
        index.remove([f"d{number}" for number in range(20, 20 + dead)])
    sql(path, damage)
    found = check(path)
    assert found
    try:
        compact(path)
    except IndexFileError as error:
        assert "damaged" in str(error)  # noqa: PT017
    assert check(path)


# export and import


@pytest.mark.parametrize("floats", [False, True])
def test_what_is_exported_and_imported_answers_the_same(tmp_path: Path, floats: bool) -> None:
    with (
        filled(tmp_path / "a.egx", keep_floats=floats) as index,
        open_index(tmp_path / "b.egx") as copy,
    ):
        index.remove([f"d{number}" for number in range(100, 250)])
        assert upkeep.export_jsonl(index.path, tmp_path / "a.jsonl") == len(index)
        for _ in range(2):  # a second import changes nothing
            report = copy.import_jsonl(tmp_path / "a.jsonl")
            assert (report.documents, report.chunks, report.embedded) == (
                len(index),
                index.facts().chunks,
                0,
            )
            assert answers(copy) == answers(index)
            assert copy.sources() == index.sources()
            assert upkeep.check(copy.path) == []
        upkeep.export_jsonl(copy.path, tmp_path / "b.jsonl")
    with open_index(tmp_path / "c.egx", keep_floats=True) as third:
        third.import_jsonl(tmp_path / "b.jsonl")
        assert upkeep.check(third.path) == []
        assert [hit.id for hit in third.search("w7", 5)] != []


def test_an_export_without_vectors_is_embedded_only_when_told_to(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index:
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl", vectors=False)
        wanted = answers(index)
    assert b'"head"' not in (tmp_path / "a.jsonl").read_bytes()
    with open_index(tmp_path / "b.egx") as copy:
        with pytest.raises(InputError, match=r"has no vectors.*reembed=True"):
            copy.import_jsonl(tmp_path / "a.jsonl")
        report = copy.import_jsonl(tmp_path / "a.jsonl", reembed=True)
        assert report.embedded == report.chunks
        assert answers(copy) == wanted


def test_vectors_of_another_model_are_refused_and_can_be_made_anew(tmp_path: Path) -> None:
    with filled(tmp_path / "a.egx") as index, open_index(tmp_path / "b.egx", "words-2") as other:
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl")
        with pytest.raises(
            IndexMismatchError,
            match=r"a\.jsonl holds vectors of words-1.*this is words-2.*reembed=True",
        ):
            other.import_jsonl(tmp_path / "a.jsonl")
        assert len(other) == 0
        other.import_jsonl(tmp_path / "a.jsonl", reembed=True)
        assert len(other) == len(index)
        assert upkeep.check(other.path) == []


def test_vectors_without_texts_come_back_too(tmp_path: Path) -> None:
    vectors = np.stack([WordEmbedder().vector(text) for text in TEXTS])
    with (
        open_index(tmp_path / "a.egx") as index,
        Index.open(
            tmp_path / "b.egx", ModelIdentity.of(cast(Any, WordEmbedder().manifest))
        ) as copy,
    ):
        index.add_vectors(vectors, ids=list("abcd"))
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl")
        copy.import_jsonl(tmp_path / "a.jsonl")
        assert [hit.id for hit in copy.search(vectors[2], 1)] == ["c"]


def test_an_export_overwrites_nothing_unless_it_is_told_to_and_leaves_no_half_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.egx"
    with filled(path) as index:
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl")
        before = (tmp_path / "a.jsonl").read_bytes()
        with pytest.raises(IndexFileError, match="exists already"):
            upkeep.export_jsonl(index.path, tmp_path / "a.jsonl")
        with pytest.raises(IndexFileError, match="exists already"):
            upkeep.export_jsonl(index.path, tmp_path, force=True)
    for damage in (
        "UPDATE vectors SET rest = zeroblob(length(rest)) WHERE number = 300",
        "UPDATE documents SET title = 'x' WHERE id = 'd9'",
        "UPDATE chunks SET text = 'x' WHERE number = 300",
        "DELETE FROM chunks WHERE number = 601",
    ):
        shutil.copy(path, tmp_path / "broken.egx")
        sql(tmp_path / "broken.egx", damage)
        with (
            Index.open(tmp_path / "broken.egx") as broken,
            pytest.raises(IndexFileError, match="damaged"),
        ):
            upkeep.export_jsonl(broken.path, tmp_path / "a.jsonl", force=True)
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir() if ".part" in found.name) == []


def exported(tmp_path: Path, **settings: Any) -> list[Any]:
    with open_index(tmp_path / "a.egx", **settings) as index:
        index.add(TEXTS, ids=list("abcd"), metadata=[{"n": 1}, None, {}, {"x": [1, {"y": None}]}])
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl", force=True)
    return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


def coded(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def _in(line: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**line, "chunks": [{**line["chunks"][0], **changes}]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda line: [], "must be a JSON object"),
        (lambda line: {**line, "id": 3}, "lacks 'id'"),
        (lambda line: {**line, "id": " "}, "is blank"),
        (lambda line: {**line, "id": "a\0b"}, "NUL"),
        (lambda line: {**line, "id": "a"}, "was there before"),
        (lambda line: {**line, "more": 3}, "has 'more'"),
        (lambda line: {**line, "title": 3}, "'title' as int"),
        (lambda line: {**line, "metadata": [1]}, "'metadata' as list"),
        (lambda line: {**line, "metadata": {"n": 2**70}}, "64 bits"),
        (lambda line: {**line, "metadata": {"n": "\ud800"}}, "metadata"),
        (lambda line: {**line, "metadata": {"n": "\0"}}, "NUL"),
        (lambda line: {**line, "metadata": {"n": float("nan")}}, "NaN is no JSON"),
        (lambda line: {**line, "source": "x"}, "'source' as str"),
        (lambda line: {**line, "chunks": []}, "has no chunks"),
        (lambda line: {**line, "chunks": {}}, "lacks 'chunks'"),
        (lambda line: {**line, "chunks": [3]}, "chunk 0 is int"),
        (lambda line: _in(line, start=1), "spans 1"),
        (lambda line: _in(line, start=-1), "from 0 to"),
        (lambda line: _in(line, stop=True), "lacks 'stop', or has it as bool"),
        (lambda line: _in(line, stop=2**80), "from 0 to"),
        (lambda line: _in(line, text=None), "lacks 'text'"),
        (lambda line: _in(line, text="x\0y", stop=3), "NUL"),
        (lambda line: _in(line, tokens=-4), "from 0 to"),
        (lambda line: _in(line, truncated=0), "lacks 'truncated'"),
        (lambda line: _in(line, head="€"), "not base64"),
        (lambda line: _in(line, head="AAAA"), "has 3 bytes, and must have 16"),
        (lambda line: _in(line, head=None), "lacks 'head'"),
        (lambda line: _in(line, head=coded([-128] * 16, "i1")), "-128"),
        (lambda line: _in(line, head=coded([0] * 16, "i1")), "a vector has length"),
        (lambda line: _in(line, scales=coded([np.nan] * 3, "<f4")), "no number"),
        (lambda line: _in(line, scales=coded([-1] * 3, "<f4")), "negative"),
        (lambda line: _in(line, scales=coded([3e38] * 3, "<f4")), "a vector has length"),
        (lambda line: {**line, "chunks": line["chunks"] * 2}, "chunk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_that_no_export_writes_is_refused_with_its_number(
    tmp_path: Path, spoil: Callable[[Any], Any], says: str
) -> None:
    header, *lines = exported(tmp_path)
    broken = spoil(lines[2])
    if isinstance(broken, dict) and broken.get("chunks") == lines[2]["chunks"] * 2:
        broken["chunks"][1] = {**broken["chunks"][1], "start": 99, "stop": 99 + len(TEXTS[2])}
    (tmp_path / "b.jsonl").write_text(
        "\n".join(map(json.dumps, [header, *lines[:2], broken, lines[3]])) + "\n"
    )
    with open_index(tmp_path / "b.egx") as index:
        with pytest.raises(InputError, match=r"line 4.*documents are stored") as caught:
            index.import_jsonl(tmp_path / "b.jsonl")
        assert says in str(caught.value)
        assert len(index) == 0
        assert upkeep.check(index.path) == []
        index.import_jsonl(tmp_path / "a.jsonl")
        assert len(index) == 4


def test_floats_that_are_no_unit_vector_are_refused(tmp_path: Path) -> None:
    header, *lines = exported(tmp_path, keep_floats=True)
    for values in ([np.nan] * 64, [0] * 64, [1] * 64, [np.inf] + [0] * 63):
        broken = _in(lines[1], floats=coded(values, "<f4"))
        (tmp_path / "b.jsonl").write_text(
            "\n".join(map(json.dumps, [header, lines[0], broken])) + "\n"
        )
        with (
            open_index(tmp_path / "b.egx") as index,
            pytest.raises(InputError, match=r"line 3: .*length"),
        ):
            index.import_jsonl(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"egemma_index": 2}, "has version 2"),
        ({"egemma_index": "1"}, "has version '1'"),
        ({"vectors": "other"}, "no export"),
        ({"scan_width": 17}, "no export"),
        ({"documents": "4"}, "no export"),
        ({"model": {}}, "no export"),
        ({"model": None}, "no export"),
        ({"tuned": "{}"}, "no export"),
        ({"tuned": "x"}, "no export"),
        ({"tuned": 3}, "no export"),
        ({"documents": 5}, "the end is missing"),
        ({"floats": 1}, "no export"),
        ({"vectors": "floats"}, "no export"),
        ({"vectors": ["codes"]}, "no export"),
    ],
)
def test_a_first_line_that_no_export_writes_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    header, *lines = exported(tmp_path)
    (tmp_path / "b.jsonl").write_text(
        "\n".join(map(json.dumps, [{**header, **changes}, *lines])) + "\n"
    )
    with open_index(tmp_path / "b.egx") as index, pytest.raises(InputError, match=says):
        index.import_jsonl(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"egemma_index": 1}\n',
        b"NaN\n",
        b'{"egemma_index": NaN}\n',
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.jsonl").write_bytes(content)
    with open_index(tmp_path / "b.egx") as index, pytest.raises(InputError, match=r"b\.jsonl"):
        index.import_jsonl(tmp_path / "b.jsonl")


def test_lines_without_end_and_files_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path)
    monkeypatch.setattr("egemma.index.jsonl_lines.MAX_LINE_BYTES", 200)
    with open_index(tmp_path / "b.egx") as index:
        with pytest.raises(InputError, match=r"line 1 is longer than"):
            index.import_jsonl(tmp_path / "a.jsonl")
        for source in (tmp_path, tmp_path / "missing", "a\0b"):
            with pytest.raises(InputError, match="cannot be read"):
                index.import_jsonl(source)


def test_an_import_that_is_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egemma.index.jsonl._DOCUMENTS_TOGETHER", 50)

    def stop(done: int, total: int) -> None:
        if done == 150:
            raise KeyboardInterrupt

    with filled(tmp_path / "a.egx") as index, open_index(tmp_path / "b.egx") as copy:
        upkeep.export_jsonl(index.path, tmp_path / "a.jsonl")
        with pytest.raises(KeyboardInterrupt):
            copy.import_jsonl(tmp_path / "a.jsonl", progress=stop)
        assert len(copy) == 150
        assert upkeep.check(copy.path) == []
        copy.import_jsonl(tmp_path / "a.jsonl")
        assert answers(copy) == answers(index)


def test_a_backup_onto_the_index_itself_is_refused(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.add(["one text"], ids=["1"])
        (tmp_path / "link.egx").symlink_to(tmp_path / "a.egx")
        for same in ("a.egx", "link.egx"):
            with pytest.raises(IndexFileError, match="is the index itself"):
                upkeep.backup(index.path, tmp_path / same, force=True)
        assert index.ids() == ["1"]
