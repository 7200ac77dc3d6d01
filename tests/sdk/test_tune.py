"""Tuning measures what it says, against a brute force written here, and keeps every vector when it
writes the heads anew.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from egemma import upkeep
from egemma.identity import ModelIdentity
from egemma.index import Index
from egemma.index.facts import read_state
from egemma.index.tune import interval
from egemma.index.tuned import Tuned
from egemma.index.upkeep.rewrite import rewrite_heads
from egemma_core.errors import ConfigError, IndexFileError, InputError, RuntimeUnavailableError
from tests.sdk.fakes import TEXTS, WordEmbedder

DIMS = (64, 32, 16)
IDENTITY = ModelIdentity(fingerprint="a" * 64, name="test", dims=DIMS, parts={})
ROWS = 1500


def unit_rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    """A prefix carries much, but not all: channels get smaller."""
    rows = np.random.default_rng(seed).normal(size=(count, DIMS[0])) / np.sqrt(
        1 + np.arange(DIMS[0]) / 8
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make(path: Path, *, rows: int = ROWS, keep_floats: bool = False) -> Index:
    index = Index.open(path, IDENTITY, threads=1, keep_floats=keep_floats)
    index.add_vectors(
        unit_rows(rows),
        ids=[str(row) for row in range(rows)],
        metadata=[{"half": row % 2} for row in range(rows)],
    )
    return index


def state_of(index: Index) -> Any:
    connection = sqlite3.connect(index.path)
    try:
        return read_state(connection)
    finally:
        connection.close()


def ids(hits: Any) -> list[str]:
    return [hit.id for hit in hits]


@pytest.mark.parametrize("keep_floats", [True, False])
def test_the_recall_is_that_of_searches_with_that_shortlist(
    tmp_path: Path, keep_floats: bool
) -> None:
    queries = unit_rows(60, seed=7)
    with make(tmp_path / "a.egx", keep_floats=keep_floats) as index:
        report = index.tune(recall=0.9, queries=queries, k=5)
        assert (report.queries, report.own_queries, report.chunks, report.floats) == (
            60,
            False,
            ROWS,
            keep_floats,
        )
        assert [row.scan_width for row in report.rows] == [16, 32]
        assert report.chosen is not None
        truth = [ids(index.search(query, 5, exact=True)) for query in queries]
        for row in report.rows:
            with Index.open(
                tmp_path / f"{row.scan_width}.egx", IDENTITY, threads=1, keep_floats=keep_floats
            ) as other:
                other.add_vectors(unit_rows(ROWS), ids=[str(number) for number in range(ROWS)])
                with other._session.writing(
                    "test"
                ) as change:  # the scan width that the row is about
                    rewrite_heads(change, row.scan_width)
                found = [ids(other.search(query, 5, shortlist=row.shortlist)) for query in queries]
            recall = np.mean([len({*a} & {*b}) / 5 for a, b in zip(found, truth, strict=True)])
            # one of 300 hits: a tie, or codes that were rounded twice
            assert recall == pytest.approx(row.recall, abs=0.004)
            assert row.low < row.recall < row.high or row.recall == 1
            assert row.reaches == (row.low >= 0.9)
            assert row.ms > 0


def test_the_shortest_shortlist_that_reaches_it_is_taken_and_the_default_from_then_on(
    tmp_path: Path,
) -> None:
    queries = unit_rows(300, seed=7)
    with make(tmp_path / "a.egx") as index:
        report = index.tune(recall=0.95, queries=queries)
        chosen = report.chosen
        assert chosen is not None
        assert chosen.ms == min(row.ms for row in report.rows if row.reaches)
        hits = index.search(queries, 10)
        truth = index.search(queries, 10, exact=True)
        assert np.mean(
            [len({*ids(a)} & {*ids(b)}) / 10 for a, b in zip(hits, truth, strict=True)]
        ) == pytest.approx(chosen.recall, abs=0.002)
        how = hits[0].how
        assert (how.shortlist, how.scan_width, how.tuned_for) == (
            chosen.shortlist,
            chosen.scan_width,
            ROWS,
        )
        assert index.search(queries[0], 20).how.shortlist == 2 * chosen.shortlist
        assert index.search(queries[0], 1).how.shortlist == chosen.shortlist
        given = index.search(queries[0], 10, shortlist=77).how
        assert (given.shortlist, given.tuned_for) == (77, None)
        kept = json.loads(state_of(index).tuned)
        assert kept == {
            "scan_width": chosen.scan_width,
            "shortlist": chosen.shortlist,
            "k": 10,
            "recall": chosen.recall,
            "low": chosen.low,
            "high": chosen.high,
            "confidence": 0.95,
            "queries": 300,
            "own_queries": False,
            "seed": 0,
            "chunks": ROWS,
        }
        assert upkeep.check(index.path) == []
    with Index.open(tmp_path / "a.egx") as again:
        assert again.search(queries[0]).how.shortlist == chosen.shortlist


def test_stored_chunks_stand_in_for_queries_and_do_not_find_themselves(tmp_path: Path) -> None:
    # else the second call may see codes that the first rounded anew
    with make(tmp_path / "a.egx", keep_floats=True) as index:
        one, other = index.tune(recall=0.9, seed=3), index.tune(recall=0.9, seed=3)
        assert (one.own_queries, one.queries) == (True, 200)
        assert "stored chunks as queries, each without itself" in one.to_text()
        assert [(row.shortlist, row.recall, row.low) for row in one.rows] == [
            (row.shortlist, row.recall, row.low) for row in other.rows
        ]
        # A chunk that found itself would always have its one hit.
        assert index.tune(recall=0.9, k=1, sample=100).rows[0].recall < 1


def test_a_recall_out_of_reach_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with make(tmp_path / "a.egx", rows=300) as index:
        before = state_of(index)
        report = index.tune(recall=0.9999, sample=50)
        assert report.chosen is None
        assert "Nothing was changed" in report.to_text()
        assert "exact=True" in report.to_text()
        assert max(row.recall for row in report.rows) == 1  # even so: fifty queries do not prove it
        assert state_of(index) == before
        assert index.search(unit_rows(1)[0]).how.tuned_for is None


@pytest.mark.parametrize("keep_floats", [True, False])
def test_writing_the_heads_anew_keeps_every_vector_and_what_was_deleted_stays_so(
    tmp_path: Path, keep_floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "egemma.index.bulk_reads.BLOCKS_TOGETHER", 1
    )  # so that a whole part is dead: block 2
    rows, dead = unit_rows(1100), [*range(300, 900), 5, 1099]
    with (
        make(tmp_path / "a.egx", rows=1100, keep_floats=keep_floats) as index,
        Index.open(tmp_path / "a.egx", threads=1) as reader,
    ):
        index.remove([str(row) for row in dead])
        reader.search(rows[0])
        for width in (32, 16, 32, 64):
            with index._session.writing("test") as change:
                rewrite_heads(change, width)
            assert upkeep.check(index.path) == []
            alive = np.setdiff1d(np.arange(1100), dead)
            hits = reader.search(rows[alive], 1)  # another reader finds out
            assert [int(hit[0].id) for hit in hits] == alive.tolist()
            assert hits[0].how.scan_width == width
            # codes: a rounding or two of 1/254 of the largest
            assert min(hit[0].score for hit in hits) > (1 - 1e-6 if keep_floats else 0.9998)
        index.add_vectors(rows[:300], ids=[f"again {row}" for row in range(300)])
        assert upkeep.check(index.path) == []
        assert {*ids(index.search(rows[7], 2))} == {"7", "again 7"}


def test_a_rewrite_that_fails_half_way_leaves_everything(tmp_path: Path) -> None:
    with make(tmp_path / "a.egx") as index:
        before = index.search(unit_rows(1, seed=7)[0], 10)

        def fail() -> None:
            with index._session.writing("test") as change:
                change.connection.execute(
                    "UPDATE vectors SET crc32 = crc32 + 1 WHERE number = 1400"
                )
                rewrite_heads(change, 32)

        with pytest.raises(IndexFileError, match="vector 1400"):
            fail()
        assert index.search(unit_rows(1, seed=7)[0], 10) == before
        assert upkeep.check(index.path) == []


def test_damage_is_found_and_not_measured(tmp_path: Path) -> None:
    with make(tmp_path / "a.egx", rows=300) as index:
        connection = sqlite3.connect(index.path)
        connection.execute("UPDATE vectors SET rest = zeroblob(length(rest)) WHERE number = 200")
        connection.commit()
        connection.close()
        with pytest.raises(IndexFileError, match="vector 200"):
            index.tune(sample=20)


def test_texts_can_be_queries_where_there_is_a_model(tmp_path: Path) -> None:
    embedder: Any = WordEmbedder()
    with Index.open(tmp_path / "a.egx", embedder) as index:
        index.add([f"{text} {number}" for text in TEXTS for number in range(10)])
        assert index.tune(recall=0.5, k=3, queries=TEXTS * 5).queries == 20
    with (
        Index.open(tmp_path / "a.egx") as index,
        pytest.raises(ConfigError, match="without a model"),
    ):
        index.tune(queries=TEXTS)


def test_an_index_that_is_too_small_or_arguments_that_cannot_work_are_refused(
    tmp_path: Path,
) -> None:
    with make(tmp_path / "a.egx", rows=10) as index:
        with pytest.raises(ConfigError, match="10 chunks"):
            index.tune()
        assert index.tune(k=3, recall=0.5, sample=10).queries == 10
        wrong: list[dict[str, Any]] = [
            {"recall": 1},
            {"recall": 0},
            {"recall": True},
            {"recall": "0.9"},
            {"recall": float("nan")},
            {"k": 0},
            {"k": 2.0},
            {"sample": 1},
            {"seed": -1},
            {"confidence": 1.0},
            {"confidence": 95},
        ]
        for arguments in wrong:
            with pytest.raises(ConfigError):
                index.tune(**arguments)
        for queries in (
            unit_rows(3)[:, :32],
            unit_rows(3)[:0],
            np.zeros((3, 64), np.float32),
            np.full((3, 64), np.nan, np.float32),
        ):
            with pytest.raises((InputError, RuntimeUnavailableError)):
                index.tune(k=3, queries=queries)


def test_what_was_tuned_is_not_used_at_another_width_or_believed_when_it_is_impossible(
    tmp_path: Path,
) -> None:
    with make(tmp_path / "a.egx", rows=100) as index:
        assert index.tune(k=3, recall=0.5, sample=10).chosen is not None
        good = json.loads(state_of(index).tuned)
    for change in ({"shortlist": 0}, {"shortlist": "9"}, {"k": None}, {"more": 1}):
        with pytest.raises(Exception, match="tuned"):
            Tuned.from_json(json.dumps(good | change))
    assert Tuned.from_json(json.dumps(good)).shortlist_for(6) == 2 * good["shortlist"]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    resampled = rng.integers(0, 200, (500, 200))
    held = 0
    for _ in range(300):
        # one query in twenty loses each hit by a coin: they miss together
        hard = rng.random(200) < 0.05
        found = 1 - (rng.random((200, 10)) < 0.5 * hard[:, None]).mean(axis=1)
        low, high = interval(found, 10, 0.95, resampled)
        held += low <= 1 - 0.05 * 0.5 <= high
    assert held / 300 > 0.9
    low, high = interval(np.ones(200), 10, 0.95, resampled)
    assert 0.99 < low < 1  # Wilson: n / (n + z²)
    assert low == pytest.approx(2000 / (2000 + 1.96**2), abs=1e-5)
    assert high == pytest.approx(1)


def test_the_shortlist_is_not_longer_than_the_hits_where_each_chunk_has_a_twin(
    tmp_path: Path,
) -> None:
    rows = unit_rows(400)
    twins = rows + 0.02 * unit_rows(400, seed=5)
    twins /= np.linalg.norm(twins, axis=1, keepdims=True)
    with make(tmp_path / "a.egx", rows=400) as index:
        index.add_vectors(twins.astype(np.float32), ids=[f"twin {row}" for row in range(400)])
        report = index.tune(k=1, recall=0.9)
        # The best of the others is the twin, and only the chunk itself, which does not count,
        # stands before it.
        assert [(row.shortlist, row.recall) for row in report.rows] == [(1, 1.0), (1, 1.0)]
