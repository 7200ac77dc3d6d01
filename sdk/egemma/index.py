"""The local index: texts and their vectors in one SQLite file (see `index_file`), searched exactly. No service, no network."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from egemma.index_file import (
    REBUILD,
    IndexFacts,
    checked_path,
    connect,
    create_tables,
    facts_of,
    is_blank,
    model_name,
    read_facts,
    stamp_of,
    text_crc32,
    typed_errors,
    vector_crc32,
)
from egemma_core.errors import ConfigError, IndexFileError, IndexMismatchError, InputError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim, shorten

if TYPE_CHECKING:
    from egemma.embedder import Embedder

# A float32 dot product of two unit vectors is off by at most D * 2^-24 (4.6e-5 at D = 768), and two are compared.
_FLOAT32_SLACK = 1e-4
_RESCORE_ROWS = 4096
_MAX_K = 10_000


@dataclass(frozen=True, kw_only=True)
class Document:
    """One stored text."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, Any] | None
    num_tokens: int   # of the whole text, its prompt included
    truncated: bool   # only the beginning of the text was embedded


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One search result."""

    id: str
    score: float      # cosine, -1 to 1
    text: str
    title: str | None
    metadata: Mapping[str, Any] | None
    truncated: bool   # only the beginning of the text was embedded, so only that can have matched


class Index:
    """An open index file and the model that reads and writes it. Make one with `Index.open`.

    May be used from several threads: a lock admits one at a time to the file, and embedding happens outside that lock.
    """

    def __init__(self, path: Path, embedder: Embedder, connection: sqlite3.Connection, *, read_only: bool, frozen: bool) -> None:
        self.path, self.read_only = path, read_only
        self._embedder, self._connection = embedder, connection
        self._stamp = stamp_of(path) if frozen else None
        self._lock = threading.RLock()
        self._closed = False
        self._matrices: dict[int, tuple[list[str], NDArray[np.float32]]] = {}  # dim -> ids, (N, dim)
        self._data_version: int | None = None

    @classmethod
    def open(cls, path: str | Path, embedder: Embedder, *, create: bool = True) -> Index:
        """Open an index file, or make one.

        Args:
            path: the SQLite file; while it is open, `-wal` and `-shm` stand beside it and belong to it.
            embedder: the model; it must be the one that made the file, wherever its bundle lies now.
            create: make the file when there is none. A file that cannot be written is opened for search only.

        Raises:
            IndexMismatchError: the file holds vectors of another model.
            IndexFileError: no file, no index, damaged, from a newer egemma, or not accessible.
        """
        path = checked_path(path, create=create)
        connection, read_only, frozen = connect(path)
        try:
            with typed_errors(path, "open"):
                if not read_only and is_blank(connection):
                    if not create:
                        raise IndexFileError(f"{path} is empty. Pass create=True, or give the path of an index.")
                    create_tables(connection, embedder)
                facts = read_facts(connection, path)
            if facts["fingerprint"] != embedder.fingerprint:
                built, mine = facts["model"], model_name(embedder)
                raise IndexMismatchError(f"{path} holds vectors of {built}, this is {mine}. Re-embed, or open it with {built}.")
        except BaseException:
            connection.close()
            raise
        return cls(path, embedder, connection, read_only=read_only, frozen=frozen)

    def add(self, texts: Sequence[str], *, ids: Sequence[str] | None = None, titles: Sequence[str | None] | None = None,
            metadata: Sequence[Mapping[str, Any] | None] | None = None, overflow: Overflow = "error") -> list[str]:
        """Embed texts as documents and store them: all of them, or after any error or crash none.

        Args:
            texts: documents, without prompts; not blank.
            ids: one per text; None makes each from a hash of its title and text. A stored id is replaced.
            titles: one per text or None.
            metadata: one JSON object per text or None.
            overflow: what to do with a text that is longer than the model reads; see `Embedder.embed_documents`.

        Returns:
            The ids, in the order of the texts. The same text twice is stored once.

        Raises:
            InputError: a text, id or metadata cannot be stored, or one id is given to two different documents.
            TokenLimitError: a text is too long and `overflow` is "error".
            IndexFileError: the file is read-only, full, locked or damaged.
        """
        if isinstance(texts, str):
            raise InputError("texts is one str: pass a list of texts.")
        texts = list(texts)
        titles = _one_per_text("titles", titles, len(texts))
        packed = [_pack_metadata(entry) for entry in _one_per_text("metadata", metadata, len(texts))]
        for position, (text, title) in enumerate(zip(texts, titles, strict=True)):
            _check_stored_text(f"text {position}", text, blank=False)
            if title is not None:
                _check_stored_text(f"title {position}", title, blank=True)
        given = [content_id(text, title) for text, title in zip(texts, titles, strict=True)] if ids is None else list(ids)
        if len(given) != len(texts):
            raise InputError(f"{len(given)} ids for {len(texts)} texts: give one each.")
        _check_ids(given, list(zip(texts, titles, packed, strict=True)))
        self._check_writable()
        if not texts:
            return []
        embedded = self._embedder.embed_documents(texts, titles=titles, overflow=overflow)
        vectors = self._checked_vectors(embedded.vectors, len(texts))
        rows = []
        for row, id_ in enumerate(given):
            words = titles[row], packed[row], int(embedded.num_tokens[row]), int(embedded.truncated[row]), texts[row]
            vector = vectors[row].tobytes()
            rows.append((id_, *words, text_crc32(id_, *words), vector, vector_crc32(id_, vector)))
        columns = "title", "metadata", "num_tokens", "truncated", "text", "text_crc32", "vector", "vector_crc32"
        with self._writing("add"):
            self._connection.executemany(
                f"INSERT INTO documents (id, {', '.join(columns)}) VALUES (?, {', '.join('?' * len(columns))}) "
                f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in columns)}",
                rows,
            )
        return given

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents, all in one transaction; ids that are not stored are passed over.

        Returns:
            How many were deleted.
        """
        if isinstance(ids, str):
            raise InputError("ids is one str: pass a list of ids.")
        for id_ in ids:
            _check_id(id_)
        self._check_writable()
        with self._writing("remove"):
            return sum(self._connection.execute("DELETE FROM documents WHERE id = ?", (id_,)).rowcount for id_ in ids)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The stored documents with these ids, in their order.

        Raises:
            InputError: an id is not stored.
        """
        with self._reading("read"):
            found = [self._document(id_) for id_ in ids]
        missing = [id_ for id_, document in zip(ids, found, strict=True) if document is None]
        if missing:
            raise InputError(f"{self.path} has no document {missing[0]!r}.")
        return [document for document in found if document is not None]

    def search(self, query: str, k: int = 10, *, dim: int | None = None, task: str = DEFAULT_TASK) -> list[Hit]:
        """The documents nearest to a query: every vector is compared.

        Args:
            query: without prompt; not blank.
            k: how many, 1 to 10,000; fewer come back when fewer are stored.
            dim: a trained width; None for the full one. A smaller one takes less memory and time.
            task: a task of the model, such as "search result" or "question answering".

        Returns:
            Hits by falling cosine; equal scores by id.

        Raises:
            InputError, TokenLimitError, PromptError, DimensionError, ConfigError: the query, task, `dim` or `k` cannot work.
            IndexFileError: the file is damaged or was replaced.
        """
        _check_k(k)
        dim = check_dim(dim, self._embedder.dims)
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"query={query!r}: a query needs at least one word.")
        return self.search_vector(self._embedder.embed_query(query, task=task).vector, k, dim=dim)

    def search_vector(self, vector: NDArray[np.float32], k: int = 10, *, dim: int | None = None) -> list[Hit]:
        """Like `search`, for a vector of the same model.

        Args:
            vector: (D,) of any trained width; only its direction counts.
            dim: a trained width, not above the vector's own; None for the vector's own.
        """
        _check_k(k)
        vector = np.asarray(vector)
        if vector.ndim != 1 or vector.dtype.kind != "f":
            raise InputError(f"vector has shape {vector.shape} and type {vector.dtype}: it must be one row of floats.")
        width = check_dim(len(vector), self._embedder.dims)
        dim = width if dim is None else check_dim(dim, self._embedder.dims)
        if dim > width:
            raise InputError(f"dim={dim}, but the vector has {width} channels: pass a wider vector or a smaller dim.")
        if not np.isfinite(vector).all() or not np.any(vector[:dim]):
            raise InputError("the vector is zero, NaN or infinite and has no direction.")
        query = shorten(vector.astype(np.float32), dim, (width, *self._embedder.dims))  # (dim,)
        with self._reading("search"):
            ids, stored = self._matrix(dim)  # (N, dim)
            hits = []
            for score, id_ in _nearest(query, ids, stored, k):
                document = self._document(id_)
                if document is None:  # one transaction sees one state, so the table and its own lookup by id disagree
                    raise IndexFileError(f"{self.path} is damaged: document {id_!r} cannot be looked up. {REBUILD}")
                hits.append(Hit(id=id_, score=score, text=document.text, title=document.title, metadata=document.metadata,
                                truncated=document.truncated))
        return hits

    def facts(self, *, check: bool = False) -> IndexFacts:
        """What the file says about itself; see `describe_index`."""
        with self._reading("read"):
            return facts_of(self._connection, self.path, check=check)

    def remember_model_path(self, model_path: str) -> None:
        """Store where the bundle lies, as a hint for the next command."""
        self._check_writable()
        with self._writing("write"):
            self._connection.execute("INSERT OR REPLACE INTO facts VALUES ('model_path', ?)", (model_path,))

    def __len__(self) -> int:
        with self._reading("read"):
            return int(self._connection.execute("SELECT count(*) FROM documents").fetchone()[0])

    def close(self) -> None:
        """Release the file. The embedder stays open: it was not opened here."""
        with self._lock:
            self._closed = True
            self._matrices.clear()
            with typed_errors(self.path, "close"):
                self._connection.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _matrix(self, dim: int) -> tuple[list[str], NDArray[np.float32]]:
        """Ids and their vectors at a width, read again after another connection has written. Call inside `_reading`."""
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._data_version:
            self._matrices.clear()
            self._data_version = version
        if dim not in self._matrices:
            self._matrices[dim] = self._load(dim)
        return self._matrices[dim]

    def _load(self, dim: int) -> tuple[list[str], NDArray[np.float32]]:
        dims = self._embedder.dims
        count = self._connection.execute("SELECT count(*) FROM documents").fetchone()[0]
        ids: list[str] = []
        stored = np.empty((count, dim), dtype=np.float32)  # (N, dim)
        rows = self._connection.execute("SELECT id, vector, vector_crc32 FROM documents ORDER BY number")
        while block := rows.fetchmany(1024):
            for id_, vector, crc in block:
                if not isinstance(id_, str) or not isinstance(vector, bytes) or len(vector) != 4 * dims[0] or vector_crc32(id_, vector) != crc:
                    raise IndexFileError(f"{self.path} is damaged: the vector of {id_!r} is not what was stored. {REBUILD}")
            full = np.frombuffer(b"".join(vector for _, vector, _ in block), dtype="<f4").reshape(len(block), dims[0])
            if len(ids) + len(block) <= count:
                stored[len(ids) : len(ids) + len(block)] = shorten(full.astype(np.float32, copy=False), dim, dims)
            ids.extend(id_ for id_, _, _ in block)
        if len(ids) != count or len(set(ids)) != count:
            raise IndexFileError(f"{self.path} is damaged: {count} documents are counted, {len(set(ids))} can be read. {REBUILD}")
        return ids, stored

    def _document(self, id_: str) -> Document | None:
        _check_id(id_)
        row = self._connection.execute(
            "SELECT title, metadata, num_tokens, truncated, text, text_crc32 FROM documents WHERE id = ?", (id_,)
        ).fetchone()
        if row is None:
            return None
        title, metadata, num_tokens, truncated, text, crc = row
        if text_crc32(id_, title, metadata, num_tokens, truncated, text) != crc:
            raise IndexFileError(f"{self.path} is damaged: document {id_!r} is not what was stored. {REBUILD}")
        unpacked = None if metadata is None else json.loads(metadata)
        return Document(id=id_, text=text, title=title, metadata=unpacked, num_tokens=num_tokens, truncated=bool(truncated))

    def _checked_vectors(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        width = self._embedder.dims[0]
        if vectors.shape != (count, width):
            raise InputError(f"the model gave shape {vectors.shape}, not {(count, width)}. Check it with `egemma verify`.")
        _check_unit_length(vectors)
        return np.ascontiguousarray(vectors, dtype="<f4")

    def _check_writable(self) -> None:
        if self.read_only:
            raise IndexFileError(f"{self.path} cannot be written here; it is open for search only. Copy it elsewhere first.")

    @contextmanager
    def _reading(self, doing: str) -> Iterator[None]:
        """One state of the file for everything in the block."""
        with self._lock, self._transaction("BEGIN", doing):
            if self._stamp is not None and stamp_of(self.path) != self._stamp:
                raise IndexFileError(f"{self.path} was changed while it was open for search only. Open it again.")
            yield

    @contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        with self._lock:
            try:
                with self._transaction("BEGIN IMMEDIATE", doing):
                    yield
            finally:
                self._matrices.clear()  # data_version tells only what others wrote

    @contextmanager
    def _transaction(self, begin: str, doing: str) -> Iterator[None]:
        if self._closed:
            raise IndexFileError(f"{self.path} is closed. Open it again.")
        with typed_errors(self.path, doing):
            if self._connection.in_transaction:  # a method called from within another one's block
                raise AssertionError("transactions do not nest")
            try:
                self._connection.execute(begin)
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # after a full disk SQLite may have rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise


def content_id(text: str, title: str | None = None) -> str:
    """The id of a text that came without one: the same title and text always get the same."""
    return hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()[:32]


def _nearest(query: NDArray[np.float32], ids: Sequence[str], stored: NDArray[np.float32], k: int) -> list[tuple[float, str]]:
    """The k best (score, id), by falling score, then by id.

    A fast float32 pass finds everything that could be among the k best; those are scored again in float64, each row alone,
    because a matrix product rounds a row differently depending on where it stands, and equal vectors must tie.
    """
    if not ids:
        return []
    rough = stored @ query  # (N,)
    k = min(k, len(ids))
    kth = np.partition(rough, len(ids) - k)[len(ids) - k]
    candidates = np.flatnonzero(rough >= kth - _FLOAT32_SLACK)
    wide = query.astype(np.float64)
    scored: list[tuple[float, str]] = []
    for start in range(0, len(candidates), _RESCORE_ROWS):
        rows = candidates[start : start + _RESCORE_ROWS]
        exact = (stored[rows] * wide).sum(axis=-1).clip(-1.0, 1.0)
        scored += zip(exact.tolist(), (ids[row] for row in rows), strict=True)
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k]


def _check_unit_length(vectors: NDArray[np.float32]) -> None:
    with np.errstate(all="ignore"):
        length = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=-1))
    if not (np.abs(length - 1) < 1e-3).all():  # false for NaN too
        raise InputError("a vector is not of unit length, or not finite. Check the model with `egemma verify`.")


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= _MAX_K:
        raise ConfigError(f"k={k!r}: a whole number from 1 to {_MAX_K}.")


def _one_per_text(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, (str, Mapping)):
        raise InputError(f"{name} is one {type(values).__name__}: pass a list, one per text.")
    if len(values) != count:
        raise InputError(f"{len(values)} {name} for {count} texts: give one each.")
    return list(values)


def _check_stored_text(what: str, text: str, *, blank: bool) -> None:
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}: pass str; decode bytes first.")
    if "\0" in text:
        raise InputError(f"{what} holds a NUL character at {text.index(chr(0))}: other languages stop reading there. Remove it.")
    if not blank and not text.strip():
        raise InputError(f"{what} is blank: there is nothing to find in it. Leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not "
                         "Unicode text. Decode the source with errors='replace', or remove it.") from error


def _check_id(id_: str) -> None:
    _check_stored_text(f"id {id_!r}", id_, blank=False)


def _check_ids(ids: Sequence[str], contents: Sequence[tuple[str, str | None, str | None]]) -> None:
    seen: dict[str, tuple[str, str | None, str | None]] = {}
    for id_, content in zip(ids, contents, strict=True):
        _check_id(id_)
        if seen.setdefault(id_, content) != content:
            raise InputError(f"id {id_!r} is given to two different documents of one call. Give each its own.")


def _pack_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise InputError(f"metadata={metadata!r}: a mapping from str to JSON values, or None.")
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata={metadata!r} cannot be stored as JSON: {error}.") from error
