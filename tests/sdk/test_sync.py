"""Folders into an index: what changed is embedded and nothing else, what is gone leaves, and an
interruption costs little.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egemma.index import Index
from egemma.ingest import IngestConfig, ParseLimits, Plan, SyncProgress, plan_folder, render, sync
from egemma.ingest import plan as plan_module
from egemma.ingest.plan import look, printable
from egemma.ingest.walk import exclusions
from egemma_core.errors import ConfigError, InputError, RuntimeUnavailableError
from tests.sdk.fakes import WordEmbedder, model_of

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
HOUR = 3600 * 10**9
# the package shows the function of this name
sync_module = importlib.import_module("egemma.ingest.sync")


def later() -> int:
    """A clock that stands an hour after the files were written: their times can be trusted."""
    return time.time_ns() + HOUR


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.open(tmp_path / "notes.db", cast(Any, WordEmbedder(max_tokens=100))) as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "deep" / "er").mkdir(parents=True)
    write(root / "guide.md", "# Guide\n\nWater the tomatoes.\n\n## Tools\n\nA spade and a rake.\n")
    write(root / "code.py", "def add(a, b):\n    return a + b\n")
    write(root / "deep" / "notes.txt", "The pump loses its oil.")
    write(root / "deep" / "er" / "more.txt", "Nobody answered the telephone.")
    return root


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def paragraph(seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(f"word{chance.randrange(500)}" for _ in range(20)).capitalize() + "."


def run(
    index: Index, root: Path | list[Path], config: IngestConfig | None = None, **settings: Any
) -> Any:
    """`sync`, and how many chunks the model read for it."""
    settings.setdefault("clock_ns", later)
    before = len(model_of(index).embedded)
    report = sync(index, root if isinstance(root, list) else [root], config, **settings)
    assert report.embedded == len(model_of(index).embedded) - before
    return report


def names(index: Index, root: Path) -> list[str]:
    return sorted(Path(id_).relative_to(root.resolve()).as_posix() for id_ in index.ids())


def assert_no_file_is_read(
    monkeypatch: pytest.MonkeyPatch, root: Path, index: Index, *, but: int = 0
) -> None:
    real, read = plan_module.read_bytes, []

    def counted(path: str, *rest: Any, **more: Any) -> Any:
        read.append(path)
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "read_bytes", counted)
        look(index, [root], clock_ns=later)
    assert len(read) == but, read


def test_a_folder_becomes_documents_that_are_found(index: Index, folder: Path) -> None:
    report = run(index, folder)
    assert (report.new, report.changed, report.unchanged, report.removed) == (4, 0, 0, 0)
    assert names(index, folder) == ["code.py", "deep/er/more.txt", "deep/notes.txt", "guide.md"]
    hit = index.search("telephone", k=1)[0]
    path = (folder / "deep" / "er" / "more.txt").resolve().as_posix()
    assert (hit.id, hit.text, hit.title) == (path, "Nobody answered the telephone.", "more.txt")
    assert hit.metadata == {"path": path, "name": "more.txt", "kind": "text"}
    assert [hit.title for hit in index.search("spade rake", k=1)] == ["Guide > Tools"]
    assert index.search("tomatoes", k=5, where={"kind": "code"})[0].id.endswith("code.py")


def test_a_second_run_embeds_nothing_and_reads_nothing(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(index, folder)
    report = run(index, folder)
    assert (report.new, report.changed, report.unchanged, report.embedded) == (0, 0, 4, 0)
    assert_no_file_is_read(monkeypatch, folder, index)


@pytest.mark.parametrize("headings", [True, False])
def test_editing_one_paragraph_embeds_one_chunk(
    index: Index, tmp_path: Path, headings: bool
) -> None:
    parts = [
        (f"## Part {number}\n\n" if headings else "")
        + f"{paragraph(number)}\n\n{paragraph(number + 1000)}"
        for number in range(60)
    ]
    path = tmp_path / "docs" / "long.md"
    write(path, "\n\n".join(parts))
    config = IngestConfig(overlap_tokens=0)
    assert run(index, tmp_path / "docs", config).embedded >= 30
    counts = []
    for number in (0, 17, 30, 45, 59):
        parts[number] += " An edit was made here."
        write(path, "\n\n".join(parts))
        report = run(index, tmp_path / "docs", config)
        assert (report.changed, report.reused) == (1, report.chunks - report.embedded)
        counts.append(report.embedded)
    assert counts == [1] * 5 if headings else sorted(counts)[2] <= 2 and max(counts) < 15
    assert index.get([path.resolve().as_posix()])[0].text == path.read_text().rstrip()


def test_the_plan_says_exactly_what_will_be_embedded(index: Index, folder: Path) -> None:
    for number in range(5):
        write(
            folder / f"{number}.txt",
            "\n\n".join(paragraph(seed) for seed in range(number * 40, number * 40 + 30)),
        )
    run(index, folder)
    write(
        folder / "0.txt", "\n\n".join(paragraph(seed) for seed in (*range(12), 999, *range(13, 30)))
    )
    write(folder / "new.txt", "\n\n".join(paragraph(seed) for seed in range(900, 930)))
    (folder / "1.txt").unlink()
    write(folder / "bad.txt", b"caf\xe9")
    stored = dict(index.sources())
    plan = plan_folder(index, [folder], clock_ns=later)
    assert index.sources() == stored  # it only looked
    assert [Path(file.id).name for file in plan.new] == ["new.txt"]
    assert [Path(file.id).name for file in plan.changed] == ["0.txt"]
    assert [Path(id_).name for id_ in plan.deleted] == ["1.txt"]
    assert [(Path(item.path).name, item.reason) for item in plan.skipped] == [
        ("bad.txt", "charset")
    ]
    assert plan.unchanged == 7
    assert plan.embed_s is not None
    assert plan.embed_s > 0
    before = len(model_of(index).embedded)
    report = sync(index, [folder], plan=plan, clock_ns=later)
    embedded = model_of(index).embedded[before:]
    assert (report.embedded, report.chunks, len(embedded)) == (
        plan.embed_chunks,
        plan.chunks,
        plan.embed_chunks,
    )
    assert plan.embed_tokens >= sum(len(text.split()) for text in embedded)
    assert plan.embed_chunks < plan.chunks
    assert (report.new, report.changed, report.removed, report.unchanged) == (1, 1, 1, 7)
    text = "\n".join(render(plan))
    assert "1 new, 1 changed, 7 unchanged, 1 deleted, 1 skipped" in text
    assert f"to embed: {plan.embed_chunks} chunks, {plan.embed_tokens} tokens, " in text
    assert "1.txt" in text
    assert "byte 3 (0xE9) is not UTF-8" in text


def test_a_plan_with_nothing_to_do_embeds_nothing(index: Index, folder: Path) -> None:
    run(index, folder)
    before = model_of(index).calls
    plan = plan_folder(index, [folder], clock_ns=later)
    assert (plan.files, plan.embed_s, model_of(index).calls) == ((), 0.0, before)


def test_only_what_is_gone_from_below_the_roots_is_removed(
    index: Index, folder: Path, tmp_path: Path
) -> None:
    other, neighbour = tmp_path / "other", tmp_path / "docs2"
    write(other / "a.txt", "Another folder.")
    write(neighbour / "a.txt", "A neighbour whose name begins the same.")
    run(index, [folder, other, neighbour])
    # no file, whatever its id says
    index.add(["A text of its own"], ids=[(folder / "typed.txt").resolve().as_posix()])
    for path in (folder / "code.py", other / "a.txt", neighbour / "a.txt"):
        path.unlink()
    shutil.rmtree(folder / "deep" / "er")
    report = run(index, folder)
    assert report.removed == 2
    assert sorted(Path(id_).name for id_ in index.ids()) == [
        "a.txt",
        "a.txt",
        "guide.md",
        "notes.txt",
        "typed.txt",
    ]
    assert run(index, folder / "deep").removed == 0
    assert run(index, folder / "guide.md").removed == 0
    write(other / "b.txt", "So that the folder is not empty.")
    assert run(index, other).removed == 1


def test_the_same_file_is_one_document_whichever_root_it_is_below(
    index: Index, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(index, folder)
    report = run(index, [folder / "deep", folder, folder / "deep" / "notes.txt"])
    assert (report.embedded, report.unchanged, report.skipped) == (0, 4, ())
    monkeypatch.chdir(tmp_path)
    assert sync(index, ["docs", "./docs/../docs"], clock_ns=later).unchanged == 4
    (tmp_path / "link").symlink_to(folder)
    assert run(index, tmp_path / "link").unchanged == 4
    twin = tmp_path / "elsewhere" / "docs"
    write(twin / "guide.md", "Another guide in a folder of the same name.")
    assert (run(index, twin).new, len(index)) == (1, 5)


def test_a_root_that_is_missing_or_empty_removes_nothing(index: Index, folder: Path) -> None:
    run(index, folder)
    stored = index.ids()
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"docs.* cannot be read.*Nothing was changed"):
        run(index, folder)
    folder.mkdir()  # as a mount point whose disk is not there
    (folder / "sub").mkdir()
    with pytest.raises(InputError, match=r"is empty, but the index has 4 documents.*allow_empty"):
        run(index, folder)
    assert index.ids() == stored
    assert run(index, folder, IngestConfig(allow_empty=True)).removed == 4
    # nothing stored below it: an empty folder is as good as any
    assert run(index, folder).unchanged == 0


@pytest.mark.parametrize("roots", ["docs", ["absent"], ["a\0b"]])
def test_roots_that_cannot_be_read_are_refused(index: Index, roots: Any) -> None:
    with pytest.raises(InputError):
        sync(index, roots)


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
    real, sources = plan_module.walk, index.sources()

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
    assert [Path(path).name for path in look(index, [folder], config).kept] == ["code.py"]
    assert (run(index, folder, config).removed, len(index)) == (0, 4)
    assert "stay although they are not read any more: 1 (" in "\n".join(
        render(look(index, [folder], config))
    )


def test_a_file_that_vanishes_after_the_look_is_told(index: Index, folder: Path) -> None:
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


# What is not read


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
        (Path(item.path).name, item.reason) for item in look(index, [folder]).skipped
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
def test_a_link_that_takes_a_files_place_after_the_look_is_not_followed(
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
    with pytest.raises(RuntimeUnavailableError, match=r"egemma\[ingest\]"):
        look(index, [folder])
    with pytest.raises(RuntimeUnavailableError, match=r"egemma\[ingest\]"):
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


PATTERNS = [
    "*.txt",
    "/a.txt",
    "build/",
    "/build/",
    "a/*/c",
    "a/**/c",
    "**/c",
    "a/**",
    "!keep.txt",
    "?.md",
    "[ab].txt",
    "[!ab].txt",
    "a*c*e",
    "\\*.txt",
    "/a/b",
    "a/b/",
    "doc*/",
    "*.t[wx]t",
    "[a-c]/",
    "**",
    "x y",
    "b",
    "*.TXT",
    "a?b",
]
PATHS = [
    "a.txt",
    "b.txt",
    "c.txt",
    "keep.txt",
    "a/b/c",
    "a/c",
    "a/x/y/c",
    "c",
    "build/x",
    "build.txt",
    "src/build/x",
    "a.md",
    "ab.md",
    "abcde",
    "a/b.txt",
    "*.txt",
    "docs/a.txt",
    "x y",
    "a/b/keep.txt",
    "b/keep.txt",
    "a.twt",
    "axb/c.txt",
    "A.TXT",
]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4))
def test_patterns_leave_out_what_git_ignores(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str]
) -> None:
    root = tmp_path_factory.mktemp("repository")
    clean = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True, env=clean)
    (root / ".git" / "info" / "exclude").write_text("\n".join(patterns) + "\n")
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "-z", "--stdin"],
        cwd=root,
        input="\0".join(PATHS).encode(),
        capture_output=True,
        check=False,
        env=clean,
    )
    excluded = exclusions(patterns)

    def ours(path: str) -> bool:
        parts = path.split("/")
        return any(
            excluded("/".join(parts[:count]), count < len(parts))
            for count in range(1, len(parts) + 1)
        )

    assert {path for path in PATHS if ours(path)} == set(
        filter(None, done.stdout.decode().split("\0"))
    ), patterns


@pytest.mark.parametrize("pattern", ["", "/", "!", "[abc", "[b-a]"])
def test_patterns_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="exclude pattern"):
        IngestConfig(exclude=(pattern,))


@pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 10}, {"chunk_tokens": True}, {"overlap_tokens": -1}, {"exclude": "*.py"}],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        IngestConfig(**settings)


def test_a_chunk_longer_than_the_model_reads_is_refused(index: Index, folder: Path) -> None:
    with pytest.raises(ConfigError, match="this model reads 100"):
        run(index, folder, IngestConfig(chunk_tokens=101))


# Stopping and going on


class Stop:
    """Ctrl-C in the middle of the n-th call of the model."""

    def __init__(self, model: WordEmbedder, after: int) -> None:
        self._model, self._left, self._real = model, after, model.embed_documents

    def __enter__(self) -> None:
        def embed(*args: Any, **settings: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            return self._real(*args, **settings)

        self._model.embed_documents = embed  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self._model.embed_documents  # type: ignore[method-assign]


def test_ctrl_c_keeps_what_was_committed_and_the_next_run_goes_on(
    index: Index, tmp_path: Path
) -> None:
    root = tmp_path / "docs"
    for number in range(40):
        write(
            root / f"{number:02}.txt",
            "\n\n".join(paragraph(seed) for seed in range(number * 50, number * 50 + 20)),
        )
    model = model_of(index)
    with Stop(model, after=2), pytest.raises(KeyboardInterrupt):
        sync(index, [root], clock_ns=later)
    stored, embedded = len(index), len(model.embedded)
    assert 0 < stored < 40
    plan = plan_folder(index, [root], clock_ns=later)
    assert (plan.unchanged, len(plan.new)) == (stored, 40 - stored)
    assert run(index, root).unchanged == stored
    texts = model.embedded[:embedded]
    assert len(index) == 40
    assert len(texts) == len(set(texts))


def test_a_long_document_is_committed_in_parts_and_continued(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "PART_CHUNKS", 8)
    path = tmp_path / "docs" / "long.txt"
    write(path, "\n\n".join(paragraph(seed) for seed in range(400)))
    id_, model = path.resolve().as_posix(), model_of(index)
    with Stop(model, after=4), pytest.raises(KeyboardInterrupt):
        sync(index, [path], clock_ns=later)
    done = len(model.embedded)
    assert done >= 32
    assert index.sources()[id_]["partial"] is True
    assert path.read_text().startswith(index.get([id_])[0].text)
    report = run(index, path)
    # nothing is embedded twice
    assert (report.changed, report.embedded) == (1, report.chunks - done)
    assert len(model.embedded) == len(set(model.embedded))
    assert "partial" not in index.sources()[id_]
    assert index.get([id_])[0].text == path.read_text().rstrip()
    assert run(index, path).unchanged == 1


def test_a_rewritten_long_document_loses_no_vector_that_it_can_keep(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "docs" / "long.txt"
    parts = [paragraph(seed) for seed in range(300)]
    write(path, "\n\n".join(parts))
    chunks = run(index, path).chunks
    monkeypatch.setattr(sync_module, "PART_CHUNKS", 4)
    parts[:100] = [paragraph(seed) for seed in range(5000, 5100)]
    write(path, "\n\n".join(parts))
    plan = plan_folder(index, [path], clock_ns=later)
    report = run(index, path)
    assert plan.embed_chunks == report.embedded > 4 * 4
    assert report.reused > chunks // 2
    assert index.get([path.resolve().as_posix()])[0].text == path.read_text().rstrip()


def test_progress_rises_to_the_end_and_counts_what_is_committed(index: Index, folder: Path) -> None:
    for number in range(30):
        write(
            folder / f"{number}.txt",
            "\n\n".join(paragraph(seed) for seed in range(number * 20, number * 20 + 18)),
        )
    write(folder / "bad.txt", b"\xff")
    seen: list[SyncProgress] = []
    report = sync(index, [folder], progress=seen.append, clock_ns=later)
    counts = [(event.files_done, event.bytes_done, event.chunks_done) for event in seen]
    assert counts == sorted(counts)
    assert counts[-1] == (seen[0].files, seen[0].bytes, report.embedded)
    assert seen[0].files == 35
    assert len({event.files_done for event in seen}) > 3


def test_sources_are_json_that_every_language_reads(index: Index, folder: Path) -> None:
    run(index, folder)
    source = index.sources()[(folder / "guide.md").resolve().as_posix()]
    assert json.loads(json.dumps(source)) == source
    assert set(source) == {
        "kind",
        "size",
        "mtime_ns",
        "ctime_ns",
        "inode",
        "sha256",
        "looked_ns",
        "recipe",
    }
    assert all(abs(source[name]) < 2**63 for name in ("size", "mtime_ns", "ctime_ns", "looked_ns"))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["a.txt", "b.md", "d/c.txt", "d/e/f.txt"]),
                st.one_of(st.none(), st.integers(0, 30)),
            ),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_after_every_sync_the_index_holds_the_folder(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[tuple[str, int | None]]], seed: int
) -> None:
    root = tmp_path_factory.mktemp("docs")
    write(root / "always.txt", "There is always a file.")
    with Index.open(
        root.parent / f"{root.name}.db", cast(Any, WordEmbedder(max_tokens=80))
    ) as index:
        for step in steps:
            for name, number in step:
                if number is None:
                    (root / name).unlink(missing_ok=True)
                else:
                    write(
                        root / name,
                        "\n\n".join(paragraph(seed + other) for other in range(number)) or " ",
                    )
            plan: Plan = plan_folder(index, [root])
            report = run(index, root, plan=plan if seed % 2 else None, clock_ns=time.time_ns)
            assert report.embedded == plan.embed_chunks
            expected = {
                path.resolve().as_posix(): path.read_text()
                for path in root.rglob("*")
                if path.is_file() and path.read_text().strip()
            }
            assert {document.id: document.text for document in index.get(index.ids())} == expected
