"""The writing of a bundle folder: its files listed, its manifest last, and all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from egemma_core.bundle import FORMAT, FORMAT_VERSION, MANIFEST, Manifest
from egemma_core.errors import BundleError
from egemma_core.files import publish_folder, sha256_of, write_json


def fingerprint_of(
    *,
    weights: Mapping[str, str],
    tokenizer_sha256: str,
    prompts: Mapping[str, str],
    architecture: Mapping[str, Any],
    scheme: Mapping[str, Any],
) -> str:
    """Return one hash over everything that moves a vector.

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
    """Write manifest.json: the last file of a bundle, so that a folder without it is no bundle."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_json(folder / MANIFEST, body, error=BundleError)


@contextmanager
def atomic_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """Give a scratch folder that takes the place of `destination` when the block ends well.

    After an error in the block it is gone. A process that is killed leaves at most a folder named
    `.NAME.partial-*`, which is no bundle.

    Raises:
        BundleError: the destination exists and `replace` is false, or cannot be written.
    """
    destination = Path(destination)
    if destination.exists():
        if not replace:
            raise BundleError(
                f"{destination} exists.", hint="Choose another --out, or replace it with --force."
            )
        if any(destination.iterdir()) and not (destination / MANIFEST).is_file():
            raise BundleError(
                f"{destination} holds files that are not a bundle; it will not be replaced.",
                hint="Choose another --out.",
            )
    with _writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{destination.name}.partial-"
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        yield scratch
        with _writing(destination):
            scratch.chmod(0o755)  # mkdtemp makes private folders
            publish_folder(scratch, destination, replace=replace)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"{destination} cannot be written: {error}.") from error
