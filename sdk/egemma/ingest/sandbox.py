"""The parent's side of the process that reads PDF and HTML.

The process is started once, limited in memory and time, and replaced after a file that broke it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from egemma_core.errors import MissingDependencyError

LIBRARIES = {"pdf": "pypdf", "html": "selectolax"}
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from egemma.ingest.worker import main; main()"
)


def check_libraries(kind: str) -> None:
    """Check that what reads files of this kind is installed.

    Raises:
        MissingDependencyError: it is not.
    """
    library = LIBRARIES.get(kind)
    if library is not None and importlib.util.find_spec(library) is None:
        raise MissingDependencyError(
            f"reading {kind.upper()} needs {library}, which is not installed.",
            hint="Install it with `pip install 'egemma[ingest]'`, or leave these files out with "
            f"exclude=['*.{kind}'].",
        )


class Sandbox:
    """A child process that extracts text.

    On Linux it has limits on memory, processor time and written files, on macOS all but the one on
    memory, on Windows none of them; the parent's clock and the parser's own bounds on decompression
    hold everywhere.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def extract(
        self, kind: str, data: bytes, *, memory_bytes: int, time_s: float, **limits: int
    ) -> dict[str, Any]:
        """Return the answer of `worker.main` for one file, or say how the process ended.

        Returns:
            The fields of `Extracted`; or those of a failure: reason, problem and perhaps hint.

        Raises:
            MissingDependencyError: the library for this kind is not installed.
        """
        check_libraries(kind)
        process = self._running()
        request = {
            "kind": kind,
            "bytes": len(data),
            "memory_bytes": memory_bytes,
            "cpu_s": int(time_s) + 1,
            **limits,
        }
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            process.kill()

        timer = threading.Timer(time_s, end)
        timer.daemon = True
        timer.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n" + data)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        # Ctrl-C in the middle of a message: the next one must not read its answer
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            if overdue.is_set() or answer.get("reason") in ("memory", "damaged"):
                self.close()
            return answer
        code = process.wait()
        self.close()
        return _failure(code, overdue.is_set(), memory_bytes, time_s)

    def close(self) -> None:
        """End the process; the next file starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:  # it flushes what a dead process will not read
                        continue

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # A session of its own: Ctrl-C is for the parent, which then ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=os.name == "posix",
            )
        return self._process


def _failure(code: int, overdue: bool, memory_bytes: int, time_s: float) -> dict[str, Any]:
    """Say why a process ended without an answer, from its exit code."""
    if overdue or (os.name == "posix" and code == -signal.SIGXCPU):
        return {"reason": "too slow", "problem": f"reading it takes more than {time_s:g} s"}
    if os.name == "posix" and code in (-signal.SIGKILL, -signal.SIGABRT):
        megabytes = memory_bytes // 2**20
        return {
            "reason": "memory",
            "problem": f"reading it takes more than {megabytes} MB of memory",
        }
    return {"reason": "damaged", "problem": f"the parser ended with code {code}"}
