"""Tests of the SDK's own ExecuTorch, run in a second process where the exporter's is tested too.

Exporting a .pte loads libexecutorch from the `executorch` package, and egemma's libegx brings a copy
of the same name: whichever comes second gets the libraries of the first, and egemma refuses that
(docs/decisions/0004). So where one run collects both kinds, the tests that open a .pte with egemma
run in a second pytest, whose reports the first one shows and counts as they come. A run that
collects only one kind stays in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

REPORTS = "EGEMMA_TEST_REPORTS"  # in the second process: the file descriptor that takes reports


def opens_pte(item: pytest.Item) -> bool:
    """Return whether a test takes the bundle that egemma runs on ExecuTorch."""
    parameters = getattr(item, "callspec", None)
    values = () if parameters is None else parameters.params.values()
    named = [value for value in values if isinstance(value, str)]  # of a fixture, to be fetched
    return "pte_bundle" in [*getattr(item, "fixturenames", ()), *named]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Take the tests that open a .pte out of a run that tests the exporter, and run them after it."""
    exporter = Path(__file__).parent / "export"
    moved: list[pytest.Item] = []
    if any(exporter in item.path.parents for item in session.items):
        moved = [item for item in session.items if opens_pte(item)]
        session.items[:] = [item for item in session.items if item not in moved]
    result = yield
    if moved and not session.config.option.collectonly:
        run_in_second_pytest(session, moved)
    return result


def run_in_second_pytest(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Run tests in a process of their own and report them in this one.

    Raises:
        Failed, Interrupted: as the first pytest ends, with -x or --maxfail.
    """
    config = session.config
    timeout_s = config.getoption("timeout", None)
    receive, send = os.pipe()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", ""),
                *(() if timeout_s is None else ("--timeout", str(timeout_s))),
                *(item.nodeid for item in items),
            ],
            cwd=config.rootpath,
            env=os.environ | {REPORTS: str(send)},
            pass_fds=[send],
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        os.close(send)
        try:
            with os.fdopen(receive, encoding="utf-8") as lines:
                left = show_reports(session, {item.nodeid: item for item in items}, lines)
            status = process.wait()
            printed.seek(0)
            output = printed.read()[-5000:]
        finally:
            process.kill()
            process.wait()
    for item in left:
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=f"The second pytest ended with status {status} before this test had. It "
            f"printed:\n{output}",
            when="call",
        )
        item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def show_reports(
    session: pytest.Session, items: dict[str, pytest.Item], lines: IO[str]
) -> list[pytest.Item]:
    """Hand the second pytest's reports to the first; return the tests that did not come to an end."""
    left = dict(items)
    for line in lines:
        report = session.config.hook.pytest_report_from_serializable(
            config=session.config, data=json.loads(line)
        )
        item = items[report.nodeid]
        if report.when == "setup":
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        item.ihook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            del left[item.nodeid]
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
    return list(left.values())


@dataclass(frozen=True)
class Reporter:
    """A plugin of the second pytest: sends each report to the first."""

    config: pytest.Config
    pipe: int

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        fields = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        data = f"{json.dumps(fields)}\n".encode()
        while data:
            data = data[os.write(self.pipe, data) :]


def pytest_configure(config: pytest.Config) -> None:
    pipe = os.environ.pop(REPORTS, None)
    if pipe is not None:
        os.set_inheritable(int(pipe), False)
        config.pluginmanager.register(Reporter(config, int(pipe)))
