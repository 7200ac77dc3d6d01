"""The bundle folder: what is read back, what is refused, and that a half-written one cannot
exist.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egemma_core.bundle import (
    GOLDEN,
    MANIFEST,
    TOKENIZER,
    Bounds,
    Manifest,
    atomic_folder,
    describe_files,
    fingerprint_of,
    read_bundle,
    write_manifest,
)
from egemma_core.errors import BundleError, ConfigError


@pytest.fixture
def bundle(tmp_path: Path, tiny_spm: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights" * 100)
    (folder / TOKENIZER).write_bytes(tiny_spm.read_bytes())
    (folder / GOLDEN).write_text("{}")
    write_manifest(
        folder,
        Manifest(
            target="onnx-int4",
            runtime="onnxruntime",
            fingerprint="f",
            source={"model": "m"},
            architecture={"width": 96},
            tokenizer={"bos_id": 2, "eos_id": 1, "pad_id": 0, "vocab_size": 4096, "max_tokens": 64},
            prompts={"query": "q: ", "document": "d: "},
            dims=(96, 32),
            scheme={"name": "int4"},
            batch="dynamic",
            verification={},
            tools={},
            files=describe_files(folder),
        ),
    )
    return folder


def test_a_written_manifest_reads_back_whole(bundle: Path) -> None:
    opened = read_bundle(bundle)
    assert opened.manifest.dims == (96, 32)
    assert opened.prompts.query() == "q: "
    assert opened.model_path == bundle / "model.onnx"
    assert opened.tokenizer().max_tokens == 64


@pytest.mark.parametrize("name", ["model.onnx", TOKENIZER, GOLDEN])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_told_apart(bundle: Path, name: str) -> None:
    path = bundle / name
    body = path.read_bytes()
    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(BundleError, match="SHA-256"):
        read_bundle(bundle)
    read_bundle(bundle, check_hashes=False)
    path.write_bytes(body[:-1])
    with pytest.raises(BundleError, match="cut off"):
        read_bundle(bundle, check_hashes=False)
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        read_bundle(bundle)


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.pop(key)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda b: b.update(format="gguf"), "not an egemma bundle"),
    "a newer version": (lambda b: b.update(format_version=2), "format_version=2"),
    "no version": (drop("format_version"), "format_version=None"),
    "a missing field": (drop("prompts"), r"missing \['prompts'\]"),
    "an unknown field": (lambda b: b.update(extra=1), r"not understood \['extra'\]"),
    "an unknown runtime": (lambda b: b.update(runtime="tflite"), "tflite"),
    "no dims": (lambda b: b.update(dims=[]), "dims"),
    "a table that is a list": (lambda b: b.update(files=[]), "files is not a table"),
    "a path that climbs": (
        lambda b: b["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
        "plain file name",
    ),
    "a model that is not listed": (
        lambda b: b["files"].pop("model.onnx"),
        "does not list model.onnx",
    ),
    "a missing tokenizer field": (lambda b: b["tokenizer"].pop("max_tokens"), "tokenizer="),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_not_understood_are_refused(bundle: Path, case: str) -> None:
    change, told = MANIFESTS[case]
    body = json.loads((bundle / MANIFEST).read_text())
    change(body)
    (bundle / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(BundleError, match=told):
        read_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        read_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="not a bundle"):
        read_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="not readable JSON"):
        read_bundle(tmp_path)


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
    assert read_bundle(bundle).manifest.target == "onnx-int4"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_killed_writer_leaves_no_bundle(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from egemma_core.bundle import atomic_folder
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


def test_bounds_are_of_cosines_and_channels() -> None:
    bounds = Bounds(min_cosine_float=0.9, min_cosine_quantized=None)
    assert bounds.max_batch_difference == 1e-2
    for bound in (2.0, float("nan"), True, "0.9"):
        with pytest.raises(ConfigError, match="min_cosine_float="):
            Bounds(min_cosine_float=bound, min_cosine_quantized=0.9)  # type: ignore[arg-type]
