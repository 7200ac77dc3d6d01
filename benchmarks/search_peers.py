"""The contenders of benchmarks/search.py: each opens its prepared files and answers one query with
ids of rows.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DIM, K = 768, 10
DIMS = (768, 512, 256, 128)
Ask = Callable[[int], list[int]]  # number of a query -> ids of the best K rows

PEERS = {
    "numpy float32": "matrix product and argpartition, memory-mapped file",
    "usearch exact float32": "usearch.index.search(exact=True)",
    "usearch exact int8": "the same on int8 codes, one scale per vector",
    "faiss flat": "IndexFlatIP",
    "sqlite-vec float32": "vec0 virtual table, float[768]",
    "sqlite-vec int8": "vec0 virtual table, int8[768]",
    "usearch HNSW int8": "768 channels, connectivity 16, expansion 128/256",
    "usearch HNSW float16": "768 channels, connectivity 16, expansion 128/256",
    "faiss HNSW": "IndexHNSWFlat, M 16, efConstruction 80, efSearch 256",
}
# hours to build for 1,000,000 x 768 on 2 cores
BIG_GRAPHS = ("usearch HNSW int8", "usearch HNSW float16", "faiss HNSW")


@dataclass(frozen=True)
class Place:
    """Where the vectors are, and where everything that was prepared is kept."""

    vectors: Path
    work: Path
    threads: int

    def passages(self, size: int) -> Any:
        """(size, 768) float32, memory-mapped."""
        return np.memmap(self.vectors / "passages.f32", "<f4", mode="r").reshape(-1, DIM)[:size]

    def queries(self) -> Any:
        return np.load(self.vectors / "queries.npy")

    def texts(self, file: str, size: int) -> Iterator[str]:
        with (self.vectors / file).open(encoding="utf-8") as lines:
            for _, line in zip(range(size), lines, strict=False):
                yield json.loads(line)

    def file(self, name: str, size: int) -> Path:
        ends = {"usearch exact int8": "i8", "faiss flat": "faiss"}
        if name in ("numpy float32", "usearch exact float32"):
            return self.vectors / "passages.f32"
        return self.work / f"{name.replace(' ', '-')}-{size}.{ends.get(name, 'db')}"

    def index(self, size: int, width: int) -> Path:
        return self.work / f"egemma-{size}-{width}.egx"


def int8(rows: Any) -> Any:
    """One scale per vector, as a user of these libraries would round."""
    return np.rint(rows * (127 / np.abs(rows).max(axis=1, keepdims=True))).astype(np.int8)


def parts(place: Place, size: int, rows: int = 10_000) -> Iterator[tuple[int, Any]]:
    passages = place.passages(size)
    for start in range(0, size, rows):
        yield start, np.array(passages[start : start + rows])


def prepare_peer(name: str, size: int, place: Place, say: Callable[[str], None]) -> None:
    """Build what the peer searches in, unless it is there; under another name until it is whole."""
    path = place.file(name, size)
    if path.exists():
        return
    made = path.with_name(path.name + ".tmp")
    made.unlink(missing_ok=True)
    started = time.perf_counter()
    say(f"building {path.name}")
    if path.suffix == ".i8":
        with made.open("wb") as file:
            for _, rows in parts(place, size):
                file.write(int8(rows).tobytes())
    elif name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(place.threads)
        index = (
            faiss.IndexFlatIP(DIM)
            if name == "faiss flat"
            else faiss.IndexHNSWFlat(DIM, 16, faiss.METRIC_INNER_PRODUCT)
        )
        if name == "faiss HNSW":
            index.hnsw.efConstruction = 80
        for _, rows in parts(place, size):
            index.add(rows)
        faiss.write_index(index, str(made))
    elif name.startswith("usearch HNSW"):
        from usearch.index import Index

        index = Index(
            ndim=DIM,
            metric="cos",
            dtype="i8" if name.endswith("int8") else "f16",
            connectivity=16,
            expansion_add=128,
        )
        for start, rows in parts(place, size):
            index.add(
                np.arange(start, start + len(rows)),
                int8(rows) if name.endswith("int8") else rows.astype(np.float16),
                threads=place.threads,
            )
        index.save(str(made))
    else:
        connection = sqlite_vec(made)
        kind = "int8" if name.endswith("int8") else "float"
        connection.execute(
            f"CREATE VIRTUAL TABLE v USING vec0(e {kind}[{DIM}] distance_metric=cosine)"
        )
        for start, rows in parts(place, size):
            with connection:
                packed: Iterable[Any] = (
                    row.tobytes() for row in (int8(rows) if kind == "int8" else rows)
                )
                connection.executemany(
                    "INSERT INTO v(rowid, e) VALUES (?, "
                    f"{'vec_int8(?)' if kind == 'int8' else '?'})",
                    enumerate(packed, start=start),
                )
        connection.close()
    made.rename(path)
    (place.work / "built.jsonl").open("a").write(
        json.dumps({"name": name, "size": size, "s": round(time.perf_counter() - started, 1)})
        + "\n"
    )


def sqlite_vec(path: Path) -> Any:
    """A connection of apsw: the sqlite3 module of many Pythons cannot load extensions."""
    import apsw
    import sqlite_vec as extension

    connection = apsw.Connection(str(path))
    connection.enable_load_extension(True)
    connection.load_extension(extension.loadable_path())
    return connection


def load_library(name: str) -> None:
    """What is imported before the clock starts."""
    modules = {
        "egemma": ["egemma.index", "numkong"],
        "usearch": ["usearch.index"],
        "faiss": ["faiss"],
        "sqlite-vec": ["apsw", "sqlite_vec"],
    }
    for module in modules.get(name.split(maxsplit=1)[0], []):
        importlib.import_module(module)


def open_peer(name: str, size: int, place: Place) -> Ask:
    path = place.file(name, size)
    queries = place.queries()
    if name == "numpy float32":
        rows = place.passages(size)

        def ask(number: int) -> list[int]:
            scores = rows @ queries[number]
            best = np.argpartition(-scores, K)[:K]
            return [int(row) for row in best[np.argsort(-scores[best])]]
    elif name.startswith("usearch exact"):
        from usearch.index import MetricKind, search

        stored = (
            np.memmap(path, np.int8, mode="r").reshape(-1, DIM)
            if name.endswith("int8")
            else place.passages(size)
        )
        asked = int8(queries) if name.endswith("int8") else queries

        def ask(number: int) -> list[int]:
            return [
                int(key)
                for key in search(
                    stored, asked[number], K, MetricKind.Cos, exact=True, threads=place.threads
                ).keys
            ]
    elif name.startswith("usearch HNSW"):
        from usearch.index import Index

        index = Index.restore(str(path))
        index.expansion_search = 256
        coded = int8(queries) if name.endswith("int8") else queries.astype(np.float16)

        def ask(number: int) -> list[int]:
            return [int(key) for key in index.search(coded[number], K).keys]
    elif name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(place.threads)
        found = faiss.read_index(str(path))
        if name == "faiss HNSW":
            found.hnsw.efSearch = 256

        def ask(number: int) -> list[int]:
            return [int(row) for row in found.search(queries[number][None], K)[1][0]]
    else:
        connection = sqlite_vec(path)
        kind_of_query = "vec_int8(?)" if name.endswith("int8") else "?"
        blobs = int8(queries) if name.endswith("int8") else queries

        def ask(number: int) -> list[int]:
            rows = connection.execute(
                f"SELECT rowid FROM v WHERE e MATCH {kind_of_query} AND k = {K} ORDER BY distance",
                (blobs[number].tobytes(),),
            )
            return [row[0] for row in rows]

    return ask


def open_ours(
    size: int, width: int, place: Place
) -> tuple[
    Callable[[int, dict[str, Any]], list[int]], Callable[[int, dict[str, Any]], list[list[int]]]
]:
    """A function for one query, and one for the first so many at once."""
    from egemma.index import Index

    index = Index.open(place.index(size, width), threads=place.threads)
    queries = place.queries()

    def ask(number: int, options: dict[str, Any]) -> list[int]:
        return [int(hit.id) for hit in index.search(queries[number], K, **options)]

    def ask_many(count: int, options: dict[str, Any]) -> list[list[int]]:
        return [
            [int(hit.id) for hit in hits] for hits in index.search(queries[:count], K, **options)
        ]

    return ask, ask_many


def prepare_ours(size: int, width: int, place: Place, say: Callable[[str], None]) -> None:
    """An index with texts and metadata, of one scan width, unless it is there."""
    from egemma import Embedder
    from egemma.identity import ModelIdentity
    from egemma.index import Index

    path = place.index(size, width)
    if path.exists():
        try:
            with Index.open(path) as index:
                if len(index) == size:
                    return
        # of a format that changed since: anything, and then it is made anew
        except Exception as error:
            say(f"{path.name}: {error}")
    for left in path.parent.glob(path.name + "*"):
        left.unlink()
    made = path.with_name("making.egx")
    for left in path.parent.glob("making.egx*"):
        left.unlink()
    say(f"building {path.name}")
    started = time.perf_counter()
    with Embedder.open(place.vectors / "bundle") as embedder:
        identity = ModelIdentity.of(embedder.manifest)
    with Index.open(made, identity, threads=place.threads) as index:
        texts = place.texts("passages.txt", size)
        for start, rows in parts(place, size, 2000):
            numbers = range(start, start + len(rows))
            index.add_vectors(
                rows,
                ids=[str(number) for number in numbers],
                texts=[next(texts) for _ in numbers],
                metadata=[{"hundredth": number % 100, "half": number % 2} for number in numbers],
            )
        if width != DIMS[-1]:
            from egemma.index.upkeep.rewrite import rewrite_heads

            with index._session.writing(
                "rewrite"
            ) as change:  # as `tune` does, whatever it would choose
                rewrite_heads(change, width)
    made.rename(path)
    (place.work / "built.jsonl").open("a").write(
        json.dumps({"name": path.name, "size": size, "s": round(time.perf_counter() - started, 1)})
        + "\n"
    )


def truth_of(size: int, count: int, place: Place) -> Any:
    """(count, K) the true best rows by float32 at full width; kept."""
    path = place.work / f"truth-{size}-{count}.npy"
    if not path.exists():
        queries = place.queries()[:count]
        best, numbers = np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)
        for start, rows in parts(place, size, 50_000):
            found = queries @ rows.T
            best = np.concatenate([best, found], axis=1)
            numbers = np.concatenate(
                [numbers, np.broadcast_to(np.arange(start, start + len(rows)), found.shape)], axis=1
            )
            order = np.argsort(-best, axis=1, kind="stable")[:, :K]
            best, numbers = (
                np.take_along_axis(best, order, axis=1),
                np.take_along_axis(numbers, order, axis=1),
            )
        np.save(path, numbers)
    return np.load(path)
