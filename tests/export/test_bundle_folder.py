"""The writing of a bundle folder: a half-written one cannot exist, and none is replaced unasked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from egemma_core.bundle import MANIFEST, read_bundle
from egemma_core.errors import BundleError
from egemma_export.bundle_folder import atomic_folder, fingerprint_of
from tests.tiny import tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path, tiny_spm: Path) -> Path:
    # tiny_spm stands in for the model too, which nothing here runs
    return tiny_bundle(tmp_path / "bundle", tokenizer=tiny_spm, model=tiny_spm)


def write_half(folder: Path, error: BaseException) -> None:
    with atomic_folder(folder, replace=True) as scratch:
        (scratch / MANIFEST).write_text("half")
        raise error


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "b", RuntimeError())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_leaves_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(bundle, KeyboardInterrupt())
    assert read_bundle(bundle).manifest.target == "tiny-onnxruntime"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_killed_writer_leaves_no_bundle(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from egemma_export.bundle_folder import atomic_folder
        with atomic_folder(Path(sys.argv[1]), replace=False) as scratch:
            (scratch / "manifest.json").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.05)
    assert not (tmp_path / "b").exists()
    assert all(path.name.startswith(".b.partial-") for path in tmp_path.iterdir())


def test_an_existing_bundle_is_replaced_only_when_asked(bundle: Path) -> None:
    with pytest.raises(BundleError, match="--force"), atomic_folder(bundle, replace=False):
        pass
    with atomic_folder(bundle, replace=True) as scratch:
        (scratch / "new").write_text("x")
    assert [path.name for path in bundle.iterdir()] == ["new"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"), atomic_folder(tmp_path, replace=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_fingerprint_follows_what_moves_vectors_and_nothing_else() -> None:
    def fingerprint(**changes: Any) -> str:
        parts: dict[str, Any] = {
            "weights": {"model.safetensors": "1"},
            "tokenizer_sha256": "2",
            "prompts": {"query": "q: "},
            "architecture": {"window": 256},
            "scheme": {"name": "int4"},
        }
        return fingerprint_of(**(parts | changes))

    base = fingerprint()
    assert base == fingerprint(prompts={"query": "q: "})
    for change in (
        {"weights": {"model.safetensors": "9"}},
        {"tokenizer_sha256": "9"},
        {"prompts": {"query": "q:"}},
        {"architecture": {"window": 512}},
        {"scheme": {"name": "int8"}},
    ):
        assert fingerprint(**change) != base
