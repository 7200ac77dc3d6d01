"""The shards of a run on Ray Data: each worker is an actor with a model of its own, and reads and
writes its shards itself.

Only shard numbers travel through Ray. So nothing is copied through its object store, which may be
small, and what a worker has finished is on the disk, whatever happens to Ray.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from egemma_core import errors
from egemma_core.errors import ConfigError, EgemmaError, RuntimeUnavailableError
from egemma_server.bulk.job import ATTEMPTS, Job, Shard
from egemma_server.bulk.shards import ShardEmbedder

# Ray's own least is 75 MiB; shard numbers need a few kB.
OBJECT_STORE_BYTES = 80 << 20
# Ray starts a worker that died again and again. A text that kills the process would never end.
MOST_ATTEMPTS = 3
# Asks for a token unless told otherwise.
FIRST_WITH_TOKEN = (2, 59)
_MOST_BLOCKS = 10_000


def embed_on_ray(
    job: Job,
    folder: Path,
    out: Path,
    bundle: str | Path,
    pending: Sequence[Shard],
    *,
    workers: int,
    threads: int,
    memory_mb: int,
    on_error: str,
) -> Generator[int]:
    """Embed shards; gives the number of each as it is finished, in any order.

    Raises:
        RuntimeUnavailableError: Ray is not installed.
        ConfigError: the cluster has no machine with so many CPUs.
        EgemmaError: as `ShardEmbedder`; or a worker was lost again and again.
    """
    if find_spec("ray") is None:
        raise RuntimeUnavailableError(
            "engine='ray' needs Ray. Install it with `pip install 'egemma[ray]'`."
        )
    shutil.rmtree(out / ATTEMPTS, ignore_errors=True)
    (out / ATTEMPTS).mkdir()
    with ray_running(cpus=workers * threads, threads=threads):
        import ray.data
        from ray.exceptions import RayError

        numbers = ray.data.from_items(
            [{"number": shard.number} for shard in pending],
            override_num_blocks=min(len(pending), _MOST_BLOCKS),
        )
        model = bundle if bundle == "builtin" else str(Path(bundle).resolve())
        answers = numbers.map_batches(
            RayWorker,
            batch_size=1,
            num_cpus=threads,
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, len(pending)), max_tasks_in_flight_per_actor=1
            ),
            fn_constructor_args=(
                job.to_json(),
                str(folder),
                str(out),
                str(model),
                threads,
                memory_mb,
                on_error,
            ),
        )
        try:
            with _quiet():
                for batch in answers.iter_batches(
                    batch_size=1, prefetch_batches=0, batch_format="numpy"
                ):
                    answer = json.loads(str(batch["answer"][0]))
                    if "error" in answer:
                        raise getattr(errors, answer["error"])(answer["message"])
                    yield int(answer["number"])
        except RayError as error:
            reason = str(error).strip().splitlines()
            raise EgemmaError(
                f"the run on Ray broke off: {reason[-1] if reason else type(error).__name__}. "
                "Finished shards are kept: run again "
                "to continue."
            ) from error
    shutil.rmtree(out / ATTEMPTS, ignore_errors=True)


class RayWorker:
    """What Ray makes one of in each worker process.

    The model is loaded with the first shard: an error then has a way back.
    """

    def __init__(
        self,
        job: str,
        folder: str,
        out: str,
        bundle: str,
        threads: int,
        memory_mb: int,
        on_error: str,
    ) -> None:
        self._job = Job.from_json(job, "the job from the driver")
        self._shards = {shard.number: shard for shard in self._job.shards()}
        self._folder, self._out, self._bundle = Path(folder), Path(out), bundle
        self._threads, self._memory_mb, self._on_error = threads, memory_mb, on_error
        self._embedder: ShardEmbedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"answer": [self._answer(int(number)) for number in batch["number"]]}

    def _answer(self, number: int) -> str:
        try:
            self._count_attempt(number)
            if self._embedder is None:
                self._embedder = ShardEmbedder(
                    self._job,
                    self._folder,
                    self._out,
                    self._bundle,
                    threads=self._threads,
                    memory_mb=self._memory_mb,
                    on_error=self._on_error,
                )
            self._embedder.embed(self._shards[number])
        except EgemmaError as error:
            return json.dumps({"error": type(error).__name__, "message": str(error)})
        return json.dumps({"number": number})

    def _count_attempt(self, number: int) -> None:
        shard = self._shards[number]
        path = self._out / ATTEMPTS / shard.name
        try:
            with path.open("ab") as file:
                file.write(b".")
            attempts = path.stat().st_size
        except OSError as error:
            raise errors.IndexFileError(
                f"{path} cannot be written: {error}. Every machine must be able to write to the "
                "output folder."
            ) from error
        if attempts > MOST_ATTEMPTS:
            raise EgemmaError(
                f"{shard.file.name}, rows {shard.start} to {shard.stop}: the worker that embeds "
                f"them died {MOST_ATTEMPTS} times. "
                "Give it more memory, or look for the text with engine='local'."
            )


@contextmanager
def ray_running(*, cpus: int, threads: int) -> Iterator[None]:
    """Ray: the one that this process is connected to; else that of RAY_ADDRESS; else one on this
    machine, started for this run and stopped after it.
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
        _keep_to_ourselves()
    import ray

    if (
        not address
        and tuple(int(part) for part in ray.__version__.split(".")[:2]) < FIRST_WITH_TOKEN
    ):
        raise RuntimeUnavailableError(
            f"Ray {ray.__version__} would let whoever reaches this machine run code. Install a "
            "newer one with "
            "`pip install --upgrade 'egemma[ray]'`, or connect to a cluster of your own."
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
            raise EgemmaError(f"Ray did not start: {error}") from error
        _check_cluster(ray, threads)
        yield
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if before is not None:  # ray.init takes it over
            signal.signal(signal.SIGTERM, before)


def _keep_to_ourselves() -> None:
    """Ray's processes listen on every network interface, and whoever reaches them can run code.

    A token that only our own processes know keeps others out; Ray asks for one on its own since
    2.59, and would otherwise leave it in the home folder.
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
            "CPUs: a worker would wait for "
            "ever. Lower it."
        )


def _shared_memory_bytes() -> int:
    """Free in /dev/shm; containers often have 64 MB of it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its log lines and bars on our stderr; they would tear our own."""
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
