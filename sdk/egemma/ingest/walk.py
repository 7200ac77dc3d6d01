"""Which files a folder has, and which of them are wanted.

Nothing is left out without being named or counted.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egemma_core.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file or folder that is not read."""

    path: str
    reason: str  # "hidden", "excluded", "link", "index", "name", or one of `parse.Reason`
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
    """Absolute paths without links, each once.

    Raises:
        InputError: one does not exist, or is no file or folder.
    """
    if isinstance(roots, (str, Path)):
        raise InputError(f"roots is one path, {str(roots)!r}: pass a list of files and folders.")
    resolved: dict[str, None] = {}
    for root in roots:
        try:
            path = Path(root).expanduser().resolve(strict=True)
            mode = path.stat().st_mode
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round
            raise InputError(
                f"{str(root)!r} cannot be read: {getattr(error, 'strerror', None) or error}. "
                "Nothing was changed; to take what was "
                "read from it out of the index, remove those documents."
            ) from error
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InputError(
                f"{str(root)!r} is neither a file nor a folder. Give files and folders."
            )
        resolved[path.as_posix()] = None
    return tuple(resolved)


def walk(
    root: str, *, exclude: Callable[[str, bool], bool], hidden: bool, own: Callable[[str], bool]
) -> Iterator[Found | Skipped]:
    """Everything below a root, in order of names; links are named, never followed.

    Args:
        root: from `resolve_roots`.
        exclude: (path below the root, whether it is a folder) -> leave it out; see `exclusions`.
        hidden: read what begins with a dot, too.
        own: whether a path is one of the index's own files.
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
            verdict = _judge(entry, path, path[len(root.rstrip("/")) + 1 :], exclude, hidden, own)
            if verdict is None:
                below.append(path)
            else:
                yield verdict
        folders += reversed(below)


def _judge(  # noqa: PLR0911
    entry: os.DirEntry[str],
    path: str,
    relative: str,
    exclude: Callable[[str, bool], bool],
    hidden: bool,
    own: Callable[[str], bool],
) -> Found | Skipped | None:
    """None is a folder to go into."""
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
        if own(path):
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


def exclusions(patterns: Sequence[str]) -> Callable[[str, bool], bool]:
    """Whether patterns leave a path out, by the rules of .gitignore: "*.log" anywhere, "/build/" at
    the top, "docs/**/draft*", "!keep.log".

    Raises:
        ConfigError: a pattern that cannot work.
    """
    if isinstance(patterns, str):
        raise ConfigError(f"exclude={patterns!r}: pass a list of patterns.")
    rules = [
        (re.compile(regex), folders_only, keep)
        for regex, folders_only, keep in map(_rule, patterns)
    ]

    def excluded(path: str, is_folder: bool) -> bool:
        verdict = False
        for regex, folders_only, keep in rules:
            if (is_folder or not folders_only) and regex.fullmatch(path):
                verdict = not keep
        return verdict

    return excluded


def _rule(pattern: str) -> tuple[str, bool, bool]:
    keep = pattern.startswith("!")
    bare = pattern[1:] if keep else pattern
    folders_only = bare.endswith("/")
    bare = bare.rstrip("/") if folders_only else bare
    if not bare.strip("/"):
        raise ConfigError(
            f"exclude pattern {pattern!r} names nothing. Write for example '*.log' or '/build/'."
        )
    anywhere = "/" not in bare
    bare = bare.removeprefix("/")
    regex, at = "(?:.*/)?" if anywhere else "", 0
    while at < len(bare):
        if bare.startswith("**/", at) and (at == 0 or bare[at - 1] == "/"):
            regex, at = regex + "(?:.*/)?", at + 3
        elif bare[at:] == "**" and bare[at - 1 : at] == "/":
            regex, at = regex + ".+", at + 2
        elif bare[at] == "*":
            while bare[at : at + 1] == "*":
                at += 1
            regex += "[^/]*"
        elif bare[at] == "?":
            regex, at = regex + "[^/]", at + 1
        elif bare[at] == "[":
            end = bare.find("]", at + 2 + (bare[at + 1 : at + 2] in ("!", "^")))
            if end < 0:
                raise ConfigError(
                    f"exclude pattern {pattern!r}: its [ has no ]. Write \\[ for the character "
                    "itself."
                )
            inner = bare[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            inner = "^" + inner[1:] if inner[0] in "!^" else inner
            regex, at = regex + f"(?!/)[{inner}]", end + 1
        else:
            at += bare[at] == "\\" and at + 1 < len(bare)
            regex, at = regex + re.escape(bare[at]), at + 1
    try:
        re.compile(regex)
    except re.error as error:
        raise ConfigError(f"exclude pattern {pattern!r} cannot be understood: {error}.") from error
    return f"(?s:{regex})", folders_only, keep
