"""Texts to vectors: tokenize, batch, run, shorten.

The one class of this package that owns native memory.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from egemma.batches import memory_of, plan_batches, windows
from egemma.runtimes import Runtime, open_runtime
from egemma.threads import check_threads
from egemma_core.bundle import Bundle, Manifest, read_bundle
from egemma_core.errors import (
    BundleError,
    ConfigError,
    EgemmaError,
    InputError,
    PromptError,
    ShapeError,
    TokenLimitError,
)
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.tokens import Overflow, Tokens
from egemma_core.vectors import check_dim, shorten

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parent / "builtin"
# Texts that are tokenized and sorted by length together; a stream holds no more than these.
WINDOW_TEXTS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """One text's vector, with what must be known to compare it with another."""

    vector: NDArray[np.float32]  # (dim,), length 1
    num_tokens: int  # of the whole text, its prompt and control tokens included
    truncated: bool  # the model read only the beginning
    fingerprint: str  # of the model; vectors of different fingerprints must not be compared

    @property
    def dim(self) -> int:
        return int(self.vector.shape[0])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.vector, dtype, copy)


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings(Sequence[Embedding]):
    """The vectors of several texts, in the order of the texts."""

    vectors: NDArray[np.float32]  # (B, dim), each row of length 1
    num_tokens: tuple[int, ...]  # as in `Embedding`, one per text
    truncated: tuple[bool, ...]
    fingerprint: str

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.num_tokens)

    @overload
    def __getitem__(self, index: int) -> Embedding: ...
    @overload
    def __getitem__(self, index: slice) -> Embeddings: ...
    def __getitem__(self, index: int | slice) -> Embedding | Embeddings:
        if isinstance(index, slice):
            return Embeddings(
                vectors=self.vectors[index],
                num_tokens=self.num_tokens[index],
                truncated=self.truncated[index],
                fingerprint=self.fingerprint,
            )
        return Embedding(
            vector=self.vectors[index],
            num_tokens=self.num_tokens[index],
            truncated=self.truncated[index],
            fingerprint=self.fingerprint,
        )

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.vectors, dtype, copy)


class Embedder:
    """A bundle, open.

    Make one with `Embedder.open`; it may be used from several threads, which then take turns.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        memory_mb: int = 256,
        kleidiai: bool = True,
    ) -> None:
        """Load the model of a bundle that `read_bundle` has checked; `open` does both and says
        more.
        """
        if isinstance(memory_mb, bool) or not isinstance(memory_mb, int) or memory_mb < 1:
            raise ConfigError(f"memory_mb={memory_mb!r}: a whole number of at least 1.")
        self._manifest = bundle.manifest
        self._tokenizer = bundle.tokenizer()
        self._prompts = bundle.prompts
        self._memory = memory_of(self._manifest.architecture, memory_mb * 2**20)
        self._lock = threading.Lock()
        self._process = os.getpid()
        runtime = open_runtime(bundle, threads=check_threads(threads), kleidiai=kleidiai)
        self._runtime: Runtime | None = runtime
        self._runtime_name = f"{runtime.name} {runtime.version}"
        self._threads = runtime.threads
        # Also runs when the embedder was forgotten, and at exit before modules are torn down; never
        # twice.
        self._release = weakref.finalize(self, _release, runtime, self._process)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        threads: int | None = None,
        check_hashes: bool = True,
        memory_mb: int = 256,
        kleidiai: bool = True,
    ) -> Embedder:
        """Open a bundle folder.

        Args:
            bundle: a folder made by egemma-export, or "builtin" for the small model inside this
                package ("./builtin" is a folder).
            threads: to compute with; None for as many as this process has CPUs.
            check_hashes: compare every file with its SHA-256 first. Without it a damaged model may
                end the process.
            memory_mb: for the activations of one batch; a single text that needs more gets it.
            kleidiai: False keeps Arm's KleidiAI kernels out of ONNX Runtime, for numbers like those
                of x86.

        Raises:
            BundleError: no bundle there, or a damaged one.
            RuntimeUnavailableError: this machine lacks the runtime that the bundle was exported
                for.
            ConfigError: a setting that cannot work.
        """
        if bundle == BUILTIN:
            return cls.builtin(
                threads=threads, check_hashes=check_hashes, memory_mb=memory_mb, kleidiai=kleidiai
            )
        return cls(
            read_bundle(bundle, check_hashes=check_hashes),
            threads=threads,
            memory_mb=memory_mb,
            kleidiai=kleidiai,
        )

    @classmethod
    def builtin(
        cls,
        *,
        threads: int | None = None,
        check_hashes: bool = True,
        memory_mb: int = 256,
        kleidiai: bool = True,
    ) -> Embedder:
        """Open the small model that comes with this package."""
        if not BUILTIN_FOLDER.is_dir():
            raise BundleError(
                f"{BUILTIN_FOLDER} is missing: this egemma was packaged without its built-in "
                "model. "
                "Install it again, or open a bundle folder."
            )
        return cls(
            read_bundle(BUILTIN_FOLDER, check_hashes=check_hashes),
            threads=threads,
            memory_mb=memory_mb,
            kleidiai=kleidiai,
        )

    def close(self) -> None:
        """Free the model's memory; waits for the run in progress. Closing again does nothing."""
        if self._process == os.getpid():
            with self._lock:
                self._runtime = None
                self._release()
        else:  # the lock may have been held at the fork, by a thread that did not come along
            self._runtime = None
            self._release()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """What vectors of this model may be mixed with."""
        return self._manifest.fingerprint

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths that may be asked for, falling."""
        return self._manifest.dims

    @property
    def dim(self) -> int:
        """The full width."""
        return self._manifest.dims[0]

    @property
    def max_tokens(self) -> int:
        """Longest text that the model reads, its prompt and two control tokens included."""
        return self._tokenizer.max_tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that `embed_query` accepts."""
        return self._prompts.tasks

    @property
    def runtime(self) -> str:
        """Name and version of what computes, such as "onnxruntime 1.32.0"."""
        return self._runtime_name

    @property
    def threads(self) -> int:
        return self._threads

    @overload
    def embed_query(  # type: ignore[overload-overlap]  # a str is an iterable of str too
        self, text: str, *, task: str = ..., dim: int | None = ..., overflow: Overflow = ...
    ) -> Embedding: ...
    @overload
    def embed_query(
        self,
        text: Iterable[str],
        *,
        task: str = ...,
        dim: int | None = ...,
        overflow: Overflow = ...,
    ) -> Embeddings: ...
    def embed_query(
        self,
        text: str | Iterable[str],
        *,
        task: str = DEFAULT_TASK,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Embedding | Embeddings:
        """The vector of something searched for, or the vectors of several such texts.

        Args:
            task: one of `tasks`; it decides the prompt in front of the text.
            dim: one of `dims`; None for the full width.
            overflow: "error", or "truncate" to read only the beginning of a text above
                `max_tokens`.

        Raises:
            TokenLimitError, InputError, PromptError, DimensionError: the text or a setting cannot
                be used.
        """
        if not isinstance(text, (str, bytes)) and isinstance(text, Iterable):
            return self.embed_queries(text, task=task, dim=dim, overflow=overflow)
        self._check_one(text)
        return self._embed([self._prompts.query(task) + text], dim, overflow, name=None)[0]

    def embed_queries(
        self,
        texts: Iterable[str],
        *,
        task: str = DEFAULT_TASK,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Embeddings:
        """As `embed_query`, for several texts; errors name the position of the text."""
        prompt = self._prompts.query(task)
        return self._embed([prompt + text for text in _checked(texts)], dim, overflow)

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Embeddings:
        """The vectors of texts to be found.

        Args:
            titles: one per text, None or "" where a text has none; None when no text has one.
            dim, overflow: as in `embed_query`.

        Raises:
            ShapeError: not as many titles as texts.
            TokenLimitError, InputError, PromptError, DimensionError: a text or a setting cannot be
                used; the position is named.
        """
        return self._embed(list(self._documents(texts, titles)), dim, overflow)

    def stream_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Iterator[Embeddings]:
        """As `embed_documents`, for more texts than fit into memory: up to WINDOW_TEXTS of them are
        read, embedded and given out before the next are read. The order of all results is that of
        the texts.
        """
        documents = self._documents(texts, titles)
        check_dim(dim, self.dims)
        return (
            self._embed(window, dim, overflow, first=number * WINDOW_TEXTS)
            for number, window in enumerate(windows(documents, WINDOW_TEXTS))
        )

    def embed_raw(
        self, texts: Iterable[str], *, dim: int | None = None, overflow: Overflow = "error"
    ) -> Embeddings:
        """Vectors of texts exactly as they are, without a prompt.

        The model was trained with prompts: use this for texts that already begin with one, or to
        measure what prompts do.
        """
        return self._embed(list(_checked(texts)), dim, overflow)

    def count_tokens(self, text: str) -> int:
        """How many tokens the model reads for a text exactly as it is, control tokens included; it
        reads at most `max_tokens`.
        """
        self._check_one(text)
        return self._tokenizer.encode(text, overflow="truncate").num_tokens

    def document_prompt(self, title: str | None = None) -> str:
        """What stands before a document's text when it is embedded."""
        return self._prompts.document(title)

    def embed_ids(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors of token ids as they are, all in one padded run where the model takes several:
        for checks of the model itself.

        Args:
            rows: token ids of each text, with its prompt and control tokens.

        Returns:
            (B, dim) float32, each row of length 1.

        Raises:
            InputError: a row is empty, too long, or holds what is not a token.
        """
        vocab_size = self._manifest.tokenizer["vocab_size"]
        for number, row in enumerate(rows):
            if not 1 <= len(row) <= self.max_tokens or not all(
                0 <= token < vocab_size for token in row
            ):
                raise InputError(
                    f"row {number}: {len(row)} ids; wanted are 1 to {self.max_tokens}, each from 0 "
                    f"to {vocab_size - 1}."
                )
        runs = [[row] for row in rows] if self._manifest.batch == "one" else [rows] if rows else []
        vectors = [shorten(self._run(run), None, self.dims) for run in runs]
        return np.concatenate([np.empty((0, self.dim), np.float32), *vectors])

    def _documents(
        self, texts: Iterable[str], titles: Iterable[str | None] | None
    ) -> Iterator[str]:
        """Each text behind its prompt.

        What can be checked without reading the texts is checked at once.
        """
        checked = _checked(texts)
        if titles is None:
            prompt = self._prompts.document()
            return (prompt + text for text in checked)
        if isinstance(titles, (str, bytes)):
            raise InputError("titles is one string, not a list with a title for each text.")
        return self._titled(checked, iter(titles))

    def _titled(self, texts: Iterator[str], titles: Iterator[str | None]) -> Iterator[str]:
        end = object()
        position = -1
        for position, text in enumerate(texts):
            title = next(titles, end)
            if title is end:
                raise ShapeError(
                    f"{position} titles, but more texts: give one title, or None, for each text."
                )
            if title is not None and not isinstance(title, str):
                raise InputError(f"title {position} is {type(title).__name__}: pass str or None.")
            try:
                yield self._prompts.document(title) + text
            except PromptError as error:
                raise PromptError(f"text {position}: {error}") from error
        if next(titles, end) is not end:
            raise ShapeError(
                f"more titles than the {position + 1} texts: give one title, or None, for each "
                "text."
            )

    def _embed(
        self,
        texts: list[str],
        dim: int | None,
        overflow: Overflow,
        *,
        first: int = 0,
        name: str | None = "text",
    ) -> Embeddings:
        """Vectors of texts that have their prompts already.

        Args:
            first: position of the first of them in what the caller passed.
            name: what errors call a text before its position; None where there is only one.
        """
        self._check_usable()
        width = check_dim(dim, self.dims)
        tokens = [
            self._encode(text, overflow, name, first + number) for number, text in enumerate(texts)
        ]
        vectors = np.empty((len(tokens), width), np.float32)
        for batch in self._plan(tokens):
            vectors[batch] = shorten(
                self._run([tokens[position].ids for position in batch]), dim, self.dims
            )
        return Embeddings(
            vectors=vectors,
            num_tokens=tuple(text.num_tokens for text in tokens),
            truncated=tuple(text.truncated for text in tokens),
            fingerprint=self.fingerprint,
        )

    def _run(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(B, dim) float32 at full width, for token ids that one run takes together."""
        ids, mask = _pad(rows, self._tokenizer.pad_id)
        with self._lock:
            return self._check_usable().run(ids, mask)

    def _encode(self, text: str, overflow: Overflow, name: str | None, position: int) -> Tokens:
        try:
            return self._tokenizer.encode(text, overflow=overflow)
        except (TokenLimitError, InputError) as error:
            if name is None:
                raise
            raise type(error)(
                f"{name} {position}: {error.found}", hint=error.hint, position=position
            ) from error

    def _plan(self, tokens: Sequence[Tokens]) -> list[list[int]]:
        if self._manifest.batch == "one":
            return [[position] for position in range(len(tokens))]
        return plan_batches([len(text.ids) for text in tokens], self._memory)

    def _check_usable(self) -> Runtime:
        if self._runtime is None:
            raise EgemmaError("this embedder is closed. Open the bundle again.")
        if self._process != os.getpid():
            raise EgemmaError(
                "this embedder was opened before the process was forked, and its threads stayed "
                "behind. "
                "Open the bundle in the new process."
            )
        return self._runtime

    def _check_one(self, text: object) -> None:
        if not isinstance(text, str):
            raise InputError(
                f"the text is {type(text).__name__}: pass str; for several texts there is "
                "embed_queries."
            )


def _release(runtime: Runtime, process: int) -> None:
    if process == os.getpid():
        runtime.close()
    else:
        # Its destructor would wait for threads that a fork left behind; the parent process frees
        # the memory.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The same texts; refuses at once what is not a collection, and in passing what is not a
    text.
    """
    if isinstance(texts, (str, bytes)):
        raise InputError(
            "one string was passed where a list of texts is wanted; its characters would be "
            "embedded one by one. Pass [text]."
        )
    if isinstance(texts, (Mapping, set, frozenset)):
        raise InputError(
            f"texts is a {type(texts).__name__}, which has no order of texts. Pass a list."
        )
    try:
        iterator = iter(texts)
    except TypeError as error:
        raise InputError(f"texts is {type(texts).__name__}: pass a list of str.") from error
    return _only_str(iterator)


def _only_str(texts: Iterator[str]) -> Iterator[str]:
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"text {position} is {type(text).__name__}: pass str; decode bytes first."
            )
        yield text


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(B, T) ids, padded at the end, and a mask that is 1 on real tokens."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def _as_array(
    vectors: NDArray[np.float32], dtype: DTypeLike | None, copy: bool | None
) -> NDArray[Any]:
    """What NumPy's `__array__` protocol asks for."""
    wanted = vectors.dtype if dtype is None else np.dtype(dtype)
    if copy is False and wanted != vectors.dtype:
        raise ValueError(f"{wanted} from {vectors.dtype} needs a copy.")
    return vectors.astype(wanted, copy=bool(copy))
