"""The child process that reads PDF and HTML, which `sandbox` starts and ends.

A request is a line of JSON and then as many bytes as it says; the answer is a line of JSON: an
`Extracted`, or reason, problem and hint of a failure. See `Sandbox.extract`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from egemma.ingest.extracted import ExtractError
from egemma.ingest.html import extract_html
from egemma.ingest.pdf import extract_pdf


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library that prints must not speak in between
    while line := requests.readline():
        request = json.loads(line)
        answer = _answer(request, _read_exactly(requests, request["bytes"]))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer.get("reason") in ("memory", "damaged"):  # whatever it has left in memory goes
            return


def _answer(request: Mapping[str, Any], data: bytes) -> Mapping[str, Any]:
    try:
        _limit_process(request["memory_bytes"], request["cpu_s"])
        if request["kind"] == "pdf":
            return extract_pdf(
                data,
                pages=request["pages"],
                characters=request["characters"],
                stream_bytes=request["stream_bytes"],
            )
        return extract_html(data.decode("utf-8"), characters=request["characters"])
    except ExtractError as error:
        return {"reason": error.reason, "problem": error.problem, "hint": error.hint}
    except MemoryError:
        megabytes = request["memory_bytes"] // 2**20
        return {
            "reason": "memory",
            "problem": f"reading it takes more than {megabytes} MB of memory",
        }
    except RecursionError:
        return {"reason": "damaged", "problem": "it is nested too deeply"}
    # a parser may raise anything on a damaged file; the parent raises it as a typed error
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        return {"reason": "damaged", "problem": f"it is damaged ({found})"}


def _limit_process(memory_bytes: int, cpu_s: int) -> None:
    """Set the system's limits on this process, anew for each file.

    Windows has no such limits: there only the parent's clock and the parser's own bounds hold.
    """
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + cpu_s + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,  # it writes no file
    }
    # macOS accepts RLIMIT_AS only where it is far above what every process maps
    if sys.platform != "darwin":
        limits[resource.RLIMIT_AS] = memory_bytes
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (soft, hard))


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise SystemExit(f"{len(data)} of {count} bytes came")
    return data
