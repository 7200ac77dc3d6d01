"""What the tests of ingestion share: a clock, a folder, an index of it, and a run of `sync`."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from egemma.index import Index
from egemma.ingest import IngestConfig, sync
from egemma.ingest import source as source_module
from egemma.ingest.plan import list_changes
from tests.sdk.fakes import WordEmbedder, model_of

HOUR = 3600 * 10**9


def later() -> int:
    """A clock that stands an hour after the files were written: their times can be trusted."""
    return time.time_ns() + HOUR


def open_index(folder: Path) -> Index:
    return Index.open(folder / "notes.db", cast(Any, WordEmbedder(max_tokens=100)))


def make_folder(parent: Path) -> Path:
    """Make a folder of four files, two of them further below."""
    root = parent / "docs"
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
    real, read = source_module.read_bytes, []

    def counted(path: str, *rest: Any, **more: Any) -> Any:
        read.append(path)
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(source_module, "read_bytes", counted)
        list_changes(index, [root], clock_ns=later)
    assert len(read) == but, read


def sources_of(index: Index) -> Mapping[str, Mapping[str, Any]]:
    """What ingestion noted of each document: id -> source."""
    return index.sources()
