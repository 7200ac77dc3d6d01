"""Exclude patterns mean what they mean in .gitignore, and settings that cannot work are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from egemma.index import Index
from egemma.ingest import IngestConfig
from egemma.ingest.exclude import exclusions
from egemma_core.errors import ConfigError
from tests.sdk.ingest_folders import make_folder, open_index, run


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path) as index:
        yield index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


PATTERNS = [
    "*.txt",
    "/a.txt",
    "build/",
    "/build/",
    "a/*/c",
    "a/**/c",
    "**/c",
    "a/**",
    "!keep.txt",
    "?.md",
    "[ab].txt",
    "[!ab].txt",
    "a*c*e",
    "\\*.txt",
    "/a/b",
    "a/b/",
    "doc*/",
    "*.t[wx]t",
    "[a-c]/",
    "**",
    "x y",
    "b",
    "*.TXT",
    "a?b",
    "!/a/",
    "/*",
    "!/a",
    "**/",
    "*/",
    "a/**/",
    "x/",
    "a[!x]c",
    "a[+-9]c",
    "[[]x",
    "[^b].txt",
    "#x",
    "\\#x",
    "\\!x",
    "b ",
    "b\\ ",
    "b /",
    "!*/",
    "!b/keep.txt",
]
PATHS = [
    "a.txt",
    "b.txt",
    "c.txt",
    "keep.txt",
    "a/b/c",
    "a/c",
    "a/x/y/c",
    "c",
    "build/x",
    "build.txt",
    "src/build/x",
    "a.md",
    "ab.md",
    "abcde",
    "a/b.txt",
    "*.txt",
    "docs/a.txt",
    "x y",
    "a/b/keep.txt",
    "b/keep.txt",
    "a.twt",
    "axb/c.txt",
    "A.TXT",
    "a/x/b/y",
    "[x",
    "#x",
    "!x",
    "b ",
    "d/b /x",
    "d/b/x",
    "a/d",
]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4))
@example(patterns=["a/**", "!a/b.txt"])
@example(patterns=["/*", "!/a", "/a/*", "!/a/b"])
@example(patterns=["*", "!*/", "!*.txt"])
@example(patterns=["build/", "!src/"])
@example(patterns=["a", "!a/"])
@example(patterns=["a[!x]c"])
def test_patterns_leave_out_what_git_ignores(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str]
) -> None:
    root = tmp_path_factory.mktemp("repository")
    clean = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True, env=clean)
    (root / ".git" / "info" / "exclude").write_text("\n".join(patterns) + "\n")
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "-z", "--stdin"],
        cwd=root,
        input="\0".join(PATHS).encode(),
        capture_output=True,
        check=False,
        env=clean,
    )
    # a comment is refused here: test_patterns_that_mean_nothing_are_refused
    excluded = exclusions([pattern for pattern in patterns if pattern != "#x"])

    def ours(path: str) -> bool:
        parts = path.split("/")
        return any(
            excluded("/".join(parts[:count]), count < len(parts))
            for count in range(1, len(parts) + 1)
        )

    assert {path for path in PATHS if ours(path)} == set(
        filter(None, done.stdout.decode().split("\0"))
    ), patterns


@pytest.mark.parametrize("pattern", ["", " ", "/", "//", "!", "!/", "[abc", "[b-a]", "#x", "x\\"])
def test_patterns_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="exclude pattern"):
        IngestConfig(exclude=(pattern,))


def test_a_line_break_in_a_name_hides_nothing_from_the_patterns() -> None:
    excluded = exclusions(["*.log", "secret/"])
    assert excluded("a\nb/c.log", False)
    assert excluded("a\nb/secret", True)
    assert not excluded("c.log\n", False)


@pytest.mark.filterwarnings("error")  # Python warns of [[ in a regular expression
def test_a_bracket_in_a_set_is_a_character() -> None:
    excluded = exclusions(["[[]draft]*", "a[[b]c"])
    assert excluded("[draft]1", False)
    assert excluded("a[c", False)


@pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 10}, {"chunk_tokens": True}, {"overlap_tokens": -1}, {"exclude": "*.py"}],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        IngestConfig(**settings)


def test_a_chunk_longer_than_the_model_reads_is_refused(index: Index, folder: Path) -> None:
    with pytest.raises(ConfigError, match="this model reads 100"):
        run(index, folder, IngestConfig(chunk_tokens=101))
