"""The graph finds nearly what a scan finds, knows what it does not cover, and is refused wherever
it may be wrong. USearch itself is the oracle.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index import Index
from egemma.index.graph import MAGIC, graph_path, read_notes
from egemma_core.errors import ConfigError, IndexFileError, RuntimeUnavailableError

usearch_index = pytest.importorskip("usearch.index")

ROWS, D = 3000, 32
IDENTITY = ModelIdentity(fingerprint="a" * 64, name="test", dims=(32, 16), parts={})


def unit_rows(count: int, seed: int = 0, groups: int = 50) -> NDArray[np.float32]:
    """Clustered, as texts are; group `row % groups`."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, D))[np.arange(count) % groups] + 0.7 * rng.normal(
        size=(count, D)
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def add(index: Index, vectors: NDArray[np.float32], first: int = 0) -> None:
    index.add_vectors(
        vectors,
        ids=[str(first + row) for row in range(len(vectors))],
        texts=[f"text {first + row}" for row in range(len(vectors))],
        metadata=[
            {"group": (first + row) % 50, "half": (first + row) % 2} for row in range(len(vectors))
        ],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index and its graph, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    with Index.open(folder / "a.egx", IDENTITY, threads=1) as index:
        add(index, unit_rows(ROWS))
        index.build_graph(connectivity=8, expansion_add=64)
    return folder


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "a.egx"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with Index.open(path, IDENTITY, threads=1) as opened:
        yield opened


def ids(hits: Any) -> list[str]:
    return [hit.id for hit in hits]


def test_the_graph_finds_nearly_what_the_scan_finds_and_how_says_so(index: Index) -> None:
    queries = unit_rows(100, seed=9)
    exact = index.search_vectors(queries, 10, shortlist=20)
    found = index.search_vectors(queries, 10, shortlist=20, approximate=True)
    assert (
        np.mean([len({*ids(a)} & {*ids(b)}) / 10 for a, b in zip(exact, found, strict=True)]) > 0.97
    )
    assert found[0][0] == exact[0][0]  # the score is that of the stored vector, so it is the same
    how = found[0].how
    assert (how.approximate, how.scanned, how.vectors, how.shortlist) == (True, 0, ROWS, 20)
    assert how.kernel is not None
    assert how.kernel.startswith("usearch")
    assert [
        ids(index.search_vector(query, 10, shortlist=20, approximate=True)) for query in queries[:5]
    ] == [ids(hits) for hits in found[:5]]


def test_a_small_index_or_a_long_shortlist_is_scanned_because_that_is_less_work(
    index: Index,
) -> None:
    hits = index.search_vector(unit_rows(1, seed=9)[0], 10, shortlist=1000, approximate=True)
    assert (hits.how.approximate, hits.how.scanned) == (False, ROWS)
    assert hits.hits == index.search_vector(unit_rows(1, seed=9)[0], 10, shortlist=1000).hits


def test_the_file_is_as_described_and_usearch_opens_it_by_its_path(path: Path) -> None:
    data = graph_path(path).read_bytes()
    crc, length, version, magic = struct.unpack("<III8s", data[-20:])
    notes = json.loads(data[-20 - length : -20])
    assert (
        version,
        magic,
        notes["vectors"],
        notes["next_number"],
        notes["width"],
        notes["connectivity"],
    ) == (1, b"EGXGRAPH", ROWS, ROWS, 16, 8)
    payload = data[: notes["payload_bytes"]]
    sums = data[notes["payload_bytes"] : -20 - length]
    assert struct.unpack(f"<{len(sums) // 4}I", sums) == tuple(
        zlib.crc32(payload[start : start + 2**20]) for start in range(0, len(payload), 2**20)
    )
    assert crc == zlib.crc32(sums + data[-20 - length : -20] + struct.pack("<II", length, 1))
    by_path = usearch_index.Index.restore(str(graph_path(path)))
    assert (len(by_path), by_path.ndim) == (ROWS, 16)
    head = unit_rows(ROWS)[77, :16]
    matches = by_path.search(np.rint(head * 127 / np.abs(head).max()).astype(np.int8), 1)
    assert matches.keys.tolist() == [77]
    assert matches.distances[0] < 1e-6  # so what is in the graph are the heads of the index


def test_what_was_added_since_is_found_and_what_was_removed_never_comes_back(index: Index) -> None:
    query = unit_rows(1, seed=9)[0]
    before = index.search_vector(query, 10, shortlist=20, approximate=True)
    new = np.concatenate([query[None], unit_rows(4, seed=4)])
    add(index, new, first=ROWS)
    index.remove(ids(before))
    after = index.search_vector(query, 10, shortlist=20, approximate=True)
    assert after[0].id == str(ROWS)
    assert (after.how.approximate, after.how.scanned, after.how.vectors) == (True, 5, ROWS + 5 - 10)
    facts = index.facts().graph
    assert facts is not None
    assert (facts.vectors, facts.added, facts.removed, facts.problem) == (ROWS, 5, 10, None)
    assert facts.file_bytes == graph_path(index.path).stat().st_size
    assert len(after) == 10
    assert not {*ids(after)} & {*ids(before)}
    assert len({*ids(after)} & {*ids(index.search_vector(query, 10, shortlist=20))}) >= 8


def test_a_search_goes_further_where_everything_near_was_removed(index: Index) -> None:
    query = unit_rows(ROWS)[0]  # of group 0, of which 60 were added
    index.remove([str(row) for row in range(0, ROWS, 50)])
    found = index.search_vector(query, 10, shortlist=10, approximate=True)
    assert ids(found) == ids(index.search_vector(query, 10, shortlist=10))


def test_a_filter_is_applied_before_the_search_whatever_it_leaves(index: Index) -> None:
    for query in unit_rows(20, seed=9):
        for where in ({"half": 1}, {"group": 7}, {"group": {"$gte": 10}}, {"group": 99}):
            found = index.search_vector(query, 10, where=where, shortlist=20, approximate=True)
            wanted = index.search_vector(query, 10, where=where, shortlist=20)
            assert len(found) == len(wanted)
            assert len({*ids(found)} & {*ids(wanted)}) >= 0.8 * len(wanted)
            assert found.how.vectors == wanted.how.vectors
            if where == {"group": 7}:  # 60 of 3,000: all of them are compared
                assert (ids(found), found.how.approximate, found.how.scanned) == (
                    ids(wanted),
                    False,
                    60,
                )


def test_a_filter_that_nothing_near_the_query_passes_still_gets_its_k_hits(index: Index) -> None:
    query = unit_rows(ROWS)[0]
    near = index.search_vector(query, 60, shortlist=200)
    # replaced, and so scanned
    index.add_vectors(
        unit_rows(ROWS)[[int(hit.id) for hit in near]],
        ids=ids(near),
        metadata=[{"near": True}] * 60,
    )
    index.build_graph(connectivity=8, expansion_add=64)
    found = index.search_vector(
        query, 10, where={"near": {"$ne": True}}, shortlist=10, approximate=True
    )
    assert len(found) == 10
    assert ids(found) == ids(
        index.search_vector(query, 10, where={"near": {"$ne": True}}, shortlist=10)
    )


def test_without_a_graph_an_approximate_search_says_how_to_make_one(tmp_path: Path) -> None:
    with Index.open(tmp_path / "b.egx", IDENTITY) as index:
        add(index, unit_rows(10))
        assert index.facts().graph is None
        with pytest.raises(
            IndexFileError, match=r"b\.egx\.graph: no such file.*egemma index graph"
        ):
            index.search_vector(unit_rows(1)[0], approximate=True)
        with pytest.raises(ConfigError, match="exact=True"):
            index.search_vector(unit_rows(1)[0], approximate=True, exact=True)


def test_without_usearch_it_is_named(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    for call in (lambda: index.search_vector(unit_rows(1)[0], approximate=True), index.build_graph):
        with pytest.raises(RuntimeUnavailableError, match=r"egemma\[search\]"):
            call()


def test_every_flipped_bit_and_every_cut_is_found_before_usearch_sees_it(path: Path) -> None:
    whole = graph_path(path).read_bytes()
    query = unit_rows(1, seed=9)[0]
    rng = np.random.default_rng(0)
    length = struct.unpack("<I", whole[-16:-12])[0]
    places = [
        *rng.integers(0, len(whole), 40).tolist(),
        *range(64),
        *range(len(whole) - 40 - length, len(whole)),
    ]
    damaged = [
        whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :]
        for at in places
    ]
    damaged += [whole[: int(at)] for at in rng.integers(0, len(whole), 20)] + [
        b"",
        MAGIC,
        whole + b"x",
        whole[1:],
        whole + whole,
    ]
    with Index.open(path, IDENTITY, threads=1) as index:
        for data in damaged:
            graph_path(path).unlink()
            graph_path(path).write_bytes(data)
            with pytest.raises(IndexFileError, match=r"a\.egx\.graph.*egemma index graph"):
                index.search_vector(query, approximate=True)
        assert len(index.search_vector(query)) == 10
        facts = index.facts().graph
        assert facts is not None
        assert facts.problem is not None
        graph_path(path).unlink()
        graph_path(path).write_bytes(whole)
        assert index.search_vector(query, shortlist=20, approximate=True).how.approximate


def test_notes_that_were_made_up_are_refused(path: Path) -> None:
    whole = graph_path(path).read_bytes()
    notes = json.loads(whole[-20 - struct.unpack("<I", whole[-16:-12])[0] : -20])
    body = whole[: notes["payload_bytes"] + 4 * -(-notes["payload_bytes"] // 2**20)]
    for change in (
        {"vectors": ROWS - 1},
        {"width": 32},
        {"next_number": -1},
        {"generation": 1.5},
        {"connectivity": True},
        {"usearch": None},
        {"more": 1},
        {"payload_bytes": 2**40},
        {"next_number": 10**9},
    ):
        packed = json.dumps(notes | change).encode()
        end = body[notes["payload_bytes"] :] + packed
        tail = struct.pack(
            "<III8s", zlib.crc32(end + struct.pack("<II", len(packed), 1)), len(packed), 1, MAGIC
        )
        graph_path(path).write_bytes(body + packed + tail)
        with (
            Index.open(path, IDENTITY) as index,
            pytest.raises(IndexFileError, match="egemma index graph"),
        ):
            index.search_vector(unit_rows(1)[0], shortlist=20, approximate=True)


def test_a_graph_of_other_vectors_is_refused_and_not_built_on(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Index.open(tmp_path / "other.egx", IDENTITY, threads=1) as other:
        add(other, unit_rows(ROWS, seed=5))
        shutil.copy(graph_path(path), graph_path(other.path))
        with pytest.raises(IndexFileError, match="other vectors"):
            other.search_vector(unit_rows(1)[0], shortlist=20, approximate=True)
        add(other, unit_rows(1, seed=6), first=ROWS)
        with caplog.at_level(logging.WARNING):
            assert other.build_graph(connectivity=8, expansion_add=64).vectors == ROWS + 1
        assert "anew" in caplog.text
        assert other.search_vector(unit_rows(1)[0], shortlist=20, approximate=True).how.approximate


def test_a_graph_from_before_chunks_were_numbered_anew_or_from_after_a_backup_is_refused(
    path: Path, tmp_path: Path
) -> None:
    query = unit_rows(1)[0]
    with Index.open(path, IDENTITY, threads=1) as index:
        index.backup(tmp_path / "backup.egx")
        add(index, unit_rows(10, seed=2), first=ROWS)
        index.build_graph(connectivity=8, expansion_add=64)
        shutil.copy(graph_path(path), graph_path(tmp_path / "backup.egx"))
        index.remove([str(row) for row in range(5)])
        assert not index.compact().renumbered  # but the heads of the five are wiped
        assert index.search_vector(query, shortlist=20, approximate=True).how.approximate
        index.remove([str(row) for row in range(600)])
        assert index.compact().renumbered
        with pytest.raises(IndexFileError, match="numbered"):
            index.search_vector(query, shortlist=20, approximate=True)
        assert index.build_graph(connectivity=8, expansion_add=64).vectors == ROWS + 10 - 600
        assert index.search_vector(query, shortlist=20, approximate=True).how.approximate
    with (
        Index.open(tmp_path / "backup.egx", IDENTITY) as restored,
        pytest.raises(IndexFileError, match="later state"),
    ):
        restored.search_vector(query, shortlist=20, approximate=True)


def test_a_graph_over_another_width_or_of_another_model_is_refused(
    path: Path, tmp_path: Path
) -> None:
    for name, identity in (
        ("model.egx", ModelIdentity(fingerprint="b" * 64, name="b", dims=(32, 16), parts={})),
        ("width.egx", ModelIdentity(fingerprint="a" * 64, name="a", dims=(32, 8), parts={})),
    ):
        with Index.open(tmp_path / name, identity, threads=1) as index:
            add(index, unit_rows(ROWS))
            shutil.copy(graph_path(path), graph_path(index.path))
            with pytest.raises(
                IndexFileError, match="another model" if name == "model.egx" else "16 channels"
            ):
                index.search_vector(unit_rows(1)[0], shortlist=20, approximate=True)


def test_building_again_adds_what_is_new_and_begins_anew_where_much_was_removed(
    index: Index,
) -> None:
    calls: list[tuple[int, int]] = []
    add(index, unit_rows(20, seed=2), first=ROWS)
    notes = index.build_graph(
        connectivity=8, expansion_add=64, progress=lambda done, total: calls.append((done, total))
    )
    assert (calls[-1], notes.vectors, notes.next_number) == ((20, 20), ROWS + 20, ROWS + 20)
    index.remove([str(row) for row in range(100)])
    # the dead are passed over
    assert index.build_graph(connectivity=8, expansion_add=64).vectors == ROWS + 20
    index.remove([str(row) for row in range(100, 700)])
    assert index.build_graph(connectivity=8, expansion_add=64).vectors == ROWS + 20 - 700
    assert index.build_graph(connectivity=4, expansion_add=64).connectivity == 4
    query = unit_rows(1, seed=9)[0]
    assert (
        len(
            {*ids(index.search_vector(query, 10, shortlist=30, approximate=True))}
            & {*ids(index.search_vector(query, 10, shortlist=30))}
        )
        >= 8
    )


def test_an_open_index_takes_up_a_graph_that_another_process_built(path: Path) -> None:
    with (
        Index.open(path, IDENTITY, threads=1) as one,
        Index.open(path, IDENTITY, threads=1) as other,
    ):
        add(one, unit_rows(20, seed=2), first=ROWS)
        assert one.search_vector(unit_rows(1)[0], shortlist=20, approximate=True).how.scanned == 20
        other.build_graph(connectivity=8, expansion_add=64)
        assert one.search_vector(unit_rows(1)[0], shortlist=20, approximate=True).how.scanned == 0


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["building", "before the file is in place"])
def test_a_killed_build_leaves_the_old_graph_and_the_next_one_cleans_up(
    path: Path, moment: str
) -> None:
    kill = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    script = (
        "import os, signal, sys\nfrom egemma.index import Index\n"
        + ("" if moment == "building" else f"os.replace = {kill}\n")
        + "Index.open(sys.argv[1]).build_graph(connectivity=4, "
        f"progress={kill if moment == 'building' else None})"
    )
    before = graph_path(path).read_bytes()
    killed = subprocess.run(
        [sys.executable, "-c", script, path],
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -9
    assert graph_path(path).read_bytes() == before
    assert len(list(path.parent.glob("*.tmp"))) == (0 if moment == "building" else 1)
    with Index.open(path, IDENTITY, threads=1) as index:
        assert index.search_vector(unit_rows(1)[0], shortlist=20, approximate=True).how.approximate
        index.build_graph(connectivity=8, expansion_add=64)
    assert sorted(found.name for found in path.parent.iterdir()) == ["a.egx", "a.egx.graph"]


def test_a_build_that_fails_or_is_interrupted_leaves_the_old_graph(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = graph_path(index.path).read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        index.build_graph(connectivity=4, progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(IndexFileError, match="free space"):
            index.build_graph(connectivity=4)
    assert graph_path(index.path).read_bytes() == before
    assert not list(index.path.parent.glob("*.tmp"))


def test_a_graph_that_is_a_folder_is_an_error_with_the_path(tmp_path: Path) -> None:
    with Index.open(tmp_path / "c.egx", IDENTITY) as index:
        add(index, unit_rows(50))
        graph_path(index.path).mkdir()
        for call in (
            lambda: index.search_vector(unit_rows(1)[0], approximate=True),
            index.build_graph,
        ):
            with pytest.raises(IndexFileError, match=r"c\.egx\.graph"):
                call()


@pytest.mark.parametrize(
    "arguments",
    [
        {"connectivity": 1},
        {"connectivity": 257},
        {"connectivity": 8.0},
        {"connectivity": True},
        {"expansion_add": 0},
        {"expansion_add": 10**6},
        {"threads": 0},
    ],
)
def test_parameters_that_cannot_work_are_refused(index: Index, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        index.build_graph(**arguments)


def test_an_empty_index_and_vectors_without_a_head_work_too(tmp_path: Path) -> None:
    with Index.open(tmp_path / "d.egx", IDENTITY, threads=1) as index:
        assert index.build_graph().vectors == 0
        assert index.search_vector(unit_rows(1)[0], approximate=True).hits == ()
        vectors = unit_rows(ROWS)
        vectors[::10, :16] = 0
        vectors[::10, 16] = 1
        vectors[::10, 17:] = 0
        add(index, vectors)
        assert index.build_graph(connectivity=8, expansion_add=64).vectors == ROWS
        assert (
            len(index.search_vector(unit_rows(1, seed=9)[0], shortlist=20, approximate=True)) == 10
        )
        assert read_notes(graph_path(index.path)) is not None
