"""The vectors of a bulk run in an index: what is found, and everything that must not get in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="bulk embedding needs the bulk extra")

from egemma import (  # noqa: E402
    ConfigError,
    DimensionError,
    Embedder,
    Index,
    IndexFileError,
    IndexMismatchError,
    InputError,
)
from egemma.identity import ModelIdentity  # noqa: E402
from egemma_server.bulk import LoadReport, embed_parquet, load_parquet  # noqa: E402
from tests.sdk.conftest import ROOT, run_python  # noqa: E402
from tests.server.test_bulk import TOO_LONG, flipped, shards, texts_of, write  # noqa: E402
from tests.tiny import tiny_bundle  # noqa: E402


@pytest.fixture(scope="module")
def embedder(onnx_bundle: Path) -> Any:
    with Embedder.open(onnx_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def run(onnx_bundle: Path, tmp_path: Path) -> Any:
    def embed(source: Path, out: str = "out", **settings: Any) -> Path:
        embed_parquet(
            source,
            tmp_path / out,
            **{"bundle": onnx_bundle, "threads_per_worker": 1, "shard_rows": 64, **settings},
        )
        return tmp_path / out

    return embed


@pytest.fixture
def index(tmp_path: Path, embedder: Embedder) -> Any:
    with Index.open(tmp_path / "index.db", embedder) as opened:
        yield opened


def test_every_row_is_found_as_if_the_index_had_embedded_it(
    run: Any, tmp_path: Path, embedder: Embedder, index: Index
) -> None:
    texts = [f"{text} {number}" for number, text in enumerate(texts_of(200))]
    source = write(
        tmp_path / "in.parquet",
        texts,
        key=pa.array([f"k{row}" for row in range(200)]),
        name=pa.array(["Pumps", None] * 100),
        year=pa.array([2020, None] * 100),
        tags=pa.array([["a", "b"]] * 200),
    )
    seen: list[tuple[int, int]] = []
    folder = run(source, id_column="key", title_column="name", keep=["year", "tags"])
    assert load_parquet(
        index, folder, progress=lambda done, total: seen.append((done, total))
    ) == LoadReport(rows=200, truncated=0, skipped=0)
    assert seen[-1] == (200, 200)
    with Index.open(tmp_path / "other.db", embedder) as other:
        other.add(
            texts,
            ids=[f"k{row}" for row in range(200)],
            titles=["Pumps", None] * 100,
            metadata=[{"year": year, "tags": ["a", "b"]} for year in [2020, None] * 100],
        )
        for query in ("where is the water pump", "password", "Öl"):
            mine, theirs = index.search(query, k=20), other.search(query, k=20)
            assert [(hit.id, hit.text, hit.title, hit.metadata) for hit in mine] == [
                (hit.id, hit.text, hit.title, hit.metadata) for hit in theirs
            ]
            assert (
                np.abs(np.array([hit.score for hit in mine]) - [hit.score for hit in theirs]).max()
                < 1e-5
            )
    assert index.search("water", k=5, where={"year": 2020})[0].title == "Pumps"


def test_loading_again_changes_nothing(run: Any, tmp_path: Path, index: Index) -> None:
    folder = run(write(tmp_path / "in.parquet"))
    for _ in range(2):
        load_parquet(index, folder)
        assert len(index) == 100
    assert index.get(["in.parquet:7"])[0].text == texts_of(100)[7]


def test_an_index_without_an_embedder_is_filled_too(
    run: Any, tmp_path: Path, embedder: Embedder
) -> None:
    with Index.open(tmp_path / "index.db", ModelIdentity.of(embedder.manifest)) as index:
        assert load_parquet(index, run(write(tmp_path / "in.parquet"))).rows == 100
    with Index.open(tmp_path / "index.db", embedder) as index:
        assert len(index.search("water", k=3)) == 3


def test_whole_numbers_are_ids_in_decimal_and_other_ids_are_refused(
    run: Any, tmp_path: Path, index: Index
) -> None:
    source = write(
        tmp_path / "in.parquet",
        10,
        number=pa.array(range(10)),
        share=pa.array([row / 2 for row in range(10)]),
    )
    load_parquet(index, run(source, id_column="number"))
    assert index.get(["9"])[0].text == texts_of(10)[9]
    with pytest.raises(InputError, match="ids are double"):
        load_parquet(index, run(source, "other", id_column="share"))


def test_an_index_of_another_model_is_refused(run: Any, tmp_path: Path, tiny_spm: Path) -> None:
    folder = run(write(tmp_path / "in.parquet"))
    other = tiny_bundle(tmp_path / "other", tokenizer=tiny_spm, changes={"fingerprint": "f" * 64})
    with (
        Embedder.open(other, threads=1) as stranger,
        Index.open(tmp_path / "index.db", stranger) as index,
    ):
        with pytest.raises(IndexMismatchError, match="holds vectors of"):
            load_parquet(index, folder)
        assert len(index) == 0


def test_vectors_of_queries_and_shorter_ones_are_refused(
    run: Any, tmp_path: Path, index: Index
) -> None:
    source = write(tmp_path / "in.parquet", 10)
    with pytest.raises(ConfigError, match="vectors of queries"):
        load_parquet(index, run(source, "queries", role="query"))
    with pytest.raises(DimensionError, match="vectors of 8, an index keeps the full 32"):
        load_parquet(index, run(source, "short", dim=8))
    assert len(index) == 0


def test_an_unfinished_or_damaged_folder_is_refused_whole(
    run: Any, tmp_path: Path, index: Index
) -> None:
    folder = run(write(tmp_path / "in.parquet"))
    path = shards(folder)[1]
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(IndexFileError, match=r"shard-000001\.parquet is missing or damaged"):
        load_parquet(index, folder)
    path.unlink()
    with pytest.raises(IndexFileError, match=r"shard-000001\.parquet is missing or damaged"):
        load_parquet(index, folder)
    with pytest.raises(IndexFileError, match="not the output of a bulk run"):
        load_parquet(index, tmp_path)
    assert len(index) == 0


def test_rows_without_a_vector_are_refused_or_counted(
    run: Any, tmp_path: Path, index: Index
) -> None:
    texts: list[Any] = texts_of(100)
    texts[3], texts[64:99] = TOO_LONG, [None] * 35
    folder = run(write(tmp_path / "in.parquet", texts), on_error="null")
    with pytest.raises(InputError, match="36 of 100 rows have no vector"):
        load_parquet(index, folder)
    assert len(index) == 0
    assert load_parquet(index, folder, skip_errors=True) == LoadReport(
        rows=64, truncated=0, skipped=36
    )
    assert len(index) == 64
    stored = index.get(["in.parquet:4", "in.parquet:99"])
    assert [document.text for document in stored] == [texts[4], texts[99]]


def test_an_id_that_comes_twice_is_refused_wherever_the_rows_are(
    run: Any, tmp_path: Path, index: Index
) -> None:
    source = write(
        tmp_path / "in.parquet", key=pa.array(["same", *(f"k{row}" for row in range(98)), "same"])
    )
    with pytest.raises(InputError, match="id 'same' comes 2 times"):
        load_parquet(index, run(source, id_column="key"))
    assert len(index) == 0


def test_a_row_that_the_index_cannot_store_is_placed(
    run: Any, tmp_path: Path, index: Index
) -> None:
    texts = texts_of(100)
    texts[80] = "two\0parts"
    with pytest.raises(InputError, match=r"shard-000001\.parquet, row 0 and after: .*NUL"):
        load_parquet(index, run(write(tmp_path / "in.parquet", texts)))


def test_vectors_without_texts_are_loaded_without_texts(
    run: Any, tmp_path: Path, index: Index
) -> None:
    load_parquet(index, run(write(tmp_path / "in.parquet"), keep_text=False))
    assert index.search("water", k=1)[0].text == ""


def test_the_page_on_bulk_embedding_says_what_happens(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "bulk.md").read_text(encoding="utf-8")
    snippet = page.split("```python\n")[1].split("```")[0]
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "git"
    assert "2 rows in 1 files, vectors of 256 float32" in done.stdout
