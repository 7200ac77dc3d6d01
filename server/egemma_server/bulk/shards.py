"""One shard: read its rows, embed them, write its file.

Both engines call this, so both write the same.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.embedder import BUILTIN, BUILTIN_FOLDER, WINDOW_TEXTS, Embedder
from egemma_core.bundle import read_bundle
from egemma_core.errors import BundleError, ConfigError, EgemmaError, InputError, TokenLimitError
from egemma_core.prompts import DEFAULT_TASK
from egemma_server.bulk.job import Job, Shard, replacing
from egemma_server.bulk.source import opened, place_of, read_rows

METADATA_KEY = b"egemma"
ON_ERROR = ("fail", "null")
_NOT_UTF8 = "the text is not valid UTF-8"


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a finished shard holds."""

    number: int
    rows: int
    tokens: int  # of the whole texts, prompts included
    truncated: int  # rows of which the model read only the beginning
    errors: int  # rows without a vector


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Some rows, embedded."""

    vectors: NDArray[np.float32]  # (B, dim), zero where there is an error
    num_tokens: list[int | None]
    truncated: list[bool | None]
    errors: list[str | None]


class ShardEmbedder:
    """A bundle, open, and the job that it works on.

    Args:
        folder: of the input.
        out: where shards go.
        on_error: "fail" raises at the first row that cannot be embedded, "null" writes it without a
            vector.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        out: Path,
        bundle: str | Path,
        *,
        threads: int | None,
        memory_mb: int,
        on_error: str,
    ) -> None:
        self.job, self.folder, self.out, self.on_error = job, folder, out, on_error
        opened_bundle = read_bundle(BUILTIN_FOLDER if bundle == BUILTIN else bundle)
        if opened_bundle.manifest.fingerprint != job.identity.fingerprint:
            raise BundleError(
                f"{bundle} is not {job.identity.name}, which this run began with. Put the same "
                "bundle on every machine."
            )
        self._tokenizer, self._prompts = opened_bundle.tokenizer(), opened_bundle.prompts
        self._embedder = Embedder(opened_bundle, threads=threads, memory_mb=memory_mb)

    def embed(self, shard: Shard, progress: Callable[[int], None] | None = None) -> ShardResult:
        """Write one shard; `progress` is told of rows as they are done.

        Raises:
            InputError, TokenLimitError: a row cannot be embedded; the file, row group and row are
                named.
            IndexFileError: the shard cannot be written.
        """
        settings = self.job.settings
        table = read_rows(self.folder, shard.file, shard.start, shard.stop, settings.input_columns)
        texts, titles = self._strings(table, settings.text_column, shard), None
        if settings.title_column is not None:
            titles = self._strings(table, settings.title_column, shard)
        parts = []
        for start in range(0, shard.rows, WINDOW_TEXTS):
            stop = min(start + WINDOW_TEXTS, shard.rows)
            parts.append(
                self._embed_rows(
                    shard, start, texts[start:stop], None if titles is None else titles[start:stop]
                )
            )
            if progress is not None:
                progress(stop - start)
        output = self._table(table, shard, texts, titles, parts)
        result = ShardResult(
            number=shard.number,
            rows=shard.rows,
            tokens=sum(count or 0 for part in parts for count in part.num_tokens),
            truncated=sum(bool(cut) for part in parts for cut in part.truncated),
            errors=sum(error is not None for part in parts for error in part.errors),
        )
        _write(self.out / shard.name, output, self.job, shard, result)
        return result

    def close(self) -> None:
        self._embedder.close()

    def __enter__(self) -> ShardEmbedder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _strings(self, table: Any, column: str, shard: Shard) -> list[str | bytes | None]:
        """A column as Python strings; what is not valid UTF-8 stays bytes."""
        import pyarrow as pa

        values = (
            table.column(column).cast(pa.large_string())
            if pa.types.is_dictionary(table.schema.field(column).type)
            else table.column(column)
        )
        try:
            return list(values.to_pylist())
        except UnicodeDecodeError:
            raw = values.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            return [_decoded(value) for value in raw]

    def _embed_rows(
        self,
        shard: Shard,
        start: int,
        texts: Sequence[str | bytes | None],
        titles: Sequence[str | bytes | None] | None,
    ) -> _Rows:
        """Embed rows of a shard from `start` on, each in its place.

        Those that can be told at a glance are put aside first. A text that is too long shows only
        when the model's own code refuses it: then every text is looked at, which costs a second
        time of tokenizing, where there is such a text.
        """
        named: Sequence[str | bytes | None] = [None] * len(texts) if titles is None else titles
        problems: dict[int, EgemmaError] = {}
        for row, (text, title) in enumerate(zip(texts, named, strict=True)):
            if (problem := _problem(text, title)) is not None:
                problems[row] = InputError(problem)
        good = [row for row in range(len(texts)) if row not in problems]
        self._refuse(shard, start, problems)
        try:
            embedded = self._embed(texts, titles, good)
        except (TokenLimitError, InputError):
            late = {
                row: error
                for row in good
                if (error := self._encoding_problem(texts[row], named[row])) is not None
            }
            if not late:
                raise
            self._refuse(shard, start, late)
            problems |= late
            good = [row for row in good if row not in late]
            embedded = self._embed(texts, titles, good)
        vectors = np.zeros((len(texts), self.job.dim), np.float32)
        vectors[good] = embedded.vectors
        num_tokens: list[int | None] = [None] * len(texts)
        truncated: list[bool | None] = [None] * len(texts)
        for row, count, cut in zip(good, embedded.num_tokens, embedded.truncated, strict=True):
            num_tokens[row], truncated[row] = count, cut
        errors = [str(problems[row]) if row in problems else None for row in range(len(texts))]
        return _Rows(vectors=vectors, num_tokens=num_tokens, truncated=truncated, errors=errors)

    def _embed(
        self, texts: Sequence[Any], titles: Sequence[Any] | None, rows: Sequence[int]
    ) -> Any:
        settings = self.job.settings
        chosen = [texts[row] for row in rows]
        if settings.role == "query":
            return self._embedder.embed_query(
                chosen,
                task=settings.task or DEFAULT_TASK,
                dim=settings.dim,
                overflow=settings.overflow,
            )
        return self._embedder.embed_documents(
            chosen,
            titles=None if titles is None else [titles[row] for row in rows],
            dim=settings.dim,
            overflow=settings.overflow,
        )

    def _encoding_problem(self, text: Any, title: Any) -> EgemmaError | None:
        settings = self.job.settings
        prompt = (
            self._prompts.query(settings.task or DEFAULT_TASK)
            if settings.role == "query"
            else self._prompts.document(title)
        )
        try:
            self._tokenizer.encode(prompt + text, overflow=settings.overflow)
        except (TokenLimitError, InputError) as error:
            return error
        return None

    def _refuse(self, shard: Shard, start: int, problems: dict[int, EgemmaError]) -> None:
        if problems and self.on_error == "fail":
            row = min(problems)
            where = place_of(self.folder, shard.file, shard.start + start + row)
            raise type(problems[row])(
                f"{where}: {problems[row]} Or go on with on_error='null', which keeps the row "
                "without a vector and "
                "says why."
            ) from problems[row]

    def _table(
        self,
        source: Any,
        shard: Shard,
        texts: Sequence[Any],
        titles: Sequence[Any] | None,
        parts: Sequence[_Rows],
    ) -> Any:
        import pyarrow as pa

        settings, columns = self.job.settings, {}
        cleaned = {settings.text_column: texts, settings.title_column: titles}
        if settings.id_column is None:
            columns["id"] = pa.array(
                [f"{shard.file.name}:{row}" for row in range(shard.start, shard.stop)], pa.string()
            )
        for name in settings.output_columns:
            if name not in source.column_names:
                continue
            column = source.column(name)
            values = cleaned.get(name)
            # the error column says so
            if values is not None and any(isinstance(value, bytes) for value in values):
                column = pa.chunked_array(
                    [[None if isinstance(value, bytes) else value for value in values]], pa.string()
                ).cast(column.type)
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise InputError(
                    f"{shard.file.name}, rows {shard.start} to {shard.stop}: column {name!r} is "
                    f"damaged: {error}. Mend the file, "
                    "or leave the column out."
                ) from error
            if name == settings.id_column and column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise InputError(
                    f"{place_of(self.folder, shard.file, shard.start + row)}: {name!r} is null. "
                    "Give every row an id."
                )
            columns[name] = column
        errors = [error for part in parts for error in part.errors]
        flat = np.concatenate([part.vectors for part in parts]).reshape(-1)
        columns["vector"] = pa.FixedSizeListArray.from_arrays(
            pa.array(flat, pa.float32()),
            self.job.dim,
            mask=pa.array([error is not None for error in errors]),
        )
        columns["num_tokens"] = pa.array(
            [count for part in parts for count in part.num_tokens], pa.int32()
        )
        columns["truncated"] = pa.array(
            [cut for part in parts for cut in part.truncated], pa.bool_()
        )
        columns["error"] = pa.array(errors, pa.string())
        return pa.table({name: columns[name] for name in settings.output_columns})


def check_shard(path: Path, job: Job, shard: Shard, *, read_data: bool) -> ShardResult | None:
    """What a finished shard holds, or None where its file is damaged and must be made again.

    Args:
        read_data: read every page and compare its checksum; otherwise the end of the file only.

    Raises:
        ConfigError: a sound file, but of another run.
    """
    import pyarrow as pa

    try:
        with opened(path) as file:
            facts = _facts(file.schema_arrow)
            if facts is None:
                return None
            if facts["job"] != job.id or facts["result"]["number"] != shard.number:
                raise ConfigError(
                    f"{path} belongs to another run, though its folder is of this one. Give "
                    "another output folder."
                )
            result = ShardResult(**facts["result"])
            if (
                file.metadata.num_rows != shard.rows
                or result.rows != shard.rows
                or _columns(file.schema_arrow) != facts["columns"]
            ):
                return None
            if read_data:
                rows = 0
                for batch in file.iter_batches(batch_size=1024, use_threads=False):
                    rows += batch.num_rows
                if rows != shard.rows:
                    return None
    except (InputError, pa.ArrowException, OSError):
        return None
    return result


def _facts(schema: Any) -> dict[str, Any] | None:
    """What `_metadata` wrote beside a shard's schema, or None where a bit of it changed; Parquet
    has no checksum there.
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


def _columns(schema: Any) -> list[str]:
    return [f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True)]


def _canonical(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def _write(path: Path, table: Any, job: Job, shard: Shard, result: ShardResult) -> None:
    import pyarrow.parquet as pq

    leaves, columns = _as_written(table)
    table = table.replace_schema_metadata(_metadata(job, shard, result, columns))
    with replacing(path) as file:
        # Vectors do not shrink: zstd takes 8 % off them and five times as long as writing.
        pq.write_table(
            table,
            file,
            row_group_size=max(1, job.settings.shard_rows),
            use_dictionary=False,
            write_page_checksum=True,
            compression={leaf: "none" if leaf.startswith("vector.") else "zstd" for leaf in leaves},
        )


def _as_written(table: Any) -> tuple[list[str], list[str]]:
    """Parquet's own names of a table's columns, those inside a list or struct with their path; and
    names and types as read back.
    """
    import pyarrow.parquet as pq

    sample = io.BytesIO()
    pq.write_table(table.slice(0, 0), sample)
    with pq.ParquetFile(sample) as file:
        schema = file.metadata.schema
        return [
            schema.column(number).path for number in range(file.metadata.num_columns)
        ], _columns(file.schema_arrow)


def _problem(text: str | bytes | None, title: str | bytes | None) -> str | None:
    """Why a row cannot be embedded, where that shows without the tokenizer."""
    if text is None:
        return "the text is null. Fix the row."
    if isinstance(text, bytes):
        return f"{_NOT_UTF8}. Decode the source with errors='replace'."
    if not text.strip():
        return "the text is blank, there is nothing to embed. Fix the row."
    if isinstance(title, bytes):
        return "the title is not valid UTF-8. Decode the source with errors='replace'."
    return None


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
