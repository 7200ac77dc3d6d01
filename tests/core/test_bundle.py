"""The bundle folder: what is read back, and what is refused."""

from __future__ import annotations

import json
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
    read_bundle,
)
from egemma_core.errors import BundleError, ConfigError
from egemma_export.bundle_folder import describe_files, write_manifest


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


def test_bounds_are_of_cosines_and_channels() -> None:
    bounds = Bounds(min_cosine_float=0.9, min_cosine_quantized=None)
    assert bounds.max_batch_difference == 1e-2
    for bound in (2.0, float("nan"), True, "0.9"):
        with pytest.raises(ConfigError, match="min_cosine_float="):
            Bounds(min_cosine_float=bound, min_cosine_quantized=0.9)  # type: ignore[arg-type]
