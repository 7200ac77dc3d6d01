"""Durable writing: the old file or the new one, whole, whatever happens in between."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from egemma_core import files
from egemma_core.errors import ExportError, OutputError
from egemma_core.files import flush, publish_folder, replacing_file, write_file, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*?.bin"
    write_file(path, b"old")
    with replacing_file(path) as scratch:
        scratch.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        scratch.with_name(scratch.name + "-wal").write_bytes(b"what SQLite leaves")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [path.name]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def write_half() -> None:
        with replacing_file(path) as scratch:
            scratch.write_bytes(b"half")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_the_disk_refuses_is_an_error_of_the_callers_class(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_file(tmp_path / "absent" / "file", b"")
    assert "Check" in caught.value.hint
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        write_file(tmp_path / "folder", b"", error=ExportError)
    assert names(tmp_path) == ["folder"]


def test_a_new_file_has_the_permissions_that_other_programs_give(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "open", b"")
        with replacing_file(tmp_path / "private", mode=0o600):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_scratch_files_of_dead_processes_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path,
) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead, living = f".file.{child}.0123abcd.part-wal", f".file.{os.getppid()}.0123abcd.part"
    for name in (dead, living, ".file.x.part", ".other.1.0.part"):
        (tmp_path / name).touch()
    write_file(tmp_path / "file", b"")
    assert names(tmp_path) == sorted([living, ".file.x.part", ".other.1.0.part", "file"])


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, str]] = []
    replace = os.replace

    def flushed(path: Path) -> None:
        order.append(("flush", path.name if path != tmp_path else "folder"))

    def replaced(source: Path, destination: Path) -> None:
        order.append(("replace", Path(destination).name))
        replace(source, destination)

    monkeypatch.setattr(files, "flush", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write_json(tmp_path / "file", {"ä": 1})
    assert [kind for kind, _ in order] == ["flush", "replace", "flush"]
    assert order[1:] == [("replace", "file"), ("flush", "folder")]
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"ä": 1}


def test_json_that_no_other_language_reads_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"x": float("nan")})
    assert names(tmp_path) == []


def test_a_folder_gets_its_name_once_everything_in_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, destination = tmp_path / ".scratch", tmp_path / "out"
    (scratch / "below").mkdir(parents=True)
    (scratch / "below" / "file").write_bytes(b"1")
    seen: list[str] = []
    monkeypatch.setattr(
        files, "flush", lambda path: seen.append(f"{path.name} {destination.exists()}")
    )
    publish_folder(scratch, destination)
    assert set(seen[:-1]) == {"below False", "file False", ".scratch False"}
    assert seen[-1] == f"{tmp_path.name} True"
    again = tmp_path / ".again"
    again.mkdir()
    with pytest.raises(OSError, match="out"):
        publish_folder(again, destination)
    publish_folder(again, destination, replace=True)
    assert names(tmp_path) == ["out"]
    assert names(destination) == []


def test_windows_has_no_handle_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("opened a folder")

    monkeypatch.setattr(files.os, "name", "nt")
    monkeypatch.setattr(files.os, "open", refuse)
    flush(tmp_path)
