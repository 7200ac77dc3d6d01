"""Damaged files, hostile texts and large numbers: the right answer or an error that says what is
wrong, never anything else.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from egemma.chunks import Chunk, ChunkedDocument
from egemma.identity import ModelIdentity
from egemma.index import Hits, Index, describe_index
from egemma.index.facts import write_state
from egemma_core.errors import ConfigError, EgemmaError, IndexFileError, InputError
from egemma_core.vectors import normalize
from tests.sdk.fakes import TEXTS, WordEmbedder, model_of, open_index
from tests.sdk.test_index_file import change


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path / "notes.egx") as opened:
        yield opened


# Damage.

COUNT = 270  # two blocks of vectors
SMALL = (16, 8)


def small_index(path: Path, **settings: Any) -> Index:
    return Index.open(path, cast(Any, WordEmbedder("small", dims=SMALL)), **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with something in every column."""
    path = tmp_path_factory.mktemp("whole") / "a.egx"
    with small_index(path) as index:
        index.put(
            [
                ChunkedDocument(
                    id=f"{row:03}",
                    title=f"title {row}",
                    metadata={"row": row, "even": row % 2 == 0},
                    source={"path": f"{row}.md"},
                    chunks=(
                        Chunk(start=0, stop=11, title="t", text=f"words {row:04} "),
                        Chunk(start=11, stop=16, title=None, text="again"),
                    ),
                )
                for row in range(COUNT // 2)
            ]
        )
        index.remove(["005", "133"])
        index.remember_model_path("/models/one")
        index.search("words")
    return path


def answers(path: Path) -> dict[str, Any]:
    """Everything that can be asked, an IndexFileError standing for itself; afterwards, that writing
    raises nothing else.
    """
    try:
        index = small_index(path, create=False)
    except IndexFileError:
        return dict.fromkeys(QUESTIONS, IndexFileError)

    def asked(ask: Callable[[Index], Any]) -> Any:
        try:
            found = ask(index)
        except IndexFileError:
            return IndexFileError
        except InputError:  # no document of that id
            return None
        return (
            [(hit.id, hit.position, hit.text, hit.score) for hit in found]
            if isinstance(found, Hits)
            else found
        )

    with index:
        found = {name: asked(ask) for name, ask in QUESTIONS.items()}
        for write in (
            lambda index: index.remove(["002"]),
            lambda index: index.put([TWICE]),
            lambda index: index.add(["more words"]),
        ):
            asked(write)
        return found


TWICE = ChunkedDocument(
    id="001",
    title=None,
    metadata=None,
    source=None,
    chunks=(Chunk(start=0, stop=5, title=None, text="again"),) * 2,
)
QUERY = "words 0077 again"
QUESTIONS: dict[str, Callable[[Index], Any]] = {
    "vector": lambda index: index.search(QUERY, 40),
    "exact": lambda index: index.search(QUERY, 300, exact=True),
    "few": lambda index: index.search(QUERY, 3, shortlist=3, dim=8),
    "where": lambda index: index.search(QUERY, 200, where={"even": True}),
    "text": lambda index: index.search(QUERY, 300, mode="text"),
    "hybrid": lambda index: index.search(QUERY, 20, mode="hybrid"),
    "get": lambda index: index.get(
        [f"{row:03}" for row in range(COUNT // 2) if row not in (5, 133)]
    ),
    "sources": lambda index: index.sources(),
    "ids": lambda index: index.ids(),
    "count": len,
    "damage": lambda index: index.facts(check=True).damage,
}


def columns() -> list[tuple[str, str]]:
    tables = {
        "documents": "number id title metadata source crc32",
        "vectors": "number crc32 scales rest floats",
        "blocks": "number changed crc32 live",
        "chunks": "number document position start stop num_tokens truncated title hash crc32 text",
        "heads": "block crc32 squares codes",
        "facts": "name value",
        "words_data": "id block",
        "words_idx": "segid term pgno",
        "words_docsize": "id sz",
        "words_config": "k v",
    }
    return [(table, column) for table, names in tables.items() for column in names.split()]


VALUES: list[Any] = [None, -1, 2**40, "text", b"", bytes(100)]
# An id that is not there any more was never stored, for all that `get` can know; `check` compares
# all.
UNSEEN = {("documents", "id"): ("get",), ("chunks", "document"): ("get",)}


@pytest.mark.parametrize(("table", "column"), columns())
def test_any_column_of_any_table_may_be_damaged(
    tmp_path: Path, whole: Path, table: str, column: str
) -> None:
    path = tmp_path / "a.egx"
    shutil.copy(whole, path)
    right = answers(path)
    assert right["damage"] is None
    tried = 0
    for value in [*VALUES, b"\0"] if table == "words_data" else VALUES:
        for row in ("min", "max") if table in ("blocks", "heads", "words_data") else ("min",):
            shutil.copy(whole, path)
            connection = sqlite3.connect(path)
            connection.execute("PRAGMA writable_schema = ON")  # lets the tables of FTS5 be written
            key = {"words_idx": "pgno", "words_config": "k"}.get(table, "rowid")
            try:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE {key} = (SELECT {row}({key}) FROM "
                    f"{table})",
                    (value,),
                )
            except sqlite3.Error:  # a constraint keeps this value out
                connection.close()
                continue
            connection.commit()
            connection.close()
            tried += 1
            found = answers(path)
            wrong = [
                name
                for name, answer in found.items()
                if answer is not IndexFileError and answer != right[name] and name != "damage"
            ]
            assert not [
                name
                for name in wrong
                if name not in UNSEEN.get((table, column), ())
                and not (table.startswith("words_") and name in ("text", "hybrid"))
            ], (value, row)
            if any(answer != right[name] for name, answer in found.items() if name != "damage"):
                assert found["damage"] is not None, (value, row, wrong)
    assert tried or column == "segid"


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM documents WHERE number = 3",
        "DELETE FROM chunks WHERE number = 3",
        "DELETE FROM vectors WHERE number = 3",
        "DELETE FROM vectors WHERE number = (SELECT max(number) FROM vectors)",
        "DELETE FROM words_docsize",
        "DELETE FROM blocks WHERE number = 1",
        "DELETE FROM heads WHERE block = 1",
        "DELETE FROM facts WHERE name = 'chunks'",
        "INSERT INTO facts VALUES ('crc32x', '7')",
        "INSERT INTO words (rowid, title, text) VALUES (3, '', 'more')",
        "DELETE FROM words_data WHERE id > 10",
        "INSERT INTO chunks SELECT 5000, document, 2, 0, 0, 0, 0, NULL, hash, crc32, '' FROM "
        "chunks WHERE number = 3",
        "UPDATE facts SET value = '[16, 4]' WHERE name = 'dims'",
        "UPDATE facts SET value = '16' WHERE name = 'scan_width'",
        "UPDATE facts SET value = '1' WHERE name = 'floats'",
        "UPDATE facts SET value = value + 1 WHERE name = 'generation'",
        "UPDATE facts SET value = value - 1 WHERE name = 'next_number'",
        "INSERT INTO facts VALUES ('tuned', '{')",
        "INSERT INTO facts VALUES ('tuned', '{\"shortlist\": -5}')",
        "UPDATE vectors SET (scales, rest, crc32) = (SELECT scales, rest, crc32 FROM vectors WHERE "
        "number = 4) WHERE number = 3",
        "UPDATE chunks SET (text, title, crc32, hash) = (SELECT text, title, crc32, hash FROM "
        "chunks WHERE number = 4) WHERE number = 3",
        "UPDATE documents SET (metadata, crc32) = (SELECT metadata, crc32 FROM documents WHERE "
        "number = 4) WHERE number = 3",
        "UPDATE chunks SET hash = (SELECT hash FROM chunks WHERE number = 5) WHERE number = 4",
        "UPDATE chunks SET position = 1 WHERE number = 2",
    ],
)
def test_rows_that_are_missing_added_or_exchanged_are_found(
    tmp_path: Path, whole: Path, damage: str
) -> None:
    path = tmp_path / "a.egx"
    shutil.copy(whole, path)
    right = answers(path)
    shutil.copy(whole, path)
    change(path, damage)
    found = answers(path)
    for name, answer in found.items():
        if name in ("vector", "exact", "few", "count") and "documents" not in damage:
            assert answer in (IndexFileError, right[name]), name
    if found != right:
        assert found["damage"] is not None
    assert found["damage"] is not None or "crc32x" in damage


def test_a_document_that_lost_a_chunk_in_the_middle_is_not_given_back_without_it(
    index: Index,
) -> None:
    chunks = tuple(
        Chunk(start=4 * number, stop=4 * number + 4, title=None, text=f"txt{number}")
        for number in range(3)
    )
    index.put([ChunkedDocument(id="a", title=None, metadata=None, source=None, chunks=chunks)])
    change(index.path, "DELETE FROM chunks WHERE position = 1")
    with pytest.raises(IndexFileError, match="damaged"):
        index.get(["a"])
    assert index.facts(check=True).damage is not None


@pytest.mark.parametrize(
    "damage",
    [
        "scales = zeroblob(12)",
        "rest = zeroblob(56)",
        "rest = x''",
        "crc32 = 7",
        "floats = zeroblob(256)",
    ],
)
def test_a_damaged_vector_is_not_copied_to_another_chunk(index: Index, damage: str) -> None:
    twice = (Chunk(start=0, stop=5, title=None, text="again"),) * 2
    index.put([ChunkedDocument(id="a", title=None, metadata=None, source=None, chunks=twice[:1])])
    change(index.path, f"UPDATE vectors SET {damage}")
    with pytest.raises(IndexFileError, match="vector 0"):
        index.put([ChunkedDocument(id="a", title=None, metadata=None, source=None, chunks=twice)])
    assert index.get(["a"])[0].num_chunks == 1


def test_facts_that_were_made_to_fit_their_checksum_must_fit_each_other(tmp_path: Path) -> None:
    for facts in (
        {"scan_width": 4},
        {"scan_width": 0},
        {"next_number": 3},
        {"chunks": -1},
        {"generation": -1},
        {"numbering": -1},
    ):
        path = tmp_path / f"{facts}.egx"
        with open_index(path) as index:
            index.add(TEXTS)
            with index._session.writing("write") as written:
                write_state(written.connection, replace(written.state, **cast(Any, facts)))
        with pytest.raises(IndexFileError, match="does not fit together"):
            open_index(path)


def test_damage_that_sqlite_reports_in_broken_utf8_is_an_error_of_ours(tmp_path: Path) -> None:
    open_index(tmp_path / "a.egx").close()
    change(
        tmp_path / "a.egx",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET name = CAST(x'b4ff' AS TEXT), sql = 'CREATE TABLE (' WHERE name "
        "= 'facts'",
    )
    with pytest.raises(IndexFileError, match=r"a\.egx"):
        open_index(tmp_path / "a.egx")


def test_a_file_damaged_anywhere_is_an_error_or_still_gives_the_right_answer(
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole.egx"
    with small_index(whole) as index:
        index.add(
            [f"{text} {number}" for number in range(60) for text in TEXTS],
            titles=["t"] * 240,
            metadata=[{"n": 1}] * 240,
        )

    def ask(index: Index) -> tuple[Any, ...]:
        return (
            index.search("quiet rain", 240).hits,
            index.search("cat 7", 5, exact=True).hits,
            index.get(index.ids())[5],
        )

    with small_index(whole) as index:
        right, right_words = ask(index), index.search("rain 7", 50, mode="text").hits
    content = whole.read_bytes()
    path, refused, random = tmp_path / "a.egx", 0, np.random.default_rng(0)
    for at in random.integers(0, len(content), size=40):
        page = int(random.integers(len(content) // 8192)) * 8192
        flipped = bytes([content[at] ^ 1 << random.integers(8)])
        for damaged in (
            content[:at],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + random.bytes(600) + content[at + 600 :],
            content[:page] + content[at // 8192 * 8192 :][:8192] + content[page + 8192 :],
        ):
            path.write_bytes(damaged)
            differs = False
            try:
                with small_index(path, create=False) as index:
                    assert ask(index) == right
                    differs = index.search("rain 7", 50, mode="text").hits != right_words
                    damage = index.facts(check=True).damage
            except IndexFileError:
                refused += 1
            except InputError as error:  # an id that is not the one that was stored
                assert "has no document" in str(error)  # noqa: PT017
                refused += 1
            else:
                # FTS5 has no checksums; a check compares it with the texts
                assert damage is not None or not differs
    assert refused > 60


@pytest.mark.parametrize("name", ["a.egx-wal", "a.egx-shm"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50_000, b"not what SQLite writes " * 1000])
def test_strange_files_beside_an_index_change_nothing(
    tmp_path: Path, name: str, content: bytes
) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.add(TEXTS)
        right = index.search("cat").hits
    (tmp_path / name).write_bytes(content)
    with open_index(tmp_path / "a.egx") as index:
        assert index.search("cat").hits == right
        assert index.facts(check=True).damage is None


# Hostile input.

EVIL = [
    "'); DROP TABLE documents; --",
    'x" OR 1=1 --',
    "%_*?[]",
    "ünï 🦊 中文\u202e",
    "a\nb\r\nc\td",
    "\u0001\u007f\u0085\ufeff",
    "\ufffe\uffff\U0010ffff",
    "$.a",
    "\"; ATTACH 'x' AS y; --",
    "NULL",
    "1e999",
    "-0",
    "../../etc/passwd",
    "C:\\windows",
    '{"a": 1}',
    "a\u2028\u2029b",
    "x" * 100_000,
]


def test_texts_ids_titles_metadata_and_filters_are_data_and_never_sql(index: Index) -> None:
    index.add(
        EVIL,
        ids=EVIL,
        titles=EVIL,
        metadata=[{text: text, "n": number} for number, text in enumerate(EVIL)],
        overflow="truncate",
    )
    assert index.ids() == EVIL
    for number, text in enumerate(EVIL):
        stored = index.get([text])[0]
        assert (stored.id, stored.text, stored.title, stored.metadata) == (
            text,
            text,
            text,
            {text: text, "n": number},
        )
        assert text in index.ids({(text,): text})
        assert index.ids({(text,): {"$startswith": text[:50]}, "n": number}) == [text]
        assert [
            hit.id
            for hit in index.search("x", where={"n": number, (text,): {"$in": [text, "other"]}})
        ] == [text]
    assert index.ids({"n": "0 OR 1=1"}) == []
    assert index.facts(check=True).damage is None
    assert index.remove(EVIL) == len(EVIL)
    assert len(index) == 0
    assert index.facts(check=True).damage is None


@pytest.mark.parametrize(
    "where",
    [
        {"a' OR 1=1 --": 1},
        {'a" OR 1=1 --': 1},
        {"$[0]') OR 1=1 --": 1},
        {("a", "b') --"): 1},
        {"a": "' OR '1'='1"},
        {"a": {"$contains": "%"}},
        {"a": {"$startswith": "_"}},
        {"\u2028": {"$gt": "'"}},
    ],
)
def test_a_filter_can_say_nothing_but_itself(index: Index, where: Any) -> None:
    index.add(TEXTS, metadata=[{"a": "b"}] * 4)
    try:
        assert index.ids(where) == [] == list(index.search("cat", where=where))
    except ConfigError:
        assert next(iter(where)).startswith("$")
    assert len(index) == 4


@pytest.mark.parametrize(
    "where",
    [
        {"a": "\0"},
        {"a": "\ud800"},
        {"a\0": 1},
        {"a": [1]},
        {"a": {1: 2}},
        {"a": object()},
        {"a": {"$in": "xyz"}},
        {"a": {"$in": [[1]]}},
        {"a": float("inf")},
        {"$and": {}},
        {"$or": "x"},
        {1: 1},
        {(): 1},
        {("a", 1): 1},
        {"a": {}},
        {"a": {"$exists": 1}},
    ],
)
def test_a_filter_that_cannot_be_is_a_config_error(index: Index, where: Any) -> None:
    index.add(TEXTS)
    for call in (
        lambda: index.ids(where),
        lambda: index.search("cat", where=where),
        lambda: index.search("cat", where=where, mode="text"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_a_filter_or_metadata_nested_without_end_is_refused(index: Index) -> None:
    deep: dict[str, Any] = {"a": 1}
    for _ in range(5000):
        deep = {"$not": deep}
    with pytest.raises(ConfigError):
        index.search("cat", where=deep)
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"a": nested}
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for metadata in (nested, endless):
        with pytest.raises(InputError):
            index.add(["x"], metadata=[metadata])
    assert len(index) == 0


@pytest.mark.parametrize(
    "ids", [None, 7, "abc", b"ab", [None], [b"a"], ["a", 1], ["\0"], ["\ud800"], [""], {"a": 1}]
)
def test_ids_that_cannot_be_are_an_input_error(index: Index, ids: Any) -> None:
    for call in (
        lambda: index.get(ids),
        lambda: index.remove(ids),
        lambda: index.add_vectors(np.eye(64, dtype=np.float32)[:1], ids=ids),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize(
    "vectors",
    [
        np.full((1, 64), np.nan, np.float32),
        np.full((1, 64), np.inf, np.float32),
        np.zeros((1, 64), np.float32),
        np.ones((1, 64), np.float32),
        np.eye(64, dtype=np.int8)[:1],
        np.eye(32, dtype=np.float32)[:1],
        np.eye(64, dtype=np.float32)[0],
        np.eye(64, dtype=complex)[:1],
        [["a"] * 64],
        None,
        "x",
        np.eye(64, dtype=np.float32)[:1] * 0.99,
        [[1.0], [1.0, 2.0]],
        np.ma.masked_all((1, 64)),
    ],
)
def test_vectors_that_cannot_be_are_refused_and_not_stored(index: Index, vectors: Any) -> None:
    with pytest.raises(InputError):
        index.add_vectors(vectors, ids=["a"])
    assert len(index) == 0


def test_vectors_in_any_memory_layout_are_stored_as_their_values(index: Index) -> None:
    vectors = normalize(np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32))
    layouts = [
        np.asfortranarray(vectors),
        vectors[::-1][::-1],
        np.repeat(vectors, 2, axis=0)[::2],
        vectors.astype(">f4"),
        vectors.astype(np.float64),
        np.lib.stride_tricks.as_strided(vectors, vectors.shape, vectors.strides, writeable=False),
    ]
    for number, layout in enumerate(layouts):
        index.add_vectors(layout, ids=[f"{number} {row}" for row in range(10)])
    hits = index.search(vectors[3], 6)
    assert {hit.id for hit in hits} == {f"{number} 3" for number in range(6)}
    assert len({hit.score for hit in hits}) == 1


# Large numbers.


def test_a_text_of_ten_megabytes_is_cut_stored_found_and_given_back(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a book that has no end\n" for number in range(270_000))
    assert len(text) > 10_000_000
    with Index.open(
        tmp_path / "a.egx", cast(Any, WordEmbedder("big", dims=SMALL, max_tokens=2048))
    ) as index:
        index.add([text], ids=["book"], overflow="chunk")
        stored = index.get(["book"])[0]
        assert stored.text == text
        assert stored.num_chunks == len(model_of(index).embedded) > 1000
        hit = index.search("123456", mode="text", k=1)[0]
        assert "line 123456 of" in hit.text == text[hit.start : hit.stop]


def test_a_hundred_thousand_deletions_leave_what_was_not_deleted(tmp_path: Path) -> None:
    vectors = normalize(np.random.default_rng(0).normal(size=(100_500, 16)).astype(np.float32))
    ids = [str(row) for row in range(len(vectors))]
    kept = sorted(np.random.default_rng(1).choice(len(vectors), 500, replace=False).tolist())
    with Index.open(
        tmp_path / "a.egx", ModelIdentity(fingerprint="0" * 64, name="small", dims=SMALL, parts={})
    ) as index:
        index.add_vectors(vectors, ids=ids)
        index.search(vectors[0], 1)
        assert index.remove(sorted(set(ids) - {str(row) for row in kept})) == 100_000
        order = np.argsort(
            -(vectors[kept].astype(np.float64) @ vectors[7].astype(np.float64)), kind="stable"
        )
        for settings in ({"exact": True}, {"shortlist": 500}):
            hits = index.search(vectors[7], 20, **cast(Any, settings))
            assert len({hit.id for hit in hits} & {str(kept[row]) for row in order[:20]}) >= 19
            assert hits.how.vectors == 500
        assert len(index.search(vectors[7], 10_000)) == 500
        index.add_vectors(vectors[:1], ids=["new"])
        assert index.search(vectors[0], 1)[0].id in ("new", "0")
        assert len(index) == 501


def test_thousands_of_equal_vectors_are_compared_some_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    with open_index(tmp_path / "a.egx") as index:
        index.add_vectors(
            np.repeat(WordEmbedder().vector("page left blank")[None], 30_000, axis=0),
            ids=[str(row) for row in range(30_000)],
        )
        index.search("page", 1)
        tracemalloc.start()
        hits = index.search("page left blank", 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [hit.id for hit in hits] == [str(row) for row in range(10)]
        # less than all of them as float64, let alone their squares and products
        assert peak < 30_000 * 64 * 8


@pytest.mark.parametrize(
    "call",
    [
        lambda index: index.search("x", task="\0"),
        lambda index: index.search("x", dim=10**30),
        lambda index: index.search("x", shortlist=10**30),
        lambda index: index.search("x" * 10_000_000),
        lambda index: index.add(["x"], ids=["y" * 5_000_000]),
        lambda index: index.get(["y" * 5_000_000]),
        lambda index: index.search("x", where={"n": 10**400}),
        lambda index: index.remember_model_path("\ud800"),
    ],
)
def test_settings_beyond_all_measure_are_an_error_of_ours_or_an_answer(
    index: Index, call: Any
) -> None:
    index.add(TEXTS)
    with contextlib.suppress(EgemmaError):
        call(index)
    assert len(index) >= 4
    assert index.facts(check=True).damage is None


def test_describing_hostile_files_is_an_error_of_ours(tmp_path: Path, whole: Path) -> None:
    content = whole.read_bytes()
    for number, damaged in enumerate(
        [
            b"",
            b"x",
            content[:100],
            content[:4096],
            content[:-1],
            bytes(len(content)),
            content[::-1],
            content + content,
        ]
    ):
        path = tmp_path / f"{number}.egx"
        path.write_bytes(damaged)
        try:
            found = describe_index(path, check=True).damage
        except IndexFileError as error:
            found = str(error)
        assert found or damaged[: len(content)] == content, number
        with contextlib.suppress(IndexFileError):
            small_index(path, create=False).close()
