"""A few of the faults of benchmarks/durability.py: kills, damaged files, full and read-only disks,
clocks that jump.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="children are forked from a process that is warm"
)

SEED = 20261123


def test_kills_at_random_moments_of_every_operation_lose_nothing_told_and_leave_nothing_half(
    tmp_path: Path,
) -> None:
    from benchmarks.durability import KINDS, kill_rounds

    report = kill_rounds(
        40,
        SEED,
        tmp_path,
        rounds_per_file=20,
        kinds=[kind for kind in KINDS if kind != "tune"],
        log=lambda line: None,
    )
    assert report.problems == []
    assert report.kills == 40
    assert len(report.by_operation) >= 8
    assert report.operations > 20
    assert report.searches_meanwhile > 0


def test_two_processes_that_write_and_are_killed_disturb_neither_each_other_nor_a_reader(
    tmp_path: Path,
) -> None:
    from benchmarks.durability import writer_rounds

    report = writer_rounds(16, SEED, tmp_path, log=lambda line: None)
    assert report.problems == []
    assert report.operations > 8


def test_files_that_are_damaged_anywhere_give_the_same_answers_or_a_clear_error(
    tmp_path: Path,
) -> None:
    from benchmarks.durability import damage_rounds

    for name, result in damage_rounds(12, SEED, tmp_path, log=lambda line: None).items():
        assert result.keys() <= {"trials", "a clear error", "all answers as before"}, (name, result)
        assert result["trials"] == 12


def test_a_damaged_log_loses_whole_commits_at_most_and_a_damaged_shm_nothing(
    tmp_path: Path,
) -> None:
    from benchmarks.durability import log_rounds

    result = log_rounds(45, SEED, tmp_path)
    assert result["problems"] == []
    assert result["-shm"] == {"the last state": 15}
    assert result["-wal"].get("an older whole state", 0) > 5


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_the_rest(tmp_path: Path) -> None:
    from benchmarks.durability import full_disk

    check(full_disk(tmp_path, SEED, steps=40))


def test_read_only_media_are_searched_and_never_written(tmp_path: Path) -> None:
    from benchmarks.durability import read_only_media

    check(read_only_media(tmp_path))


def test_clocks_that_jump_change_nothing(tmp_path: Path) -> None:
    from benchmarks.durability import clock_jumps

    check(clock_jumps(15, SEED, tmp_path, kinds=["add", "put", "remove", "compact", "reopen"]))


def check(result: dict[str, Any]) -> None:
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["problems"] == []


def test_the_harness_sees_a_write_that_was_told_and_is_not_there(tmp_path: Path) -> None:
    """Whether a loss would be noticed: the state that must be stored has a document more than the
    file.
    """
    import random

    from benchmarks.durability import MODELS, State, one_chunk, verify
    from egemma.index import Index

    state = State(
        "words-1",
        True,
        {"a": one_chunk("w1 w2", None, {"n": 1}), "b": one_chunk("w3", None, {"n": 1})},
    )
    with Index.open(tmp_path / "a.egx", MODELS["words-1"], keep_floats=True) as index:  # type: ignore[arg-type]
        index.add(["w1 w2", "w3"], ids=["a", "b"], metadata=[{"n": 1}, {"n": 1}])
    assert verify(tmp_path / "a.egx", [state], random.Random(0)) == 0
    lost = state.copy()
    lost.docs["c"] = one_chunk("w5", None, {"n": 1})
    with pytest.raises(AssertionError, match="are none of"):
        verify(tmp_path / "a.egx", [lost], random.Random(0))
