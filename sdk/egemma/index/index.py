"""The local index: documents, their chunks and vectors in one SQLite file, searched right here.

`Index` is what users open; the modules beside this one do the work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import ChunkedDocument
from egemma.exported import exported
from egemma.identity import ModelIdentity
from egemma.index import jsonl, migration, records, tune
from egemma.index.facts import write_state
from egemma.index.hits import MODES, Document, Hits, Mode, read_document
from egemma.index.inputs import MAX_K, check_ids, check_text
from egemma.index.prepare import IndexOverflow, document_of, prepare_vectors, text_rows
from egemma.index.put import PutReport, put_documents, store_vectors
from egemma.index.search import Queries, Query, Searcher, SearchOptions, SearchPlan, queries_of
from egemma.index.session import Session
from egemma.index.tuned import TuneReport
from egemma.index.upkeep.describe import IndexFacts, facts_of
from egemma.threads import check_threads
from egemma.where import parse
from egemma.where_sqlite import to_sqlite
from egemma_core.checks import one_of, whole_number
from egemma_core.errors import NotFoundError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from egemma.embedder import Embedder


@exported
class Index:
    """An open index file and the model that reads and writes it. Make one with `Index.open`.

    May be used from several threads. Searches take turns among themselves, and so do writes; a
    search waits for no write, and embedding happens outside both. Several processes may have the
    same file open: one writes at a time, the others wait for it.
    """

    def __init__(self, session: Session, threads: int) -> None:
        self.path, self.read_only = session.path, session.read_only
        self._session, self._threads = session, threads
        self._searcher = Searcher(threads)

    @classmethod
    def open(
        cls,
        path: str | Path,
        embedder: Embedder | ModelIdentity | None = None,
        *,
        create: bool = True,
        keep_floats: bool = False,
        threads: int | None = None,
    ) -> Index:
        """Open an index file, or make one.

        Args:
            path: the SQLite file; `-wal` and `-shm`, beside it while it is open, belong to it.
            embedder: the model; it must be the one that made the file, wherever its bundle lies
                now. An identity will do where vectors come from elsewhere, None for a file that
                exists: both can do everything but embed.
            create: make the file when there is none. A file that cannot be written is opened for
                search only.
            keep_floats: a new file keeps vectors as float32 beside their codes: 4 bytes more per
                channel, and scores as of the model's own vectors.
            threads: to search with; None for as many as this process has CPUs.

        Raises:
            IndexMismatchError: the file holds vectors of another model.
            IndexFileError: no file, no index, damaged, of another version, or not accessible.
        """
        threads = check_threads(threads)
        return cls(Session.open(path, embedder, create=create, keep_floats=keep_floats), threads)

    @property
    def identity(self) -> ModelIdentity:
        """The model whose vectors are in the file."""
        return self._session.identity

    @property
    def embedder(self) -> Embedder:
        """The model that texts are embedded with; a ConfigError where the index has none."""
        return self._session.embedder_for("embed texts")

    def add(
        self,
        texts: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        overflow: IndexOverflow = "error",
    ) -> list[str]:
        """Embed texts as documents and store them: all of them, or after any error or crash none.

        Args:
            texts: documents, without prompts; not blank.
            ids: one per text; None makes each from a hash of its title and text. A stored id is
                replaced; what of it is unchanged keeps its vector.
            titles: one per text or None.
            metadata: one JSON object per text or None; what `where` filters by.
            overflow: what to do with a text that is longer than the model reads: "error";
                "truncate" embeds its beginning; "chunk" cuts it into chunks that the model reads
                whole, which are found one by one.

        Returns:
            The ids, in the order of the texts. The same text twice is stored once.

        Raises:
            InputError: a text, id or metadata cannot be stored, or one id is given to two different
                documents.
            TokenLimitError: a text is too long and `overflow` is "error".
            IndexFileError: the file is read-only, full, locked or damaged.
        """
        rows = text_rows(texts, ids, titles, metadata)
        one_of("overflow", overflow, get_args(IndexOverflow))
        embedder = self._session.embedder_for("add texts")
        documents = [document_of(row, embedder, overflow) for row in rows]
        self.put(documents, overflow="error" if overflow == "chunk" else overflow)
        return [row.id for row in rows]

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
        """Store documents of one chunk each, whose vectors were computed elsewhere: all, or none.

        Args:
            vectors: (N, D) float32 unit vectors of documents by the same model, D its full width.
            ids: one per row; a stored id is replaced.
            texts: one per row, to be shown and for full text; None stores vectors alone.
            titles, metadata: as in `add`.
            num_tokens, truncated: one per row, as the embedder said; None stores 0 and False.

        Returns:
            The ids.

        Raises:
            InputError, IndexFileError: as `add`.
        """
        prepared = prepare_vectors(
            vectors, self.identity.dim, ids, texts, titles, metadata, num_tokens, truncated
        )
        with self._session.writing("add") as change:
            store_vectors(change, prepared)
        return list(ids)

    def put(
        self, documents: Sequence[ChunkedDocument], *, overflow: Overflow = "error"
    ) -> PutReport:
        """Embed the chunks of documents and store them: all, or after any error or crash none.

        A stored id is replaced. A chunk whose title and text the stored document has already keeps
        its vector, so an edit costs what it changed.

        Args:
            overflow: what to do with a chunk that is longer than the model reads; see
                `Embedder.embed_documents`.

        Raises:
            InputError, TokenLimitError, IndexFileError: as `add`.
        """
        one_of("overflow", overflow, get_args(Overflow))
        return put_documents(documents, overflow, self._session)

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents, all in one transaction, and return how many of the ids were stored."""
        checked = check_ids(ids)
        with self._session.writing("remove") as change:
            return change.remove_documents(checked)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the stored documents with these ids, in their order; `index[id]` returns one.

        Raises:
            NotFoundError: an id is not stored.
        """
        found = []
        with self._session.reading("read") as connection:
            for position, id_ in enumerate(check_ids(ids)):
                document = read_document(connection, id_)
                if document is None:
                    raise NotFoundError(f"{self.path} has no document {id_!r}.", position=position)
                found.append(document)
        return found

    def __getitem__(self, id_: str) -> Document:
        return self.get([id_])[0]

    def __contains__(self, id_: object) -> bool:
        if not isinstance(id_, str):
            return False
        with self._session.reading("read") as connection:
            return records.find_document(connection, id_) is not None

    def __len__(self) -> int:
        with self._session.reading("read") as connection:
            self._session.check_documents(connection)
            return records.count_documents(connection)

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """Return the ids of all documents, or of those that pass a filter, in order of adding."""
        condition, parameters = ("1", []) if where is None else to_sqlite(parse(where))
        with self._session.reading("read") as connection:
            self._session.check_documents(connection)
            return records.ids_where(connection, condition, parameters)

    @overload
    def search(self, query: Query, k: int = 10, **options: Unpack[SearchOptions]) -> Hits: ...

    @overload
    def search(
        self, query: Queries, k: int = 10, **options: Unpack[SearchOptions]
    ) -> list[Hits]: ...

    @overload  # one vector or rows of them: NumPy's types do not tell
    def search(self, query: NDArray[Any], k: int = 10, **options: Unpack[SearchOptions]) -> Any: ...

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
    ) -> Hits | list[Hits]:
        """Find the chunks that answer a query best.

        A vector search goes through the first `scan_width` channels of every vector, keeps the best
        `shortlist` of them, and orders these by the cosine at `dim`.

        Args:
            query: a text without prompt, or its vector (W,) by the same model, of any trained width
                from the index's scan width up, or what `embed_query` gave; or several: a list
                of texts, rows (B, W), or `Embeddings`.
            k: how many hits, 1 to 10,000; fewer come back when fewer are stored or found.
            dim: a trained width to score at; None for the full one, or for that of the vector.
            where: a filter on metadata, such as {"lang": "en", "year": {"$gte": 2020}}; see
                `egemma.where`. It is applied before the search, so k of those that pass come back.
            mode: "vector" by meaning; "text" by words (BM25); "hybrid" joins both by reciprocal
                rank fusion.
            task: a task of the model, such as "search result" or "question answering"; for texts.
            shortlist: None takes what `tune` found, or else the larger of 300 and 10 k.
            exact: compare every vector at `dim`, without a first pass.

        Returns:
            Hits by falling score, equal scores in the order in which chunks were added; for several
            queries a list of them.

        Raises:
            InputError, TokenLimitError, PromptError, DimensionError, ConfigError: the query,
                filter, task or a number cannot work.
            IndexFileError: the file is damaged or was replaced.
            IndexMismatchError: somebody has migrated the file to another model since it was opened.
        """
        texts, vectors, single = queries_of(query)
        if shortlist is not None:
            hint = "None leaves the choice to the index."
            shortlist = whole_number("shortlist", shortlist, 1, hint=hint)
        plan = SearchPlan(
            texts=texts,
            vectors=vectors,
            k=whole_number("k", k, 1, MAX_K),
            dim=None if dim is None else check_dim(dim, self.identity.dims),
            condition=None if where is None else to_sqlite(parse(where)),
            mode=one_of("mode", mode, MODES),
            task=task,
            shortlist=shortlist,
            exact=exact,
        )
        found = self._searcher.answer(plan, self._session)
        return found[0] if single else found

    def facts(self, *, check: bool = False) -> IndexFacts:
        """Return what the file says about itself; see `egemma.upkeep.describe`."""
        with self._session.reading("read") as connection:
            return facts_of(connection, self.path, check=check)

    def tune(
        self,
        *,
        recall: float = 0.99,
        k: int = 10,
        queries: Sequence[str] | NDArray[np.float32] | None = None,
        sample: int = tune.SAMPLE,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> TuneReport:
        """Find the fastest scan width and shortlist that find what an exact search finds.

        See `egemma.index.tune.tune`; later searches use what was found.
        """
        request = tune.TuneRequest(recall, k, sample, seed, confidence)
        return tune.tune(request, queries, self._session, threads=self._threads)

    def import_jsonl(
        self,
        source: str | Path,
        *,
        reembed: bool = False,
        overflow: Overflow = "error",
        progress: Callable[[int, int], None] | None = None,
    ) -> jsonl.ImportReport:
        """Put the documents of an export in; see `jsonl.import_jsonl`."""
        self._session.check_writable()
        put = partial(self.put, overflow=overflow)
        writing = self._session.writing
        return jsonl.import_jsonl(
            source, self.identity, put, writing, reembed=reembed, progress=progress
        )

    def migrate(
        self,
        new_embedder: Embedder,
        *,
        overflow: migration.MigrationOverflow = "error",
        progress: Callable[[int, int], None] | None = None,
        batch: int = 64,
    ) -> migration.MigrationReport:
        """Embed everything anew with another model, with which this index then goes on.

        See `migration.migrate`. Other threads may use this index meanwhile. Texts that they search
        for or add are embedded by the model that the file is of at that moment; vectors that they
        pass themselves must be the new model's once this returns.
        """
        self._session.check_writable()
        return migration.migrate(
            self.path,
            new_embedder,
            overflow=overflow,
            progress=progress,
            batch=batch,
            switching=lambda: self._session.switching_to(new_embedder),
        )

    def close(self) -> None:
        """Release the file. The embedder stays open: it was not opened here."""
        self._session.close(self._searcher.forget)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For `egemma.ingest` and the command line alone; methods, as ingestion takes any such store.

    def sources(self) -> dict[str, Mapping[str, Any]]:
        """Return what ingestion noted of each document that it put in: id -> source."""
        with self._session.reading("read") as connection:
            self._session.check_documents(connection)
            documents = records.documents_with_source(connection)
            return {row.id: json.loads(row.source or "null") for row in documents}

    def chunk_hashes(self, ids: Sequence[str]) -> dict[str, frozenset[bytes]]:
        """Return the hashes of stored documents' chunks, which `put` would not embed again."""
        with self._session.reading("read") as connection:
            known = records.chunk_keys(connection, check_ids(ids))
        return {id_: frozenset(key.hash for key in keys) for id_, (_, keys) in known.items()}

    def remember_model_path(self, model_path: str) -> None:
        """Store where the bundle lies, as a hint for the next command."""
        check_text("model_path", model_path, blank=False)
        with self._session.writing("write") as change:
            write_state(change.connection, replace(change.state, model_path=model_path))
