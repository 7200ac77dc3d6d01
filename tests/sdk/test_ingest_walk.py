"""What is not read: named with its reason, and never removed by mistake."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from egemma.index import Index
from egemma.ingest import IngestConfig, ParseLimits, plan_folder, render, sync
from egemma.ingest.plan import list_changes
from egemma.ingest.printing import printable
from egemma_core.errors import MissingDependencyError
from tests.sdk.fakes import WordEmbedder
from tests.sdk.ingest_files import posix
from tests.sdk.ingest_folders import later, make_folder, open_index, run, write


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path) as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@posix
def test_everything_that_is_not_read_is_named_with_its_reason(
    index: Index, folder: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "secret"
    write(outside / "key.txt", "Not below the root.")
    write(folder / ".git" / "config", "hidden")
    write(folder / ".env", "hidden")
    write(folder / "node_modules" / "x.js", "excluded")
    write(folder / "photo.png", b"\x89PNG\r\n\x1a\n")
    (folder / "loop").symlink_to(folder)
    (folder / "out").symlink_to(outside)
    (folder / "out.txt").symlink_to(outside / "key.txt")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "self").symlink_to(folder / "self")
    os.mkfifo(folder / "pipe")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("a name that is no Unicode")
    # without opening it
    assert ("pipe", "not a file") in [
        (Path(item.path).name, item.reason) for item in list_changes(index, [folder]).skipped
    ]
    report = run(index, folder)
    assert report.new == 4
    reasons = sorted((Path(item.path).name, item.reason) for item in report.skipped)
    assert reasons == [
        (".env", "hidden"),
        (".git", "hidden"),
        ("caf\ufffd.txt", "name"),
        ("dangling", "link"),
        ("loop", "link"),
        ("node_modules", "excluded"),
        ("out", "link"),
        ("out.txt", "link"),
        ("photo.png", "binary"),
        ("pipe", "not a file"),
        ("self", "link"),
    ]
    text = "\n".join(report.to_lines())
    assert "4 new, 0 changed, 0 unchanged, 0 removed, 11 skipped" in text
    assert "photo.png: it is a PNG image, not text" in text
    assert "skipped, hidden: 2 (" in text
    assert run(index, folder, IngestConfig(hidden=True)).new == 2


@posix
def test_a_link_that_takes_a_files_place_after_the_plan_is_not_followed(
    index: Index, folder: Path, tmp_path: Path
) -> None:
    plan = plan_folder(index, [folder], clock_ns=later)
    write(tmp_path / "secret.txt", "Not below the root.")
    (folder / "code.py").unlink()
    (folder / "code.py").symlink_to(tmp_path / "secret.txt")
    report = sync(index, [folder], plan=plan, clock_ns=later)
    assert [item.reason for item in report.skipped] == ["unreadable"]
    assert not [hit for hit in index.search("root", k=5) if "root" in hit.text]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_folder_that_may_not_be_read_loses_nothing(index: Index, folder: Path) -> None:
    run(index, folder)
    (folder / "deep").chmod(0)
    try:
        report = run(index, folder)
    finally:
        (folder / "deep").chmod(0o755)
    assert ([item.reason for item in report.skipped], report.removed, len(report.kept)) == (
        ["unreadable"],
        0,
        2,
    )


def test_a_folder_that_cannot_be_listed_loses_nothing(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(index, folder)
    deep, scandir, lstat = str(folder.resolve() / "deep"), os.scandir, os.lstat

    def refused(real: Any) -> Any:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if str(path).startswith(deep) and (real is scandir or str(path) != deep):
                raise PermissionError(13, "Permission denied")
            return real(path, *rest, **more)

        return call

    monkeypatch.setattr("egemma.ingest.walk.os.scandir", refused(scandir))
    monkeypatch.setattr("egemma.ingest.plan.os.lstat", refused(lstat))
    report = sync(index, [folder], clock_ns=later)
    assert ([item.reason for item in report.skipped], report.removed, len(report.kept)) == (
        ["unreadable"],
        0,
        2,
    )


def test_the_index_does_not_read_itself(folder: Path) -> None:
    with Index.open(folder / "index.db", cast(Any, WordEmbedder(max_tokens=100))) as index:
        write(folder / "index.db.graph", "derived")
        write(folder / "index.dbx", "not of the index")
        report = run(index, folder)
        assert report.new == 5
        assert {Path(item.path).name for item in report.skipped if item.reason == "index"} >= {
            "index.db",
            "index.db-wal",
            "index.db.graph",
        }


def test_a_missing_library_stops_before_the_work(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "a.pdf", b"%PDF-1.7")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"egemma\[ingest\]"):
        list_changes(index, [folder])
    with pytest.raises(MissingDependencyError, match=r"egemma\[ingest\]"):
        run(index, folder)
    assert len(index) == 0
    assert run(index, folder, IngestConfig(exclude=("*.pdf",))).new == 4


def test_pdf_and_html_are_read_by_one_process(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("selectolax")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        "egemma.ingest.sandbox.subprocess.Popen",
        lambda *args, **more: started.append(1) or popen(*args, **more),
    )
    for number in range(5):
        write(
            folder / f"{number}.html", f"<title>Page {number}</title><h1>Head</h1><p>Body {number}"
        )
    assert run(index, folder).new == 9
    assert len(started) == 1
    assert index.get([(folder / "3.html").resolve().as_posix()])[0].title == "Page 3"


def test_names_cannot_move_the_cursor(index: Index, folder: Path) -> None:
    write(folder / "a\x1b[2J\n\u202eb.bin", b"\0")
    text = render(plan_folder(index, [folder], clock_ns=later))
    assert all(character.isprintable() for line in text for character in line)
    assert printable("a\x1b\u202eä 日") == "a\\x1b\\u202eä 日"


def test_a_limit_that_a_file_exceeds_is_told(index: Index, folder: Path) -> None:
    report = run(index, folder, IngestConfig(limits=ParseLimits(file_bytes=30)))
    assert {(Path(item.path).name, item.reason) for item in report.skipped} == {
        ("guide.md", "too large"),
        ("code.py", "too large"),
    }
