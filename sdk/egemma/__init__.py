"""Text to vectors on this machine, without torch and without the network.

    from egemma import Embedder, Index

    with Embedder.open("my-bundle") as embedder:
        query = embedder.embed_query("how do I reset my password")

Importing this package loads nothing heavy: each name below arrives with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from egemma_core.errors import (
    BundleError,
    ConfigError,
    DimensionError,
    EgemmaError,
    IndexFileError,
    IndexMismatchError,
    InputError,
    PromptError,
    RuntimeUnavailableError,
    ShapeError,
    TokenLimitError,
)

if TYPE_CHECKING:
    from egemma.embedder import Embedder, Embedding, Embeddings
    from egemma.identity import ModelIdentity
    from egemma.index import Document, Hit, Hits, Index

    __version__: str

__all__ = [
    "BundleError",
    "ConfigError",
    "DimensionError",
    "Document",
    "EgemmaError",
    "Embedder",
    "Embedding",
    "Embeddings",
    "Hit",
    "Hits",
    "Index",
    "IndexFileError",
    "IndexMismatchError",
    "InputError",
    "ModelIdentity",
    "PromptError",
    "RuntimeUnavailableError",
    "ShapeError",
    "TokenLimitError",
    "__version__",
]

_HOMES = {
    "Document": "index",
    "Embedder": "embedder",
    "Embedding": "embedder",
    "Embeddings": "embedder",
    "Hit": "index",
    "Hits": "index",
    "Index": "index",
    "ModelIdentity": "identity",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'egemma' has no attribute {name!r}")
    return getattr(import_module(f"egemma.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("egemma")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0+source"
