"""Text to vectors on this machine, without torch and without the network.

    from egemma import Embedder, Index

    with Embedder.open("my-bundle") as embedder:
        query = embedder.embed_query("how do I reset my password")

Importing this package loads nothing heavy: each name below arrives with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from egemma.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DimensionError,
    EgemmaError,
    ExportError,
    IndexFileError,
    IndexMismatchError,
    InputError,
    MissingDependencyError,
    NotFoundError,
    OutputError,
    PromptError,
    RuntimeUnavailableError,
    ShapeError,
    StoreError,
    TokenLimitError,
)

if TYPE_CHECKING:
    from egemma import upkeep
    from egemma.chunks import Chunk, ChunkedDocument, split_text
    from egemma.embedder import Embedder
    from egemma.embeddings import Embedding, Embeddings
    from egemma.identity import ModelIdentity
    from egemma.index import Document, Hit, Hits, Index, PutReport, SearchInfo
    from egemma.verify import Verification, verify_bundle

    __version__: str

__all__ = [
    "BundleError",
    "CheckpointError",
    "Chunk",
    "ChunkedDocument",
    "ConfigError",
    "DimensionError",
    "Document",
    "EgemmaError",
    "Embedder",
    "Embedding",
    "Embeddings",
    "ExportError",
    "Hit",
    "Hits",
    "Index",
    "IndexFileError",
    "IndexMismatchError",
    "InputError",
    "MissingDependencyError",
    "ModelIdentity",
    "NotFoundError",
    "OutputError",
    "PromptError",
    "PutReport",
    "RuntimeUnavailableError",
    "SearchInfo",
    "ShapeError",
    "StoreError",
    "TokenLimitError",
    "Verification",
    "__version__",
    "split_text",
    "upkeep",
    "verify_bundle",
]

# Where each name is loaded from at its first use; a submodule is its own home.
_HOMES = {
    "Chunk": "chunks",
    "ChunkedDocument": "chunks",
    "Document": "index",
    "Embedder": "embedder",
    "Embedding": "embeddings",
    "Embeddings": "embeddings",
    "Hit": "index",
    "Hits": "index",
    "Index": "index",
    "ModelIdentity": "identity",
    "PutReport": "index",
    "SearchInfo": "index",
    "Verification": "verify",
    "split_text": "chunks",
    "upkeep": "upkeep",
    "verify_bundle": "verify",
}


if not TYPE_CHECKING:  # which would take every misspelt name for one that arrives later

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return _version()
        if name not in _HOMES:
            raise AttributeError(f"module 'egemma' has no attribute {name!r}")
        home = import_module(f"egemma.{_HOMES[name]}")
        return home if _HOMES[name] == name else getattr(home, name)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("egemma")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0+source"
