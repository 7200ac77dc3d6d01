"""contract/index-format.md is enough: the stranger's reader finds in files of other shapes what `Index`
finds, and the page shows all that a file holds.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from egemma.identity import ModelIdentity
from egemma.index import Index
from egemma.index.file import TABLES
from egemma_core.errors import InputError
from egemma_core.vectors import normalize
from tests.contract import stranger_index

PAGE = (Path(__file__).parents[2] / "contract" / "index-format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("dims", [(48, 32, 16, 8), (7,), (20, 5)])
def test_a_reader_made_from_the_page_finds_the_same(
    tmp_path: Path, dims: tuple[int, ...], floats: bool
) -> None:
    random = np.random.default_rng(3)
    vectors = normalize(random.standard_normal((700, dims[0])).astype(np.float32))
    identity = ModelIdentity(fingerprint="0" * 64, name="a model", dims=dims, parts={})
    with Index.open(tmp_path / "a.db", identity, keep_floats=floats) as index:
        ids = [f"note {number}" for number in range(700)]
        index.add_vectors(
            vectors,
            ids=ids,
            texts=[f"text {number} ü 水" for number in range(700)],
            titles=["A title"] * 350 + [None] * 350,
            metadata=[{"n": number, "ü": None} for number in range(700)],
        )
        index.remove(ids[100:400:3])
        index.add_vectors(vectors[:5], ids=[f"again {number}" for number in range(5)])
        stranger = stranger_index.Index(tmp_path / "a.db", identity.fingerprint)
        stranger.check()
        for query in random.standard_normal((5, dims[0])).astype(np.float32):
            for dim in dims:
                hits = index.search(query, 12, dim=dim, exact=True)
                expected = stranger.search(vector=query, k=12, dim=dim, exact=True)
                assert [(hit.id, hit.position) for hit in hits] == [
                    (id_, at) for id_, at, _ in expected
                ]
                np.testing.assert_allclose(
                    [hit.score for hit in hits], [score for *_, score in expected], atol=1e-6
                )
                assert [hit.text for hit in hits] == [
                    stranger.get(id_)["text"] for id_, *_ in expected
                ]


def test_the_page_shows_the_tables_as_they_are_made() -> None:
    assert stranger_index.page_tables() == list(TABLES.values())


def test_every_fact_is_on_the_page(tmp_path: Path) -> None:
    with Index.open(
        tmp_path / "a.db", ModelIdentity(fingerprint="0" * 64, name="a model", dims=(8,), parts={})
    ) as index:
        index.add_vectors(np.eye(8, dtype=np.float32)[:1], ids=["1"])
    with sqlite3.connect(tmp_path / "a.db") as db:
        for (name,) in db.execute("SELECT name FROM facts"):
            assert f"`{name}`" in PAGE, name


def test_what_the_embedder_said_of_a_vector_is_stored_with_it(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)[:2]
    with Index.open(
        tmp_path / "a.db", ModelIdentity(fingerprint="0" * 64, name="a model", dims=(8,), parts={})
    ) as index:
        index.add_vectors(
            vectors,
            ids=["1", "2"],
            texts=["one", "two"],
            num_tokens=np.array([7, 9]).tolist(),
            truncated=[False, True],
        )
        assert [
            (document.num_tokens, document.truncated) for document in index.get(["1", "2"])
        ] == [(7, False), (9, True)]
        assert index.search(vectors[1], 1)[0].truncated is True
        for bad in ([1], [1, -1], [1, True], [1, 2.5]):
            with pytest.raises(InputError, match="num_tokens"):
                index.add_vectors(vectors, ids=["3", "4"], num_tokens=bad)  # type: ignore[arg-type]
        assert len(index) == 2
