"""Points of a store in Qdrant: written, deleted, read and searched, page by page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.index.hits import Hits
from egemma.where import Condition, matches
from egemma_core.vectors import normalize
from egemma_server.request import QueryVectors, SearchRequest
from egemma_server.stores.qdrant_collection import (
    WORDS,
    payload_of,
    point_id,
    row_of,
    vector_name,
)
from egemma_server.stores.qdrant_where import to_qdrant
from egemma_server.stores.rows import Row, ranked_hits

# of one request; with vectors of 768 channels at all four widths about 6 MB, a server takes 32
_BATCH_POINTS = 256
_PAGE_POINTS = 1000  # of one answer, where points are read one by one


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A collection that was checked, and how it is reached."""

    client: Any
    name: str
    widths: tuple[int, ...]  # that its points have vectors of, falling
    local: bool  # Qdrant's local mode, which always compares everything


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """A filter, as far as the server decides it."""

    condition: Condition | None
    server: Any  # models.Filter that is true wherever the condition is; None for everywhere
    exact: bool  # it is true nowhere else

    @classmethod
    def of(cls, condition: Condition | None) -> _Filter:
        server, exact = (None, True) if condition is None else to_qdrant(condition)
        return cls(condition=condition, server=server, exact=exact)

    def lets_pass(self, point: Any) -> bool:
        """Return whether the filter is true for a point that the server let pass."""
        if self.exact or self.condition is None:
            return True
        metadata = point.payload["metadata"]
        return matches(self.condition, None if metadata is None else json.loads(metadata))


def store_documents(
    collection: Collection, rows: Sequence[Row], vectors: NDArray[np.float32]
) -> None:
    """Write documents; one whose id is stored takes the other's place.

    Args:
        vectors: (N, D), of the rows.
    """
    from qdrant_client import models

    if not rows:
        return
    by_name = {vector_name(width): normalize(vectors[:, :width]) for width in collection.widths}
    for start in range(0, len(rows), _BATCH_POINTS):
        points = [
            models.PointStruct(
                id=point_id(row.id),
                payload=payload_of(row),
                vector={name: matrix[number].tolist() for name, matrix in by_name.items()},
            )
            for number, row in enumerate(rows[start : start + _BATCH_POINTS], start=start)
        ]
        collection.client.upsert(collection.name, points=points, wait=True)


def delete_documents(collection: Collection, ids: Sequence[str]) -> int:
    """Delete documents; return how many were there."""
    from qdrant_client import models

    stored = list(read_rows(collection, ids))
    for start in range(0, len(stored), _PAGE_POINTS):
        page = stored[start : start + _PAGE_POINTS]
        selector = models.PointIdsList(points=[point_id(id_) for id_ in page])
        collection.client.delete(collection.name, points_selector=selector, wait=True)
    return len(stored)


def read_rows(collection: Collection, ids: Sequence[str]) -> dict[str, Row]:
    """Return those of these documents that are stored, by id."""
    found: dict[str, Row] = {}
    different = list(dict.fromkeys(ids))
    for start in range(0, len(different), _PAGE_POINTS):
        points = collection.client.retrieve(
            collection.name,
            ids=[point_id(id_) for id_ in different[start : start + _PAGE_POINTS]],
            with_payload=True,
        )
        found.update((row.id, row) for row in map(row_of, points))
    return found


def read_ids(collection: Collection, condition: Condition | None) -> list[str]:
    """Return the ids of the documents that a filter is true for, sorted."""
    passing = _Filter.of(condition)
    found: list[str] = []
    offset = None
    while True:
        points, offset = collection.client.scroll(
            collection.name,
            scroll_filter=passing.server,
            limit=_PAGE_POINTS,
            offset=offset,
            with_payload=["id", "metadata"],
            with_vectors=False,
        )
        found += [point.payload["id"] for point in points if passing.lets_pass(point)]
        if offset is None:
            return sorted(found)


def count_documents(collection: Collection, condition: Condition | None = None) -> int:
    """Return how many documents the server compares under a filter; all, where there is none."""
    wanted = _Filter.of(condition).server
    return int(collection.client.count(collection.name, count_filter=wanted, exact=True).count)


def search(
    collection: Collection, request: SearchRequest, queries: QueryVectors | None
) -> list[Hits]:
    """Return the hits of each query."""
    from qdrant_client import models

    compared = 0 if queries is None else count_documents(collection, request.condition)
    info = request.info(queries, engine="qdrant", vectors=compared)
    # Local mode always compares everything, and warns of being told so.
    params = None if collection.local else models.SearchParams(exact=not request.approximate)
    passing = _Filter.of(request.condition)
    results = []
    for number in range(request.num_queries):
        rows: dict[str, Row] = {}
        cosines: dict[str, float] = {}
        scores: dict[str, float] = {}
        if queries is not None:
            query = queries.rows[number, : queries.dim].astype(np.float32)
            best = _best(
                collection,
                passing,
                rows,
                request.num_candidates,
                query=normalize(query).tolist(),
                using=vector_name(queries.dim),
                search_params=params,
            )
            cosines = {id_: max(-1.0, min(1.0, score)) for id_, score in best}
        if request.words is not None and request.words[number]:
            text = models.TextQuery(text=" ".join(request.words[number]))
            best = _best(collection, passing, rows, request.num_candidates, query=text, using=WORDS)
            scores = dict(best)
        ranked = request.ranked(cosines, scores)
        results.append(ranked_hits(rows, ranked, cosines, scores, info))
    return results


def _best(
    collection: Collection, passing: _Filter, rows: dict[str, Row], count: int, **asked: Any
) -> list[tuple[str, float]]:
    """Return the ids and scores of the best points, best first.

    Pages are read until `count` points pass the filter, where the server does not decide it.

    Args:
        rows: gets the documents of these points, by id.
        count: how many are wanted.
        asked: what `query_points` takes: the query and the vector to compare it with.
    """
    found: list[tuple[str, float]] = []
    offset, page = 0, count if passing.exact else max(count, _PAGE_POINTS)
    while len(found) < count:
        points = collection.client.query_points(
            collection.name,
            query_filter=passing.server,
            limit=page,
            offset=offset,
            with_payload=True,
            with_vectors=False,
            **asked,
        ).points
        for point in points:
            if passing.lets_pass(point):
                row = row_of(point)
                rows[row.id] = row
                found.append((row.id, float(point.score)))
        offset += page
        if passing.exact or len(points) < page:
            break
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count]
