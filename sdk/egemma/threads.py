"""How many threads to compute with: what this process may use, not what the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from egemma_core.checks import whole_number

MOST_THREADS = 256


def check_threads(threads: int | None) -> int:
    """Return `threads`, or for None as many as this process has CPUs.

    Raises:
        ConfigError: not a whole number from 1 to MOST_THREADS.
    """
    if threads is None:
        return min(available_cpus(), MOST_THREADS)
    return whole_number("threads", threads, 1, MOST_THREADS, hint="None takes the CPUs here.")


def available_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use.

    These are the CPUs of its affinity mask, or fewer where its control group may use less time, as
    in a container.

    Args:
        root: where /proc and /sys are, for tests.
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # 1.5 CPUs keep two threads busy for most of the time; one thread would waste a third.
    return max(1, min([allowed, *(math.ceil(cpus) for cpus in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Read the CPUs granted by each control group, from this process's own to the topmost.

    Every one of them binds.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and controllers == "":
            mounts, read = ["sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = ["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"], _quota_v1
        else:
            continue
        own = Path(path.lstrip("/"))
        for mount in mounts:
            for group in (own, *own.parents):
                cpus = read(root / mount / group)
                if cpus is not None:
                    yield cpus


def _quota_v2(group: Path) -> float | None:
    words = _words(group / "cpu.max")  # "max 100000", or "150000 100000": microseconds per period
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(group: Path) -> float | None:
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # the topmost group has no such file
        return []
