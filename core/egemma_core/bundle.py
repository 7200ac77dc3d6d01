"""The bundle: the folder that export writes and every SDK reads.

contract/bundle-format.md describes it for other languages.

manifest.json    what the model is, what may be asked of it, the size and SHA-256 of every other
                 file
model.pte or model.onnx
tokenizer.model
golden.json      texts, token ids and float-reference vectors, with the deviations measured at
                 export
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from egemma_core.checkpoint import sha256_of
from egemma_core.errors import BundleError
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer

FORMAT = "egemma-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
GOLDEN = "golden.json"
RUNTIMES = {"executorch": "model.pte", "onnxruntime": "model.onnx"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json, field by field.

    Every field is required; unknown ones are refused by `read`.
    """

    target: str  # such as "android-int4"
    runtime: str  # a key of RUNTIMES
    fingerprint: str  # what vectors of this model may be mixed with; see `fingerprint_of`
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
        if self.runtime not in RUNTIMES:
            raise BundleError(f"runtime={self.runtime!r}: this version knows {sorted(RUNTIMES)}.")
        if self.batch not in ("one", "dynamic"):
            raise BundleError(f"batch={self.batch!r}: it must be 'one' or 'dynamic'.")

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


def fingerprint_of(
    *,
    weights: Mapping[str, str],
    tokenizer_sha256: str,
    prompts: Mapping[str, str],
    architecture: Mapping[str, Any],
    scheme: Mapping[str, Any],
) -> str:
    """One hash over everything that moves a vector: weights, tokenizer, prompts, architecture,
    rounding of weights.

    Names, paths, the runtime and tool versions stay out: they move nothing beyond float noise, so a
    rename rebuilds no index.
    """
    parts = {
        "weights": dict(weights),
        "tokenizer": tokenizer_sha256,
        "prompts": dict(prompts),
        "architecture": dict(architecture),
        "scheme": dict(scheme),
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


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
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder. A bundle is a folder with {MANIFEST}; make one with "
            "egemma-export."
        )
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST}: it is not a bundle. Make one with egemma-export."
        )
    manifest = _parse(_json(folder / MANIFEST), folder / MANIFEST)
    for name in (manifest.model_file, TOKENIZER, GOLDEN):
        if name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST} does not list {name}. Export again.")
    for name, facts in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise BundleError(
                f"{folder / MANIFEST} lists {name!r}, which is not a plain file name."
            )
        if not path.is_file():
            raise BundleError(f"{path} is missing. Copy the whole bundle folder again.")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise BundleError(
                f"{path} has {size} bytes, the manifest says {facts['bytes']}: it is cut off or "
                "altered. Copy it again."
            )
        if check_hashes and sha256_of(path) != facts["sha256"]:
            raise BundleError(
                f"{path} does not have the SHA-256 that the manifest says: it was altered. Copy it "
                "again."
            )
    return Bundle(folder=folder, manifest=manifest)


def describe_files(
    folder: Path, *, known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the manifest's `files` for everything in a folder except the manifest.

    Args:
        known: entries of files that did not change since; these files are not read again.
    """
    found = dict(known or {})
    return {
        path.name: dict(found[path.name])
        if path.name in found
        else {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; the last file of a bundle, so that a folder without it is no bundle."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, ensure_ascii=False)
        file.write("\n")


@contextmanager
def atomic_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """A scratch folder beside `destination` that takes its place when the block ends well, and
    vanishes otherwise.

    A process that is killed leaves at most a folder named `.NAME.partial-*`, which is no bundle.

    Raises:
        BundleError: the destination exists and `replace` is false, or cannot be written.
    """
    destination = Path(destination)
    if destination.exists() and not replace:
        raise BundleError(
            f"{destination} exists. Choose another --out, or pass --force to replace it."
        )
    if (
        destination.exists()
        and any(destination.iterdir())
        and not (destination / MANIFEST).is_file()
    ):
        raise BundleError(
            f"{destination} holds files that are not a bundle; it will not be replaced. Choose "
            "another --out."
        )
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(
            tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent)
        )
    except OSError as error:
        raise BundleError(f"{destination} cannot be written: {error}.") from error
    try:
        yield scratch
        for path in scratch.iterdir():
            _fsync(path)
        _fsync(scratch)
        scratch.chmod(0o755)  # mkdtemp makes private folders
        if destination.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
            os.replace(destination, old / "bundle")
            os.replace(scratch, destination)
            shutil.rmtree(old)
        else:
            os.replace(scratch, destination)
        _fsync(destination.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(body: dict[str, Any], path: Path) -> Manifest:
    if body.get("format") != FORMAT:
        raise BundleError(
            f"{path}: format={body.get('format')!r}, not {FORMAT!r}. This is not an egemma bundle."
        )
    if body.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version={body.get('format_version')!r}, this egemma reads "
            f"{FORMAT_VERSION}. "
            "Export the model again, or install the egemma that wrote it."
        )
    wanted = {field.name for field in fields(Manifest)}
    found = set(body) - {"format", "format_version"}
    if wanted != found:
        raise BundleError(
            f"{path}: missing {sorted(wanted - found)}, not understood {sorted(found - wanted)}. "
            "Export again."
        )
    _check_types(body, path)
    values: dict[str, Any] = {name: body[name] for name in wanted}
    return Manifest(**values | {"dims": tuple(body["dims"])})


def _check_types(body: dict[str, Any], path: Path) -> None:
    """Refuse a manifest whose fields are all there but are not what `Manifest` says."""
    tables = (
        "source",
        "architecture",
        "tokenizer",
        "prompts",
        "scheme",
        "verification",
        "tools",
        "files",
    )
    for name in tables:
        if not isinstance(body[name], dict):
            raise BundleError(f"{path}: {name} is not a table. Export again.")
    for name in ("target", "runtime", "fingerprint", "batch"):
        if not isinstance(body[name], str):
            raise BundleError(f"{path}: {name}={body[name]!r} is not text. Export again.")
    dims = body["dims"]
    if (
        not isinstance(dims, list)
        or not dims
        or not all(isinstance(dim, int) and dim > 0 for dim in dims)
    ):
        raise BundleError(f"{path}: dims={dims!r} is not a list of widths. Export again.")
    if set(body["tokenizer"]) != {"bos_id", "eos_id", "pad_id", "vocab_size", "max_tokens"}:
        raise BundleError(f"{path}: tokenizer={body['tokenizer']!r} lacks a field. Export again.")
    for name, value in body["tokenizer"].items():
        # BOS, one piece, EOS
        if type(value) is not int or value < (3 if name == "max_tokens" else 0):
            raise BundleError(f"{path}: tokenizer has {name}={value!r}. Export again.")
    for name, text in body["prompts"].items():
        if not isinstance(text, str):
            raise BundleError(f"{path}: prompts[{name!r}] is not text. Export again.")
    for name, facts in body["files"].items():
        if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise BundleError(f"{path}: files[{name!r}] must give bytes and sha256. Export again.")


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing. Copy the whole bundle folder again.") from error
    # RecursionError: a hundred thousand brackets
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(body, dict):
        raise BundleError(f"{path} is not a JSON table.")
    return body
