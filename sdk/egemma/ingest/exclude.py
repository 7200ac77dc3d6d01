"""Which paths the exclude patterns leave out, by the rules of .gitignore.

The library pathspec translates the patterns. It is made for complete paths of files, and there a
pattern matches whatever is below a folder, too. `walk` asks on its way down, at every folder and
file, so here a pattern has to match the path itself, as in git.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from egemma_core.errors import ConfigError

# An escaped character or a set of characters, in the regular expressions that pathspec builds.
_ESCAPE_OR_SET = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)


def exclusions(patterns: Sequence[str]) -> Callable[[str, bool], bool]:
    """Return the rule that says whether patterns leave a path out.

    Args:
        patterns: "*.log" anywhere, "/build/" at the top, "docs/**/draft*", "!keep.log"; of those
            that match a path, the last one decides.

    Returns:
        (path below the root, whether it is a folder) -> leave it out, when no folder above it is
        left out.

    Raises:
        ConfigError: a pattern cannot match anything.
    """
    if isinstance(patterns, str):
        raise ConfigError(f"exclude={patterns!r} is a str.", hint="Pass a list of patterns.")
    for_files: list[str] = []
    for_folders: list[str] = []
    for pattern in patterns:
        bare, folders_only = _split_slash(pattern)
        _check(pattern, bare)
        for_folders.append(bare)
        if not folders_only:
            for_files.append(bare)
    # "simple" is the engine that knows lookahead
    files = GitIgnoreSpec.from_lines(for_files, _Pattern, backend="simple")
    folders = GitIgnoreSpec.from_lines(for_folders, _Pattern, backend="simple")

    def excluded(path: str, is_folder: bool) -> bool:
        return (folders if is_folder else files).match_file(path)

    return excluded


class _Pattern(GitIgnoreSpecPattern):
    """A pattern that matches a path itself, and neither its folder nor a slash by a set."""

    __slots__ = ()

    @classmethod
    def pattern_to_regex(cls, pattern: Any) -> tuple[Any, bool | None]:
        regex, include = super().pattern_to_regex(pattern)
        if regex is None:
            return None, include
        itself = r"\Z" if regex.endswith("$)") else ""  # else "a/**", which means all below
        # s: the name of a folder may hold a line break
        return f"(?s:{_ESCAPE_OR_SET.sub(_set_without_slash, regex)}){itself}", include


def _set_without_slash(found: re.Match[str]) -> str:
    """Return a set of characters that does not match "/": "a[!b]c" is not "a/c"."""
    part = found[0]
    if part.startswith("\\") or part == "[^/]":
        return part
    return "(?!/)[" + part[1:].replace("[", "\\[")  # Python warns of a bare [ in a set


def _split_slash(pattern: str) -> tuple[str, bool]:
    """Return a pattern without the slash at its end, and whether there was one."""
    pattern = pattern if pattern.endswith("\\ ") else pattern.rstrip()
    bare = pattern.rstrip("/")
    folders_only = bare != pattern
    if folders_only and bare.endswith(" ") and not bare.endswith("\\ "):
        bare = f"{bare[:-1]}\\ "  # pathspec drops blanks at the end
    return bare, folders_only


def _check(pattern: str, bare: str) -> None:
    try:
        problem = "" if _Pattern(bare).include is not None else "it matches no path"
    except (ValueError, re.error) as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"exclude pattern {pattern!r} cannot be used: {problem}.",
            hint="Write for example '*.log' or '/build/'; a character that is meant as itself has "
            "a '\\' before it.",
        )
