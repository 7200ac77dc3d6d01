"""What a document notes of its file, and whether the file is still like that.

The keys stand in the index file: see contract/index-format.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from egemma.ingest.config import ParseLimits
from egemma.ingest.files import FileBytes, read_bytes
from egemma.ingest.walk import Found

# A file system may keep times no finer than this (FAT: 2 s): what changed so shortly before it was
# read may change again unseen.
_CLOCK_STEP_NS = 2_000_000_000


def source_of(content: FileBytes, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a document notes of the file that it was made of."""
    return {
        "kind": "file",
        "size": content.size,
        "mtime_ns": content.mtime_ns,
        "ctime_ns": content.ctime_ns,
        "inode": str(content.inode),
        "sha256": content.sha256,
        "looked_ns": content.looked_ns,
        "recipe": dict(recipe),
    }


def is_unchanged(
    file: Found,
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    limits: ParseLimits,
    clock_ns: Callable[[], int],
) -> bool:
    """Whether a file is as `source` says: by size and times where these can be trusted, else bytes.

    They cannot where the file changed shortly before it was read, as it may have changed again
    within the same tick; or where the clock stood later then than it does now.

    Raises:
        UnreadableFileError: its bytes are needed, and cannot be read.
    """
    if source.get("recipe") != recipe or source.get("partial") or source.get("size") != file.size:
        return False
    looked_ns = source.get("looked_ns", 0)
    last_ns = max(file.mtime_ns, file.ctime_ns)
    noted = (source.get("mtime_ns"), source.get("ctime_ns"), source.get("inode"))
    same_times = noted == (file.mtime_ns, file.ctime_ns, str(file.inode))
    if same_times and last_ns + _CLOCK_STEP_NS < looked_ns <= clock_ns():
        return True
    return read_bytes(file.path, limits, follow=False).sha256 == source.get("sha256")
