"""The output file of one shard: how it is written, and what one that lies there holds."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from egemma_core.errors import ConfigError, InputError
from egemma_core.files import replacing_file
from egemma_server.bulk.job import Job, Shard
from egemma_server.bulk.source import opened

METADATA_KEY = b"egemma"
_READ_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a finished shard holds."""

    number: int
    rows: int
    tokens: int  # of the whole texts, prompts included
    truncated: int  # rows of which the model read only the beginning
    errors: int  # rows without a vector


def write_shard(path: Path, table: Any, job: Job, shard: Shard, result: ShardResult) -> None:
    """Write a shard durably: after a kill or a power cut the file is whole or not there.

    Args:
        table: pyarrow.Table with the job's output columns.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    import pyarrow.parquet as pq

    leaves, columns = _as_read_back(table)
    table = table.replace_schema_metadata(_metadata(job, shard, result, columns))
    # Vectors do not shrink: zstd takes 8 % off them and five times as long as writing.
    compression = {leaf: "none" if leaf.startswith("vector.") else "zstd" for leaf in leaves}
    with replacing_file(path) as scratch:
        pq.write_table(
            table,
            scratch,
            row_group_size=max(1, job.settings.shard_rows),
            use_dictionary=False,
            write_page_checksum=True,
            compression=compression,
        )


def check_shard(path: Path, job: Job, shard: Shard, *, read_data: bool) -> ShardResult | None:
    """Return what a finished shard holds, or None where its file is damaged and must be made again.

    Args:
        read_data: read every page and compare its checksum; otherwise the end of the file only.

    Raises:
        ConfigError: the file is sound, but of another run.
    """
    import pyarrow as pa

    try:
        with opened(path) as file:
            return _check_open_shard(file, path, job, shard, read_data)
    except (InputError, pa.ArrowException, OSError):
        return None


def _check_open_shard(
    file: Any, path: Path, job: Job, shard: Shard, read_data: bool
) -> ShardResult | None:
    facts = _facts(file.schema_arrow)
    if facts is None:
        return None
    if facts["job"] != job.id or facts["result"]["number"] != shard.number:
        raise ConfigError(
            f"{path} belongs to another run, though its folder is of this one.",
            hint="Give another output folder.",
        )
    result = ShardResult(**facts["result"])
    rows = {shard.rows, result.rows, file.metadata.num_rows}
    if len(rows) > 1 or _columns(file.schema_arrow) != facts["columns"]:
        return None
    if read_data:
        batches = file.iter_batches(batch_size=_READ_ROWS, use_threads=False)
        if sum(batch.num_rows for batch in batches) != shard.rows:
            return None
    return result


def _facts(schema: Any) -> dict[str, Any] | None:
    """Return what `_metadata` wrote beside a shard's schema, or None where a bit of it changed.

    Parquet itself has no checksum there.
    """
    try:
        facts: dict[str, Any] = json.loads(schema.metadata[METADATA_KEY])
        crc32 = facts.pop("crc32")
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return facts if crc32 == zlib.crc32(_canonical(facts)) else None


def _metadata(
    job: Job, shard: Shard, result: ShardResult, columns: list[str]
) -> dict[bytes, bytes]:
    facts = {
        "fingerprint": job.identity.fingerprint,
        "model": job.identity.name,
        "target": job.target,
        "dim": job.dim,
        "prompt": job.prompt,
        "role": job.settings.role,
        "task": job.settings.task,
        "overflow": job.settings.overflow,
        "text_column": job.settings.text_column,
        "title_column": job.settings.title_column,
        "id_column": job.settings.id_column,
        "job": job.id,
        "source": shard.file.name,
        "source_sha256": shard.file.sha256,
        "first_row": shard.start,
        "columns": columns,
        "result": asdict(result),
    }
    return {METADATA_KEY: json.dumps(facts | {"crc32": zlib.crc32(_canonical(facts))}).encode()}


def _canonical(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def _columns(schema: Any) -> list[str]:
    return [f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True)]


def _as_read_back(table: Any) -> tuple[list[str], list[str]]:
    """Return how Parquet gives a table's columns back.

    Returns:
        Parquet's own names of the columns, those inside a list or struct with their path; and names
        and types of the columns.
    """
    import pyarrow.parquet as pq

    sample = io.BytesIO()
    pq.write_table(table.slice(0, 0), sample)
    with pq.ParquetFile(sample) as file:
        schema = file.metadata.schema
        leaves = [schema.column(number).path for number in range(file.metadata.num_columns)]
        return leaves, _columns(file.schema_arrow)
