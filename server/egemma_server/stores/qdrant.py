"""The index in Qdrant: one collection, a named vector for each trained width, filters that mean
what they mean elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from egemma.fusion import reciprocal_rank_fusion
from egemma.identity import ModelIdentity, check_same_model
from egemma.index import Document, Hits
from egemma.index.hits import Mode
from egemma.index.inputs import check_ids
from egemma.where import Condition, matches, parse
from egemma_core.errors import ConfigError, IndexFileError, InputError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.vectors import check_dim, normalize
from egemma_server.stores.qdrant_collection import (
    WORDS,
    client_of,
    create_collection,
    payload_of,
    place_of,
    point_id,
    read_metadata,
    row_of,
    typed_errors,
    vector_name,
)
from egemma_server.stores.qdrant_where import to_qdrant
from egemma_server.stores.rows import (
    Plan,
    Row,
    StoreFacts,
    check_name,
    embedded_rows,
    model_here,
    no_chunks,
    one_vector,
    plan_of,
    ranked_hits,
    vector_rows,
)

if TYPE_CHECKING:
    from egemma.embedder import Embedder

# of one request; with vectors of 768 channels at all four widths about 6 MB, a server takes 32
_BATCH_POINTS = 256
_PAGE_POINTS = 1000  # of one answer, where points are looked at one by one
_WAY_OUT = "Open it with that model, or re-embed the texts into a store of another name."


class QdrantIndex:
    """An open store. Make one with `QdrantIndex.open`.

    Qdrant has no transactions: after an error in the middle of a call a part of its documents may
    be stored. Each is stored as a whole, and repeating the call completes it.
    """

    def __init__(
        self,
        client: Any,
        name: str,
        identity: ModelIdentity,
        embedder: Embedder | None,
        *,
        widths: tuple[int, ...],
        owned: bool,
        local: bool,
    ) -> None:
        """Of a client whose collection `open` has checked; `open` does it all."""
        self.name = name
        self._client, self._identity, self._embedder = client, identity, embedder
        self._widths = widths
        self._owned, self._local = owned, local
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
            IndexFileError: no connection, no collection, or one that is not understood.
            RuntimeUnavailableError: qdrant-client is not installed, or it or the server is too old.
        """
        check_name(name)
        identity = (
            embedder
            if isinstance(embedder, ModelIdentity) or embedder is None
            else ModelIdentity.of(embedder.manifest)
        )
        wanted = (
            None
            if identity is None
            else tuple(
                sorted(
                    {
                        identity.dim,
                        *(check_dim(width, identity.dims) for width in widths or identity.dims),
                    },
                    reverse=True,
                )
            )
        )
        place = place_of(name)
        with typed_errors(place, "opened"):
            client, owned, local = client_of(location)
        try:
            with typed_errors(place, "opened"):
                if not client.collection_exists(name):
                    if not create or identity is None or wanted is None:
                        raise IndexFileError(
                            f"there is no {place} there. Pass an embedder and create=True, or "
                            "another name."
                        )
                    create_collection(client, name, identity, wanted)
                stored, stored_widths = read_metadata(client, name)
            if identity is not None:
                check_same_model(place, stored, identity, _WAY_OUT)
            return cls(
                client,
                name,
                stored,
                None if isinstance(embedder, ModelIdentity) else embedder,
                widths=stored_widths,
                owned=owned,
                local=local,
            )
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
        given, rows, vectors = embedded_rows(
            model_here(self._embedder, self._place, "add texts"),
            texts,
            ids,
            titles,
            metadata,
            overflow,
        )
        self._store(rows, vectors)
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
        """Store documents whose vectors were computed elsewhere by the same model; as
        `egemma.Index.add_vectors`.
        """
        given, rows, checked = vector_rows(
            self._identity, vectors, ids, texts, titles, metadata, num_tokens, truncated
        )
        self._store(rows, checked)
        return given

    def put(self, documents: object, *, overflow: str = "error") -> NoReturn:
        """Not here: a store has one vector for each document."""
        no_chunks(self._place)

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents; ids that are not stored are passed over.

        Returns how many were there.
        """
        wanted = list(dict.fromkeys(check_ids(ids)))
        with self._checked("changed") as models:
            stored = list(self._rows(wanted))
            for start in range(0, len(stored), _PAGE_POINTS):
                points = [point_id(id_) for id_ in stored[start : start + _PAGE_POINTS]]
                self._client.delete(
                    self.name, points_selector=models.PointIdsList(points=points), wait=True
                )
        return len(stored)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The stored documents with these ids, in their order.

        Raises:
            InputError: an id is not stored.
        """
        wanted = check_ids(ids)
        with self._checked("read"):
            rows = self._rows(list(dict.fromkeys(wanted)))
        missing = [id_ for id_ in wanted if id_ not in rows]
        if missing:
            raise InputError(f"{self._place} has no document {missing[0]!r}.")
        return [rows[id_].document() for id_ in wanted]

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """The ids of all documents, or of those that a filter is true for, in their own order."""
        condition = None if where is None else parse(where)
        wanted, exact = (None, True) if condition is None else to_qdrant(condition)
        found: list[str] = []
        with self._checked("read"):
            offset = None
            while True:
                points, offset = self._client.scroll(
                    self.name,
                    scroll_filter=wanted,
                    limit=_PAGE_POINTS,
                    offset=offset,
                    with_payload=["id", "metadata"],
                    with_vectors=False,
                )
                found += [
                    point.payload["id"] for point in points if exact or _passes(condition, point)
                ]
                if offset is None:
                    return sorted(found)

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits:
        """The documents that answer a query best.

        Every vector of the width `dim` is compared, on the server; with `approximate` Qdrant goes
        by its own graph.

        Args: as `egemma.Index.search`, without `shortlist`. A filter that Qdrant cannot express is
            decided here, on as many of its hits as that takes. Full text is ranked by Qdrant's
            BM25.

        Returns:
            Hits by falling score; equal scores by id. Which of several equal ones at the end of the
            list come back is Qdrant's choice.
        """
        return self.search_many(
            [query],
            k,
            dim=dim,
            where=where,
            mode=mode,
            task=task,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        mode: Mode = "vector",
        task: str = DEFAULT_TASK,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> list[Hits]:
        """As `search`, for several queries: they are embedded together."""
        _refuse_shortlist(shortlist)
        return self._search(
            plan_of(
                self._identity,
                self._embedder,
                self._place,
                queries=queries,
                vectors=None,
                k=k,
                dim=dim,
                where=where,
                mode=mode,
                task=task,
                shortlist=None,
                exact=exact,
                approximate=approximate,
            )
        )

    def search_vector(
        self,
        vector: NDArray[np.float32],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> Hits:
        """As `search`, for a query's vector by the same model: (W,) of any trained width; only its
        direction counts.
        """
        return self.search_vectors(
            one_vector(vector)[None],
            k,
            dim=dim,
            where=where,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )[0]

    def search_vectors(
        self,
        vectors: NDArray[np.float32],
        k: int = 10,
        *,
        dim: int | None = None,
        where: Mapping[Any, Any] | None = None,
        shortlist: int | None = None,
        exact: bool = False,
        approximate: bool = False,
    ) -> list[Hits]:
        """As `search_vector`, for the (B, W) vectors of several queries."""
        _refuse_shortlist(shortlist)
        return self._search(
            plan_of(
                self._identity,
                None,
                self._place,
                queries=None,
                vectors=vectors,
                k=k,
                dim=dim,
                where=where,
                mode="vector",
                task=DEFAULT_TASK,
                shortlist=None,
                exact=exact,
                approximate=approximate,
            )
        )

    def facts(self) -> StoreFacts:
        """What the store says about itself."""
        with self._checked("read"):
            return StoreFacts(
                engine="Qdrant",
                name=self.name,
                fingerprint=self._identity.fingerprint,
                model=self._identity.name,
                dims=self._widths,
                documents=self._count(None),
                graph_dim=None,
            )

    def __len__(self) -> int:
        """How many documents there are."""
        with self._checked("read"):
            return self._count(None)

    def close(self) -> None:
        """Close the client that `open` made.

        A client that was passed in, and the embedder, stay open.
        """
        self._closed = True
        if self._owned:
            self._client.close()

    def __enter__(self) -> QdrantIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _place(self) -> str:
        return place_of(self.name)

    def _store(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        named = (
            {vector_name(width): normalize(vectors[:, :width]) for width in self._widths}
            if rows
            else {}
        )
        with self._checked("changed") as models:
            for start in range(0, len(rows), _BATCH_POINTS):
                points = [
                    models.PointStruct(
                        id=point_id(row.id),
                        payload=payload_of(row),
                        vector={width: matrix[number].tolist() for width, matrix in named.items()},
                    )
                    for number, row in enumerate(rows[start : start + _BATCH_POINTS], start=start)
                ]
                self._client.upsert(self.name, points=points, wait=True)

    def _search(self, plan: Plan) -> list[Hits]:
        if plan.dim is not None and plan.dim not in self._widths:
            raise ConfigError(
                f"dim={plan.dim}: {self._place} was made for the widths {self._widths}. Choose one "
                "of these, or make another "
                "collection with widths=."
            )
        results = []
        with self._checked("searched") as models:
            wanted, _ = (None, True) if plan.condition is None else to_qdrant(plan.condition)
            compared = self._count(wanted) if plan.vectors is not None else 0
            how = plan.how(
                scan_width=None,
                shortlist=None,
                vectors=compared,
                kernel="qdrant" if plan.vectors is not None else None,
            )
            # Local mode always compares everything, and warns of being told so.
            params = None if self._local else models.SearchParams(exact=not plan.approximate)
            for number in range(
                len(plan.vectors) if plan.vectors is not None else len(plan.words or ())
            ):
                rows: dict[str, Row] = {}
                cosine: dict[str, float] = {}
                rank: dict[str, float] = {}
                if plan.vectors is not None:
                    width = cast(int, plan.dim)
                    query = normalize(plan.vectors[number, :width].astype(np.float32)).tolist()
                    cosine = {
                        id_: max(-1.0, min(1.0, score))
                        for id_, score in self._best(plan, query, vector_name(width), params, rows)
                    }
                if plan.words is not None and plan.words[number]:
                    rank = dict(
                        self._best(
                            plan,
                            models.TextQuery(text=" ".join(plan.words[number])),
                            WORDS,
                            None,
                            rows,
                        )
                    )
                ranked = (
                    list((cosine or rank).items())
                    if plan.mode != "hybrid"
                    else reciprocal_rank_fusion([list(cosine), list(rank)])
                )
                results.append(ranked_hits(rows, ranked[: plan.k], cosine, rank, how))
        return results

    def _best(
        self, plan: Plan, query: Any, using: str, params: Any, rows: dict[str, Row]
    ) -> list[tuple[str, float]]:
        """The plan's number of ids and scores, best first; puts their rows into `rows`."""
        condition, exact = plan.condition, True
        wanted = None
        if condition is not None:
            wanted, exact = to_qdrant(condition)
        found: list[tuple[str, float]] = []
        offset, page = 0, plan.count if exact else max(plan.count, _PAGE_POINTS)
        while len(found) < plan.count:
            points = self._client.query_points(
                self.name,
                query=query,
                using=using,
                query_filter=wanted,
                search_params=params,
                limit=page,
                offset=offset,
                with_payload=True,
                with_vectors=False,
            ).points
            for point in points:
                if exact or _passes(condition, point):
                    row = row_of(point)
                    rows[row.id] = row
                    found.append((row.id, float(point.score)))
            offset += page
            if exact or len(points) < page:
                break
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[: plan.count]

    def _count(self, wanted: Any) -> int:
        return int(self._client.count(self.name, count_filter=wanted, exact=True).count)

    def _rows(self, ids: Sequence[str]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for start in range(0, len(ids), _PAGE_POINTS):
            points = self._client.retrieve(
                self.name,
                ids=[point_id(id_) for id_ in ids[start : start + _PAGE_POINTS]],
                with_payload=True,
            )
            found.update((row.id, row) for row in map(row_of, points))
        return found

    @contextmanager
    def _checked(self, doing: str) -> Iterator[Any]:
        """Begins by seeing that the collection still holds vectors of this model."""
        from qdrant_client import models

        if self._closed:
            raise IndexFileError(f"{self._place} is closed. Open it again.")
        with typed_errors(self._place, doing):
            check_same_model(
                self._place, read_metadata(self._client, self.name)[0], self._identity, _WAY_OUT
            )
            yield models


def _passes(condition: Condition | None, point: Any) -> bool:
    metadata = point.payload["metadata"]
    return condition is None or matches(
        condition, None if metadata is None else json.loads(metadata)
    )


def _refuse_shortlist(shortlist: int | None) -> None:
    if shortlist is not None:
        raise ConfigError(f"shortlist={shortlist!r}: Qdrant has its own first pass. Leave it out.")
