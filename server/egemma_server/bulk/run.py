"""The whole run: what is to be done, what is done already, and who does the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from egemma.identity import ModelIdentity
from egemma_core.bundle import Bundle, Manifest
from egemma_core.errors import ConfigError, EgemmaError, OutputError, PromptError
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim
from egemma_server.bulk.config import BulkConfig
from egemma_server.bulk.folder import (
    begin_job,
    check_apart,
    finished_shards,
    locked,
    refuse_errors,
)
from egemma_server.bulk.job import DEFAULT_SHARD_ROWS, BulkSettings, Job, Shard
from egemma_server.bulk.report import BulkReport
from egemma_server.bulk.shard_files import ShardResult, check_shard
from egemma_server.bulk.shards import ShardEmbedder, WorkerConfig, open_bundle
from egemma_server.bulk.source import (
    Source,
    check_columns,
    describe_file,
    find_files,
    require_pyarrow,
)

CallProgress = Callable[[int, int], None]


def embed_parquet(
    source: Source,
    out: str | Path,
    *,
    bundle: str | Path,
    text_column: str = "text",
    title_column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    keep_text: bool = True,
    role: str = "document",
    task: str | None = None,
    dim: int | None = None,
    overflow: Overflow = "error",
    shard_rows: int = DEFAULT_SHARD_ROWS,
    engine: str = "local",
    workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_mb: int = 256,
    on_error: str = "fail",
    progress: CallProgress | None = None,
) -> BulkReport:
    """Embed the texts of Parquet files into a folder of Parquet files.

    Stopped at any moment, kill -9 and power failure included, the same call goes on: finished files
    are checked and kept. Rows keep their order: file by file, `shard-000000.parquet` and so on,
    each with rows of one input file.

    Args:
        source: a Parquet file, a folder of them, or a list of files.
        out: a folder, new, empty, or of the same run.
        bundle: the bundle folder, or "builtin"; with Ray on several machines, at the same path on
            each, as are `source` and `out`.
        text_column, title_column: strings; a null title is none.
        id_column: of any type; None makes ids, "FILE:ROW" with rows counted from 0.
        keep: other columns that go along.
        keep_text: False leaves texts and titles out of the output.
        role: "document" or "query", which decides the prompt; `task` is of queries.
        dim: a trained width; None for the full one, which an index wants.
        overflow: "error", or "truncate" to read only the beginning of a text that is longer than
            the model reads.
        shard_rows: of one output file; a kill costs each worker the shard that it was in.
        engine: "local" in this process, or "ray": on the Ray that this process is connected to or
            that RAY_ADDRESS names, else on one started on this machine for the run.
        workers: processes of Ray, each with a model of its own.
        threads_per_worker: to compute with; None for this machine's CPUs, shared out among the
            workers.
        memory_mb: of each worker, for the activations of one batch.
        on_error: "fail" stops at the first row that cannot be embedded; "null" keeps it without a
            vector, with the reason in `error`. May differ from the run that began.
        progress: is called with rows done, those of earlier runs included, and rows in all.

    Raises:
        InputError, TokenLimitError: the input or a row cannot be used; file, row group and row are
            named.
        IndexMismatchError: `out` holds vectors of another model.
        IndexFileError: the job file in `out` is damaged.
        ConfigError: a setting cannot work, or `out` holds something else or is in use.
        OutputError: `out` cannot be written.
        MissingDependencyError: pyarrow or Ray is not installed.
        BundleError: there is no bundle, or a damaged one.
    """
    require_pyarrow()
    if isinstance(keep, str):
        raise ConfigError(f"keep={keep!r} is one str.", hint="Pass a list of column names.")
    settings = BulkSettings(
        text_column=text_column,
        title_column=title_column,
        id_column=id_column,
        keep=tuple(keep),
        keep_text=keep_text,
        role=role,
        task=task,
        dim=dim,
        overflow=overflow,
        shard_rows=shard_rows,
    )
    config = BulkConfig(
        source=source,
        out=Path(out).resolve(),
        bundle=bundle,
        settings=settings,
        engine=engine,
        workers=workers,
        threads_per_worker=threads_per_worker,
        memory_mb=memory_mb,
        on_error=on_error,
    )
    return run_bulk(config, progress)


def run_bulk(config: BulkConfig, progress: CallProgress | None = None) -> BulkReport:
    """Do, or go on with, one run; raises as `embed_parquet`."""
    out = config.out
    folder, names = find_files(config.source)
    check_apart(config.source, folder, names, out)
    bundle = open_bundle(config.bundle)
    job = _job_of(config.settings, bundle.manifest, folder, names)
    with locked(out):
        begin_job(out, job)
        shards = job.shards()
        done, damaged = finished_shards(out, job, shards)
        counter = _Counter(job.rows, sum(result.rows for result in done.values()), progress)
        if config.on_error == "fail":
            refuse_errors(out, shards, done, folder)
        pending = [shard for shard in shards if shard.number not in done]
        worker = WorkerConfig(
            job=job,
            folder=folder,
            out=out,
            bundle=config.bundle,
            threads=config.threads,
            memory_mb=config.memory_mb,
            on_error=config.on_error,
        )
        start = time.perf_counter()
        if pending and config.engine == "ray":
            results = _embed_on_ray(worker, pending, config.num_workers, counter)
        else:
            results = _embed_here(worker, bundle, pending, counter)
        for result in results:
            done[result.number] = result
        seconds = time.perf_counter() - start
        missing = [shard.name for shard in shards if shard.number not in done]
        if missing:
            raise EgemmaError(
                f"{missing[0]} in {out} was not finished.",
                hint="Finished shards are kept: run again to continue.",
            )
    return BulkReport(
        out=str(out),
        model=job.identity.name,
        fingerprint=job.identity.fingerprint,
        dim=job.dim,
        engine=config.engine,
        workers=config.num_workers,
        threads_per_worker=config.threads,
        rows=job.rows,
        tokens=sum(result.tokens for result in done.values()),
        truncated=sum(result.truncated for result in done.values()),
        errors=sum(result.errors for result in done.values()),
        shards=len(shards),
        embedded=len(pending),
        repaired=damaged,
        embedded_rows=sum(shard.rows for shard in pending),
        seconds=round(seconds, 3),
    )


class _Counter:
    """How many rows are done, for a progress bar."""

    def __init__(self, total: int, done: int, progress: CallProgress | None) -> None:
        self._total, self._done, self._progress = total, done, progress
        self.advance(0)

    def advance(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


def _job_of(settings: BulkSettings, manifest: Manifest, folder: Path, names: Sequence[str]) -> Job:
    """Return the job of this model and input, with width and task resolved."""
    identity = ModelIdentity.of(manifest)
    prompts = Prompts(by_name=manifest.prompts)
    task = None
    if settings.role == "query":
        task = settings.task or DEFAULT_TASK
        prompt = prompts.query(task)
    else:
        prompt = prompts.document()
        if settings.title_column is not None:
            try:
                prompts.document("a title")
            except PromptError as error:
                raise ConfigError(f"title_column={settings.title_column!r}: {error}") from error
    settings = replace(settings, dim=check_dim(settings.dim, identity.dims), task=task)
    check_columns(folder, names, settings.text_columns, settings.input_columns)
    return Job(
        identity=identity,
        target=manifest.target,
        prompt=prompt,
        settings=settings,
        files=tuple(describe_file(folder, name) for name in names),
    )


def _embed_here(
    worker: WorkerConfig, bundle: Bundle, pending: Sequence[Shard], counter: _Counter
) -> Iterator[ShardResult]:
    if not pending:  # nothing to load a model for
        return
    with ShardEmbedder(worker, bundle) as embedder:
        for shard in pending:
            yield embedder.embed(shard, counter.advance)


def _embed_on_ray(
    worker: WorkerConfig, pending: Sequence[Shard], num_workers: int, counter: _Counter
) -> Iterator[ShardResult]:
    from egemma_server.bulk.on_ray import embed_on_ray

    by_number = {shard.number: shard for shard in pending}
    with closing(embed_on_ray(worker, pending, num_workers)) as numbers:
        for number in numbers:
            # Read here too: a worker on another machine may have written to a disk that only it
            # sees.
            shard = by_number[number]
            path = worker.out / shard.name
            result = check_shard(path, worker.job, shard, read_data=False)
            if result is None:
                raise OutputError(
                    f"{path} was written by a worker, but cannot be read here.",
                    hint="Give an output folder that all machines share.",
                )
            counter.advance(result.rows)
            yield result
