"""The output folder of a bulk run: who may write to it, and what is finished in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from egemma_core.errors import ConfigError, InputError, OutputError
from egemma_core.files import remove_leftovers, write_file
from egemma_server.bulk.job import ATTEMPTS, JOB_FILE, Job, Shard, check_same_job, read_job
from egemma_server.bulk.shard_files import ShardResult, check_shard
from egemma_server.bulk.source import Source, opened, place_of

_LOCK = ".lock"
_PERMISSIONS = "Check the permissions of the folder, or give another one."


def check_apart(source: Source, folder: Path, names: Sequence[str], out: Path) -> None:
    """Refuse an output folder that the input lies in: the next run would embed its own output.

    Args:
        folder, names: the input, as `find_files` gives it.

    Raises:
        ConfigError: input and output lie in each other.
    """
    for name in names:
        if out in (folder / name).resolve().parents:
            raise ConfigError(
                f"{folder / name} lies in the output folder {out}.",
                hint="Give another output folder.",
            )
    given_as_folder = isinstance(source, (str, Path)) and Path(source).is_dir()
    if given_as_folder and folder.resolve() in out.parents:
        raise ConfigError(
            f"{out} lies in the input folder {folder}: the next run would embed its own output.",
            hint="Give a folder outside of it.",
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder where it is missing, and keep every other run out of it.

    SQLite's lock is the one that works on every system and ends with its process, however that
    ends.

    Raises:
        ConfigError: another run holds the folder.
        OutputError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error}.", hint=_PERMISSIONS) from error
    try:
        lock = sqlite3.connect(out / _LOCK, timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise OutputError(f"{out} cannot be written: {error}.", hint=_PERMISSIONS) from error
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise OutputError(
                    f"{out} cannot be written: {error}.", hint=_PERMISSIONS
                ) from error
            raise ConfigError(
                f"another process is embedding into {out}.",
                hint="Wait for it, or give another output folder.",
            ) from error
        yield
    finally:
        lock.close()


def begin_job(out: Path, job: Job) -> None:
    """Make sure that the folder holds this job and nothing else, and write its job file.

    Raises:
        ConfigError: the folder holds something else, or a run of other settings or input.
        IndexMismatchError: it holds vectors of another model.
        IndexFileError: its job file is damaged.
        OutputError: it cannot be written.
    """
    stored = read_job(out)
    own = {JOB_FILE, ATTEMPTS}
    if stored is None:
        remove_leftovers(out / JOB_FILE)
    else:
        check_same_job(out, stored, job)
        own |= {shard.name for shard in job.shards()}
    foreign = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in own
        and not path.name.startswith((_LOCK, f".{JOB_FILE}."))
        and (stored is None or path.suffix == ".parquet")
    )
    if foreign:
        raise ConfigError(
            f"{out} holds {foreign[0]!r}, which is not of this run.",
            hint="Give a new or empty output folder.",
        )
    if stored is None:
        write_file(out / JOB_FILE, job.to_json().encode())


def finished_shards(
    out: Path, job: Job, shards: Sequence[Shard]
) -> tuple[dict[int, ShardResult], int]:
    """Read every shard that lies in the folder.

    Returns:
        What the sound ones hold, by number; and how many are damaged and must be made again.
    """
    done: dict[int, ShardResult] = {}
    damaged = 0
    names = {path.name for path in out.glob("shard-*.parquet")}
    for shard in shards:
        if shard.name in names:
            result = check_shard(out / shard.name, job, shard, read_data=True)
            if result is None:
                damaged += 1
            else:
                done[shard.number] = result
    return done, damaged


def refuse_errors(
    out: Path, shards: Sequence[Shard], done: dict[int, ShardResult], folder: Path
) -> None:
    """Refuse finished shards in which an earlier run left rows without a vector.

    Args:
        folder: of the input.

    Raises:
        InputError: there is such a row; names the first.
    """
    for shard in shards:
        if shard.number in done and done[shard.number].errors:
            with opened(out / shard.name) as file:
                errors = file.read(columns=["error"], use_threads=False).column("error").to_pylist()
            row = next(row for row, error in enumerate(errors) if error is not None)
            raise InputError(
                f"{place_of(folder, shard.file, shard.start + row)}: {errors[row]} An earlier run "
                f"with on_error='null' put this row into {out / shard.name} without a vector.",
                hint="Pass on_error='null' again, or give another output folder.",
            )
