"""How a bulk run is to be done: everything that a caller chooses, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from egemma.threads import available_cpus, check_threads
from egemma_core.checks import one_of, whole_number
from egemma_core.errors import ConfigError
from egemma_server.bulk.job import BulkSettings
from egemma_server.bulk.source import Source

ENGINES = ("local", "ray")
ON_ERROR = ("fail", "null")
MAX_WORKERS = 10_000


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """One bulk run.

    `settings` decide what the output files hold; everything else may differ when a run goes on.
    """

    source: Source
    out: Path
    bundle: str | Path  # a bundle folder, or "builtin"
    settings: BulkSettings
    engine: str = "local"
    workers: int | None = None  # processes of Ray; None: one, with the local engine
    threads_per_worker: int | None = None  # None: this machine's CPUs, shared out among the workers
    memory_mb: int = 256  # of each worker, for the activations of one batch
    on_error: str = "fail"

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ENGINES)
        one_of("on_error", self.on_error, ON_ERROR)
        whole_number("memory_mb", self.memory_mb, 1)
        if self.threads_per_worker is not None:
            check_threads(self.threads_per_worker)
        if self.engine == "local" and self.workers not in (None, 1):
            raise ConfigError(
                f"workers={self.workers!r} was given with engine='local', which is one process.",
                hint="Pass engine='ray', or threads_per_worker.",
            )
        if self.engine == "ray":
            whole_number(
                "workers",
                self.workers,
                1,
                MAX_WORKERS,
                hint="Ray starts so many processes, each with a model of its own; there are "
                f"{available_cpus()} CPUs here.",
            )

    @property
    def num_workers(self) -> int:
        """How many processes embed."""
        return self.workers or 1

    @property
    def threads(self) -> int:
        """How many threads each worker computes with."""
        if self.engine == "local":
            return check_threads(self.threads_per_worker)
        return self.threads_per_worker or max(1, available_cpus() // self.num_workers)
