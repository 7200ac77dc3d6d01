"""The vectors of a bulk run into an index, without embedding anything again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from egemma.identity import check_same_model
from egemma_core.errors import ConfigError, DimensionError, IndexFileError, InputError
from egemma_server.bulk.job import ID_COLUMN, JOB_FILE, Job, Shard, read_job
from egemma_server.bulk.shard_files import check_shard
from egemma_server.bulk.source import opened, require_pyarrow

if TYPE_CHECKING:
    from egemma.index import Index

_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was put into an index."""

    rows: int  # documents added or replaced
    truncated: int  # of them, texts of which the model read only the beginning
    skipped: int  # rows without a vector, which stay out

    def to_dict(self) -> dict[str, int]:
        """Return all of it, as JSON takes it."""
        return asdict(self)


def load_parquet(
    index: Index,
    folder: str | Path,
    *,
    skip_errors: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Put every row of a finished bulk run into an index of the same model; columns that were kept
    become metadata.

    Each batch is stored whole or not. After an interruption call it again: a row that is stored
    already is replaced by itself.

    Args:
        folder: what `embed_parquet` wrote.
        skip_errors: leave rows without a vector out, and count them; otherwise they are refused
            before anything is stored.
        progress: is called with rows done and rows in all.

    Raises:
        IndexMismatchError: the index is of another model.
        IndexFileError: the folder is unfinished or damaged.
        DimensionError: the vectors are shorter than the index's.
        ConfigError: the run was of queries.
        InputError: an id comes twice, or a row cannot be stored.
    """
    require_pyarrow()
    folder = Path(folder)
    job = _job_for(index, folder)
    shards = job.shards()
    truncated = errors = 0
    for shard in shards:
        result = check_shard(folder / shard.name, job, shard, read_data=True)
        if result is None:
            raise IndexFileError(
                f"{folder / shard.name} is missing or damaged.",
                hint="Run the same embedding again: only what is missing is done.",
            )
        truncated, errors = truncated + result.truncated, errors + result.errors
    if errors and not skip_errors:
        raise InputError(
            f'{errors} of {job.rows} rows have no vector in {folder}; their column "error" says '
            "why.",
            hint="Mend the input and embed it again, or pass skip_errors=True to leave them out.",
        )
    _check_ids(folder, job, shards)
    done = added = 0
    for shard in shards:
        for first, batch in _batches(folder, shard):
            added += _add(index, job, batch, f"{folder / shard.name}, row {first} and after")
            done += batch.num_rows
            if progress is not None:
                progress(done, job.rows)
    return LoadReport(rows=added, truncated=truncated, skipped=errors)


def _job_for(index: Index, folder: Path) -> Job:
    """Return the job of a folder whose vectors this index can keep; raises as `load_parquet`."""
    job = read_job(folder)
    if job is None:
        raise IndexFileError(
            f"{folder} has no {JOB_FILE}: it is not the output of a bulk run.",
            hint="Give such a folder.",
        )
    check_same_model(
        folder,
        job.identity,
        index.identity,
        "Embed the texts again with the index's model, or load into another index.",
    )
    if job.settings.role != "document":
        raise ConfigError(
            f"{folder} holds vectors of queries, and what is to be found is embedded with "
            "role='document'.",
            hint="Embed the texts again.",
        )
    if job.dim != index.identity.dim:
        raise DimensionError(
            f"{folder} holds vectors of {job.dim}, an index keeps the full {index.identity.dim}.",
            hint="Embed the texts again with dim=None.",
        )
    return job


def _add(index: Index, job: Job, batch: Any, where: str) -> int:
    """Put a batch of a shard into the index; return how many rows of it have a vector."""
    import pyarrow.compute as pc

    settings = job.settings
    batch = batch.filter(pc.is_null(batch.column("error")))
    if not batch.num_rows:
        return 0
    column = {name: batch.column(name) for name in batch.schema.names}
    flat = column["vector"].flatten().to_numpy()
    texts = column[settings.text_column].to_pylist() if settings.keep_text else None
    titles = (
        column[settings.title_column].to_pylist()
        if settings.keep_text and settings.title_column is not None
        else None
    )
    kept = [column[name].to_pylist() for name in settings.keep]
    metadata = (
        [dict(zip(settings.keep, values, strict=True)) for values in zip(*kept, strict=True)]
        if kept
        else None
    )
    try:
        index.add_vectors(
            np.ascontiguousarray(flat.reshape(batch.num_rows, job.dim), np.float32),
            ids=_id_strings(column[_id_column(job)]),
            texts=texts,
            titles=titles,
            metadata=metadata,
            num_tokens=column["num_tokens"].to_pylist(),
            truncated=column["truncated"].to_pylist(),
        )
    except InputError as error:
        raise error.within(where) from error
    return int(batch.num_rows)


def _batches(folder: Path, shard: Shard) -> Iterator[tuple[int, Any]]:
    first = 0
    with opened(folder / shard.name) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            yield first, batch
            first += batch.num_rows


def _id_column(job: Job) -> str:
    return job.settings.id_column or ID_COLUMN


def _id_strings(column: Any) -> list[str]:
    """Return ids as an index takes them: strings, and whole numbers in decimal.

    Raises:
        InputError: they are something else.
    """
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        return [str(value) for value in column.to_pylist()]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return list(column.to_pylist())
    raise InputError(
        f"the ids are {column.type}, and an index takes strings or whole numbers.",
        hint="Embed with another id_column.",
    )


def _check_ids(folder: Path, job: Job, shards: list[Shard]) -> None:
    """Refuse an id that two rows have: the second would replace the first in the index."""
    if job.settings.id_column is None:
        return  # made from file and row
    import pyarrow as pa
    import pyarrow.compute as pc

    name = job.settings.id_column
    pieces = []
    for shard in shards:
        with opened(folder / shard.name) as file:
            column = file.read(columns=[name], use_threads=False).column(name)
        pieces += [
            chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
            for chunk in column.chunks
        ]
    if not pieces:
        return
    ids = pa.chunked_array(pieces)
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        raise InputError(
            f"the id {twice[0]['values'].as_py()!r} comes {twice[0]['counts'].as_py()} times in "
            f"{folder}; the last would replace the others.",
            hint="Make the ids unique, or embed without id_column.",
        )
