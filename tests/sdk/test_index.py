"""The index keeps what it was given, finds exactly, and says so when it cannot. A bag-of-words embedder stands in for the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from egemma.index import Index, _nearest, content_id
from egemma.index_file import APPLICATION_ID, describe_index
from egemma_core.errors import ConfigError, DimensionError, IndexFileError, IndexMismatchError, InputError, TokenLimitError
from egemma_core.vectors import normalize

DIMS = (64, 32, 16)
MAX_WORDS = 40


class WordEmbedder:
    """Keeps the contract of `egemma.Embedder`: each word is a fixed random direction, a text the sum of its words."""

    dims = DIMS
    dim = DIMS[0]

    def __init__(self, name: str = "words-1") -> None:
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.manifest = SimpleNamespace(source={"model": name}, target="test")
        self.broken: NDArray[np.float32] | None = None

    def _vector(self, text: str) -> NDArray[np.float32]:
        total = np.zeros(self.dim)
        for word in text.split()[:MAX_WORDS]:
            total += np.random.default_rng(int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")).normal(size=self.dim)
        return normalize(total.astype(np.float32))

    def embed_query(self, text: str, *, task: str = "search result", dim: int | None = None, overflow: str = "error") -> Any:
        return SimpleNamespace(vector=self._vector(text))

    def embed_documents(self, texts: Sequence[str], *, titles: Sequence[str | None] | None = None, dim: int | None = None,
                        overflow: str = "error") -> Any:
        lengths = np.array([len(text.split()) for text in texts])
        if overflow == "error" and (lengths > MAX_WORDS).any():
            raise TokenLimitError("a text is too long")
        vectors = np.stack([self._vector(text) for text in texts]) if self.broken is None else self.broken
        return SimpleNamespace(vectors=vectors, num_tokens=lengths, truncated=lengths > MAX_WORDS)


def open_index(path: Path, name: str = "words-1", *, create: bool = True) -> Index:
    return Index.open(path, cast(Any, WordEmbedder(name)), create=create)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path / "notes.egx") as opened:
        yield opened


TEXTS = ["the cat sat on the mat", "a dog barked at the moon", "rain fell on the quiet harbour", "she fixed the bicycle chain"]


# What goes in comes out.


def test_a_stored_text_is_found_by_its_own_words_with_title_metadata_and_score(index: Index) -> None:
    index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"], titles=["Cats", None, "", "Bikes"],
              metadata=[{"page": 3, "tags": ["é", None]}, None, {}, {"deep": {"a": [1.5, True]}}])
    hit = index.search("the cat sat on the mat", k=1)[0]
    assert (hit.id, hit.text, hit.title, hit.metadata, hit.truncated) == ("cat", TEXTS[0], "Cats", {"page": 3, "tags": ["é", None]}, False)
    assert hit.score == pytest.approx(1.0, abs=1e-6)
    assert index.get(["bicycle", "dog"])[0].metadata == {"deep": {"a": [1.5, True]}}
    assert index.get(["dog"])[0].title is None
    assert index.get(["dog"])[0].num_tokens == 6


def test_everything_is_still_there_after_closing_and_opening_again(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as first:
        ids = first.add(TEXTS)
        before = first.search("quiet rain", k=4)
    with open_index(tmp_path / "a.egx", create=False) as second:
        assert len(second) == 4
        assert second.search("quiet rain", k=4) == before
        assert [document.text for document in second.get(ids)] == TEXTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.egx"]


def test_the_ids_of_texts_without_one_are_their_content_and_title(index: Index) -> None:
    ids = index.add(TEXTS)
    assert index.add(TEXTS) == ids
    assert len(index) == 4
    assert content_id("a", "b") != content_id("a") != content_id("a", "")
    assert content_id('b", "a') != content_id("a", "b")


def test_adding_a_stored_id_replaces_its_document_and_vector(index: Index) -> None:
    index.add(["the cat sat on the mat"], ids=["x"], titles=["old"], metadata=[{"v": 1}])
    assert index.search("the cat sat on the mat")[0].score > 0.99
    index.add(["a dog barked at the moon"], ids=["x"])
    assert len(index) == 1
    hit = index.search("a dog barked at the moon")[0]
    assert (hit.text, hit.title, hit.metadata) == ("a dog barked at the moon", None, None)
    assert hit.score > 0.99
    assert index.search("the cat sat on the mat")[0].score < 0.9


def test_removed_documents_are_not_found_and_unknown_ids_are_not_counted(index: Index) -> None:
    index.add(TEXTS, ids=["a", "b", "c", "d"])
    assert {hit.id for hit in index.search("the", k=4)} == {"a", "b", "c", "d"}
    assert index.remove(["a", "c", "a", "unknown"]) == 2
    assert {hit.id for hit in index.search("the", k=4)} == {"b", "d"}
    assert index.remove([]) == 0
    with pytest.raises(InputError, match="'a'"):
        index.get(["b", "a"])


def test_nothing_is_added_for_no_texts_and_nothing_is_found_in_an_empty_index(index: Index) -> None:
    assert index.add([]) == []
    assert index.search("anything") == []
    assert len(index) == 0


def test_texts_ids_titles_and_metadata_are_data_and_never_sql(index: Index) -> None:
    evil = "'); DROP TABLE documents; --"
    index.add([evil, 'x" OR 1=1 --', "%_*?", "ünï 🦊 中文\u202e"], ids=[evil, "' OR '1'='1", "%", "🦊"], titles=[evil] * 4,
              metadata=[{evil: evil}] * 4)
    assert len(index) == 4
    assert index.get(["' OR '1'='1"])[0].text == 'x" OR 1=1 --'
    assert index.search(evil, k=1)[0].id == evil
    assert index.remove(["%"]) == 1
    assert index.remove([evil]) == 1
    assert index.get(["🦊"])[0].text == "ünï 🦊 中文\u202e"


# Search is exact.


@pytest.mark.parametrize("dim", [None, *DIMS])
def test_search_equals_cosines_in_float64_at_every_trained_width(index: Index, dim: int | None) -> None:
    generator = np.random.default_rng(0)
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(generator.choice(words, size=8)) for _ in range(400)]
    texts = sorted(set(texts))
    index.add(texts, ids=[f"{row:03}" for row in range(len(texts))])
    embedder = WordEmbedder()
    documents = np.stack([embedder._vector(text) for text in texts]).astype(np.float64)[:, :dim]
    query = embedder._vector("word1 word2 word3").astype(np.float64)[:dim]
    cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    hits = index.search("word1 word2 word3", k=25, dim=dim)
    assert [hit.id for hit in hits] == [f"{row:03}" for row in np.argsort(-cosines, kind="stable")[:25]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:25], atol=1e-6)


def test_equal_vectors_tie_exactly_and_come_in_the_order_of_their_ids(index: Index) -> None:
    generator = np.random.default_rng(1)
    ids = [f"{number:04}" for number in generator.permutation(997)]  # no multiple of a kernel's row count
    index.add([f"same words here{' ' * (row + 1)}" for row in range(997)], ids=ids)
    for k in (1, 7, 997):
        hits = index.search("same words", k=k)
        assert [hit.id for hit in hits] == sorted(ids)[:k]
        assert len({hit.score for hit in hits}) == 1


def test_scores_that_float32_cannot_tell_apart_are_ordered_as_in_float64() -> None:
    generator = np.random.default_rng(2)
    query = normalize(generator.normal(size=768).astype(np.float32))
    stored = normalize((query + 3e-4 * generator.normal(size=(3000, 768)) / np.sqrt(768)).astype(np.float32))
    exact = stored.astype(np.float64) @ query.astype(np.float64)
    assert len(np.unique(stored @ query)) < 100  # cosines of 1 - 5e-8: a handful of float32 values
    found = _nearest(query, [f"{row:04}" for row in range(3000)], stored, 5)
    assert [id_ for _, id_ in found] == [f"{row:04}" for row in np.argsort(-exact, kind="stable")[:5]]


def test_a_search_sees_one_state_though_another_connection_writes_in_the_middle(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as reader, open_index(tmp_path / "a.egx") as writer:
        writer.add(TEXTS, ids=["a", "b", "c", "d"])
        reader.search("the", k=4)

        def interfere(statement: str) -> None:
            if "FROM documents WHERE id" in statement:
                reader._connection.set_trace_callback(None)
                writer.remove(["a", "b", "c", "d"])

        reader._connection.set_trace_callback(interfere)
        assert {hit.id for hit in reader.search("the", k=4)} == {"a", "b", "c", "d"}
        assert reader.search("the", k=4) == []


def test_fewer_hits_come_back_when_fewer_are_stored(index: Index) -> None:
    index.add(TEXTS)
    assert len(index.search("cat", k=10_000)) == 4


def test_a_vector_of_a_smaller_width_searches_at_that_width(index: Index) -> None:
    index.add(TEXTS)
    full = WordEmbedder()._vector("rain harbour")
    for dim in DIMS:
        assert index.search_vector(full[:dim]) == index.search_vector(full, dim=dim) == index.search("rain harbour", dim=dim)
        assert index.search_vector(full[:dim] * np.float32(8)) == index.search("rain harbour", dim=dim)
    with pytest.raises(InputError, match="dim=32"):
        index.search_vector(full[:16], dim=32)


# What cannot work is refused, and nothing is stored.


@pytest.mark.parametrize("k", [0, -1, 10_001, 2.5, True, None, "3"])
def test_a_k_that_is_no_count_is_refused(index: Index, k: Any) -> None:
    with pytest.raises(ConfigError, match="k="):
        index.search("cat", k)


def test_a_width_that_was_not_trained_is_refused(index: Index) -> None:
    with pytest.raises(DimensionError, match="dim=300"):
        index.search("cat", dim=300)
    with pytest.raises(DimensionError, match="dim=63"):
        index.search_vector(np.ones(63, dtype=np.float32))


@pytest.mark.parametrize("query", ["", "  \n", None, 7])
def test_a_query_without_words_is_refused(index: Index, query: Any) -> None:
    with pytest.raises(InputError, match="query="):
        index.search(query)


@pytest.mark.parametrize("vector", [np.full(64, np.nan), np.full(64, np.inf), np.zeros(64), np.ones((1, 64)), np.ones(64, dtype=int),
                                    np.r_[np.zeros(16), np.ones(48)]])
def test_a_query_vector_without_direction_is_refused(index: Index, vector: Any) -> None:
    with pytest.raises(InputError):
        index.search_vector(vector, dim=16)


@pytest.mark.parametrize(("changes", "says"), [
    ({"texts": ["good", ""]}, "text 1 is blank"),
    ({"texts": ["good", " \t\n"]}, "text 1 is blank"),
    ({"texts": ["good", b"bytes"]}, "text 1 is bytes"),
    ({"texts": ["good", None]}, "text 1 is NoneType"),
    ({"texts": ["good", "a\0b"]}, "text 1 holds a NUL character at 1"),
    ({"texts": ["good", "a\ud800"]}, r"U\+D800"),
    ({"texts": "good"}, "one str"),
    ({"titles": ["t"]}, "1 titles for 2 texts"),
    ({"titles": "tt"}, "one str"),
    ({"titles": ["t", "\udcff"]}, "title 1"),
    ({"titles": ["t", 3]}, "title 1 is int"),
    ({"ids": ["one"]}, "1 ids for 2 texts"),
    ({"ids": ["one", ""]}, "blank"),
    ({"ids": ["one", 2]}, "int"),
    ({"ids": ["one", "a\0"]}, "NUL"),
    ({"ids": ["one", "\ud800"]}, "surrogate"),
    ({"ids": ["one", "one"]}, "two different documents"),
    ({"metadata": [{}, {"a": float("nan")}]}, "JSON"),
    ({"metadata": [{}, {"a": {1, 2}}]}, "JSON"),
    ({"metadata": [{}, {1: 2}]}, "mapping"),
    ({"metadata": [{}, [1]]}, "mapping"),
    ({"metadata": {"a": 1}}, "one dict"),
])
def test_what_cannot_be_stored_is_refused_with_its_place_and_nothing_is_stored(index: Index, changes: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        index.add(**{"texts": ["good", "also good"], **changes})
    assert len(index) == 0


def test_a_text_too_long_is_refused_or_cut_and_marked(index: Index) -> None:
    long = "word " * (MAX_WORDS + 1)
    with pytest.raises(TokenLimitError):
        index.add(["short", long])
    assert len(index) == 0
    index.add(["short", long], ids=["short", "long"], overflow="truncate")
    assert [hit.truncated for hit in index.search("word", k=2)] == [True, False]
    assert [document.truncated for document in index.get(["short", "long"])] == [False, True]
    assert index.get(["long"])[0].num_tokens == MAX_WORDS + 1


@pytest.mark.parametrize("broken", [np.full((4, 64), np.nan), np.zeros((4, 64)), np.full((4, 64), 0.5), np.ones((4, 32)) / np.sqrt(32),
                                    np.ones((3, 64)) / 8])
def test_vectors_that_are_not_unit_vectors_of_the_full_width_are_not_stored(index: Index, broken: Any) -> None:
    cast(Any, index._embedder).broken = broken.astype(np.float32)
    with pytest.raises(InputError, match="egemma verify"):
        index.add(TEXTS)
    assert len(index) == 0


def test_a_batch_that_fails_while_it_is_written_leaves_nothing(index: Index) -> None:
    index.add(["before"], ids=["before"])
    index._connection.execute("CREATE TRIGGER late BEFORE INSERT ON documents WHEN new.id = 'bad' BEGIN SELECT raise(ABORT, 'full'); END")
    with pytest.raises(IndexFileError):
        index.add(["first", "second", "third"], ids=["first", "bad", "third"])
    assert len(index) == 1
    index.add(["after"], ids=["after"])
    assert len(index) == 2


# Which file, which model.


def test_an_index_refuses_another_model_and_names_both(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", "model-one") as first:
        first.add(TEXTS)
    with pytest.raises(IndexMismatchError, match=r"holds vectors of model-one .*, this is model-two .*Re-embed"):
        open_index(tmp_path / "a.egx", "model-two")
    with open_index(tmp_path / "a.egx", "model-one") as again:
        assert len(again) == 4


def test_a_file_that_is_no_index_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("this is a text file, long enough to have a header of a hundred bytes. " * 4)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE contacts (name TEXT)")
    connection.close()
    short = tmp_path / "short"
    short.write_bytes(b"SQLite form")
    for path, says in ((text, "not an index"), (other, "SQLite file of another program"), (short, "not an index")):
        before = path.read_bytes()
        with pytest.raises(IndexFileError, match=f"{path.name}.*{says}"):
            open_index(path)
        with pytest.raises(IndexFileError, match=f"{path.name}.*{says}"):
            describe_index(path)
        assert path.read_bytes() == before


def test_a_missing_file_folder_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="no such file"):
        open_index(tmp_path / "none.egx", create=False)
    with pytest.raises(IndexFileError, match="no such folder"):
        open_index(tmp_path / "none" / "a.egx")
    with pytest.raises(IndexFileError, match="is a folder"):
        open_index(tmp_path)
    with pytest.raises(IndexFileError, match="NUL"):
        open_index(tmp_path / "a\0b")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    open_index(tmp_path / "a.egx").close()
    change(tmp_path / "a.egx", "PRAGMA user_version = 2")
    with pytest.raises(IndexFileError, match=r"format version 2, this egemma reads 1\. Update"):
        open_index(tmp_path / "a.egx")


def test_an_empty_file_becomes_an_index_only_when_it_may_be_created(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"  # what a process leaves that dies before its first commit
    path.touch()
    with pytest.raises(IndexFileError, match="empty"):
        open_index(path, create=False)
    with pytest.raises(IndexFileError, match="empty"):
        describe_index(path)
    with open_index(path) as index:
        index.add(TEXTS)
    assert describe_index(path).documents == 4


def test_names_that_mean_something_in_an_sqlite_uri_are_plain_file_names(tmp_path: Path) -> None:
    for name in ("a?mode=memory", "b#c", "100%20", "ü 🦊", ":memory:", "file:x"):
        with open_index(tmp_path / name) as index:
            index.add(["one"])
        assert describe_index(tmp_path / name).documents == 1
    assert len(list(tmp_path.iterdir())) == 6


def test_the_file_is_as_its_description_says(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index.remember_model_path("/models/one")
        index.add(["a b c"], ids=["x"], titles=["t"], metadata=[{"k": 1}])
        assert index._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert index._connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    with sqlite3.connect(tmp_path / "a.egx") as connection:
        assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID == int.from_bytes(b"eGMA", "big")
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 1
        facts = dict(connection.execute("SELECT name, value FROM facts"))
        row = connection.execute("SELECT id, title, metadata, num_tokens, truncated, vector, text FROM documents").fetchone()
    connection.close()
    assert facts == {"fingerprint": WordEmbedder().fingerprint, "model": f"words-1 test ({WordEmbedder().fingerprint[:12]})",
                     "dims": "[64, 32, 16]", "model_path": "/models/one"}
    assert row[:5] == ("x", "t", '{"k": 1}', 3, 0)
    assert row[6] == "a b c"
    np.testing.assert_array_equal(np.frombuffer(row[5], "<f4"), WordEmbedder()._vector("a b c"))
    described = describe_index(tmp_path / "a.egx", check=True)
    assert (described.documents, described.dims, described.model_path, described.damage) == (1, DIMS, "/models/one", None)


# Damage.


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("damage", [
    "UPDATE documents SET vector = substr(vector, 1, 100) WHERE id = 'b'",
    "UPDATE documents SET vector = zeroblob(256) WHERE id = 'b'",
    "UPDATE documents SET vector = x'0000c07f' || substr(vector, 5) WHERE id = 'b'",  # NaN
    "UPDATE documents SET vector = 'text' WHERE id = 'b'",
    "UPDATE documents SET vector = (SELECT vector FROM documents WHERE id = 'a') WHERE id = 'b'",
    "UPDATE documents SET (vector, vector_crc32) = (SELECT vector, vector_crc32 FROM documents WHERE id = 'a') WHERE id = 'b'",
    "UPDATE documents SET metadata = '{' WHERE id = 'a'",
    "UPDATE documents SET title = 'another' WHERE id = 'a'",
    "UPDATE documents SET text = 'another' WHERE id = 'a'",
    "UPDATE documents SET text = 7 WHERE id = 'a'",
    "UPDATE documents SET truncated = 1 WHERE id = 'a'",
    "UPDATE documents SET text = CAST(x'ff61' AS TEXT) WHERE id = 'a'",
    "DROP TABLE documents",
    "DELETE FROM facts WHERE name = 'fingerprint'",
    "UPDATE facts SET value = 'no' WHERE name = 'dims'",
    "ALTER TABLE documents DROP COLUMN truncated",
])
def test_damaged_contents_are_an_error_and_never_a_wrong_answer(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.egx"
    with open_index(path) as index:
        index.add(TEXTS, ids=["a", "b", "c", "d"])
    change(path, damage)
    with pytest.raises(IndexFileError, match="damaged"), open_index(path) as index:
        index.search("cat", k=4)
    try:
        assert describe_index(path, check=True).damage
    except IndexFileError as error:  # too damaged to say anything about it
        assert "damaged" in str(error)  # noqa: PT017


def test_damage_that_sqlite_reports_in_broken_utf8_is_an_error_of_ours(tmp_path: Path) -> None:
    open_index(tmp_path / "a.egx").close()
    change(tmp_path / "a.egx", "PRAGMA writable_schema = ON",
           "UPDATE sqlite_master SET name = CAST(x'b4ff' AS TEXT), sql = 'CREATE TABLE (' WHERE name = 'facts'")
    with pytest.raises(IndexFileError, match=r"a\.egx"):
        open_index(tmp_path / "a.egx")


def test_a_file_damaged_anywhere_is_an_error_or_still_gives_the_right_answer(tmp_path: Path) -> None:
    whole = tmp_path / "whole.egx"
    with open_index(whole) as index:
        index.add([f"{text} {number}" for number in range(40) for text in TEXTS], titles=["t"] * 160, metadata=[{"n": 1}] * 160)
        right = index.search("quiet rain", k=160)
    content = whole.read_bytes()
    path, refused, generator = tmp_path / "a.egx", 0, np.random.default_rng(0)
    for at in generator.integers(0, len(content), size=100):
        page = bytes(generator.permutation(len(content) // 4096)[:1])[0] * 4096
        flipped = bytes([content[at] ^ 1 << generator.integers(8)])
        for damaged in (content[:at], content[:at] + flipped + content[at + 1 :],
                        content[:at] + generator.bytes(600) + content[at + 600 :],
                        content[:page] + content[at // 4096 * 4096 :][:4096] + content[page + 4096 :]):
            path.write_bytes(damaged)
            try:
                with open_index(path, create=False) as index:
                    found = index.search("quiet rain", k=160)
            except IndexFileError:
                refused += 1
            else:
                assert found == right
    assert refused > 200


# Several programs and threads.


def test_a_search_sees_what_another_connection_wrote(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as reader, open_index(tmp_path / "a.egx") as writer:
        writer.add(TEXTS[:2], ids=["a", "b"])
        assert {hit.id for hit in reader.search("the", k=9)} == {"a", "b"}
        writer.add([TEXTS[2]], ids=["c"])
        writer.remove(["a"])
        assert {hit.id for hit in reader.search("the", k=9)} == {"b", "c"}
        writer.add([TEXTS[3]], ids=["b"])
        assert reader.search(TEXTS[3], k=1)[0].score > 0.99


def test_vectors_are_read_once_while_nothing_changes(index: Index) -> None:
    index.add(TEXTS)
    index.search("cat")
    before = index._matrices[64][1]
    index.search("dog")
    assert index._matrices[64][1] is before
    assert before.dtype == np.float32


def test_threads_may_search_and_write_at_once_and_each_search_sees_one_state(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    with open_index(tmp_path / "a.egx") as shared, open_index(tmp_path / "a.egx") as other:
        def write(index: Index, name: str) -> None:
            try:
                for round_ in range(30):
                    index.add([f"pair {name} {round_} left", f"pair {name} {round_} right"], ids=[f"{name}-left", f"{name}-right"])
                    index.remove([f"{name}-left", f"{name}-right"])
            except BaseException as error:
                errors.append(error)

        def read(index: Index) -> None:
            try:
                for _ in range(100):
                    rounds: dict[str, set[str]] = {}
                    for hit in index.search("pair", k=10):
                        _, name, round_, side = hit.text.split()
                        rounds.setdefault(name, set()).add(f"{round_} {side}")
                    for found in rounds.values():
                        assert len(found) == 2
                        assert len({pair.split()[0] for pair in found}) == 1
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(shared, "x")), threading.Thread(target=write, args=(other, "y")),
                   threading.Thread(target=read, args=(shared,)), threading.Thread(target=read, args=(other,))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    for call in (lambda: index.search("cat"), lambda: index.add(["x"]), lambda: len(index)):
        with pytest.raises(IndexFileError, match="is closed"):
            call()


def test_a_file_locked_by_another_program_is_a_typed_error(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index:
        index._connection.execute("PRAGMA busy_timeout = 50")
        other = sqlite3.connect(tmp_path / "a.egx", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(IndexFileError, match="another program"):
            index.add(TEXTS)
        assert index.search("cat") == []  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert len(index.add(TEXTS)) == 4


# Programs that die, and disks that fill.

WRITER = """
import sys
from pathlib import Path
from tests.sdk.test_index import open_index
index = open_index(Path(sys.argv[1]))
print("ready", flush=True)
for batch in range(10_000):
    index.add([f"batch {batch} row {row} " + "filler " * 30 for row in range(50)], ids=[f"{batch}-{row}" for row in range(50)])
    print(batch, flush=True)
"""
ROOT = Path(__file__).parents[2]


def start_writer(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, cwd=ROOT)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("delay_s", [0.0, 0.021, 0.157])
def test_a_writer_killed_at_any_time_loses_nothing_told_and_leaves_no_half_batch(tmp_path: Path, delay_s: float,
                                                                                  end: signal.Signals) -> None:
    path = tmp_path / "a.egx"
    writer = start_writer(path)
    assert writer.stdout is not None
    lines = [writer.stdout.readline(), writer.stdout.readline()]
    time.sleep(delay_s)
    writer.send_signal(end)
    rest, complaint = writer.communicate()
    told = [int(line) for line in (lines + rest.splitlines())[1:] if line.strip()]
    assert writer.returncode == -end or "KeyboardInterrupt" in complaint
    with open_index(path, create=False) as index:
        stored = [tuple(map(int, row[0].split("-"))) for row in index._connection.execute("SELECT id FROM documents")]
        batches = {batch for batch, _ in stored}
        assert len(stored) == 50 * len(batches)       # whole batches only
        assert batches >= set(told)                   # all that was reported
        assert len(batches) <= len(told) + 1          # at most one committed but not yet reported
        assert index.search("batch 0 row 0", k=3)[0].id.startswith("0-")
        assert index.facts(check=True).damage is None
        index.add(["and it still takes more"], ids=["more"])
        assert len(index) == len(stored) + 1


def test_eight_processes_may_make_the_same_index_at_once(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from tests.sdk.test_index import open_index; sys.stdin.readline();"
            "open_index(Path(sys.argv[1])).add([sys.argv[2]])")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    makers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.egx"), f"text {number}"], stdin=subprocess.PIPE, text=True,
                               env=environment, cwd=ROOT, stderr=subprocess.PIPE) for number in range(8)]
    time.sleep(1.0)
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    complaints = [maker.communicate()[1] for maker in makers]
    assert complaints == [""] * 8
    assert describe_index(tmp_path / "a.egx").documents == 8


def test_a_full_file_refuses_the_batch_and_keeps_the_rest(index: Index) -> None:
    index.add(TEXTS)
    pages = index._connection.execute("PRAGMA page_count").fetchone()[0]
    index._connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(IndexFileError, match=r"full.*Nothing of this call was stored"):
        index.add([f"another {number} " + "x" * 500 for number in range(100)])
    assert len(index) == 4
    assert len(index.search("cat")) == 4
    index._connection.execute("PRAGMA max_page_count = 1000000")
    index.add(["there is room again"])
    assert len(index) == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small disk can only be made by root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_refuses_the_batch_and_keeps_the_rest(small_disk: Path) -> None:
    with open_index(small_disk / "a.egx") as index:
        index.add(TEXTS)

        def fill() -> None:
            for number in range(1000):
                index.add([f"number {number} {row} " + "x" * 500 for row in range(20)])

        with pytest.raises(IndexFileError, match=r"full|I/O"):
            fill()
        kept = len(index)
        assert kept % 20 == 4
        assert len(index.search("number", k=9999)) == kept
    with open_index(small_disk / "a.egx", create=False) as index:
        assert len(index) == kept


# Files that cannot be written.

READER = """
import json, os, sys
from pathlib import Path
from egemma_core.errors import IndexFileError
from tests.sdk.test_index import WordEmbedder, open_index
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
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


def start_reader(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen([sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=environment, cwd=ROOT)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of Unix")
@pytest.mark.parametrize("folder_mode", [0o777, 0o555])
def test_a_file_that_cannot_be_written_can_be_searched(open_folder: Path, folder_mode: int) -> None:
    path = open_folder / "a.egx"
    with open_index(path) as index:
        index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
    path.chmod(0o444)
    open_folder.chmod(folder_mode)
    reader = start_reader(path)
    out, complaint = reader.communicate("\n")
    assert complaint == ""
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["hits"][0] == "cat" == second[0]
    assert first["read_only"]
    assert "search only" in first["refused"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs a second user to write while the first may only read")
def test_a_file_read_as_unchanging_is_given_up_when_somebody_changes_it(open_folder: Path) -> None:
    path = open_folder / "a.egx"
    with open_index(path) as index:
        index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
    open_folder.chmod(0o555)
    path.chmod(0o444)
    reader = start_reader(path)
    assert reader.stdout is not None
    assert json.loads(reader.stdout.readline())["hits"][0] == "cat"
    with open_index(path) as index:
        index.remove(["cat"])
        out, _ = reader.communicate("\n")
    assert "changed while it was open" in json.loads(out)
