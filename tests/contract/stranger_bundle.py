"""A bundle, from bundle-format.md alone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.contract.stranger import Refused

MODEL_FILES = {"executorch": "model.pte", "onnxruntime": "model.onnx"}
OBJECTS = ("source", "architecture", "tokenizer", "prompts", "scheme", "verification", "tools", "files")  # fmt: skip
TEXTS = ("target", "runtime", "fingerprint", "batch")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all there and whole."""
    try:
        manifest: Any = json.loads((folder / "manifest.json").read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused("BundleError") from error
    _require(isinstance(manifest, dict))
    _require(manifest.get("format") == "egemma-bundle")
    _require(type(manifest.get("format_version")) is int and manifest["format_version"] == 1)
    _require(set(manifest) == {"format", "format_version", "dims", *OBJECTS, *TEXTS})
    _require(all(isinstance(manifest[name], dict) for name in OBJECTS))
    _require(all(isinstance(manifest[name], str) for name in TEXTS))
    dims = manifest["dims"]
    _require(isinstance(dims, list) and len(dims) > 0)
    _require(all(type(dim) is int and dim > 0 for dim in dims))
    _require(manifest["runtime"] in MODEL_FILES and manifest["batch"] in ("one", "dynamic"))
    fields = manifest["tokenizer"]
    _require(set(fields) == {"bos_id", "eos_id", "pad_id", "vocab_size", "max_tokens"})
    _require(all(type(value) is int and value >= 0 for value in fields.values()))
    _require(fields["max_tokens"] >= 3)
    _require(all(isinstance(prompt, str) for prompt in manifest["prompts"].values()))
    files = manifest["files"]
    _require({MODEL_FILES[manifest["runtime"]], "tokenizer.model", "golden.json"} <= set(files))
    for name, entry in files.items():
        _require(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"})
        _require("/" not in name and "\\" not in name)
        _require((folder / name).is_file())
        content = (folder / name).read_bytes()
        _require(len(content) == entry["bytes"])
        _require(hashlib.sha256(content).hexdigest() == entry["sha256"])
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """As the page says it is made."""
    scheme = manifest["scheme"]
    parts = {
        "weights": manifest["source"]["weights"],
        "tokenizer": manifest["files"]["tokenizer.model"]["sha256"],
        "prompts": manifest["prompts"],
        "architecture": manifest["architecture"],
        "scheme": {"name": scheme["name"], "weights": scheme["weights"]},
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shorten(vectors: NDArray[Any], dim: Any, dims: list[int]) -> NDArray[np.float32]:
    """(B, dim) float32 of length 1."""
    width = dims[0] if dim is None else dim
    if isinstance(width, bool) or width not in dims:
        raise Refused("DimensionError")
    part = vectors[:, :width].astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.sqrt((part * part).sum(axis=1, keepdims=True))
    if not np.isfinite(length).all() or (length == 0).any():
        raise Refused("InputError")
    shortened: NDArray[np.float32] = (part / length).astype(np.float32)
    return shortened


class Model:
    """An ONNX bundle's graph."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        # else its import alone reports to its makers
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        shape = manifest["architecture"]
        for name in ("width", "ffn_width", "num_heads"):
            _require(isinstance(shape.get(name), int) and shape[name] > 0)
        self.manifest = manifest
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            names = {node.name for node in self.session.get_inputs()}
            _require(names == {"input_ids", "attention_mask"})
            _require("sentence_embedding" in {node.name for node in self.session.get_outputs()})
        except Refused:
            raise
        except Exception as error:  # its exceptions have no other parent
            raise Refused("BundleError") from error

    def run(self, rows: list[list[int]]) -> NDArray[np.float32]:
        """(B, dims[0]) of rows of ids, padded in front."""
        longest = max(map(len, rows))
        pad = self.manifest["tokenizer"]["pad_id"]
        ids = np.array([[pad] * (longest - len(row)) + row for row in rows], np.int64)
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], np.int64)
        vectors: NDArray[np.float32] = self.session.run(
            ["sentence_embedding"], {"input_ids": ids, "attention_mask": mask}
        )[0]
        _require(vectors.shape == (len(rows), self.manifest["dims"][0]))
        _require(bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3).all()))
        return vectors


def _require(true: bool) -> None:
    if not true:
        raise Refused("BundleError")
