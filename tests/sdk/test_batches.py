"""Batches are plans over lengths: pure functions, checked on plain numbers.

Threads are counted from files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egemma.batches import FREE_TOKENS, MOST_PADDING, BatchMemory, memory_of, plan_batches, windows
from egemma.threads import MOST_THREADS, available_cpus, check_threads
from egemma_core.errors import BundleError, ConfigError

SHAPE = {"width": 768, "ffn_width": 1152, "num_heads": 3}
ROOMY = memory_of(SHAPE, 2**40)
LENGTHS = st.lists(st.integers(min_value=2, max_value=2048), max_size=200)


@given(LENGTHS)
def test_every_text_is_in_exactly_one_batch(lengths: list[int]) -> None:
    plan = plan_batches(lengths, memory_of(SHAPE, 64 * 2**20))
    assert sorted(position for batch in plan for position in batch) == list(range(len(lengths)))
    assert all(plan)


@given(LENGTHS, st.integers(min_value=1, max_value=512))
def test_no_batch_of_several_texts_exceeds_the_memory(lengths: list[int], memory_mb: int) -> None:
    memory = memory_of(SHAPE, memory_mb * 2**20)
    for batch in plan_batches(lengths, memory):
        assert (
            len(batch) == 1
            or memory.run_bytes(len(batch), max(lengths[position] for position in batch))
            <= memory_mb * 2**20
        )


@given(LENGTHS)
def test_little_is_padded_once_padding_costs(lengths: list[int]) -> None:
    for batch in plan_batches(lengths, ROOMY):
        cells = len(batch) * max(lengths[position] for position in batch)
        padding = cells - sum(lengths[position] for position in batch)
        assert cells <= FREE_TOKENS or padding <= MOST_PADDING * cells


@given(LENGTHS)
def test_the_same_lengths_give_the_same_plan(lengths: list[int]) -> None:
    assert plan_batches(lengths, ROOMY) == plan_batches(list(lengths), ROOMY)


def test_equal_lengths_keep_their_order() -> None:
    assert plan_batches([5, 5, 5], ROOMY) == [[0, 1, 2]]


def test_an_outlier_runs_alone() -> None:
    assert plan_batches([12, 2048, 11, 12], ROOMY) == [[1], [0, 3, 2]]


def test_no_texts_need_no_runs() -> None:
    assert plan_batches([], ROOMY) == []


def test_a_text_above_the_memory_still_gets_a_run() -> None:
    assert plan_batches([2048, 2048], memory_of(SHAPE, 1)) == [[0], [1]]


def test_attention_counts_quadratically() -> None:
    # 4 bytes * (3 heads * 3 score tables * 1000 * 1000 + 1000 * (6 * 768 + 3 * 1152)) = 36,000,000
    # + 32,256,000
    assert ROOMY.run_bytes(1, 1000) == 68_256_000
    few = BatchMemory(limit_bytes=68_256_000, width=768, ffn_width=1152, num_heads=3)
    assert plan_batches([1000, 1000], few) == [[0], [1]]
    assert plan_batches([500, 500], few) == [[0, 1]]


@pytest.mark.parametrize("damage", [{"width": 0}, {"num_heads": None}, {"ffn_width": "1152"}])
def test_a_manifest_without_the_shape_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=next(iter(damage))):
        memory_of(SHAPE | damage, 1)


def test_windows_read_only_what_they_give() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(7):
            taken.append(number)
            yield number

    stream = windows(numbers(), 3)
    assert taken == []
    assert next(stream) == [0, 1, 2]
    assert taken == [0, 1, 2]
    assert list(stream) == [[3, 4, 5], [6]]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("9900000 100000", 16),
    ],
)
@pytest.mark.usefixtures("sixteen_cpus")
def test_a_container_limits_the_cpus(tmp_path: Path, limit: str, cpus: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/app/worker\n")
    write(tmp_path / "sys/fs/cgroup/app/worker/cpu.max", "max 100000\n")
    # of the parent group: it binds as well
    write(tmp_path / "sys/fs/cgroup/app/cpu.max", limit + "\n")
    assert available_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 16), ("250000", 3)])
@pytest.mark.usefixtures("sixteen_cpus")
def test_a_container_of_the_first_kind_limits_the_cpus(
    tmp_path: Path, quota: str, cpus: int
) -> None:
    write(tmp_path / "proc/self/cgroup", "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", quota + "\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert available_cpus(tmp_path) == cpus


@pytest.mark.usefixtures("sixteen_cpus")
def test_without_control_groups_the_affinity_decides(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == 16


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2", MOST_THREADS + 1])
def test_an_impossible_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(ConfigError, match="threads="):
        check_threads(threads)  # type: ignore[arg-type]


def test_threads_are_taken_as_asked_and_default_to_the_cpus() -> None:
    assert check_threads(3) == 3
    assert check_threads(None) == available_cpus()
