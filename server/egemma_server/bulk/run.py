"""The whole run: what is to be done, what is done already, and who does the rest."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from egemma.embedder import Embedder
from egemma.identity import ModelIdentity
from egemma.threads import available_cpus, check_threads
from egemma_core.bundle import Manifest
from egemma_core.errors import ConfigError, EgemmaError, IndexFileError, InputError, PromptError
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim
from egemma_server.bulk.job import (
    ATTEMPTS,
    DEFAULT_SHARD_ROWS,
    JOB_FILE,
    BulkSettings,
    Job,
    Shard,
    check_same_job,
    read_job,
    replacing,
)
from egemma_server.bulk.on_ray import embed_on_ray
from egemma_server.bulk.shards import ON_ERROR, ShardEmbedder, ShardResult, check_shard
from egemma_server.bulk.source import (
    Source,
    check_columns,
    describe_file,
    find_files,
    opened,
    place_of,
    require_pyarrow,
)

ENGINES = ("local", "ray")
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """What a folder holds after a run."""

    out: str
    model: str
    fingerprint: str
    dim: int
    engine: str
    workers: int
    threads_per_worker: int
    rows: int
    tokens: int
    truncated: int  # rows of which the model read only the beginning
    errors: int  # rows without a vector; their `error` says why
    shards: int
    embedded: int  # of the shards, by this run; the others were there
    repaired: int  # of those embedded, files that were there but damaged
    embedded_rows: int
    seconds: float  # that embedding took, start of the workers included

    @property
    def texts_per_s(self) -> float:
        return self.embedded_rows / self.seconds if self.embedded_rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"texts_per_s": round(self.texts_per_s, 1)}

    def to_text(self) -> str:
        lines = [
            f"{self.out}: {self.rows} rows in {self.shards} files, vectors of {self.dim} float32, "
            f"{self.tokens} tokens"
        ]
        if self.embedded < self.shards:
            lines.append(f"{self.shards - self.embedded} of the files were finished before")
        if self.repaired:
            lines.append(f"{self.repaired} damaged files were made again")
        if self.truncated:
            lines.append(
                f"{self.truncated} texts were longer than the model reads, only their beginning "
                "was embedded"
            )
        if self.errors:
            lines.append(f'{self.errors} rows have no vector; column "error" says why')
        if self.embedded_rows:
            lines.append(
                f"{self.embedded_rows} texts in {self.seconds:.1f} s, {self.texts_per_s:.0f} a "
                "second, "
                f"{self.workers} workers of {self.threads_per_worker} threads ({self.engine})"
            )
        return "\n".join(lines)


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
    progress: Callable[[int, int], None] | None = None,
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
        ConfigError: a setting cannot work, or `out` holds something else or is in use.
        IndexFileError: `out` cannot be written or read.
        RuntimeUnavailableError: pyarrow or Ray is not installed.
        BundleError: no bundle there, or a damaged one.
    """
    require_pyarrow()
    workers, threads = _check_engine(engine, workers, threads_per_worker)
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error={on_error!r}: one of {ON_ERROR}.")
    if isinstance(keep, str):
        raise ConfigError(f"keep={keep!r} is one str: pass a list of column names.")
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
    folder, names = find_files(source)
    out = Path(out).resolve()
    _check_apart(source, folder, names, out)
    with Embedder.open(bundle, threads=threads, memory_mb=memory_mb) as embedder:
        identity, manifest = ModelIdentity.of(embedder.manifest), embedder.manifest
    texts = [
        column for column in (settings.text_column, settings.title_column) if column is not None
    ]
    job = _job(identity, manifest, settings, folder, names, texts)
    with _locked(out):
        _begin(out, job)
        shards = job.shards()
        done, repaired = _finished(out, job, shards)
        counter = _Counter(job.rows, sum(result.rows for result in done.values()), progress)
        if on_error == "fail":
            _refuse_errors(out, shards, done, folder)
        pending = [shard for shard in shards if shard.number not in done]
        start = time.perf_counter()
        for result in _run(
            engine,
            job,
            folder,
            out,
            bundle,
            pending,
            workers,
            threads,
            memory_mb,
            on_error,
            counter,
        ):
            done[result.number] = result
        seconds = time.perf_counter() - start
        missing = [shard.name for shard in shards if shard.number not in done]
        if missing:
            raise EgemmaError(
                f"{out}: {missing[0]} was not finished. Finished shards are kept: run again to "
                "continue."
            )
    return BulkReport(
        out=str(out),
        model=job.identity.name,
        fingerprint=job.identity.fingerprint,
        dim=job.dim,
        engine=engine,
        workers=workers,
        threads_per_worker=threads,
        rows=job.rows,
        tokens=sum(result.tokens for result in done.values()),
        truncated=sum(result.truncated for result in done.values()),
        errors=sum(result.errors for result in done.values()),
        shards=len(shards),
        embedded=len(pending),
        repaired=repaired,
        embedded_rows=sum(shard.rows for shard in pending),
        seconds=round(seconds, 3),
    )


class _Counter:
    """Rows done, for whoever watches."""

    def __init__(self, total: int, done: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._done, self._progress = total, done, progress
        self.advance(0)

    def advance(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


def _run(
    engine: str,
    job: Job,
    folder: Path,
    out: Path,
    bundle: str | Path,
    pending: Sequence[Shard],
    workers: int,
    threads: int,
    memory_mb: int,
    on_error: str,
    counter: _Counter,
) -> Iterator[ShardResult]:
    if not pending:
        return
    if engine == "ray":
        by_number = {shard.number: shard for shard in pending}
        with closing(
            embed_on_ray(
                job,
                folder,
                out,
                bundle,
                pending,
                workers=workers,
                threads=threads,
                memory_mb=memory_mb,
                on_error=on_error,
            )
        ) as numbers:
            for number in numbers:
                # Looked at here too: a worker on another machine may have written to a disk that
                # only it sees.
                shard = by_number[number]
                result = check_shard(out / shard.name, job, shard, read_data=False)
                if result is None:
                    raise IndexFileError(
                        f"{out / shard.name} was written by a worker, but cannot be read here. "
                        "Give an output folder that "
                        "all machines share."
                    )
                counter.advance(result.rows)
                yield result
        return
    with ShardEmbedder(
        job, folder, out, bundle, threads=threads, memory_mb=memory_mb, on_error=on_error
    ) as embedder:
        for shard in pending:
            yield embedder.embed(shard, counter.advance)


def _check_engine(
    engine: str, workers: int | None, threads_per_worker: int | None
) -> tuple[int, int]:
    """Workers and threads of each."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: one of {ENGINES}.")
    if threads_per_worker is not None:
        check_threads(threads_per_worker)
    if engine == "local":
        if workers not in (None, 1):
            raise ConfigError(
                f"workers={workers!r} with engine='local', which is one process. Pass "
                "engine='ray', or threads_per_worker."
            )
        return 1, check_threads(threads_per_worker)
    if workers is None:
        raise ConfigError(
            "engine='ray' needs workers: how many processes, each with a model of its own. There "
            f"are {available_cpus()} CPUs here."
        )
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= 10_000:
        raise ConfigError(f"workers={workers!r}: a whole number from 1 to 10,000.")
    return workers, threads_per_worker or max(1, available_cpus() // workers)


def _job(
    identity: ModelIdentity,
    manifest: Manifest,
    settings: BulkSettings,
    folder: Path,
    names: Sequence[str],
    texts: Sequence[str],
) -> Job:
    prompts = Prompts(by_name=manifest.prompts)
    if settings.role == "query":
        task = settings.task or DEFAULT_TASK
        prompt = prompts.query(task)
    else:
        task, prompt = None, prompts.document()
        if settings.title_column is not None:
            try:
                prompts.document("a title")
            except PromptError as error:
                raise ConfigError(f"title_column={settings.title_column!r}: {error}") from error
    settings = replace(settings, dim=check_dim(settings.dim, identity.dims), task=task)
    check_columns(folder, names, texts, settings.input_columns)
    return Job(
        identity=identity,
        target=manifest.target,
        prompt=prompt,
        settings=settings,
        files=tuple(describe_file(folder, name) for name in names),
    )


def _check_apart(source: Source, folder: Path, names: Sequence[str], out: Path) -> None:
    """Refuse an output folder that the input lies in: the next run would embed its own output."""
    for name in names:
        if out in (folder / name).resolve().parents:
            raise ConfigError(
                f"{folder / name} lies in the output folder {out}. Give another output folder."
            )
    if (
        isinstance(source, (str, Path))
        and Path(source).is_dir()
        and folder.resolve() in out.parents
    ):
        raise ConfigError(
            f"{out} lies in the input folder {folder}: the next run would embed its own output. "
            "Give a folder outside of it."
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder.

    SQLite's lock is the one that works on every system and ends with its process, however that
    ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IndexFileError(f"{out} cannot be made: {error}.") from error
    try:
        lock = sqlite3.connect(out / _LOCK, timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise IndexFileError(f"{out} cannot be written: {error}.") from error
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise IndexFileError(f"{out} cannot be written: {error}.") from error
            raise ConfigError(
                f"{out}: another process is embedding into it. Wait for it, or give another output "
                "folder."
            ) from error
        yield
    finally:
        lock.close()


def _begin(out: Path, job: Job) -> None:
    """Make sure that `out` holds this job and nothing else."""
    stored = read_job(out)
    if stored is not None:
        check_same_job(out, stored, job)
    for path in out.iterdir():
        if path.name.startswith(".") and path.suffix == ".tmp":  # of a process that was killed
            path.unlink()
    own = {shard.name for shard in job.shards()} if stored is not None else set()
    foreign = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in own | {JOB_FILE, ATTEMPTS}
        and not path.name.startswith(_LOCK)
        and (stored is None or path.suffix == ".parquet")
    )
    if foreign:
        raise ConfigError(
            f"{out} holds {foreign[0]!r}, which is not of this run. Give a new or empty output "
            "folder."
        )
    if stored is None:
        with replacing(out / JOB_FILE) as file:
            file.write(job.to_json().encode())


def _finished(out: Path, job: Job, shards: Sequence[Shard]) -> tuple[dict[int, ShardResult], int]:
    """Sound shards that are there, and how many are there but damaged; those are made again."""
    done, damaged = {}, 0
    there = {path.name for path in out.glob("shard-*.parquet")}
    for shard in shards:
        if shard.name in there:
            result = check_shard(out / shard.name, job, shard, read_data=True)
            if result is None:
                damaged += 1
            else:
                done[shard.number] = result
    return done, damaged


def _refuse_errors(
    out: Path, shards: Sequence[Shard], done: dict[int, ShardResult], folder: Path
) -> None:
    for shard in shards:
        if shard.number in done and done[shard.number].errors:
            with opened(out / shard.name) as file:
                errors = file.read(columns=["error"], use_threads=False).column("error").to_pylist()
            row = next(row for row, error in enumerate(errors) if error is not None)
            raise InputError(
                f"{place_of(folder, shard.file, shard.start + row)}: {errors[row]} An earlier run "
                "with on_error='null' put this "
                f"row into {out / shard.name} without a vector. Pass on_error='null' again, or "
                "give another output folder."
            )
