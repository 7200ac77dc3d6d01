"""A collection of a store in Qdrant, and what goes between it and Python: the client, points,
errors.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from egemma.identity import ModelIdentity
from egemma_core.errors import ConfigError, EgemmaError, MissingDependencyError, StoreError
from egemma_server.stores.qdrant_where import TERMS, terms_of
from egemma_server.stores.rows import Row
from egemma_server.words import words_of

FORMAT_VERSION = 1
WORDS = "words"  # key of a point's payload: what full text goes through


def client_of(location: Any) -> tuple[Any, bool, bool]:
    """Return a client, whether it was made here, and whether it is known to be the local mode.

    Raises:
        MissingDependencyError: qdrant-client is not installed, or is too old.
        ConfigError: `location` is none.
    """
    try:
        from qdrant_client import QdrantClient, models
    except ImportError as error:
        raise MissingDependencyError(
            "QdrantIndex needs qdrant-client, which is not installed.",
            hint="Install it with `pip install 'egemma[qdrant]'`.",
        ) from error
    if not hasattr(models, "TextQuery"):
        raise MissingDependencyError(
            "QdrantIndex needs qdrant-client 1.20 or newer, and an older one is installed.",
            hint="Install it with `pip install -U 'egemma[qdrant]'`.",
        )
    if isinstance(location, QdrantClient):
        return location, False, False
    if not isinstance(location, (str, Path)) or not str(location):
        raise ConfigError(
            f"location is {location!r}, which is no place of a store.",
            hint="Pass the address of a server, a folder, ':memory:', or a QdrantClient.",
        )
    if location == ":memory:":
        return QdrantClient(location=":memory:"), True, True
    if isinstance(location, str) and "://" in location:
        return QdrantClient(url=location), True, False
    return QdrantClient(path=str(location)), True, True


def create_collection(
    client: Any, name: str, identity: ModelIdentity, widths: tuple[int, ...]
) -> None:
    """Make a collection with a vector for each width; after an error there is none."""
    from qdrant_client import models

    vectors = {
        vector_name(width): models.VectorParams(size=width, distance=models.Distance.COSINE)
        for width in widths
    }
    metadata = {
        "egemma_format": FORMAT_VERSION,
        "egemma_model": identity.to_json(),
        "egemma_widths": list(widths),
    }
    client.create_collection(name, vectors_config=vectors, metadata=metadata)
    try:
        _create_indexes(client, name)
    except BaseException:
        # half of one would be opened next time, and fail at its first search for words
        client.delete_collection(name)
        raise


def _create_indexes(client: Any, name: str) -> None:
    from qdrant_client import models

    with warnings.catch_warnings():
        # local mode needs no index for keywords, and says so
        warnings.simplefilter("ignore", UserWarning)
        client.create_payload_index(name, TERMS, field_schema=models.PayloadSchemaType.KEYWORD)
    client.create_payload_index(
        name,
        WORDS,
        field_schema=models.TextIndexParams(type=models.TextIndexType.TEXT, scoring=True),
    )


def read_metadata(client: Any, name: str) -> tuple[ModelIdentity, tuple[int, ...]]:
    """Return the model and the widths that a collection says it was made for.

    Raises:
        StoreError: it says nothing, or is of another format.
    """
    metadata = client.get_collection(name).config.metadata or {}
    version = metadata.get("egemma_format")
    if version is None:
        raise StoreError(
            f"{place_of(name)} does not say which model its vectors are of: it was not made here, "
            "or by a server older than 1.16, which keeps no metadata of collections.",
            hint="Pass another name, or update the server.",
        )
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{place_of(name)} has format {version!r}, and this egemma reads {FORMAT_VERSION}.",
            hint="Update egemma, or pass another name.",
        )
    try:
        return ModelIdentity.from_json(metadata["egemma_model"]), tuple(
            int(width) for width in metadata["egemma_widths"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{place_of(name)} does not say which model its vectors are of: {error}.",
            hint="Add the documents to a new one.",
        ) from error


def payload_of(row: Row) -> dict[str, Any]:
    """Return what a document's point carries beside its vectors."""
    terms, numbers = terms_of(None if row.metadata is None else json.loads(row.metadata))
    return {
        "id": row.id,
        "title": row.title,
        "text": row.text,
        "metadata": row.metadata,
        "num_tokens": row.num_tokens,
        "truncated": row.truncated,
        "terms": terms,
        "numbers": numbers,
        WORDS: " ".join(words_of(f"{row.title or ''} {row.text}")),
    }


def row_of(point: Any) -> Row:
    """Return the document of a point."""
    body = point.payload
    return Row(
        id=body["id"],
        title=body["title"],
        text=body["text"],
        metadata=body["metadata"],
        num_tokens=body["num_tokens"],
        truncated=body["truncated"],
    )


def point_id(id_: str) -> str:
    """Return a document's id as Qdrant takes it, a UUID: the first 128 bits of its SHA-256."""
    return str(uuid.UUID(bytes=hashlib.sha256(id_.encode()).digest()[:16]))


def vector_name(width: int) -> str:
    """Return what a point's vector of this width is called."""
    return f"d{width}"


def place_of(name: str) -> str:
    """Return what messages call a collection."""
    return f"Qdrant collection {name!r}"


@contextmanager
def typed_errors(place: str, doing: str) -> Iterator[None]:
    """Turn the errors of a block's calls into ours.

    Qdrant's local mode raises ValueError and RuntimeError where a server answers with a status.

    Args:
        doing: what the block does, after "cannot be": "opened", "searched".

    Raises:
        StoreError: the client or the server refuses, or is out of reach.
    """
    errors = _qdrant_errors()
    try:
        yield
    except EgemmaError:
        raise
    except errors as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StoreError(
            f"{place} cannot be {doing}: {reason}.",
            hint="Check the address and the server, or open it again.",
        ) from error


def _qdrant_errors() -> tuple[type[BaseException], ...]:
    try:
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException
    except ImportError:
        return (OSError,)
    return (ApiException, QdrantException, ValueError, RuntimeError, OSError, NotImplementedError)
