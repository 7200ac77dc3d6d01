"""An open index notices that its file is another one now, or that it is in another process than the
one that opened it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from egemma.index import Index
from egemma_core.errors import IndexFileError
from tests.sdk.fakes import WordEmbedder


def filled(path: Path, word: str) -> Index:
    index = Index.open(path, WordEmbedder())
    index.add([f"{word} one", f"{word} two"], ids=["1", "2"])
    return index


@pytest.mark.parametrize(
    "use",
    [
        lambda index: index.search("one"),
        lambda index: index.add(["three"]),
        lambda index: index.remove(["1"]),
    ],
)
def test_a_file_that_was_replaced_is_neither_read_nor_written(tmp_path: Path, use: object) -> None:
    with filled(tmp_path / "other.db", "other"):
        pass
    with filled(tmp_path / "a.db", "mine") as index:
        shutil.copy(tmp_path / "other.db", tmp_path / "copy.db")
        os.replace(tmp_path / "copy.db", tmp_path / "a.db")
        with pytest.raises(IndexFileError, match="replaced while it was open"):
            use(index)  # type: ignore[operator]
    with Index.open(tmp_path / "other.db", WordEmbedder()) as index:
        assert index.ids() == ["1", "2"]


def test_a_file_that_was_deleted_is_not_made_again_empty(tmp_path: Path) -> None:
    with Index.open(tmp_path / "a.db", WordEmbedder()) as index:
        (tmp_path / "a.db").unlink()
        with pytest.raises(IndexFileError, match="deleted"):
            index.add(["text"])
        assert not (tmp_path / "a.db").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_index_refuses_to_work_in_a_forked_process(tmp_path: Path) -> None:
    with filled(tmp_path / "a.db", "mine") as index:
        child = os.fork()
        if child == 0:
            try:
                index.search("one")
            except IndexFileError as error:
                os._exit(7 if "another process" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert index.search("one")[0].id == "1"
