"""The files below a folder, and which of them are not to be read.

Nothing is left out without being named or counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egemma_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file or folder that is not read."""

    path: str
    reason: str  # "hidden", "excluded", "link", "index", "name", or one of `errors.Reason`
    detail: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A regular file, as its folder lists it."""

    path: str  # absolute, without links, "/" between its parts: the document's id
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def resolve_roots(roots: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the absolute paths of files and folders, without links, each once.

    Raises:
        InputError: one does not exist, or is no file or folder.
    """
    if isinstance(roots, (str, Path)):
        raise InputError(
            f"roots is one path, {str(roots)!r}.", hint="Pass a list of files and folders."
        )
    resolved: dict[str, None] = {}
    for root in roots:
        try:
            path = Path(root).expanduser().resolve(strict=True)
            mode = path.stat().st_mode
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round
            found = getattr(error, "strerror", None) or error
            raise InputError(
                f"{str(root)!r} cannot be read: {found}. Nothing was changed.",
                hint="To take what was read from it out of the index, remove those documents.",
            ) from error
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InputError(
                f"{str(root)!r} is neither a file nor a folder.", hint="Give files and folders."
            )
        resolved[path.as_posix()] = None
    return tuple(resolved)


def walk(
    root: str,
    *,
    exclude: Callable[[str, bool], bool],
    hidden: bool,
    is_index: Callable[[str], bool],
) -> Iterator[Found | Skipped]:
    """Yield everything below a root, in order of names; links are named, never followed.

    Args:
        root: from `resolve_roots`.
        exclude: (path below the root, whether it is a folder) -> leave it out; see `exclusions`.
        hidden: read what begins with a dot, too.
        is_index: whether a path is one of the index's own files.
    """
    if not os.path.isdir(root):
        yield _found(root, os.stat(root))
        return
    seen: set[tuple[int, int]] = set()  # a bind mount can make a folder its own child
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            facts = os.stat(folder, follow_symlinks=False)
            if (facts.st_dev, facts.st_ino) in seen and facts.st_ino:
                yield Skipped(
                    path=folder, reason="link", detail="it is a folder that was read already"
                )
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Skipped(
                path=folder,
                reason="unreadable",
                detail=f"the folder cannot be read ({error.strerror})",
            )
            continue
        below: list[str] = []
        for entry in entries:
            path = f"{folder.rstrip('/')}/{entry.name}"
            relative = path[len(root.rstrip("/")) + 1 :]
            item = _classify(entry, path, relative, exclude, hidden, is_index)
            if item is None:
                below.append(path)
            else:
                yield item
        folders += reversed(below)


# one return for each reason
def _classify(  # noqa: PLR0911
    entry: os.DirEntry[str],
    path: str,
    relative: str,
    exclude: Callable[[str, bool], bool],
    hidden: bool,
    is_index: Callable[[str], bool],
) -> Found | Skipped | None:
    """Say what an entry of a folder is; None is a folder to go into."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Skipped(
            path=os.fsencode(path).decode(errors="replace"),
            reason="name",
            detail="its name is not Unicode. Rename it",
        )
    try:
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.startswith(".") and not hidden:
            return Skipped(path=path, reason="hidden", detail="its name begins with a dot")
        if exclude(relative, is_folder):
            return Skipped(path=path, reason="excluded", detail="a pattern excludes it")
        if entry.is_symlink() or getattr(entry, "is_junction", bool)():
            return Skipped(
                path=path,
                reason="link",
                detail="it is a link, and links are not followed: give its target as a root",
            )
        if is_folder:
            return None
        if is_index(path):
            return Skipped(path=path, reason="index", detail="it belongs to the index")
        facts = entry.stat(follow_symlinks=False)
    except OSError as error:
        return Skipped(
            path=path, reason="unreadable", detail=f"it cannot be read ({error.strerror})"
        )
    if not stat.S_ISREG(facts.st_mode):
        return Skipped(
            path=path, reason="not a file", detail="it is a pipe, socket or device, not a file"
        )
    return _found(path, facts)


def _found(path: str, facts: os.stat_result) -> Found:
    return Found(
        path=path,
        size=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        ctime_ns=facts.st_ctime_ns,
        inode=facts.st_ino,
    )
