"""What ingestion asks of an index; nothing else of this package calls it but `put` and `remove`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from egemma.chunks import Chunk, ChunkedDocument

if TYPE_CHECKING:
    from egemma.embedder import Embedder
    from egemma.index import PutReport


class Store(Protocol):
    """The part of an index that ingestion uses.

    `sources` gives what was noted of each document, `chunk_hashes` the hashes of the chunks of
    those of the ids that are stored.
    """

    @property
    def path(self) -> Path: ...
    @property
    def embedder(self) -> Embedder: ...
    def put(self, documents: Sequence[ChunkedDocument]) -> PutReport: ...
    def remove(self, ids: Sequence[str]) -> int: ...
    def sources(self) -> Mapping[str, Mapping[str, Any]]: ...
    def chunk_hashes(self, ids: Sequence[str]) -> Mapping[str, Collection[bytes]]: ...


def stored_sources(index: Store) -> Mapping[str, Mapping[str, Any]]:
    """Return what was noted of each document of the index that ingestion put in: id -> source."""
    return index.sources()


def stored_chunks(index: Store, document: ChunkedDocument) -> list[bool]:
    """Say of each chunk of a document whether the stored document of its id has the same one."""
    hashes = index.chunk_hashes([document.id]).get(document.id, ())
    return [_hash(chunk) in hashes for chunk in document.chunks]


def missing_chunks(index: Store, document: ChunkedDocument) -> list[Chunk]:
    """Return the chunks of a document that the index has no vector of, each once."""
    stored = stored_chunks(index, document)
    pairs = zip(document.chunks, stored, strict=True)
    return list({_hash(chunk): chunk for chunk, is_stored in pairs if not is_stored}.values())


def index_files(index: Store) -> Callable[[str], bool]:
    """Return the rule that says whether a path is the index file, or one beside it: -wal, -shm."""
    own = Path(index.path).resolve().as_posix()
    return lambda path: path == own or path.startswith((f"{own}-", f"{own}."))


def _hash(chunk: Chunk) -> bytes:
    from egemma.index.checksums import chunk_hash  # the index takes time to load

    return chunk_hash(chunk.title, chunk.text)
