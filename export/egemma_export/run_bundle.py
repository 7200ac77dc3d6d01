"""The finished bundle, run by the SDK in a process of its own.

As a user would run it: without torch, and with the SDK's own ExecuTorch library, which cannot share
a process with the exporter's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from egemma_core.errors import ExportError

BENCH_TOKENS = (16, 64, 256)
BENCH_RUNS = 5


def verify(folder: Path, threads: int | None) -> dict[str, Any]:
    """Return what `egemma verify` says of a bundle; it may say that the bundle failed."""
    return _run("verify", folder, threads)


def bench(folder: Path, threads: int | None, max_tokens: int) -> dict[str, Any]:
    """Return what `egemma bench` measures of a bundle, at the lengths that its model reads."""
    lengths = ",".join(str(tokens) for tokens in BENCH_TOKENS if tokens <= max_tokens)
    return _run("bench", folder, threads, "--tokens", lengths, "--runs", str(BENCH_RUNS))


def _run(command: str, folder: Path, threads: int | None, *more: str) -> dict[str, Any]:
    """Run `egemma COMMAND FOLDER --json` and return what it prints.

    Raises:
        ExportError: it printed no JSON table; gives the last line of its errors.
    """
    arguments = [sys.executable, "-m", "egemma", command, str(folder), "--json", *more]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    try:
        body = json.loads(ended.stdout)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise ExportError(
        f"the finished file could not be run: `egemma {command}` ended with {ended.returncode}: "
        f"{last}"
    )
