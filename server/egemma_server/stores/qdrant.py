"""The index in Qdrant: one collection, a named vector for each trained width, filters that mean
what they mean elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity, check_same_model
from egemma.index.hits import Document, Hits, Mode
from egemma.index.inputs import check_id, check_ids
from egemma.index.search import Queries, Query
from egemma.where import parse
from egemma_core.errors import ConfigError, StoreError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.vectors import check_dim
from egemma_server.request import (
    SearchRequest,
    StoreOptions,
    model_here,
)
from egemma_server.stores import qdrant_documents as documents
from egemma_server.stores.qdrant_collection import (
    client_of,
    create_collection,
    place_of,
    read_metadata,
    typed_errors,
)
from egemma_server.stores.rows import (
    StoreFacts,
    can_be_stored,
    check_name,
    documents_of,
    embedded_rows,
    embedder_of,
    identity_of,
    vector_rows,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from egemma.embedder import Embedder

_WAY_OUT = "Open it with that model, or re-embed the texts into a store of another name."


class QdrantIndex:
    """An open store in Qdrant.

    Make one with `QdrantIndex.open`. Qdrant has no transactions: after an error in the middle of a
    call a part of its documents may be stored. Each is stored as a whole, and repeating the call
    completes it.
    """

    def __init__(
        self,
        collection: documents.Collection,
        identity: ModelIdentity,
        embedder: Embedder | None,
        *,
        owned: bool,
    ) -> None:
        """Take a collection that `open` has checked; `open` does it all."""
        self.name = collection.name
        self._place = place_of(collection.name)
        self._collection, self._identity, self._embedder = collection, identity, embedder
        self._owned = owned
        self._closed = False

    @classmethod
    def open(
        cls,
        location: str | Path | Any,
        embedder: Embedder | ModelIdentity | None = None,
        *,
        name: str = "egemma",
        create: bool = True,
        widths: Sequence[int] | None = None,
    ) -> QdrantIndex:
        """Open a collection, or make one.

        Args:
            location: of a server, "http://..." or "https://..."; ":memory:" or a folder for
                Qdrant's own local mode, which one process opens at a time; or a `QdrantClient`,
                which stays open when this is closed.
            embedder: the model; it must be the one that made the collection. An identity will do
                where vectors come from elsewhere, None for a collection that exists.
            name: of the collection.
            create: make the collection where there is none.
            widths: trained widths that a new collection can be searched at, each a vector of its
                own beside the full one; None for all, (768,) for the full one alone. One that
                exists stays as it is.

        Raises:
            IndexMismatchError: the collection holds vectors of another model.
            StoreError: no connection, no collection, or one that is not understood.
            MissingDependencyError: qdrant-client is not installed, or is too old.
        """
        check_name(name)
        identity = identity_of(embedder)
        falling: tuple[int, ...] = ()
        if identity is not None:
            chosen = {check_dim(width, identity.dims) for width in widths or identity.dims}
            falling = tuple(sorted(chosen | {identity.dim}, reverse=True))
        place = place_of(name)
        with typed_errors(place, "opened"):
            client, owned, local = client_of(location)
        try:
            with typed_errors(place, "opened"):
                if not client.collection_exists(name):
                    if not create or identity is None:
                        raise StoreError(
                            f"there is no {place} there.",
                            hint="Pass an embedder and create=True, or another name.",
                        )
                    create_collection(client, name, identity, falling)
                stored, stored_widths = read_metadata(client, name)
            if identity is not None:
                check_same_model(place, stored, identity, _WAY_OUT)
            collection = documents.Collection(
                client=client, name=name, widths=stored_widths, local=local
            )
            return cls(collection, stored, embedder_of(embedder), owned=owned)
        except BaseException:
            if owned:
                client.close()
            raise

    @property
    def identity(self) -> ModelIdentity:
        """The model whose vectors are in the store."""
        return self._identity

    def add(
        self,
        texts: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        overflow: str = "error",
    ) -> list[str]:
        """Embed texts as documents and store them.

        Args, returns and raises as `egemma.Index.add`; `overflow` can be "error" or "truncate".
        """
        model = model_here(self._embedder, self._place, "add texts")
        given, rows, vectors = embedded_rows(model, texts, ids, titles, metadata, overflow)
        with self._checked("changed"):
            documents.store_documents(self._collection, rows, vectors)
        return given

    def add_vectors(
        self,
        vectors: NDArray[np.float32],
        *,
        ids: Sequence[str],
        texts: Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        num_tokens: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
    ) -> list[str]:
        """Store documents whose vectors were computed elsewhere by the same model.

        Args, returns and raises as `egemma.Index.add_vectors`.
        """
        given, rows, checked = vector_rows(
            self._identity, vectors, ids, texts, titles, metadata, num_tokens, truncated
        )
        with self._checked("changed"):
            documents.store_documents(self._collection, rows, checked)
        return given

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents; ids that are not stored are passed over.

        Returns how many were deleted.
        """
        checked = check_ids(ids)
        with self._checked("changed"):
            return documents.delete_documents(self._collection, checked)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the stored documents with these ids, in their order.

        Raises:
            NotFoundError: an id is not stored.
        """
        checked = check_ids(ids)
        with self._checked("read"):
            rows = documents.read_rows(self._collection, checked)
        return documents_of(rows, checked, self._place)

    def __getitem__(self, id_: str) -> Document:
        """Return the stored document with this id; raises as `get`."""
        check_id(id_)
        return self.get([id_])[0]

    def __contains__(self, id_: object) -> bool:
        """Return whether a document with this id is stored."""
        if not isinstance(id_, str) or not can_be_stored(id_):
            return False
        with self._checked("read"):
            return bool(documents.read_rows(self._collection, [id_]))

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """Return the ids of all documents, or of those that a filter is true for, sorted."""
        condition = None if where is None else parse(where)
        with self._checked("read"):
            return documents.read_ids(self._collection, condition)

    @overload
    def search(self, query: Query, k: int = 10, **options: Unpack[StoreOptions]) -> Hits: ...
    @overload
    def search(
        self, query: Queries, k: int = 10, **options: Unpack[StoreOptions]
    ) -> list[Hits]: ...
    @overload  # one vector or rows of them: NumPy's types do not tell
    def search(self, query: NDArray[Any], k: int = 10, **options: Unpack[StoreOptions]) -> Any: ...
    def search(
        self,
        query: Query | Queries | NDArray[Any],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits | list[Hits]:
        """Return the documents that answer a query best.

        Every vector of the width `dim` is compared, on the server. A filter that Qdrant cannot
        express is decided here, on as many of its hits as that takes. Full text is ranked by
        Qdrant's BM25.

        Args:
            query: a text or a (W,) vector by the same model; or several: a list of texts or (B, W)
                vectors. Of a vector only the direction counts; W is any trained width.
            k, dim, where, mode, task: as in `egemma.Index.search`.
            approximate: let the server's own index, Qdrant's graph, find the hits; it can miss
                some.
            shortlist: None; Qdrant's graph has no such number.
            exact: what a store does unless `approximate` is given.

        Returns:
            Hits by falling score; equal scores by id. Which of several equal ones at the end of the
            list come back is Qdrant's choice. For several queries a list.
        """
        if shortlist is not None:
            raise ConfigError(
                f"shortlist={shortlist!r} was given, but Qdrant has its own first pass.",
                hint="Leave it out.",
            )
        request = SearchRequest(
            query=query,
            k=k,
            dim=dim,
            where=where,
            mode=mode,
            task=task,
            exact=exact,
            approximate=approximate,
        )
        queries = request.query_vectors(self._identity, self._embedder, self._place)
        widths = self._collection.widths
        if queries is not None and queries.dim not in widths:
            raise ConfigError(
                f"dim={queries.dim} was asked for, but {self._place} was made for the widths "
                f"{widths}.",
                hint="Choose one of these, or make another collection with widths=.",
            )
        with self._checked("searched"):
            found = documents.search(self._collection, request, queries)
        return request.answer(found)

    def facts(self) -> StoreFacts:
        """Return what the store says about itself."""
        with self._checked("read"):
            return StoreFacts(
                engine="Qdrant",
                name=self.name,
                fingerprint=self._identity.fingerprint,
                model=self._identity.name,
                dims=self._collection.widths,
                documents=documents.count_documents(self._collection),
                graph_dim=None,
            )

    def __len__(self) -> int:
        """Return how many documents there are."""
        with self._checked("read"):
            return documents.count_documents(self._collection)

    def close(self) -> None:
        """Close the client that `open` made.

        A client that was passed in, and the embedder, stay open.
        """
        self._closed = True
        if self._owned:
            self._collection.client.close()

    def __enter__(self) -> QdrantIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _checked(self, doing: str) -> Iterator[None]:
        """Run a block on a collection that still holds vectors of this model.

        Args:
            doing: what the block does, after "cannot be", for messages.
        """
        if self._closed:
            raise StoreError(f"{self._place} is closed.", hint="Open it again.")
        with typed_errors(self._place, doing):
            stored, _ = read_metadata(self._collection.client, self.name)
            check_same_model(self._place, stored, self._identity, _WAY_OUT)
            yield
