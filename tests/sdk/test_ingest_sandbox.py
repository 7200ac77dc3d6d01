"""The process that reads PDF and HTML: limited, replaced when it dies, never out of step."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from egemma.ingest import read_file, worker
from egemma.ingest.extracted import squeeze_blanks
from egemma.ingest.sandbox import Sandbox, check_libraries
from egemma_core.errors import MissingDependencyError
from tests.sdk.ingest_files import posix, refusal, with_html, write


@posix
@with_html
def test_a_process_that_dies_is_told_and_replaced(tmp_path: Path) -> None:
    page = write(tmp_path, "a.html", "<p>text")
    with Sandbox() as sandbox:
        assert read_file(page, sandbox=sandbox).text == "text"
        process = sandbox._process
        assert process is not None
        assert read_file(page, sandbox=sandbox).text == "text"
        assert sandbox._process is process  # one for all files
        os.kill(process.pid, signal.SIGSEGV)
        process.wait()
        assert read_file(page, sandbox=sandbox).text == "text"
    assert sandbox._process is None


@posix
@with_html
def test_a_process_that_hangs_without_computing_is_given_up(tmp_path: Path) -> None:
    page = write(tmp_path, "a.html", "<p>text")
    with Sandbox() as sandbox:
        read_file(page, sandbox=sandbox)
        assert sandbox._process is not None
        os.kill(sandbox._process.pid, signal.SIGSTOP)
        assert refusal(page, sandbox, time_s=0.3).reason == "too slow"
        assert read_file(page, sandbox=sandbox).text == "text"


@posix
@with_html
def test_the_process_is_limited_as_said() -> None:
    import resource

    with Sandbox() as sandbox:
        sandbox.extract("html", b"<p>text", memory_bytes=300 * 2**20, time_s=7.0, characters=100)
        assert sandbox._process is not None
        if sys.platform == "linux":
            pid = sandbox._process.pid
            assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == 300 * 2**20
            assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] == 0
            assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
            assert 7 <= resource.prlimit(pid, resource.RLIMIT_CPU)[0] <= 12
            assert os.getsid(pid) == pid  # Ctrl-C at the terminal does not reach it


def test_a_library_that_prints_does_not_disturb_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def extract_html(source: str, characters: int) -> dict[str, Any]:
        print("a warning on standard output")
        return {"text": source}

    request = (
        json.dumps(
            {"kind": "html", "bytes": 4, "memory_bytes": 1, "cpu_s": 1, "characters": 9}
        ).encode()
        + b"\ntext"
    )
    answers = io.BytesIO()
    shown = io.TextIOWrapper(answers)
    monkeypatch.setattr(worker, "extract_html", extract_html)
    monkeypatch.setattr(worker, "_limit_process", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(request)))
    monkeypatch.setattr(sys, "stdout", shown)
    worker.main()
    assert json.loads(answers.getvalue()) == {"text": "text"}


def test_a_missing_library_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError,
        match=r"PDF needs pypdf.*pip install 'egemma\[ingest\]'.*exclude=\['\*\.pdf'\]",
    ):
        check_libraries("pdf")
    check_libraries("markdown")
    with pytest.raises(MissingDependencyError, match="HTML needs selectolax"):
        read_file(write(tmp_path, "a.html", "<p>text"))


def test_blanks_are_squeezed_to_the_same_in_both_processes() -> None:
    assert (
        squeeze_blanks("a" + " " * 128 + "b" + " " * 129 + "c")
        == "a" + " " * 128 + "b" + " " * 128 + "c"
    )
