"""The bundle: the folder that export writes and every SDK reads.

    manifest.json               what the model is, what may be asked of it, and the size and SHA-256
                                of every other file
    model.pte or model.onnx
    tokenizer.model
    golden.json                 texts, token ids and float-reference vectors, with the deviations
                                measured at export

contract/bundle-format.md describes it for other languages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import BundleError, ConfigError
from egemma_core.files import sha256_of
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer

FORMAT = "egemma-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
GOLDEN = "golden.json"
RUNTIMES = {"executorch": "model.pte", "onnxruntime": "model.onnx"}

_COPY = "Copy the whole bundle folder again."
_EXPORT = "Export again."
_MAKE = "Make a bundle with egemma-export."


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a bundle must keep on every golden text, at every width; none passes a bound of None."""

    min_cosine_float: float | None  # to the float model's vector
    min_cosine_quantized: float | None  # to float arithmetic on the same rounded weights
    # of any channel, between a text alone and in a padded batch; int8 activations may round over
    # an edge
    max_batch_difference: float | None = 1e-2

    def __post_init__(self) -> None:
        for name, bound in asdict(self).items():
            if bound is not None:
                number(name, bound, -1, 1, error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json, field by field; every one is required, and no other is allowed."""

    target: str  # such as "android-int4"
    runtime: str  # a key of RUNTIMES
    fingerprint: str  # hash over everything that moves a vector; only equal ones may be mixed
    source: Mapping[str, Any]  # model, revision, and the SHA-256 of each weight file
    # vocab_size, layers, widths, window, pooling; for people and checks
    architecture: Mapping[str, Any]
    tokenizer: Mapping[str, Any]  # bos_id, eos_id, pad_id, vocab_size, max_tokens
    prompts: Mapping[str, str]  # byte for byte
    dims: tuple[int, ...]  # widths that may be asked for, falling
    # name, weights by role, activations, and what was done instead of what
    scheme: Mapping[str, Any]
    batch: str  # "one" (one text per run) or "dynamic"
    verification: Mapping[str, Any]  # bounds that the export had to keep, and what was measured
    tools: Mapping[str, str]  # versions that made it
    files: Mapping[str, Mapping[str, Any]]  # name -> {"bytes", "sha256"}

    def __post_init__(self) -> None:
        one_of("runtime", self.runtime, list(RUNTIMES), error=BundleError)
        one_of("batch", self.batch, ("one", "dynamic"), error=BundleError)

    @property
    def model_file(self) -> str:
        return RUNTIMES[self.runtime]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder whose manifest was understood and whose files were checked."""

    folder: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.folder / self.manifest.model_file

    @property
    def prompts(self) -> Prompts:
        return Prompts(by_name=self.manifest.prompts)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / TOKENIZER, **self.manifest.tokenizer)

    def golden(self) -> dict[str, Any]:
        return _json(self.folder / GOLDEN)


def read_bundle(folder: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Open a bundle folder.

    Args:
        check_hashes: read every file and compare its SHA-256 (about 0.1 s per 200 MB on a laptop);
            sizes are always compared.

    Raises:
        BundleError: no bundle, another format version, a field missing, a file missing, cut off or
            altered.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        found = f"{folder}: no such folder. A bundle is a folder with {MANIFEST}."
        raise BundleError(found, hint=_MAKE)
    if not path.is_file():
        raise BundleError(f"{folder} has no {MANIFEST}: it is not a bundle.", hint=_MAKE)
    manifest = _parse(_json(path), path)
    for name in (manifest.model_file, TOKENIZER, GOLDEN):
        if name not in manifest.files:
            raise BundleError(f"{path} does not list {name}.", hint=_EXPORT)
    for name, facts in manifest.files.items():
        if Path(name).name != name:
            found = f"{path} lists {name!r}, which is not a plain file name."
            raise BundleError(found, hint=_EXPORT)
        _check_file(folder / name, facts, check_hashes)
    return Bundle(folder=folder, manifest=manifest)


def _check_file(path: Path, facts: Mapping[str, Any], check_hash: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing.", hint=_COPY)
    size = path.stat().st_size
    if size != facts["bytes"]:
        found = f"{path} has {size} bytes, the manifest says {facts['bytes']}"
        raise BundleError(f"{found}: it is cut off or altered.", hint=_COPY)
    if check_hash and sha256_of(path) != facts["sha256"]:
        found = f"{path} does not have the SHA-256 that the manifest says: it was altered."
        raise BundleError(found, hint=_COPY)


def _parse(body: dict[str, Any], path: Path) -> Manifest:
    form, version = body.pop("format", None), body.pop("format_version", None)
    if form != FORMAT:
        raise BundleError(f"{path}: format={form!r}, not {FORMAT!r}: it is not an egemma bundle.")
    if version != FORMAT_VERSION:
        found = f"{path}: format_version={version!r}, this egemma reads {FORMAT_VERSION}."
        hint = "Export the model again, or install the egemma that wrote it."
        raise BundleError(found, hint=hint)
    known = {field.name for field in fields(Manifest)}
    if known != body.keys():
        missing, unknown = sorted(known - body.keys()), sorted(body.keys() - known)
        found = f"{path}: missing {missing}, not understood {unknown}."
        raise BundleError(found, hint=_EXPORT)
    try:
        _check_fields(body)
        return Manifest(**body | {"dims": tuple(body["dims"])})
    except BundleError as error:
        raise BundleError(error.found, hint=_EXPORT, place=str(path)) from error


def _check_fields(body: dict[str, Any]) -> None:
    """Refuse a manifest whose fields are all there but are not what `Manifest` says."""
    dims, tokenizer = body["dims"], body["tokenizer"]
    tables = ("source", "architecture", "tokenizer", "prompts")
    for name in (*tables, "scheme", "verification", "tools", "files"):
        if not isinstance(body[name], dict):
            raise BundleError(f"{name} is not a table.")
    for name in ("target", "runtime", "fingerprint", "batch"):
        if not isinstance(body[name], str):
            raise BundleError(f"{name}={body[name]!r} is not text.")
    if not isinstance(dims, list) or not dims:
        raise BundleError(f"dims={dims!r} is not a list of widths.")
    for position, dim in enumerate(dims):
        whole_number(f"dims[{position}]", dim, 1, error=BundleError)
    if set(tokenizer) != {"bos_id", "eos_id", "pad_id", "vocab_size", "max_tokens"}:
        raise BundleError(f"tokenizer={tokenizer!r} lacks a field.")
    for name, value in tokenizer.items():
        least = 3 if name == "max_tokens" else 0  # BOS, one piece, EOS
        whole_number(f"tokenizer: {name}", value, least, error=BundleError)
    for name, text in body["prompts"].items():
        if not isinstance(text, str):
            raise BundleError(f"prompts[{name!r}] is not text.")
    for name, facts in body["files"].items():
        if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise BundleError(f"files[{name!r}] must give bytes and sha256.")


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing.", hint=_COPY) from error
    # RecursionError: a hundred thousand brackets
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}.", hint=_COPY) from error
    if not isinstance(body, dict):
        raise BundleError(f"{path} is not a JSON table.", hint=_COPY)
    return body
