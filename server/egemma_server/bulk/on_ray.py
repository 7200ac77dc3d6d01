"""The shards of a run on Ray Data: each worker is an actor with a model of its own, and reads and
writes its shards itself.

Only shard numbers travel through Ray. So nothing is copied through its object store, which may be
small, and what a worker has finished is on the disk, whatever happens to Ray.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from egemma.embedder import BUILTIN
from egemma_core.errors import ConfigError, EgemmaError, MissingDependencyError, OutputError
from egemma_server.bulk.job import ATTEMPTS, Shard
from egemma_server.bulk.shards import ShardEmbedder, WorkerConfig, open_bundle

# Ray's own least is 75 MiB; shard numbers need a few kB.
OBJECT_STORE_BYTES = 80 << 20
# Ray starts a worker that died again and again. A text that kills the process would never end.
MOST_ATTEMPTS = 3
# Asks for a token unless told otherwise.
FIRST_WITH_TOKEN = (2, 59)
_MOST_BLOCKS = 10_000


def embed_on_ray(
    worker: WorkerConfig, pending: Sequence[Shard], num_workers: int
) -> Generator[int]:
    """Embed shards, and give the number of each as it is finished, in any order.

    Raises:
        MissingDependencyError: Ray is not installed, or is too old.
        ConfigError: the cluster has no machine with so many CPUs.
        EgemmaError: what a worker raised, of its own class; or a worker was lost again and again.
    """
    if find_spec("ray") is None:
        raise MissingDependencyError(
            "engine='ray' needs Ray, which is not installed.",
            hint="Install it with `pip install 'egemma[ray]'`.",
        )
    attempts = worker.out / ATTEMPTS
    shutil.rmtree(attempts, ignore_errors=True)
    attempts.mkdir()
    with ray_running(cpus=num_workers * worker.threads, threads=worker.threads):
        import ray.data
        from ray.exceptions import RayError

        numbers = ray.data.from_items(
            [{"number": shard.number} for shard in pending],
            override_num_blocks=min(len(pending), _MOST_BLOCKS),
        )
        answers = numbers.map_batches(
            RayWorker,
            batch_size=1,
            num_cpus=worker.threads,
            compute=ray.data.ActorPoolStrategy(
                size=min(num_workers, len(pending)), max_tasks_in_flight_per_actor=1
            ),
            fn_constructor_args=(_from_anywhere(worker),),
        )
        try:
            with _quiet():
                for batch in answers.iter_batches(
                    batch_size=1, prefetch_batches=0, batch_format="numpy"
                ):
                    error = pickle.loads(batch["error"][0])
                    if error is not None:
                        raise error
                    yield int(batch["number"][0])
        except RayError as error:
            reason = str(error).strip().splitlines()
            raise EgemmaError(
                f"the run on Ray broke off: {reason[-1] if reason else type(error).__name__}.",
                hint="Finished shards are kept: run again to continue.",
            ) from error
    shutil.rmtree(attempts, ignore_errors=True)


def _from_anywhere(worker: WorkerConfig) -> WorkerConfig:
    """Return the config with a path of the bundle that does not depend on the current folder."""
    if worker.bundle == BUILTIN:
        return worker
    return replace(worker, bundle=Path(worker.bundle).resolve())


class RayWorker:
    """What Ray makes one of in each worker process.

    An error is given back as a value: raised, it would arrive wrapped in one of Ray's. The model is
    loaded with the first shard, so that an error in loading it is given back too.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._shards = {shard.number: shard for shard in config.job.shards()}
        self._embedder: ShardEmbedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Embed shards by their numbers.

        Returns:
            "number", and "error": what was raised, pickled; None where the shard is finished.
        """
        numbers = [int(number) for number in batch["number"]]
        return {
            "number": numbers,
            "error": [pickle.dumps(self._embed(self._shards[number])) for number in numbers],
        }

    def _embed(self, shard: Shard) -> EgemmaError | None:
        try:
            self._count_attempt(shard)
            if self._embedder is None:
                self._embedder = ShardEmbedder(self._config, open_bundle(self._config.bundle))
            self._embedder.embed(shard)
        except EgemmaError as error:
            return error
        return None

    def _count_attempt(self, shard: Shard) -> None:
        path = self._config.out / ATTEMPTS / shard.name
        try:
            with path.open("ab") as file:
                file.write(b".")
            attempts = path.stat().st_size
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error}.",
                hint="Let every machine write to the output folder.",
            ) from error
        if attempts > MOST_ATTEMPTS:
            raise EgemmaError(
                f"{shard.file.name}, rows {shard.start} to {shard.stop}: the worker that embeds "
                f"them died {MOST_ATTEMPTS} times.",
                hint="Give it more memory, or look for the text with engine='local'.",
            )


@contextmanager
def ray_running(*, cpus: int, threads: int) -> Iterator[None]:
    """Run a block with Ray: the one that this process is connected to, else that of RAY_ADDRESS,
    else one that is started on this machine for the block and stopped after it.

    Args:
        cpus: of a Ray that is started here.
        threads: of each worker; some machine of the cluster must have so many CPUs.

    Raises:
        MissingDependencyError: Ray is too old to be started safely.
        ConfigError: no machine of the cluster has so many CPUs.
        EgemmaError: Ray did not start.
    """
    loaded = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        _check_cluster(loaded, threads)
        yield
        return
    before = (
        signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        else None
    )
    # Ray and Ray Data ask here before they report to their makers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _require_token()
    import ray

    if (
        not address
        and tuple(int(part) for part in ray.__version__.split(".")[:2]) < FIRST_WITH_TOKEN
    ):
        raise MissingDependencyError(
            f"Ray {ray.__version__} would let whoever reaches this machine run code.",
            hint="Install a newer one with `pip install --upgrade 'egemma[ray]'`, or connect to a "
            "cluster of your own.",
        )
    scratch = None if address else tempfile.mkdtemp(prefix="egemma-ray-")
    try:
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=0,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=scratch,
                    _plasma_directory=None
                    if _shared_memory_bytes() > 2 * OBJECT_STORE_BYTES
                    else scratch,
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise EgemmaError(
                f"Ray did not start: {error}.",
                hint="Check RAY_ADDRESS and the free memory and disk, or use engine='local'.",
            ) from error
        _check_cluster(ray, threads)
        yield
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if before is not None:  # ray.init takes it over
            signal.signal(signal.SIGTERM, before)


def _require_token() -> None:
    """Let only processes of this run talk to the Ray that it starts.

    Ray's processes listen on every network interface, and whoever reaches them can run code. A
    token that only our own processes know keeps others out; Ray asks for one on its own since 2.59,
    and would otherwise leave it in the home folder.
    """
    own = (
        "RAY_AUTH_TOKEN" in os.environ
        or "RAY_AUTH_TOKEN_PATH" in os.environ
        or (Path.home() / ".ray" / "auth_token").exists()
    )
    if not own:
        # stays: Ray remembers the first one that it saw
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def _check_cluster(ray: Any, threads: int) -> None:
    most = max(
        (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0
    )
    if most < threads:
        raise ConfigError(
            f"threads_per_worker={threads}, but no machine of the Ray cluster has more than {most} "
            "CPUs: a worker would wait for ever.",
            hint="Lower threads_per_worker.",
        )


def _shared_memory_bytes() -> int:
    """Return how much of /dev/shm is free; containers often have 64 MB of it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's log lines and bars off our stderr, where they would tear our own."""
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars, context.print_on_execution_start = False, False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])
