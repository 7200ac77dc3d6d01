"""A run that tests both ExecuTorchs: in two processes, reported as one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SDK = """
import os
import pytest

@pytest.fixture
def pte_bundle():
    return os.getpid()

@pytest.fixture(params=["pte_bundle", "other"])
def bundle(request):
    return request.param

def test_open(pte_bundle):
    print("process", os.getpid())
    {body}

def test_either(bundle):
    pass

def test_after(pte_bundle):
    pass
"""
EXPORT = """
def test_export():
    {body}
"""
Run = Callable[..., tuple[int, str]]
unix_only = pytest.mark.skipif(os.name != "posix", reason="egemma has no ExecuTorch elsewhere")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run pytest on two small rooms; returns (exit code, what it printed)."""
    for room in ("sdk", "export"):
        (tmp_path / "tests" / room).mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("own_process.py"), tmp_path / "tests")
    (tmp_path / "tests/__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (tmp_path / "tests/conftest.py").write_text(
        "from tests.own_process import pytest_configure, pytest_runtestloop\n"
    )

    def run(*arguments: str, sdk: str = "pass", export: str = "pass") -> tuple[int, str]:
        (tmp_path / "tests/sdk/test_sdk.py").write_text(SDK.format(body=sdk))
        (tmp_path / "tests/export/test_export.py").write_text(EXPORT.format(body=export))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@unix_only
def test_tests_that_open_a_pte_run_in_a_second_process_and_count_in_the_first(run: Run) -> None:
    """`os.getppid` of the second pytest is the first, whose parent is this process."""
    alone = f"assert os.getppid() == {os.getpid()}"
    code, printed = run("tests/sdk", sdk=alone)
    assert (code, "4 passed" in printed) == (0, True), printed
    code, printed = run(sdk=alone.replace("==", "!="))
    assert (code, "5 passed" in printed) == (0, True), printed
    code, printed = run("-k", "export or open", sdk=alone.replace("==", "!="))
    assert (code, "2 passed, 3 deselected" in printed) == (0, True), printed


@unix_only
def test_a_failure_in_the_second_process_is_shown_and_fails_the_run(run: Run) -> None:
    code, printed = run(sdk="assert pte_bundle == 0")
    assert code == 1
    assert "assert pte_bundle == 0" in printed
    assert "process " in printed, "what the test printed is shown"
    assert "1 failed, 4 passed" in printed
    code, printed = run("-x", sdk="assert pte_bundle == 0")
    assert code == 1
    assert "stopping after 1 failures" in printed
    assert "test_after" not in printed.partition("short test summary")[0]


@unix_only
def test_a_failure_in_the_first_process_stops_before_the_second(run: Run) -> None:
    code, printed = run("-x", export="assert False")
    assert code == 1
    assert "test_open" not in printed


@unix_only
def test_a_crash_of_the_second_process_fails_all_that_it_had_left(run: Run) -> None:
    code, printed = run(sdk="os.abort()")
    assert code == 1
    assert "3 failed, 2 passed" in printed
    assert "The second pytest ended with status -6" in printed


@unix_only
def test_a_collection_alone_runs_nothing(run: Run) -> None:
    code, printed = run("--collect-only", sdk="assert False")
    assert code == 0, printed
    assert "5 tests collected" in printed
    assert printed.count("test_open") == 1
