"""Any order of calls on an index, compared after each with a dictionary, NumPy and `in`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from egemma import upkeep
from egemma.chunks import Chunk, ChunkedDocument
from egemma.index import Index
from egemma.index.migration import abandon
from egemma.where import matches, parse
from egemma_core.errors import DimensionError, IndexFileError, IndexMismatchError, InputError
from tests.sdk.fakes import WordEmbedder

# Any: they keep the contract of `Embedder` without being one.
MODELS: dict[str, Any] = {
    name: WordEmbedder(name, dims=dims)
    for name, dims in (("words-1", (32, 16, 8)), ("words-2", (32, 16, 8)), ("words-3", (24, 12)))
}
WORDS = [f"w{number}" for number in range(12)]
# of a cosine, by whether floats are kept: 8 bits of 32 channels are coarse
TOLERANCE = {True: 1e-6, False: 0.04}

ids = st.sampled_from([f"d{number}" for number in range(14)])
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
titles = st.sampled_from([None, "w1", "Title w2"])
metadata = st.none() | st.fixed_dictionaries(
    {"n": st.integers(0, 3)}, optional={"tags": st.lists(st.sampled_from("ab"), max_size=2)}
)
wheres = st.sampled_from(
    [
        None,
        {"n": 1},
        {"n": {"$lt": 2}},
        {"tags": {"$contains": "a"}},
        {"$not": {"n": {"$gte": 1}}},
        {"$or": [{"n": 3}, {"tags": {"$exists": True}}]},
        {"missing": {"$exists": False}},
    ]
)


@dataclass(frozen=True)
class Doc:
    title: str | None
    metadata: Mapping[str, Any] | None
    chunks: tuple[Chunk, ...]


def whole(text: str, title: str | None, meta: Mapping[str, Any] | None) -> Doc:
    return Doc(title, meta, (Chunk(start=0, stop=len(text), title=title, text=text),))


class IndexMachine(RuleBasedStateMachine):
    copies = Bundle("copies")  # (file, model, floats, documents) of backups

    @initialize(model=st.sampled_from(sorted(MODELS)), floats=st.booleans())
    def make(self, model: str, floats: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model, self.floats, self.count = model, floats, 0
        self.docs: dict[str, Doc] = {}
        self.half_way: str | None = None
        self.index = Index.open(self.folder / "a.egx", cast(Any, MODELS[model]), keep_floats=floats)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.folder)

    @rule(
        documents=st.lists(
            st.tuples(ids, texts, titles, metadata),
            min_size=1,
            max_size=6,
            unique_by=lambda entry: entry[0],
        )
    )
    def add(self, documents: list[tuple[str, str, str | None, Any]]) -> None:
        self.index.add(
            [text for _, text, _, _ in documents],
            ids=[id_ for id_, _, _, _ in documents],
            titles=[title for _, _, title, _ in documents],
            metadata=[meta for *_, meta in documents],
        )
        self.docs.update({id_: whole(text, title, meta) for id_, text, title, meta in documents})

    @rule(
        id_=ids,
        parts=st.lists(texts, min_size=1, max_size=4),
        overlap=st.integers(0, 2),
        title=titles,
        meta=metadata,
    )
    def put(self, id_: str, parts: list[str], overlap: int, title: str | None, meta: Any) -> None:
        text, stops = " ".join(parts), np.cumsum([len(part) + 1 for part in parts]).tolist()
        stops[-1] = len(text)
        chunks = tuple(
            Chunk(
                start=max(0, start - overlap),
                stop=stop,
                title=title,
                text=text[max(0, start - overlap) : stop],
            )
            for start, stop in zip([0, *stops], stops, strict=False)
        )
        report = self.index.put(
            [ChunkedDocument(id=id_, title=title, metadata=meta, source=None, chunks=chunks)]
        )
        assert report.chunks == len(chunks)
        self.docs[id_] = Doc(title, meta, chunks)

    @rule(
        documents=st.lists(
            st.tuples(ids, texts, metadata),
            min_size=1,
            max_size=5,
            unique_by=lambda entry: entry[0],
        )
    )
    def add_vectors(self, documents: list[tuple[str, str, Any]]) -> None:
        vectors = MODELS[self.model].embed_documents([text for _, text, _ in documents]).vectors
        self.index.add_vectors(
            vectors,
            ids=[id_ for id_, _, _ in documents],
            texts=[text for _, text, _ in documents],
            metadata=[meta for *_, meta in documents],
        )
        self.docs.update({id_: whole(text, None, meta) for id_, text, meta in documents})

    @rule(gone=st.lists(ids, max_size=8, unique=True))
    def remove(self, gone: list[str]) -> None:
        assert self.index.remove(gone) == len(self.docs.keys() & set(gone))
        for id_ in gone:
            self.docs.pop(id_, None)

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = Index.open(self.folder / "a.egx", cast(Any, MODELS[self.model]))

    @rule()
    def compact(self) -> None:
        if self.half_way is None:
            assert upkeep.compact(self.index.path).chunks == sum(
                len(doc.chunks) for doc in self.docs.values()
            )
        else:
            with pytest.raises(IndexFileError, match="half way"):
                upkeep.compact(self.index.path)

    @rule(target=copies)
    def backup(self) -> Any:
        self.count += 1
        copy = self.folder / f"copy{self.count}.egx"
        upkeep.backup(self.index.path, copy)
        return copy, self.model, self.floats, dict(self.docs), self.half_way

    @rule(copy=copies)
    def restore(self, copy: Any) -> None:
        path, self.model, self.floats, documents, self.half_way = copy
        self.docs = dict(documents)
        self.index.close()
        shutil.copy(path, self.folder / "a.egx")
        self.index = Index.open(self.folder / "a.egx", cast(Any, MODELS[self.model]))

    @rule(target=copies)
    def export_and_import(self) -> Any:
        self.count += 1
        copy = self.folder / f"copy{self.count}.egx"
        upkeep.export_jsonl(self.index.path, self.folder / "a.jsonl", force=True)
        with Index.open(copy, cast(Any, MODELS[self.model])) as imported:
            report = imported.import_jsonl(self.folder / "a.jsonl")
            assert (report.documents, report.embedded) == (len(self.docs), 0)
        floats = self.floats if self.docs else False  # nothing came in that could say so
        return copy, self.model, floats, dict(self.docs), None

    @rule(source=copies)
    def import_over(self, source: Any) -> None:
        path, model, _, documents, _ = source
        with Index.open(path, cast(Any, MODELS[model])) as other:
            upkeep.export_jsonl(other.path, self.folder / "b.jsonl", force=True)
        if model != self.model:
            with pytest.raises(IndexMismatchError):
                self.index.import_jsonl(self.folder / "b.jsonl")
        if documents:
            self.index.import_jsonl(self.folder / "b.jsonl", reembed=True)
        self.docs.update(documents)

    @rule(
        target=copies, to=st.sampled_from(sorted(MODELS)), stop_after=st.none() | st.integers(0, 2)
    )
    def migrate(self, to: str, stop_after: int | None) -> Any:
        class Stopping(WordEmbedder):
            def embed_documents(self, *args: Any, **settings: Any) -> Any:
                if self.calls == stop_after:
                    raise KeyboardInterrupt
                return super().embed_documents(*args, **settings)

        model = Stopping(to, dims=MODELS[to].dims)
        if self.half_way not in (None, to):
            with pytest.raises(IndexFileError, match="half way"):
                self.index.migrate(cast(Any, model))
            return multiple()
        try:
            self.index.migrate(cast(Any, model), batch=4)
            self.model, self.half_way = to, None
            self.index.close()
            self.index = Index.open(self.folder / "a.egx", cast(Any, MODELS[to]))
        except KeyboardInterrupt:
            self.half_way = to
        return multiple()

    @precondition(lambda self: self.half_way is not None)
    @rule()
    def abandon(self) -> None:
        assert abandon(self.folder / "a.egx")
        self.half_way = None

    @rule(
        query=texts,
        k=st.sampled_from([1, 3, 100]),
        data=st.data(),
        where=wheres,
        exact=st.booleans(),
    )
    def search(self, query: str, k: int, data: st.DataObject, where: Any, exact: bool) -> None:
        model = MODELS[self.model]
        dim = data.draw(st.sampled_from([None, *model.dims]))
        width = dim or model.dim
        scores: dict[tuple[str, int], float] = {}
        asked = model.vector(query)[:width]
        for id_, doc in self.allowed(where).items():
            for position, chunk in enumerate(doc.chunks):
                vector = model.vector(chunk.text, chunk.title or "")[:width]
                scores[id_, position] = float(
                    asked @ vector / np.linalg.norm(asked) / np.linalg.norm(vector)
                )
        hits = self.index.search(query, k, dim=dim, where=where, exact=exact)
        # At most 56 chunks are stored, and a shortlist has 200, so that the first pass leaves none
        # out.
        best = sorted(scores.values(), reverse=True)[:k]
        tolerance = TOLERANCE[self.floats]
        assert len(hits) == len(best)
        assert len({(hit.id, hit.position) for hit in hits}) == len(hits)
        for hit, wanted in zip(hits, best, strict=True):
            assert hit.score == pytest.approx(scores[hit.id, hit.position], abs=tolerance)
            assert hit.score == pytest.approx(wanted, abs=tolerance)
            self.check_hit(hit)
        with pytest.raises(DimensionError):
            self.index.search(query, k, dim=7)

    @rule(words=st.lists(st.sampled_from([*WORDS, "title"]), min_size=1, max_size=3), where=wheres)
    def search_words(self, words: list[str], where: Any) -> None:
        wanted = {
            (id_, position)
            for id_, doc in self.allowed(where).items()
            for position, chunk in enumerate(doc.chunks)
            if set(words) & set(f"{chunk.title or ''} {chunk.text}".lower().split())
        }
        hits = self.index.search(" ".join(words), 1000, mode="text", where=where)
        assert {(hit.id, hit.position) for hit in hits} == wanted
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        hybrid = self.index.search(" ".join(words), 1000, mode="hybrid", where=where)
        assert {(hit.id, hit.position) for hit in hybrid} == {
            (id_, position)
            for id_, doc in self.allowed(where).items()
            for position in range(len(doc.chunks))
        }
        for hit in hybrid:
            self.check_hit(hit)

    def check_hit(self, hit: Any) -> None:
        doc = self.docs[hit.id]
        assert (hit.text, hit.start, hit.stop, hit.title) == (
            doc.chunks[hit.position].text,
            doc.chunks[hit.position].start,
            doc.chunks[hit.position].stop,
            doc.chunks[hit.position].title,
        )
        assert hit.metadata == doc.metadata

    def allowed(self, where: Any) -> dict[str, Doc]:
        return {
            id_: doc
            for id_, doc in self.docs.items()
            if where is None or matches(parse(where), doc.metadata)
        }

    @invariant()
    def holds_what_the_dictionary_holds(self) -> None:
        if not hasattr(self, "index"):
            return
        assert len(self.index) == len(self.docs)
        assert set(self.index.ids()) == self.docs.keys()
        for document in self.index.get(sorted(self.docs)):
            doc = self.docs[document.id]
            assert (document.title, document.metadata, document.num_chunks) == (
                doc.title,
                doc.metadata,
                len(doc.chunks),
            )
            assert document.text == "".join(
                chunk.text[max(0, done - chunk.start) :]
                for done, chunk in zip(
                    [0, *(chunk.stop for chunk in doc.chunks)], doc.chunks, strict=False
                )
            )
        with pytest.raises(InputError):
            self.index.get(["never"])
        assert self.index.facts().chunks == sum(len(doc.chunks) for doc in self.docs.values())
        assert upkeep.check(self.index.path) == []


TestIndexModel = IndexMachine.TestCase
TestIndexModel.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
