"""An index keeps what it was given, all of it or nothing, and embeds only what it does not have
yet.
"""

from __future__ import annotations

import enum
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from egemma.chunks import Chunk, ChunkedDocument
from egemma.index import Document, Index, PutReport, content_id, describe_index, file
from egemma_core.errors import (
    ConfigError,
    IndexFileError,
    InputError,
    NotFoundError,
    TokenLimitError,
)
from tests.sdk.fakes import DIMS, MAX_TOKENS, TEXTS, WordEmbedder, model_of, open_index
from tests.sdk.test_index_file import python


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path / "notes.egx") as opened:
        yield opened


# What goes in comes out.


def test_a_stored_text_is_found_by_its_own_words_with_title_metadata_and_score(
    index: Index,
) -> None:
    ids = index.add(
        TEXTS,
        ids=["cat", "dog", "rain", "bicycle"],
        titles=["Cats", None, "", "Bikes"],
        metadata=[{"page": 3, "tags": ["é", None]}, None, {}, {"deep": {"a": [1.5, True]}}],
    )
    assert ids == ["cat", "dog", "rain", "bicycle"]
    hit = index.search("Cats the cat sat on the mat", k=1)[0]
    assert (hit.id, hit.text, hit.title, hit.metadata, hit.truncated) == (
        "cat",
        TEXTS[0],
        "Cats",
        {"page": 3, "tags": ["é", None]},
        False,
    )
    assert (hit.start, hit.stop, hit.position) == (0, 22, 0)
    assert hit.score == pytest.approx(1.0, abs=1e-3)
    assert index.get(["bicycle", "dog"])[0].metadata == {"deep": {"a": [1.5, True]}}
    prompt = 4  # "title: none | text: "
    assert index.get(["dog"]) == [
        Document(
            id="dog",
            text=TEXTS[1],
            title=None,
            metadata=None,
            source=None,
            num_tokens=6 + prompt,
            truncated=False,
            num_chunks=1,
        )
    ]
    assert index.get(["rain"])[0].title is None
    assert index.get([]) == []


def test_everything_is_still_there_after_closing_and_opening_again(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as first:
        ids = first.add(TEXTS)
        before = first.search("quiet rain", k=4)
    with open_index(tmp_path / "a.egx", create=False) as second:
        assert len(second) == 4
        assert second.search("quiet rain", k=4) == before
        assert [document.text for document in second.get(ids)] == TEXTS
        assert second.ids() == ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.egx"]


def test_the_ids_of_texts_without_one_are_their_content_and_title(index: Index) -> None:
    ids = index.add(TEXTS)
    assert ids == [content_id(text) for text in TEXTS]
    assert index.add([*TEXTS, TEXTS[0]]) == [*ids, ids[0]]
    assert len(index) == 4
    assert model_of(index).embedded == TEXTS
    assert content_id("a", "b") != content_id("a") != content_id("a", "")
    assert content_id('b", "a') != content_id("a", "b")
    assert index.add(["x"], titles=[""]) == index.add(["x"])


def test_adding_a_stored_id_replaces_its_document_and_vector(index: Index) -> None:
    index.add(["the cat sat on the mat"], ids=["x"], titles=["old"], metadata=[{"v": 1}])
    assert index.search("old the cat sat on the mat")[0].score > 0.99
    index.add(["a dog barked at the moon"], ids=["x"])
    assert len(index) == 1
    hit = index.search("a dog barked at the moon")[0]
    assert (hit.text, hit.title, hit.metadata) == ("a dog barked at the moon", None, None)
    assert hit.score > 0.99
    assert index.search("the cat sat on the mat")[0].score < 0.9
    assert [hit.text for hit in index.search("cat", mode="text")] == []
    assert index.facts(check=True).damage is None


def test_removed_documents_are_not_found_and_unknown_ids_are_not_counted(index: Index) -> None:
    index.add(TEXTS, ids=["a", "b", "c", "d"])
    assert {hit.id for hit in index.search("the", k=4)} == {"a", "b", "c", "d"}
    assert index.remove(["a", "c", "a", "unknown"]) == 2
    for mode in ("vector", "text", "hybrid"):
        assert {hit.id for hit in index.search("the", k=4, mode=cast(Any, mode))} == {"b", "d"}
    assert index.ids() == ["b", "d"]
    assert index.remove([]) == 0
    with pytest.raises(InputError, match="'a'"):
        index.get(["b", "a"])
    assert index.facts(check=True).damage is None


def test_nothing_is_added_for_no_texts_and_nothing_is_found_in_an_empty_index(index: Index) -> None:
    assert index.add([]) == []
    assert index.add_vectors(np.empty((0, 64), np.float32), ids=[]) == []
    assert index.put([]) == PutReport(documents=0, chunks=0, embedded=0, reused=0, removed=0)
    for mode in ("vector", "text", "hybrid"):
        assert list(index.search("anything", mode=cast(Any, mode))) == []
    assert list(index.search("anything", exact=True)) == []
    assert len(index) == 0
    assert index.facts(check=True).damage is None


def test_vectors_of_the_same_model_are_stored_as_its_own_would_be(tmp_path: Path) -> None:
    vectors = np.stack([WordEmbedder().vector(text) for text in TEXTS])
    ids = ["a", "b", "c", "d"]
    with open_index(tmp_path / "texts.egx") as one, open_index(tmp_path / "vectors.egx") as other:
        one.add(TEXTS, ids=ids, metadata=[{"n": number} for number in range(4)])
        assert (
            other.add_vectors(
                vectors, ids=ids, texts=TEXTS, metadata=[{"n": number} for number in range(4)]
            )
            == ids
        )
        for mode in ("vector", "text", "hybrid"):
            assert one.search("the quiet cat", mode=cast(Any, mode)) == other.search(
                "the quiet cat", mode=cast(Any, mode)
            )
        # c is replaced; neither has a text
        other.add_vectors(vectors[:2], ids=["c", "e"], titles=["T", None])
        assert {hit.id: hit.text for hit in other.search("the", k=9)} == {
            "a": TEXTS[0],
            "b": TEXTS[1],
            "c": "",
            "d": TEXTS[3],
            "e": "",
        }
        assert other.search(TEXTS[0], k=2)[1].title == "T"
        assert other.get(["e"])[0].text == ""
        assert other.facts(check=True).damage is None


def test_what_ingestion_noted_comes_back(index: Index) -> None:
    source = {"path": "docs/ü.md", "bytes": 7, "stamp": [1, 2.5, None]}
    index.put([document("a", "one two"), replace(document("b", "three"), source=source)])
    assert index.sources() == {"b": source}
    assert index.get(["b"])[0].source == source


@pytest.mark.parametrize("floats", [False, True])
def test_a_file_keeps_floats_where_it_was_made_to(tmp_path: Path, floats: bool) -> None:
    with open_index(tmp_path / "a.egx", keep_floats=floats) as index:
        index.add(TEXTS)
    # of no effect on a file that exists
    with open_index(tmp_path / "a.egx", keep_floats=not floats) as index:
        index.add(["one more text"])
        assert index.facts(check=True).floats is floats
        query, stored = (
            WordEmbedder().vector("the bicycle chain").astype(float),
            WordEmbedder().vector(TEXTS[3]).astype(float),
        )
        error = abs(
            index.search("the bicycle chain", k=1)[0].score
            - query @ stored / np.linalg.norm(query) / np.linalg.norm(stored)
        )
        assert error < 1e-12 if floats else 1e-9 < error < 1e-3


def test_texts_that_are_members_of_an_enumeration_are_stored_as_their_texts(index: Index) -> None:
    class Name(str, enum.Enum):
        CAT = "cat"
        WORDS = "the cat sat"

    index.add([Name.WORDS], ids=[Name.CAT], titles=[Name.CAT])
    index.put(
        [
            ChunkedDocument(
                id=Name.WORDS,
                title=Name.CAT,
                metadata=None,
                source=None,
                chunks=(Chunk(start=0, stop=11, title=Name.CAT, text=Name.WORDS),),
            )
        ]
    )
    index.add_vectors(
        WordEmbedder().vector("x")[None], ids=[np.str_("n")], texts=[Name.WORDS], titles=[Name.CAT]
    )
    assert index.get([Name.CAT])[0].text == "the cat sat"
    assert [hit.title for hit in index.search("cat", k=3)] == ["cat"] * 3
    assert index.facts(check=True).damage is None


# Chunks.


def document(
    id_: str, *texts: str, title: str | None = None, metadata: Any = None
) -> ChunkedDocument:
    """One whose chunks are these texts, one after the other."""
    chunks, start = [], 0
    for text in texts:
        chunks.append(Chunk(start=start, stop=start + len(text), title=title, text=text))
        start += len(text)
    return ChunkedDocument(
        id=id_, title=title, metadata=metadata, source=None, chunks=tuple(chunks)
    )


def hits_of(index: Index, query: str = "anything") -> dict[tuple[str, int], tuple[str, int, int]]:
    """All that can be found: (id, position) -> text and span."""
    return {
        (hit.id, hit.position): (hit.text, hit.start, hit.stop)
        for hit in index.search(query, k=1000)
    }


PARAGRAPHS = ("first paragraph\n\n", "second one\n\n", "third and longest of them\n\n", "fourth")


def test_an_edited_paragraph_is_the_only_one_that_is_embedded(index: Index) -> None:
    report = index.put([document("a", *PARAGRAPHS), document("b", "something else")])
    assert report == PutReport(documents=2, chunks=5, embedded=5, reused=0, removed=0)
    model_of(index).embedded.clear()
    edited = (PARAGRAPHS[0], "second one, edited\n\n", *PARAGRAPHS[2:])
    assert index.put([document("a", *edited)]) == PutReport(
        documents=1, chunks=4, embedded=1, reused=3, removed=1
    )
    assert model_of(index).embedded == ["second one, edited\n\n"]
    assert index.get(["a"])[0].text == "".join(edited)
    found = hits_of(index)
    starts = np.cumsum([0, *map(len, edited)]).tolist()
    assert found == {
        ("a", number): (text, starts[number], starts[number + 1])
        for number, text in enumerate(edited)
    } | {("b", 0): ("something else", 0, 14)}
    assert index.search("edited", mode="text")[0].position == 1
    assert index.facts(check=True).damage is None


def test_a_document_that_did_not_change_embeds_nothing(index: Index) -> None:
    index.put([document("a", *PARAGRAPHS)])
    before = index.search("longest", k=9)
    assert index.put([document("a", *PARAGRAPHS)]) == PutReport(
        documents=1, chunks=4, embedded=0, reused=4, removed=0
    )
    assert index.put([document("a", *PARAGRAPHS, metadata={"lang": "en"})]).embedded == 0
    assert model_of(index).calls == 1
    assert [hit.score for hit in index.search("longest", k=9)] == [hit.score for hit in before]
    assert index.search("longest", where={"lang": "en"})[0].metadata == {"lang": "en"}
    assert index.put([document("a", *PARAGRAPHS)]).embedded == 0
    assert list(index.search("longest", where={"lang": "en"})) == []


def test_another_title_embeds_all_chunks_that_carry_it(index: Index) -> None:
    index.put([document("a", *PARAGRAPHS, title="Old")])
    assert index.put([document("a", *PARAGRAPHS, title="New")]).embedded == 4
    assert index.search("Old", mode="text").hits == ()
    assert {hit.title for hit in index.search("New", k=9)} == {"New"}


def test_chunks_that_changed_places_keep_their_vectors(index: Index) -> None:
    index.put([document("a", *PARAGRAPHS)])
    assert index.put([document("a", *PARAGRAPHS[::-1])]) == PutReport(
        documents=1, chunks=4, embedded=0, reused=4, removed=0
    )
    assert index.get(["a"])[0].text == "".join(PARAGRAPHS[::-1])
    assert hits_of(index)["a", 3] == (
        PARAGRAPHS[0],
        sum(map(len, PARAGRAPHS[1:])),
        sum(map(len, PARAGRAPHS)),
    )
    assert index.search("first paragraph", k=1)[0].position == 3
    assert index.facts(check=True).damage is None


def test_a_document_may_shrink_and_grow(index: Index) -> None:
    index.put([document("a", *PARAGRAPHS)])
    assert index.put([document("a", *PARAGRAPHS[1:3])]) == PutReport(
        documents=1, chunks=2, embedded=0, reused=2, removed=2
    )
    assert index.get(["a"])[0].num_chunks == 2
    assert set(hits_of(index)) == {("a", 0), ("a", 1)}
    assert index.put([document("a", *PARAGRAPHS)]) == PutReport(
        documents=1, chunks=4, embedded=2, reused=2, removed=0
    )
    assert index.facts(check=True).damage is None


def test_the_same_words_twice_in_a_document_are_embedded_once_and_found_twice(index: Index) -> None:
    index.put([document("a", "again and ", "other words ", "again and ")])
    assert model_of(index).embedded == ["again and ", "other words "]
    hits = index.search("again and", k=2)
    assert [(hit.position, hit.text) for hit in hits] == [(0, "again and "), (2, "again and ")]
    assert hits[0].score == hits[1].score
    # A third one: the file has the vector, so nothing is embedded, and all three tie.
    assert index.put(
        [document("a", "again and ", "again and ", "other words ", "again and ")]
    ) == PutReport(documents=1, chunks=4, embedded=0, reused=4, removed=0)
    hits = index.search("again and", k=3)
    assert {hit.position for hit in hits} == {0, 1, 3}
    assert len({hit.score for hit in hits}) == 1
    assert [hit.num_chunks for hit in index.get(["a"])] == [4]
    assert index.put([document("a", "other words ", "again and ")]) == PutReport(
        documents=1, chunks=2, embedded=0, reused=2, removed=2
    )
    assert index.search("again", mode="text", k=9)[0].position == 1
    assert index.facts(check=True).damage is None


@pytest.mark.parametrize("floats", [False, True])
def test_a_copied_vector_is_the_stored_one_bit_for_bit(tmp_path: Path, floats: bool) -> None:
    with open_index(tmp_path / "a.egx", keep_floats=floats) as index:
        words = [f"some words {number} " for number in range(300)]
        index.put([document("a", *words)])
        index.put([document("a", *words, *words)])
        vectors = index._session._reader.execute(
            "SELECT scales, rest, floats FROM vectors ORDER BY number"
        ).fetchall()
        assert vectors[:300] == vectors[300:]
        codes = b"".join(
            row[0]
            for row in index._session._reader.execute("SELECT codes FROM heads ORDER BY block")
        )
        assert codes[: 300 * DIMS[-1]] == codes[300 * DIMS[-1] :]
        assert index.facts(check=True).damage is None


def test_the_same_words_in_two_documents_are_embedded_once_a_call_and_kept_apart(
    index: Index,
) -> None:
    assert index.put([document("a", "same words"), document("b", "same words")]).embedded == 1
    assert index.remove(["a"]) == 1
    assert [hit.id for hit in index.search("same words", k=9)] == ["b"]


def test_overlapping_chunks_give_back_the_text_once(index: Index) -> None:
    text = "one two three four five"
    chunks = tuple(
        Chunk(start=start, stop=stop, title=None, text=text[start:stop])
        for start, stop in ((0, 13), (8, 18), (8, 18), (14, 23))
    )
    index.put([ChunkedDocument(id="a", title=None, metadata=None, source=None, chunks=chunks)])
    assert index.get(["a"])[0].text == text
    assert {(hit.position, hit.start, hit.stop, hit.text) for hit in index.search("x", k=9)} == {
        (number, chunk.start, chunk.stop, chunk.text) for number, chunk in enumerate(chunks)
    }


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ((), "no chunks"),
        ((Chunk(start=0, stop=4, title=None, text="one"),), "spans 0 to 4"),
        ((Chunk(start=-1, stop=2, title=None, text="one"),), "spans -1"),
        ((Chunk(start=1, stop=4, title=None, text="one"),), "begins at 1"),
        (
            (
                Chunk(start=0, stop=3, title=None, text="one"),
                Chunk(start=4, stop=7, title=None, text="two"),
            ),
            "chunk 1 .* begins at 4",
        ),
        ((Chunk(start=0, stop=3, title=None, text="   "),), "blank"),
        ((Chunk(start=0, stop=3, title="\0", text="one"),), "NUL"),
        ((Chunk(start=0, stop=3, title=None, text="o\0e"),), "NUL"),
        ((Chunk(start=0, stop=3, title=None, text=cast(Any, b"one")),), "bytes"),
        ((Chunk(start=cast(Any, np.int64(0)), stop=3, title=None, text="one"),), "int64"),
        ((Chunk(start=cast(Any, 0.0), stop=cast(Any, 3.0), title=None, text="one"),), "float"),
        ((Chunk(start=False, stop=3, title=None, text="one"),), "bool"),
    ],
)
def test_chunks_that_do_not_tile_a_text_are_refused(index: Index, chunks: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        index.put(
            [
                document("good", "good"),
                ChunkedDocument(id="bad", title=None, metadata=None, source=None, chunks=chunks),
            ]
        )
    assert len(index) == 0


def test_a_chunk_that_was_cut_off_is_not_reused_where_that_is_an_error(index: Index) -> None:
    long = document("a", "short ", "word " * MAX_TOKENS)
    assert index.put([long], overflow="truncate").embedded == 2
    assert [hit.truncated for hit in index.search("word", k=1)] == [True]
    assert index.put([long], overflow="truncate").embedded == 0
    with pytest.raises(TokenLimitError):
        index.put([long])
    assert index.get(["a"])[0].truncated
    with pytest.raises(ConfigError, match="overflow='chunks'"):
        index.put([document("a", "short ")], overflow=cast(Any, "chunks"))
    with pytest.raises(ConfigError, match="overflow='chunk '"):
        index.add(["short"], overflow=cast(Any, "chunk "))


def test_a_long_text_is_cut_into_chunks_that_are_found_one_by_one(index: Index) -> None:
    text = " ".join(f"word{number}" for number in range(500))
    assert index.add(
        [text, "short"], ids=["long", "short"], titles=["Numbers", None], overflow="chunk"
    ) == ["long", "short"]
    stored = index.get(["long"])[0]
    assert (stored.text, stored.truncated) == (text, False)
    assert stored.num_chunks > 500 / MAX_TOKENS
    for number in (0, 250, 490):
        words = [f"word{number + offset}" for offset in range(9)]
        hit = index.search(" ".join(words), k=1)[0]
        assert set(words) & set(hit.text.split())
        assert (hit.text, hit.title) == (text[hit.start : hit.stop], "Numbers")
    assert index.add(
        [text.replace("word250 ", "changed ")], ids=["long"], titles=["Numbers"], overflow="chunk"
    ) == ["long"]
    # an edit costs what is near it
    assert len(model_of(index).embedded) <= stored.num_chunks + 1 + 3


def test_a_long_blank_stretch_in_a_long_text_does_not_refuse_it(tmp_path: Path) -> None:
    class Lines(WordEmbedder):
        """Counts blank lines, as tokenizers do."""

        def count_tokens(self, text: str) -> int:
            return len(text.split()) + text.count("\n")

    text = "before\n" + "\n" * 500 + "after " + "words " * 100
    with Index.open(tmp_path / "a.egx", cast(Any, Lines())) as index:
        index.add([text], ids=["a"], overflow="chunk")
        assert index.get(["a"])[0].text == text
        assert "after" in index.search("after words", k=1)[0].text


def test_what_another_process_took_away_meanwhile_is_embedded_after_all(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index, open_index(tmp_path / "a.egx") as other:
        index.put([document("a", "kept words ", "other words")])
        embedder = model_of(index)
        embed, rounds = embedder.embed_documents, 0

        def embed_slowly(*arguments: Any, **settings: Any) -> Any:
            nonlocal rounds
            rounds += 1
            if rounds == 1:
                other.remove(["a"])
            return embed(*arguments, **settings)

        embedder.embed_documents = embed_slowly  # type: ignore[method-assign]
        embedder.embedded.clear()
        report = index.put([document("a", "kept words ", "new words")])
        assert rounds == 2
        assert embedder.embedded == ["new words", "kept words "]
        assert report == PutReport(documents=1, chunks=2, embedded=2, reused=0, removed=0)
        assert index.get(["a"])[0].text == "kept words new words"
        assert index.facts(check=True).damage is None


def test_what_another_process_changed_meanwhile_is_replaced(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as index, open_index(tmp_path / "a.egx") as other:
        index.put([document("a", "kept words ", "other words")])
        embedder = model_of(index)
        embed = embedder.embed_documents

        def embed_slowly(*arguments: Any, **settings: Any) -> Any:
            other.put([document("a", "from elsewhere ", "kept words ")])
            return embed(*arguments, **settings)

        embedder.embed_documents = embed_slowly  # type: ignore[method-assign]
        report = index.put([document("a", "kept words ", "new words")])
        assert report == PutReport(documents=1, chunks=2, embedded=1, reused=1, removed=1)
        assert index.get(["a"])[0].text == "kept words new words"
        assert index.facts(check=True).damage is None


def test_an_index_is_asked_for_documents_like_a_mapping(index: Index) -> None:
    index.add(TEXTS[:2], ids=["cat", "dog"])
    assert "cat" in index
    assert "cow" not in index
    assert 7 not in index
    assert index["dog"] == index.get(["dog"])[0]
    for ask in (lambda: index["cow"], lambda: index.get(["cat", "cow"])):
        with pytest.raises(NotFoundError, match="has no document 'cow'") as caught:
            ask()
        assert isinstance(caught.value, KeyError)
    assert caught.value.position == 1


# What cannot work is refused, and nothing is stored.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"texts": ["good", ""]}, "text 1: the text is blank"),
        ({"texts": ["good", " \t\n"]}, "text 1: the text is blank"),
        ({"texts": ["good", b"bytes"]}, "text 1: the text is bytes"),
        ({"texts": ["good", None]}, "text 1: the text is NoneType"),
        ({"texts": ["good", "a\0b"]}, "text 1: the text holds a NUL character at 1"),
        ({"texts": ["good", "a\ud800"]}, r"U\+D800"),
        ({"texts": "good"}, "one str"),
        ({"titles": ["t"]}, "1 titles for 2 texts"),
        ({"titles": "tt"}, "one str"),
        ({"titles": ["t", "\udcff"]}, "text 1: its title"),
        ({"titles": ["t", 3]}, "text 1: its title is int"),
        ({"ids": ["one"]}, "1 ids for 2 texts"),
        ({"ids": "12"}, "ids is one str"),
        ({"ids": ["one", ""]}, "blank"),
        ({"ids": ["one", 2]}, "int"),
        ({"ids": ["one", None]}, "NoneType"),
        ({"ids": ["one", ["two"]]}, "list"),
        ({"ids": ["one", "a\0"]}, "NUL"),
        ({"ids": ["one", "\ud800"]}, "surrogate"),
        ({"ids": ["one", "one"]}, "two different documents"),
        ({"metadata": [{}, {"a": float("nan")}]}, "no such number"),
        ({"metadata": [{}, {"a": {1, 2}}]}, "set"),
        ({"metadata": [{}, {1: 2}]}, "keys are str"),
        ({"metadata": [{}, {"a": 2**70}]}, "64 bits"),
        ({"metadata": [{}, {"a": "\0"}]}, "NUL"),
        ({"metadata": [{}, [1]]}, "mapping"),
        ({"metadata": {"a": 1}}, "one dict"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place_and_nothing_is_stored(
    index: Index, changes: Any, says: str
) -> None:
    arguments = {"texts": ["good", "also good"], **changes}
    with pytest.raises(InputError, match=says):
        index.add(**arguments)
    assert model_of(index).calls == 0
    if "texts" not in changes or "blank" not in says:  # add_vectors takes texts that are empty
        arguments.setdefault("ids", ["1", "2"])
        with pytest.raises(
            InputError,
            match=says.replace("two different documents", "comes twice").replace(
                "2 texts", "2 (texts|vectors)"
            ),
        ):
            index.add_vectors(np.stack([WordEmbedder().vector("a")] * 2), **arguments)
    assert len(index) == 0


def test_a_text_too_long_is_refused_or_cut_and_marked(index: Index) -> None:
    long = "word " * (MAX_TOKENS + 1)
    with pytest.raises(TokenLimitError, match="text 1: ") as caught:
        index.add(["short", long])
    assert caught.value.position == 1
    assert len(index) == 0
    too_long = ChunkedDocument(
        id="long",
        title=None,
        metadata=None,
        source=None,
        chunks=(Chunk(start=0, stop=len(long), title=None, text=long),),
    )
    fine = replace(too_long, id="fine", chunks=(Chunk(start=0, stop=5, title=None, text="short"),))
    with pytest.raises(TokenLimitError, match="text 2: ") as caught:
        index.put([fine, fine, too_long])
    assert caught.value.position == 2
    assert len(index) == 0
    index.add(["short", long], ids=["short", "long"], overflow="truncate")
    assert [hit.truncated for hit in index.search("word", k=2)] == [True, False]
    assert [document.truncated for document in index.get(["short", "long"])] == [False, True]
    assert index.get(["long"])[0].num_tokens == MAX_TOKENS + 1 + 4
    assert index.facts().truncated_chunks == 1


@pytest.mark.parametrize(
    "broken",
    [
        np.full((4, 64), np.nan),
        np.zeros((4, 64)),
        np.full((4, 64), 0.5),
        np.ones((4, 32)) / np.sqrt(32),
        np.ones((3, 64)) / 8,
    ],
)
def test_vectors_that_are_not_unit_vectors_of_the_full_width_are_not_stored(
    index: Index, broken: Any
) -> None:
    model_of(index).broken = broken.astype(np.float32)
    with pytest.raises(InputError, match=r"egemma verify|full width"):
        index.add(TEXTS)
    if len(broken) == 4:
        with pytest.raises(InputError, match=r"egemma verify|full width"):
            index.add_vectors(broken.astype(np.float32), ids=["a", "b", "c", "d"])
    else:
        with pytest.raises(InputError, match="4 ids for 3 vectors"):
            index.add_vectors(broken.astype(np.float32), ids=["a", "b", "c", "d"])
    assert len(index) == 0


def writer_of(index: Index) -> sqlite3.Connection:
    index.remove([])
    return cast(sqlite3.Connection, index._session._writer)


@pytest.mark.parametrize("table", ["documents", "chunks", "vectors", "heads", "blocks", "facts"])
def test_a_batch_that_fails_while_it_is_written_leaves_nothing(index: Index, table: str) -> None:
    index.add(["before"], ids=["before"])
    writer_of(index).execute(
        f"CREATE TEMP TRIGGER late AFTER INSERT ON main.{table} BEGIN SELECT raise(ABORT, 'no'); "
        "END"
    )
    before = hits_of(index)
    with pytest.raises(IndexFileError):
        index.add(["first", "second", "third"], ids=["first", "before", "third"])
    assert hits_of(index) == before
    assert index.facts(check=True).damage is None
    writer_of(index).execute("DROP TRIGGER late")
    index.add(["after"], ids=["after"])
    assert len(index) == 2


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    calls: list[Callable[[], Any]] = [
        lambda: index.search("cat"),
        lambda: index.add(["x"]),
        lambda: len(index),
        lambda: index.remove(["x"]),
        lambda: index.get(["x"]),
        index.facts,
        index.ids,
        index.sources,
    ]
    for call in calls:
        with pytest.raises(IndexFileError, match="is closed"):
            call()


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
        writer.add([TEXTS[3]], ids=["b"], metadata=[{"n": 1}])
        assert [hit.id for hit in reader.search("the", where={"n": 1})] == ["b"]
        writer.add([TEXTS[3]], ids=["b"], metadata=[{"n": 2}])
        assert list(reader.search("the", where={"n": 1})) == []


def test_a_search_sees_one_state_though_another_connection_writes_in_the_middle(
    tmp_path: Path,
) -> None:
    with open_index(tmp_path / "a.egx") as reader, open_index(tmp_path / "a.egx") as writer:
        for mode in ("vector", "text", "hybrid"):
            writer.add(TEXTS, ids=["a", "b", "c", "d"])
            reader.search("the", k=4)
            interfered = []

            def interfere(statement: str) -> None:
                if "FROM chunks c JOIN documents" in statement:
                    reader._session._reader.set_trace_callback(None)
                    interfered.append(writer.remove(["a", "b", "c", "d"]))  # noqa: B023

            reader._session._reader.set_trace_callback(interfere)
            assert {hit.id for hit in reader.search("the", k=4, mode=cast(Any, mode))} == {
                "a",
                "b",
                "c",
                "d",
            }
            assert interfered == [4]
            assert list(reader.search("the", k=4, mode=cast(Any, mode))) == []


def test_threads_may_search_and_write_at_once_and_each_search_sees_one_state(
    tmp_path: Path,
) -> None:
    errors: list[BaseException] = []
    with open_index(tmp_path / "a.egx") as shared, open_index(tmp_path / "a.egx") as other:

        def write(index: Index, name: str) -> None:
            try:
                for round_ in range(20):
                    index.add(
                        [f"pair {name} {round_} left", f"pair {name} {round_} right"],
                        ids=[f"{name}-left", f"{name}-right"],
                    )
                    index.remove([f"{name}-left", f"{name}-right"])
            except BaseException as error:
                errors.append(error)

        def read(index: Index) -> None:
            try:
                for number in range(100):
                    rounds: dict[str, set[str]] = {}
                    for hit in index.search(
                        "pair", k=10, mode=cast(Any, ("vector", "text", "hybrid")[number % 3])
                    ):
                        _, name, round_, side = hit.text.split()
                        rounds.setdefault(name, set()).add(f"{round_} {side}")
                    for found in rounds.values():
                        assert len(found) == 2
                        assert len({pair.split()[0] for pair in found}) == 1
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=write, args=(shared, "x")),
            threading.Thread(target=write, args=(other, "y")),
            threading.Thread(target=read, args=(shared,)),
            threading.Thread(target=read, args=(other,)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shared.facts(check=True).damage is None
    assert errors == []


def test_a_search_does_not_wait_for_a_write_of_the_same_index(index: Index) -> None:
    index.add(TEXTS)
    with index._session.writing("remove") as written:
        written.remove_documents(index.ids())
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(len(index.search("cat"))))
        thread.start()
        thread.join(timeout=30)
        assert found == [4]


def test_a_file_locked_by_another_program_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.3)
    with open_index(tmp_path / "a.egx") as index:
        other = sqlite3.connect(tmp_path / "a.egx", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for call in (
            lambda: index.add(TEXTS),
            lambda: index.remove(["x"]),
            lambda: index.remember_model_path("x"),
        ):
            with pytest.raises(IndexFileError, match="another program has been writing"):
                call()
        assert list(index.search("cat")) == []  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert len(index.add(TEXTS)) == 4


def test_a_writer_that_waits_says_so_once_and_then_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "egemma")
    with open_index(tmp_path / "a.egx") as index:
        index.add(["before"])
        assert caplog.messages == []
        other = sqlite3.connect(tmp_path / "a.egx", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        adding = threading.Thread(target=index.add, args=(TEXTS,))
        adding.start()
        deadline = time.monotonic() + 9
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(caplog.messages) == 1
        assert "another program is writing" in caplog.messages[0]
        other.execute("ROLLBACK")
        other.close()
        adding.join()
        assert len(index) == 5
    assert len(caplog.messages) == 1


READERS = """
import sys
from tests.sdk.fakes import open_index
with open_index(sys.argv[1], create=False) as index:
    print("ready", flush=True)
    seen = 0
    while seen < 40:
        hits = index.search("batch", k=100, mode=("vector", "text", "hybrid")[seen % 3])
        batches = {}
        for hit in hits:
            batches.setdefault(hit.text.split()[1], []).append(hit.id)
        assert all(len(ids) == 5 for ids in batches.values()), batches
        assert len(hits) >= seen, (len(hits), seen)
        seen = max(seen, len(hits))
print(seen)
"""


def test_reading_processes_see_whole_transactions_of_a_writing_one(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx") as writer:
        readers = [python(READERS, tmp_path / "a.egx") for _ in range(3)]
        for reader in readers:
            assert cast(Any, reader.stdout).readline() == "ready\n"
        for batch in range(8):
            writer.add(
                [f"batch {batch} row {row}" for row in range(5)],
                ids=[f"{batch}-{row}" for row in range(5)],
            )
        assert [reader.communicate(timeout=60) for reader in readers] == [("40\n", "")] * 3


# Programs that die, and disks that fill.

WRITER = """
import sys
from tests.sdk.fakes import open_index
index = open_index(sys.argv[1])
print("ready", flush=True)
for batch in range(10_000):
    index.add([f"batch {batch} row {row} " + "filler " * 30 for row in range(50)], ids=[f"{batch}-{row}" for row in range(50)])
    print(batch, flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("delay_s", [0.0, 0.021, 0.157])
def test_a_writer_killed_at_any_time_loses_nothing_told_and_leaves_no_half_batch(
    tmp_path: Path, delay_s: float, end: signal.Signals
) -> None:
    path = tmp_path / "a.egx"
    writer = python(WRITER, path)
    assert writer.stdout is not None
    lines = [writer.stdout.readline(), writer.stdout.readline()]
    time.sleep(delay_s)
    writer.send_signal(end)
    rest, complaint = writer.stdout.read(), cast(Any, writer.stderr).read()
    writer.wait()
    told = [int(line) for line in (lines + rest.splitlines())[1:] if line.strip()]
    assert writer.returncode == -end or "KeyboardInterrupt" in complaint
    with open_index(path, create=False) as index:
        stored = [tuple(map(int, id_.split("-"))) for id_ in index.ids()]
        batches = {batch for batch, _ in stored}
        assert len(stored) == 50 * len(batches)  # whole batches only
        assert batches >= set(told)  # all that was reported
        assert len(batches) <= len(told) + 1  # at most one committed but not yet reported
        assert index.search("batch 0 row 0", k=3)[0].id.startswith("0-")
        assert index.facts(check=True).damage is None
        index.add(["and it still takes more"], ids=["more"])
        assert len(index) == len(stored) + 1


def test_eight_processes_may_make_the_same_index_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.sdk.fakes import open_index; print('ready', flush=True); "
        "sys.stdin.readline();"
        "open_index(sys.argv[1]).add([sys.argv[2]])"
    )
    makers = [python(code, tmp_path / "a.egx", f"text {number}") for number in range(8)]
    for maker in makers:
        assert cast(Any, maker.stdout).readline() == "ready\n"
    for maker in makers:
        cast(Any, maker.stdin).write("\n")
        cast(Any, maker.stdin).flush()
    complaints = [line for maker in makers for line in maker.communicate()[1].splitlines()]
    assert all("another program is writing to this index" in line for line in complaints)
    assert [maker.returncode for maker in makers] == [0] * 8
    facts = describe_index(tmp_path / "a.egx", check=True)
    assert (facts.documents, facts.damage) == (8, None)


def test_a_full_file_refuses_the_batch_and_keeps_the_rest(index: Index) -> None:
    index.add(TEXTS)
    writer = writer_of(index)
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(IndexFileError, match=r"full.*Nothing of this call was stored"):
        index.add([f"another {number} " + "x" * 500 for number in range(100)])
    assert len(index) == 4
    assert len(index.search("cat")) == 4
    assert index.facts(check=True).damage is None
    writer.execute("PRAGMA max_page_count = 1000000")
    index.add(["there is room again"])
    assert len(index) == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small disk can only be made by root")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
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
        assert index.facts(check=True).damage is None
