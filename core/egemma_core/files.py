"""Durable writing: after a kill or a power cut there is the old file or the new one, whole.

Bytes are flushed before a name is given, and the folder after it. A process that is killed leaves
at most a hidden `.NAME.PID.*.part` beside its destination, which the next writer removes. Files are
told apart by `sha256_of`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from egemma_core.errors import EgemmaError, OutputError

_ADVICE = "Check the free space, and the permissions of its folder."


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, would survive a power cut.

    Windows has no handle of a folder and keeps names by itself: there a folder needs nothing.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_file(
    path: Path, *, mode: int = 0o666, error: type[EgemmaError] = OutputError
) -> Iterator[Path]:
    """Give an empty scratch file that takes the place of `path` when the block ends well.

    After an error in the block the scratch file is gone, and `path` is as it was.

    Args:
        mode: permissions of the new file, less what the process's umask takes away.
        error: raised where the scratch file cannot be made, flushed or renamed.

    Raises:
        OutputError, or `error`: the folder cannot be written or the disk is full; an OSError of
            the block counts as that.
    """
    scratch: Path | None = None
    try:
        remove_leftovers(path)
        made = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        scratch = made
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
        flush(path.parent)
    except OSError as problem:
        raise error(f"{path} cannot be written: {problem}.", hint=_ADVICE) from problem
    finally:
        if scratch is not None:
            for leftover in scratch.parent.glob(f"{glob.escape(scratch.name)}*"):
                leftover.unlink(missing_ok=True)


def write_file(path: Path, body: bytes, *, error: type[EgemmaError] = OutputError) -> None:
    """Write `body` as the whole of `path`, durably; raises as `replacing_file`."""
    with replacing_file(path, error=error) as scratch:
        scratch.write_bytes(body)


def write_json(path: Path, body: Any, *, error: type[EgemmaError] = OutputError) -> None:
    """Write `body` as JSON, indented by one, with a line end; raises as `replacing_file`."""
    text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, f"{text}\n".encode(), error=error)


def publish_folder(scratch: Path, destination: Path, *, replace: bool = False) -> None:
    """Rename a finished scratch folder to its name, once all its bytes are on the disk.

    Args:
        replace: put an existing folder aside first, and remove it after.

    Raises:
        OSError: `destination` exists and `replace` is false, or the disk refuses.
    """
    for path in [*scratch.rglob("*"), scratch]:
        flush(path)
    if replace and destination.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
        os.replace(destination, old / destination.name)
        os.replace(scratch, destination)
        shutil.rmtree(old)
    else:
        os.rename(scratch, destination)
    flush(destination.parent)


def remove_leftovers(path: Path) -> None:
    """Remove scratch files of `path` whose writers were killed; those of living ones stay."""
    if os.name == "nt":  # asking after a process can end it there
        return
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.\w+\.part.*")
    for found in path.parent.iterdir():
        if not (match := pattern.fullmatch(found.name)):
            continue
        try:
            os.kill(int(match[1]), 0)
        except (ProcessLookupError, OverflowError):
            found.unlink(missing_ok=True)
        except PermissionError:  # it lives, as another user's
            continue
