"""Texts to vectors: tokenize, batch, run, shorten.

`Embedder` is the one class of this package that owns native memory.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from egemma.batches import memory_of, pad, plan_batches, windows
from egemma.embeddings import Embedding, Embeddings
from egemma.exported import exported
from egemma.runtimes import Runtime, open_runtime
from egemma.texts import behind_prompts, each_text
from egemma.threads import check_threads
from egemma_core.bundle import Bundle, Manifest, read_bundle
from egemma_core.checks import whole_number
from egemma_core.errors import BundleError, EgemmaError, InputError, TokenLimitError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.tokens import Overflow, Tokens
from egemma_core.vectors import check_dim, shorten

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parent / "builtin"
# Texts that are tokenized and sorted by length together; a stream holds no more than these.
WINDOW_TEXTS = 512


def folder_of(bundle: str | Path) -> Path:
    """Return the folder that `Embedder.open` reads for this name: "builtin" is inside this package.

    Raises:
        BundleError: it is "builtin", and this package has none.
    """
    if bundle != BUILTIN:
        return Path(bundle)
    if not BUILTIN_FOLDER.is_dir():
        found = f"{BUILTIN_FOLDER} is missing: this egemma was packaged without its built-in model."
        raise BundleError(found, hint="Install it again, or open a bundle folder.")
    return BUILTIN_FOLDER


@exported
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
        """Load the model of a bundle that was checked; `open` does both and has the settings."""
        whole_number("memory_mb", memory_mb, 1)
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
        # also when the embedder was forgotten, and before modules are torn down; never twice
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
            RuntimeUnavailableError: this machine lacks the runtime that the bundle is for.
            ConfigError: a setting that cannot work.
        """
        checked = read_bundle(folder_of(bundle), check_hashes=check_hashes)
        return cls(checked, threads=threads, memory_mb=memory_mb, kleidiai=kleidiai)

    def close(self) -> None:
        """Free the model's memory; waits for the run in progress. Closing again does nothing."""
        # after a fork the lock may be held for ever, by a thread that did not come along
        with self._lock if self._process == os.getpid() else nullcontext():
            self._runtime = None
            self._release()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *raised: object) -> None:
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

    @overload  # a str is an iterable of str as well, and one text
    def embed_query(  # type: ignore[overload-overlap]
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
        """Embed what is searched for: one text, or several.

        Args:
            text: one str gives an Embedding; a list, or another iterable of str, gives Embeddings.
            task: one of `tasks`; it decides the prompt in front of the text.
            dim: one of `dims`; None for the full width.
            overflow: "error", or "truncate" to read only the beginning of a text above
                `max_tokens`.

        Raises:
            TokenLimitError, InputError, PromptError, DimensionError: a text or a setting cannot be
                used; of several texts, the error's `position` says which.
        """
        prompt = self._prompts.query(task)
        if isinstance(text, str):
            return self._embed([prompt + text], dim, overflow, alone=True)[0]
        return self._embed([prompt + one for one in each_text(text)], dim, overflow)

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Embeddings:
        """Embed texts that are to be found.

        Args:
            titles: one per text, None or "" where a text has none; None when no text has one.
            dim, overflow: as in `embed_query`.

        Raises:
            ShapeError: not as many titles as texts; others as in `embed_query`.
        """
        return self._embed(list(behind_prompts(texts, titles, self._prompts)), dim, overflow)

    def stream_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: Overflow = "error",
    ) -> Iterator[Embeddings]:
        """Embed more texts than fit into memory, as `embed_documents` does, in their order.

        Up to WINDOW_TEXTS of them are read, embedded and given out before the next are read.
        """
        documents = behind_prompts(texts, titles, self._prompts)
        check_dim(dim, self.dims)
        return (
            self._embed(window, dim, overflow, first=number * WINDOW_TEXTS)
            for number, window in enumerate(windows(documents, WINDOW_TEXTS))
        )

    # For checks of the model itself, and for cutting texts to what it reads.

    def embed_raw(
        self, texts: Iterable[str], *, dim: int | None = None, overflow: Overflow = "error"
    ) -> Embeddings:
        """Embed texts as they are: such as begin with a prompt already, or to measure prompts."""
        return self._embed(list(each_text(texts)), dim, overflow)

    def embed_ids(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Embed B rows of token ids as they are, together where the model takes several.

        Returns:
            (B, dim) float32, each row of length 1.

        Raises:
            InputError: a row is empty, too long, or holds what is not a token.
        """
        last = self._manifest.tokenizer["vocab_size"] - 1
        for number, row in enumerate(rows):
            if not 1 <= len(row) <= self.max_tokens or not all(0 <= token <= last for token in row):
                found = f"{len(row)} ids must be 1 to {self.max_tokens}, each from 0 to {last}."
                raise InputError(found, position=number, place=f"row {number}")
        runs = [[row] for row in rows] if self._manifest.batch == "one" else [rows] if rows else []
        vectors = [shorten(self._run(run), None, self.dims) for run in runs]
        return np.concatenate([np.empty((0, self.dim), np.float32), *vectors])

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text as it is, control tokens included, beyond `max_tokens` too."""
        return self._tokenizer.encode(text, overflow="truncate").num_tokens

    def document_prompt(self, title: str | None = None) -> str:
        """Return what stands before a document's text when it is embedded."""
        return self._prompts.document(title)

    def _embed(
        self,
        texts: list[str],
        dim: int | None,
        overflow: Overflow,
        *,
        first: int = 0,
        alone: bool = False,
    ) -> Embeddings:
        """Embed texts that have their prompts already.

        Args:
            first: position of the first of them in what the caller passed.
            alone: the caller passed one text, not a list; an error then names no position.
        """
        self._check_usable()
        width = check_dim(dim, self.dims)
        tokens: list[Tokens] = []
        for position, text in enumerate(texts, start=first):
            try:
                tokens.append(self._tokenizer.encode(text, overflow=overflow))
            except (TokenLimitError, InputError) as error:
                if alone:
                    raise
                raise error.at(f"text {position}", position=position) from error
        vectors = np.empty((len(tokens), width), np.float32)
        for batch in self._plan(tokens):
            run = self._run([tokens[position].ids for position in batch])
            vectors[batch] = shorten(run, dim, self.dims)
        return Embeddings(
            vectors=vectors,
            num_tokens=tuple(text.num_tokens for text in tokens),
            truncated=tuple(text.truncated for text in tokens),
            fingerprint=self.fingerprint,
        )

    def _run(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return (B, dim) float32 at full width, for token ids that one run takes together."""
        ids, mask = pad(rows, self._tokenizer.pad_id)
        with self._lock:
            return self._check_usable().run(ids, mask)

    def _plan(self, tokens: Sequence[Tokens]) -> list[list[int]]:
        if self._manifest.batch == "one":
            return [[position] for position in range(len(tokens))]
        return plan_batches([len(text.ids) for text in tokens], self._memory)

    def _check_usable(self) -> Runtime:
        if self._runtime is None:
            raise EgemmaError("this embedder is closed.", hint="Open the bundle again.")
        if self._process != os.getpid():
            raise EgemmaError(
                "this embedder was opened before the process was forked, and its threads stayed "
                "behind.",
                hint="Open the bundle in the new process.",
            )
        return self._runtime


def _release(runtime: Runtime, process: int) -> None:
    if process == os.getpid():
        runtime.close()
    else:
        # its destructor would wait for threads that the fork left behind; the parent frees memory
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))
