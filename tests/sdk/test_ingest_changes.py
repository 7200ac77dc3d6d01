"""Which files are read again: what changed, whatever the clocks say, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from egemma.index import Index
from egemma.ingest import IngestConfig, plan_folder, render, sync
from egemma.ingest import plan as plan_module
from egemma.ingest.plan import list_changes
from egemma_core.errors import ConfigError
from tests.sdk.ingest_folders import (
    HOUR,
    assert_no_file_is_read,
    later,
    make_folder,
    open_index,
    paragraph,
    run,
    sources_of,
    write,
)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path) as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


# What changed


def same_size_edit(path: Path) -> None:
    """Other words of the same length, with the old time of change put back, as a tool that keeps
    times would.
    """
    facts = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_an_edit_of_the_same_size_and_time_is_found(index: Index, folder: Path) -> None:
    run(index, folder)
    same_size_edit(folder / "deep" / "notes.txt")
    assert run(index, folder).changed == 1  # the inode's own time of change tells


def test_an_edit_in_the_tick_of_the_last_look_is_found(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "deep" / "notes.txt"
    now = path.stat().st_mtime_ns
    run(index, folder, clock_ns=lambda: now)  # looked at within the second in which it was written
    assert_no_file_is_read(monkeypatch, folder, index, but=4)
    # as long as before; a coarse clock gives it the same times
    path.write_text("The pump keeps all oil!")
    with monkeypatch.context() as patch:
        freeze_times(patch, index)
        assert run(index, folder).changed == 1
    assert run(index, folder).changed == 0
    assert_no_file_is_read(monkeypatch, folder, index, but=3)


def freeze_times(patch: pytest.MonkeyPatch, index: Index) -> None:
    """A file system whose clock stands still: every file has the times that the index remembers."""
    real, sources = plan_module.walk, sources_of(index)

    def walk(*args: Any, **settings: Any) -> Any:
        for item in real(*args, **settings):
            source = sources.get(item.path)
            yield (
                item
                if source is None
                else replace(item, mtime_ns=source["mtime_ns"], ctime_ns=source["ctime_ns"])
            )  # type: ignore[type-var]

    patch.setattr(plan_module, "walk", walk)


def test_a_clock_that_was_ahead_hides_no_edit(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(index, folder, clock_ns=lambda: time.time_ns() + 24 * 365 * HOUR)
    # what was seen in the future is not believed now
    assert_no_file_is_read(monkeypatch, folder, index, but=4)
    (folder / "deep" / "notes.txt").write_text("The pump keeps all oil!")
    with monkeypatch.context() as patch:
        freeze_times(patch, index)
        assert run(index, folder).changed == 1


def test_a_file_from_the_future_is_read_each_time(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = time.time_ns() + 24 * HOUR
    os.utime(folder / "guide.md", ns=(future, future))
    run(index, folder)
    assert_no_file_is_read(monkeypatch, folder, index, but=1)
    assert run(index, folder).unchanged == 4


def test_a_touched_file_is_unchanged(index: Index, folder: Path) -> None:
    run(index, folder)
    os.utime(folder / "guide.md")
    copy = (folder / "code.py").read_bytes()
    (folder / "code.py").unlink()
    (folder / "code.py").write_bytes(copy)
    report = run(index, folder)
    assert (report.changed, report.unchanged) == (0, 4)


def test_other_settings_cut_all_files_anew(index: Index, folder: Path) -> None:
    write(folder / "long.txt", " ".join(paragraph(seed) for seed in range(40)))
    run(index, folder)
    report = run(index, folder, IngestConfig(chunk_tokens=80))
    assert report.changed == 5
    assert 0 < report.reused < report.chunks  # short files keep their only chunk
    assert run(index, folder, IngestConfig(chunk_tokens=80)).changed == 0


def test_a_file_that_cannot_be_read_any_more_keeps_its_earlier_version(
    index: Index, folder: Path
) -> None:
    run(index, folder)
    write(folder / "guide.md", b"caf\xe9")
    report = run(index, folder)
    assert [(Path(path).name, len(index)) for path in report.kept] == [("guide.md", 4)]
    assert report.skipped[0].reason == "charset"
    assert "its earlier version stays" in report.skipped[0].detail
    assert [Path(path).name for path in plan_folder(index, [folder], clock_ns=later).kept] == [
        "guide.md"
    ]


def test_a_file_that_was_emptied_leaves(index: Index, folder: Path) -> None:
    run(index, folder)
    write(folder / "guide.md", "\n")
    assert [Path(id_).name for id_ in plan_folder(index, [folder], clock_ns=later).deleted] == [
        "guide.md"
    ]
    assert run(index, folder).removed == 1
    assert len(index) == 3


def test_an_excluded_file_that_is_stored_stays_and_is_told(index: Index, folder: Path) -> None:
    run(index, folder)
    config = IngestConfig(exclude=("*.py",))
    assert [Path(path).name for path in list_changes(index, [folder], config).kept] == ["code.py"]
    assert (run(index, folder, config).removed, len(index)) == (0, 4)
    assert "stay although they are not read any more: 1 (" in "\n".join(
        render(list_changes(index, [folder], config))
    )


def test_a_file_that_vanishes_after_the_plan_is_told(index: Index, folder: Path) -> None:
    plan = plan_folder(index, [folder], clock_ns=later)
    (folder / "code.py").unlink()
    report = sync(index, [folder], plan=plan, clock_ns=later)
    assert [(Path(item.path).name, item.reason) for item in report.skipped] == [
        ("code.py", "unreadable")
    ]
    assert (report.new, len(index)) == (3, 3)


def test_a_plan_of_something_else_is_refused(index: Index, folder: Path) -> None:
    plan = plan_folder(index, [folder], clock_ns=later)
    with pytest.raises(ConfigError, match="Plan again"):
        sync(index, [folder / "deep"], plan=plan)
    with pytest.raises(ConfigError, match="Plan again"):
        sync(index, [folder], IngestConfig(hidden=True), plan=plan)
    assert len(index) == 0
