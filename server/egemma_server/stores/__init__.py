"""The index on a server, for when the device is too small: the methods of `egemma.Index`, the same
filters, the same check of the model.

    from egemma_server.stores import PostgresIndex

    with PostgresIndex.open("postgresql://localhost/notes", embedder) as index:
        index.add(["Hold the button for ten seconds."], ids=["reset"], metadata=[{"lang": "en"}])
        hits = index.search("how do I reset it", where={"lang": "en"})

A document is one text with one vector: what is longer than the model reads is cut with
`egemma.chunks.split_text` first. Every vector is compared, unless `approximate=True` lets the
server's own approximate index find the candidates. Files, ingestion, migration and backup stay with
the local index or with the server's own tools.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egemma_server.stores.postgres import PostgresIndex
    from egemma_server.stores.qdrant import QdrantIndex

__all__ = ["PostgresIndex", "QdrantIndex"]

_HOMES = {"PostgresIndex": "postgres", "QdrantIndex": "qdrant"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'egemma_server.stores' has no attribute {name!r}")
    return getattr(import_module(f"egemma_server.stores.{_HOMES[name]}"), name)
