"""Free space on a disk, before work that needs much of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from egemma_core.errors import IndexFileError

_MARGIN = 1.05  # on an estimate of disk space


def check_room(folder: Path, needed: float, what: str) -> None:
    """Check that the disk of a folder has enough space.

    Args:
        needed: bytes, as an estimate.
        what: needs them, for the message.

    Raises:
        IndexFileError: less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * _MARGIN:
        raise IndexFileError(
            f"{folder} has {free / 1e6:.0f} MB free: {what} needs about "
            f"{needed * _MARGIN / 1e6:.0f} MB.",
            hint="Free some space and repeat it.",
        )


def folder_of_vacuum() -> Path:
    """Return the folder where SQLite's VACUUM writes the new file first.

    Source: https://sqlite.org/tempfiles.html, section 5.
    """
    candidates = (
        [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp"]
        if os.name == "posix"
        else []
    )
    for folder in candidates:
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    return Path(tempfile.gettempdir())
