"""One shard: read its rows, embed them, write its file.

Both engines call this, so both write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.embedder import WINDOW_TEXTS, Embedder, folder_of
from egemma.embeddings import Embeddings
from egemma_core.bundle import Bundle, read_bundle
from egemma_core.errors import BundleError, EgemmaError, InputError, TokenLimitError
from egemma_core.prompts import DEFAULT_TASK
from egemma_server.bulk.job import ID_COLUMN, Job, Shard
from egemma_server.bulk.shard_files import ShardResult, write_shard
from egemma_server.bulk.source import place_of, read_rows

Cell = str | bytes | None  # of a column of strings; bytes where it is not valid UTF-8


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a process needs to embed shards of a job; it can be pickled."""

    job: Job
    folder: Path  # of the input
    out: Path  # where shards go
    bundle: str | Path  # a bundle folder, or "builtin"
    threads: int
    memory_mb: int
    on_error: str  # "fail": raise at the first row that cannot be embedded; "null": write it empty


@dataclass(frozen=True, kw_only=True)
class _EmbeddedRows:
    """Some rows of a shard, embedded."""

    vectors: NDArray[np.float32]  # (B, dim), zero where there is an error
    num_tokens: list[int | None]
    truncated: list[bool | None]
    errors: list[str | None]


def open_bundle(bundle: str | Path) -> Bundle:
    """Read and check a bundle folder, or the bundle that comes with the package for "builtin".

    Raises:
        BundleError: there is no bundle, or a damaged one.
    """
    return read_bundle(folder_of(bundle))


class ShardEmbedder:
    """An open model, and the job that it works on.

    Args:
        bundle: what `open_bundle` read from the config's bundle.

    Raises:
        BundleError: the bundle is not the one that the run began with.
    """

    def __init__(self, config: WorkerConfig, bundle: Bundle) -> None:
        self.job, self.folder, self.out = config.job, config.folder, config.out
        self._on_error = config.on_error
        if bundle.manifest.fingerprint != self.job.identity.fingerprint:
            raise BundleError(
                f"{config.bundle} is not {self.job.identity.name}, which this run began with.",
                hint="Put the same bundle on every machine.",
            )
        self._tokenizer, self._prompts = bundle.tokenizer(), bundle.prompts
        self._embedder = Embedder(bundle, threads=config.threads, memory_mb=config.memory_mb)

    def embed(self, shard: Shard, progress: Callable[[int], None] | None = None) -> ShardResult:
        """Embed one shard and write its file.

        Args:
            progress: is called with the number of rows of each window that is done.

        Raises:
            InputError, TokenLimitError: a row cannot be embedded; the file, row group and row are
                named.
            OutputError: the shard cannot be written.
        """
        settings = self.job.settings
        table = read_rows(self.folder, shard.file, shard.start, shard.stop, settings.input_columns)
        texts = _strings(table, settings.text_column)
        titles: list[Cell] = [None] * shard.rows
        if settings.title_column is not None:
            titles = _strings(table, settings.title_column)
        parts = []
        for start in range(0, shard.rows, WINDOW_TEXTS):
            stop = min(start + WINDOW_TEXTS, shard.rows)
            parts.append(self._embed_rows(shard, start, texts[start:stop], titles[start:stop]))
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
        write_shard(self.out / shard.name, output, self.job, shard, result)
        return result

    def close(self) -> None:
        """Free the model's memory."""
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

    def _embed_rows(
        self, shard: Shard, start: int, texts: Sequence[Cell], titles: Sequence[Cell]
    ) -> _EmbeddedRows:
        """Embed rows of a shard from `start` on, each in its place.

        Rows whose fault can be seen are put aside first. A text that is too long is found by the
        embedder, which says where it is.
        """
        problems: dict[int, EgemmaError] = {}
        for row, (text, title) in enumerate(zip(texts, titles, strict=True)):
            if (visible := _visible_problem(text, title)) is not None:
                problems[row] = visible
        self._refuse(shard, start, problems)
        good = [row for row in range(len(texts)) if row not in problems]
        try:
            embedded = self._embed(texts, titles, good)
        except (TokenLimitError, InputError) as error:
            if error.position is None:
                raise
            late: dict[int, EgemmaError] = {good[error.position]: error.at("")}
            self._refuse(shard, start, late)
            # Those before it were read. Those after it are tokenized alone: embedding again after
            # each of many bad rows would read the window as often as there are bad rows.
            late |= self._encoding_problems(texts, titles, good[error.position + 1 :])
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
        return _EmbeddedRows(
            vectors=vectors, num_tokens=num_tokens, truncated=truncated, errors=errors
        )

    def _embed(
        self, texts: Sequence[Any], titles: Sequence[Any], rows: Sequence[int]
    ) -> Embeddings:
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
            titles=[titles[row] for row in rows],
            dim=settings.dim,
            overflow=settings.overflow,
        )

    def _encoding_problems(
        self, texts: Sequence[Any], titles: Sequence[Any], rows: Sequence[int]
    ) -> dict[int, EgemmaError]:
        """Return what is wrong with each of these rows that the tokenizer refuses."""
        settings = self.job.settings
        found: dict[int, EgemmaError] = {}
        for row in rows:
            prompt = (
                self._prompts.query(settings.task or DEFAULT_TASK)
                if settings.role == "query"
                else self._prompts.document(titles[row])
            )
            try:
                self._tokenizer.encode(prompt + texts[row], overflow=settings.overflow)
            except (TokenLimitError, InputError) as error:
                found[row] = error
        return found

    def _refuse(self, shard: Shard, start: int, problems: dict[int, EgemmaError]) -> None:
        if problems and self._on_error == "fail":
            row = min(problems)
            problem, position = problems[row], shard.start + start + row
            raise type(problem)(
                problem.found,
                hint=f"{problem.hint} Or go on with on_error='null', which keeps the row without a "
                "vector and says why.".strip(),
                position=position,
                place=place_of(self.folder, shard.file, position),
            ) from problem

    def _table(
        self,
        source: Any,
        shard: Shard,
        texts: Sequence[Cell],
        titles: Sequence[Cell],
        parts: Sequence[_EmbeddedRows],
    ) -> Any:
        """Return the shard's output as a pyarrow.Table."""
        import pyarrow as pa

        settings = self.job.settings
        cleaned = {settings.text_column: texts, settings.title_column: titles}
        columns: dict[str, Any] = {}
        if settings.id_column is None:
            ids = [f"{shard.file.name}:{row}" for row in range(shard.start, shard.stop)]
            columns[ID_COLUMN] = pa.array(ids, pa.string())
        for name in settings.output_columns:
            if name in source.column_names:
                columns[name] = self._kept_column(source, name, shard, cleaned.get(name))
        columns |= _made_columns(parts, self.job.dim)
        return pa.table({name: columns[name] for name in settings.output_columns})

    def _kept_column(
        self, source: Any, name: str, shard: Shard, values: Sequence[Cell] | None
    ) -> Any:
        """Return a column of the input as it goes into the output.

        Args:
            values: of a column of texts or titles; what is bytes in it becomes null.
        """
        import pyarrow as pa

        column = source.column(name)
        if values is not None and any(isinstance(value, bytes) for value in values):
            # the error column says so
            valid = [None if isinstance(value, bytes) else value for value in values]
            column = pa.chunked_array([valid], pa.string()).cast(column.type)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{shard.file.name}, rows {shard.start} to {shard.stop}: column {name!r} is "
                f"damaged: {error}.",
                hint="Mend the file, or leave the column out.",
            ) from error
        if name == self.job.settings.id_column and column.null_count:
            row = shard.start + column.is_null().to_pylist().index(True)
            raise InputError(
                f"{name!r} is null.",
                hint="Give every row an id.",
                position=row,
                place=place_of(self.folder, shard.file, row),
            )
        return column


def _made_columns(parts: Sequence[_EmbeddedRows], dim: int) -> dict[str, Any]:
    """Return the columns that the run makes: vectors, and what is known of each."""
    import pyarrow as pa

    errors = [error for part in parts for error in part.errors]
    flat = np.concatenate([part.vectors for part in parts]).reshape(-1)
    without = pa.array([error is not None for error in errors])
    num_tokens = [count for part in parts for count in part.num_tokens]
    truncated = [cut for part in parts for cut in part.truncated]
    return {
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(flat, pa.float32()), dim, mask=without
        ),
        "num_tokens": pa.array(num_tokens, pa.int32()),
        "truncated": pa.array(truncated, pa.bool_()),
        "error": pa.array(errors, pa.string()),
    }


def _strings(table: Any, name: str) -> list[Cell]:
    """Return a column as Python strings; what is not valid UTF-8 stays bytes."""
    import pyarrow as pa

    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string())
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> Cell:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _visible_problem(text: Cell, title: Cell) -> InputError | None:
    """Return why a row cannot be embedded, where that shows without the tokenizer."""
    decode = "Decode the source with errors='replace'."
    if text is None:
        return InputError("the text is null.", hint="Fix the row.")
    if isinstance(text, bytes):
        return InputError("the text is not valid UTF-8.", hint=decode)
    if not text.strip():
        return InputError("the text is blank, there is nothing to embed.", hint="Fix the row.")
    if isinstance(title, bytes):
        return InputError("the title is not valid UTF-8.", hint=decode)
    return None
