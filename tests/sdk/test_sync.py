"""Folders into an index: what changed is embedded and nothing else, what is gone leaves, and an
interruption costs little.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egemma.index import Index
from egemma.ingest import IngestConfig, Plan, SyncProgress, plan_folder, render, sync
from egemma_core.errors import InputError
from tests.sdk.fakes import WordEmbedder, model_of
from tests.sdk.ingest_folders import (
    assert_no_file_is_read,
    later,
    make_folder,
    names,
    open_index,
    paragraph,
    run,
    sources_of,
    write,
)

# the package shows the function of this name
sync_module = importlib.import_module("egemma.ingest.sync")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path) as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


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
    stored = dict(sources_of(index))
    plan = plan_folder(index, [folder], clock_ns=later)
    assert sources_of(index) == stored  # it only looked
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
    assert sources_of(index)[id_]["partial"] is True
    assert path.read_text().startswith(index.get([id_])[0].text)
    report = run(index, path)
    # nothing is embedded twice
    assert (report.changed, report.embedded) == (1, report.chunks - done)
    assert len(model.embedded) == len(set(model.embedded))
    assert "partial" not in sources_of(index)[id_]
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
    source = sources_of(index)[(folder / "guide.md").resolve().as_posix()]
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
