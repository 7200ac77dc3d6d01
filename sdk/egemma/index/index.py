"""The local index: documents, their chunks and vectors in one SQLite file, searched on this
machine. No service, no network.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument, split_text
from egemma.exported import exported
from egemma.fusion import reciprocal_rank_fusion
from egemma.identity import ModelIdentity, check_same_model
from egemma.index import jsonl, migration, upkeep
from egemma.index.codes import check_vectors, cosines, to_array
from egemma.index.damage import document_crc32, find_document_damage
from egemma.index.file import (
    MAX_WIDTH,
    IndexFacts,
    State,
    check_format,
    checked_path,
    connect,
    create_tables,
    facts_of,
    file_identity,
    is_blank,
    read_state,
    stamp_of,
    transaction,
    typed_errors,
    write_state,
)
from egemma.index.graph import (
    CONNECTIVITY,
    EXPANSION_ADD,
    Graph,
    GraphNotes,
    build,
    candidates,
    check_graph,
    graph_path,
    problem_with,
    read_graph,
    usearch_module,
    worth_adding_to,
    write_graph,
)
from egemma.index.heads import Damage, Heads, kernel_name
from egemma.index.hits import MODES, Document, Hits, How, Mode, read_document, read_hit
from egemma.index.inputs import (
    check_counts,
    check_ids,
    check_k,
    check_shortlist,
    check_text,
    content_id,
    one_per_text,
    query_rows,
)
from egemma.index.put import (
    PutReport,
    hash_of,
    naming_document,
    prepare,
    reusable_chunks,
    store_documents,
)
from egemma.index.rows import Change, NewChunk, stored_chunks
from egemma.index.tune import SAMPLE, TuneReport, Wanted, measure, pick_chunks, rewrite_heads
from egemma.index.vectors import Plan, default_shortlist, rescore_ms, shortened, stored_vectors
from egemma.index.words import best_words
from egemma.metadata import pack_metadata
from egemma.threads import check_threads
from egemma.where import parse
from egemma.where_sqlite import to_sqlite
from egemma_core.errors import ConfigError, IndexFileError, InputError
from egemma_core.prompts import DEFAULT_TASK
from egemma_core.tokens import Overflow
from egemma_core.vectors import check_dim

if TYPE_CHECKING:
    from egemma.embedder import Embedder

IndexOverflow = Literal["error", "truncate", "chunk"]
FUSED = 100  # hits of each kind that hybrid search joins, or k where that is more
_EXACT_ROWS = 4096  # vectors that an exact search holds at a time
_KEPT_FILTERS = 16


@exported
class Index:
    """An open index file and the model that reads and writes it. Make one with `Index.open`.

    May be used from several threads. Searches take turns among themselves, and so do writes; a
    search waits for no write, and embedding happens outside both. Several processes may have the
    same file open: one writes at a time, the others wait for it.
    """

    def __init__(
        self,
        path: Path,
        embedder: Embedder | None,
        connection: sqlite3.Connection,
        state: State,
        *,
        read_only: bool,
        frozen: bool,
        threads: int | None,
    ) -> None:
        self.path, self.read_only = path, read_only
        self._embedder = embedder
        self._identity = state.identity
        self._reader, self._reading_lock = connection, threading.RLock()
        self._writer: sqlite3.Connection | None = None
        self._writing_lock = threading.RLock()
        self._stamp = stamp_of(path) if frozen else None
        self._file, self._process = file_identity(path), os.getpid()
        self._closed = False
        self._threads = check_threads(threads)
        self._heads = Heads(state.scan_width, self._threads)
        # SQL and parameters -> allowed by number; of one generation
        self._filters: dict[tuple[str, str], NDArray[np.bool_]] = {}
        self._filters_generation = -1
        self._documents_checked = False
        self._graph: Graph | None = None
        self._graph_stamp: tuple[int, int, int, int] | None = None

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
            path: the SQLite file; while it is open, `-wal` and `-shm` stand beside it and belong to
                it.
            embedder: the model; it must be the one that made the file, wherever its bundle lies
                now. An identity will do where vectors come from elsewhere, None for a file that
                exists: both can do everything but embed.
            create: make the file when there is none. A file that cannot be written is opened for
                search only.
            keep_floats: a new file keeps vectors as float32 beside their int8 codes: 4 bytes more
                per channel, and scores as of the model's own vectors. A file that exists stays as
                it is.
            threads: to search with; None for as many as this process has CPUs.

        Raises:
            IndexMismatchError: the file holds vectors of another model.
            IndexFileError: no file, no index, damaged, from a newer egemma, or not accessible.
        """
        from egemma.index.upgrade import upgrade

        identity = (
            embedder
            if isinstance(embedder, ModelIdentity) or embedder is None
            else ModelIdentity.of(embedder)
        )
        if identity is not None and identity.dim > MAX_WIDTH:
            raise ConfigError(
                f"the model's vectors have {identity.dim} channels, an index holds up to "
                f"{MAX_WIDTH}."
            )
        if identity is None and create and not Path(path).exists():
            create = False
        path = checked_path(path, create=create)
        connection, read_only, frozen = connect(path)
        try:
            with typed_errors(path, "open"):
                if not read_only and is_blank(connection):
                    if not create or identity is None:
                        raise IndexFileError(
                            f"{path} is empty. Pass an embedder and create=True, or give the path "
                            "of an index."
                        )
                    create_tables(connection, identity, floats=keep_floats)
                if not read_only:
                    upgrade(connection)
                check_format(connection, path)
                with transaction(connection):
                    state = read_state(connection)
            if identity is not None:
                check_same_model(path, state.identity, identity, _WAY_OUT)
        except BaseException:
            connection.close()
            raise
        usable = None if isinstance(embedder, ModelIdentity) else embedder
        return cls(
            path, usable, connection, state, read_only=read_only, frozen=frozen, threads=threads
        )

    @property
    def identity(self) -> ModelIdentity:
        """The model whose vectors are in the file."""
        return self._identity

    @property
    def embedder(self) -> Embedder:
        """The model that texts are embedded with.

        Raises:
            ConfigError: the index was opened without one.
        """
        return self._embedder_here("embed texts")

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
        if isinstance(texts, str):
            raise InputError("texts is one str: pass a list of texts.")
        texts = list(texts)
        titles, packed = (
            one_per_text("titles", titles, len(texts)),
            one_per_text("metadata", metadata, len(texts)),
        )
        for position, (text, title) in enumerate(zip(texts, titles, strict=True)):
            check_text(f"text {position}", text, blank=False, position=position)
            if title is not None:
                check_text(f"title {position}", title, blank=True, position=position)
        given = (
            [content_id(text, title or None) for text, title in zip(texts, titles, strict=True)]
            if ids is None
            else one_per_text("ids", ids, len(texts))
        )
        if overflow not in get_args(IndexOverflow):
            raise ConfigError(f"overflow={overflow!r}: one of {get_args(IndexOverflow)}.")
        embedder = self._embedder_here("add texts")
        documents = []
        for id_, text, title, entry in zip(given, texts, titles, packed, strict=True):
            chunks: tuple[Chunk, ...] = (
                Chunk(start=0, stop=len(text), title=title or None, text=text),
            )
            if overflow == "chunk":
                chunks = tuple(
                    split_text(
                        text,
                        title=title or None,
                        count_tokens=embedder.count_tokens,
                        max_tokens=embedder.max_tokens,
                        prompt=embedder.document_prompt,
                    )
                )
            documents.append(
                ChunkedDocument(id=id_, title=title, metadata=entry, source=None, chunks=chunks)
            )
        self.put(documents, overflow="error" if overflow == "chunk" else overflow)
        return given

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
        embedder = self._embedder_here("put documents")
        if overflow not in get_args(Overflow):
            raise ConfigError(f"overflow={overflow!r}: one of {get_args(Overflow)}.")
        prepared = prepare(documents)
        self._check_writable()
        if not prepared:
            return PutReport(documents=0, chunks=0, embedded=0, reused=0, removed=0)
        embedded = 0
        while True:
            if embedder is not self._embedder:  # `migrate` was called meanwhile, and is done
                embedder = self._embedder_here("put documents")
                for document in prepared:
                    document.vectors.clear()
            with self._reading("read") as connection:
                known = stored_chunks(connection, [document.id for document in prepared])
            missing: dict[bytes, Chunk] = {}
            owners: list[str] = []  # the document of each of them
            for document in prepared:
                reusable = reusable_chunks(known.get(document.id), overflow)
                for chunk in document.chunks:
                    hash_ = hash_of(chunk)
                    known_already = hash_ in document.vectors or hash_ in reusable
                    if not known_already and hash_ not in missing:
                        missing[hash_] = chunk
                        owners.append(document.id)
            if missing:
                with naming_document(documents, owners):
                    fresh = embedder.embed_documents(
                        [chunk.text for chunk in missing.values()],
                        titles=[chunk.title for chunk in missing.values()],
                        overflow=overflow,
                    )
                vectors = check_vectors(fresh.vectors, embedder.dim)
                if len(vectors) != len(missing):
                    raise InputError(
                        f"the model gave {len(vectors)} vectors for {len(missing)} texts. Check it "
                        "with `egemma verify`."
                    )
                embedded += len(missing)
                found = {
                    hash_: (vectors[row], int(fresh.num_tokens[row]), bool(fresh.truncated[row]))
                    for row, hash_ in enumerate(missing)
                }
                for document in prepared:
                    document.vectors.update(
                        (hash_of(chunk), found[hash_of(chunk)])
                        for chunk in document.chunks
                        if hash_of(chunk) in found
                    )
            with self._writing("add") as change:
                report = (
                    store_documents(change, prepared, overflow)
                    if embedder is self._embedder
                    else None
                )
                if report is None:
                    # another writer took away what was to be reused: begin anew with what is
                    # embedded
                    continue
            return replace(report, embedded=embedded)

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
        """Store documents whose vectors were computed elsewhere by the same model, one chunk each:
        all, or none.

        Args:
            vectors: (N, D) float32 unit vectors of documents, D the model's full width.
            ids: one per row; a stored id is replaced.
            texts: one per row, to be shown and for full text; None stores vectors alone.
            titles, metadata: as in `add`.
            num_tokens, truncated: one per row, as the embedder said; None stores 0 and False.

        Returns:
            The ids.

        Raises:
            InputError: a vector, id, text or metadata cannot be stored.
            IndexFileError: the file is read-only, full, locked or damaged.
        """
        rows = check_vectors(vectors, self._identity.dim)
        given = check_ids(ids)
        if len(given) != len(rows):
            raise InputError(f"{len(given)} ids for {len(rows)} vectors: give one each.")
        if len(set(given)) != len(given):
            raise InputError("an id comes twice in one call. Give each vector its own.")
        words = [""] * len(rows) if texts is None else one_per_text("texts", texts, len(rows))
        named, packed = (
            one_per_text("titles", titles, len(rows)),
            one_per_text("metadata", metadata, len(rows)),
        )
        for position, (text, title) in enumerate(zip(words, named, strict=True)):
            check_text(f"text {position}", text, blank=True)
            if title is not None:
                check_text(f"title {position}", title, blank=True)
        metas = [pack_metadata(entry) for entry in packed]
        counts = [0] * len(rows) if num_tokens is None else check_counts(num_tokens, len(rows))
        cut = (
            [False] * len(rows)
            if truncated is None
            else one_per_text("truncated", truncated, len(rows))
        )
        self._check_writable()
        with self._writing("add") as change:
            known = stored_chunks(change.connection, given)
            change.remove_chunks([chunk.number for _, chunks in known.values() for chunk in chunks])
            chunks = []
            for id_, text, title, meta, tokens, short in zip(
                given, words, named, metas, counts, cut, strict=True
            ):
                number = change.put_document(
                    id_, title or None, meta, None, known[id_][0] if id_ in known else None
                )
                chunks.append(
                    NewChunk(
                        document=number,
                        position=0,
                        start=0,
                        stop=len(text),
                        num_tokens=tokens,
                        truncated=bool(short),
                        title=title or None,
                        text=text,
                    )
                )
            change.add_chunks(chunks, rows)
        return given

    def remove(self, ids: Sequence[str]) -> int:
        """Delete documents, all in one transaction; ids that are not stored are passed over.

        Returns:
            How many were deleted.
        """
        wanted = check_ids(ids)
        self._check_writable()
        with self._writing("remove") as change:
            return change.remove_documents(wanted)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The stored documents with these ids, in their order.

        Raises:
            InputError: an id is not stored.
        """
        with self._reading("read") as connection:
            found = [read_document(connection, id_) for id_ in check_ids(ids)]
            missing = [id_ for id_, document in zip(ids, found, strict=True) if document is None]
            if (
                missing
                and connection.execute(
                    "SELECT 1 FROM documents NOT INDEXED WHERE id = ?", missing[:1]
                ).fetchone()
            ):
                raise Damage(
                    f"document {missing[0]!r} is there, and SQLite's index of ids does not know it"
                )
        if missing:
            raise InputError(f"{self.path} has no document {missing[0]!r}.")
        return [document for document in found if document is not None]

    def ids(self, where: Mapping[Any, Any] | None = None) -> list[str]:
        """The ids of all documents, or of those that a filter is true for, in the order in which
        they were added.
        """
        condition, parameters = ("1", []) if where is None else to_sqlite(parse(where))
        with self._reading("read") as connection:
            self._check_documents(connection)
            return [
                row[0]
                for row in connection.execute(
                    f"SELECT id FROM documents WHERE {condition} ORDER BY number", parameters
                )
            ]

    def sources(self) -> dict[str, Mapping[str, Any]]:
        """What ingestion noted of each document that it put in: id -> source."""
        with self._reading("read") as connection:
            self._check_documents(connection)
            sources = {}
            for id_, title, metadata, source, crc in connection.execute(
                "SELECT id, title, metadata, source, crc32 FROM documents WHERE source IS NOT NULL"
            ):
                if document_crc32(id_, title, metadata, source) != crc:
                    raise Damage(f"document {id_!r} is not what was stored")
                sources[id_] = json.loads(source)
            return sources

    def chunk_hashes(self, ids: Sequence[str]) -> dict[str, frozenset[bytes]]:
        """For those of the ids that are stored: the hashes of their chunks, which `put` would not
        embed again.
        """
        with self._reading("read") as connection:
            known = stored_chunks(connection, check_ids(ids))
        return {
            id_: frozenset(chunk.hash for chunk in chunks) for id_, (_, chunks) in known.items()
        }

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
        """The chunks that answer a query best.

        A vector search goes through the first `scan_width` channels of every vector, keeps the best
        `shortlist` of them, and orders these by the cosine at `dim`.

        Args:
            query: without prompt; not blank.
            k: how many, 1 to 10,000; fewer come back when fewer are stored or found.
            dim: a trained width to score at; None for the full one.
            where: a filter on metadata, such as {"lang": "en", "year": {"$gte": 2020}}; see
                `egemma.where`. It is applied before the search, so k of those that pass come back.
            mode: "vector" by meaning; "text" by words (BM25); "hybrid" joins both by reciprocal
                rank fusion.
            task: a task of the model, such as "search result" or "question answering".
            shortlist: None takes what `tune` found, or else the larger of 300 and 10 k.
            exact: compare every vector at `dim`, without a first pass.
            approximate: use the graph of `build_graph` as the first pass.

        Returns:
            Hits by falling score; equal scores in the order in which chunks were added.

        Raises:
            InputError, TokenLimitError, PromptError, DimensionError, ConfigError: the query,
                filter, task or a number cannot work.
            IndexFileError: the file is damaged or was replaced.
            IndexMismatchError: somebody has migrated the file to another model since it was opened.
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
        """As `search`, for several queries at once: they are embedded and scanned together."""
        if isinstance(queries, str):
            raise InputError("queries is one str: pass a list, or use `search`.")
        queries = list(queries)
        if not all(isinstance(query, str) and query.strip() for query in queries):
            raise InputError("queries: pass a list of texts, each with at least one word.")
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: choose one of {', '.join(MODES)}.")
        if mode == "text" and (dim is not None or shortlist is not None or exact or approximate):
            raise ConfigError(
                "mode='text' compares no vectors: leave dim, shortlist, exact and approximate out."
            )
        plan = self._plan(k, dim, where, shortlist, exact=exact, approximate=approximate)
        if not queries:
            return []
        if mode == "text":
            return self._search(plan, None, list(queries), mode)
        while True:
            embedder = self._embedder_here("search by meaning")
            vectors = embedder.embed_query(queries, task=task).vectors
            with self._reading_lock:
                # else `migrate` was called meanwhile, and is done: ask the new model
                if embedder is self._embedder:
                    return self._search(
                        plan, vectors, list(queries) if mode != "vector" else None, mode
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
        """As `search`, for a query's vector by the same model.

        Args:
            vector: (W,) of any trained width from the index's scan width up; only its direction
                counts.
            dim: a trained width, not above the vector's own; None for the vector's own.
        """
        vector = to_array(vector)
        if vector.ndim != 1:
            raise InputError(
                f"vector has shape {vector.shape} and type {vector.dtype}: it must be one row of "
                "floats."
            )
        return self.search_vectors(
            vector[None],
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
        return self._search(
            self._plan(k, dim, where, shortlist, exact=exact, approximate=approximate),
            to_array(vectors),
            None,
            "vector",
        )

    def facts(self, *, check: bool = False) -> IndexFacts:
        """What the file says about itself; see `describe_index`."""
        with self._reading("read") as connection:
            return facts_of(connection, self.path, check=check)

    def build_graph(
        self,
        *,
        connectivity: int = CONNECTIVITY,
        expansion_add: int = EXPANSION_ADD,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> GraphNotes:
        """Build the graph that `search(approximate=True)` takes for its first pass: the file
        `<index>.graph` beside this one.

        It is worth its file from some hundred thousand chunks on. Where there is one already, the
        chunks that were added since are added to it; where a fifth of it was deleted, or it does
        not fit, it is made anew. Searches and writes go on meanwhile. The new file takes the place
        of the old one in one step at the end; a build that is stopped leaves nothing and begins
        again.

        Args:
            connectivity: neighbours of a node, 2 to 256: more find more, and make the file larger.
            expansion_add: how many nodes an insertion looks at, up to 10,000: more find more, and
                take longer.
            threads: None takes those of this index.
            progress: called now and then with how many of how many chunks are in.

        Raises:
            RuntimeUnavailableError: usearch is not installed.
            IndexFileError: the index is damaged, or the file cannot be written.
        """
        check_graph(connectivity, expansion_add)
        usearch_module()
        path = graph_path(self.path)
        with self._reading("read") as connection:
            state = self._current(connection)
            self._heads.refresh(
                connection,
                generation=state.generation,
                next_number=state.next_number,
                num_chunks=state.chunks,
            )
            # A row that is once filled keeps its codes, so they can be read while searches go on;
            # which rows are live can change.
            codes, live = (
                self._heads.codes[: state.next_number],
                self._heads.live[: state.next_number].copy(),
            )
            onto = worth_adding_to(path, state, self._heads, connectivity, expansion_add)
        numbers = np.flatnonzero(live)
        built = build(
            codes,
            numbers if onto is None else numbers[numbers >= onto.notes.next_number],
            onto=onto,
            connectivity=connectivity,
            expansion_add=expansion_add,
            threads=self._threads if threads is None else check_threads(threads),
            progress=progress,
        )
        return write_graph(
            path,
            built,
            fingerprint=state.identity.fingerprint,
            numbering=state.numbering,
            generation=state.generation,
            next_number=state.next_number,
            width=state.scan_width,
            connectivity=connectivity,
            expansion_add=expansion_add,
        )

    def remember_model_path(self, model_path: str) -> None:
        """Store where the bundle lies, as a hint for the next command."""
        check_text("model_path", model_path, blank=False)
        self._check_writable()
        with self._writing("write") as change:
            write_state(change.connection, replace(change.state, model_path=model_path))

    def tune(
        self,
        *,
        recall: float = 0.99,
        k: int = 10,
        queries: Sequence[str] | NDArray[np.float32] | None = None,
        sample: int = SAMPLE,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> TuneReport:
        """Find the fastest scan width and shortlist that find what an exact search finds, on the
        vectors in this file, and store them.

        Every trained width is tried but the full one. The truth is an exact search at full width,
        the speed is that of this machine now, and what counts is the lower end of the recall's
        confidence interval. Where another width is chosen, all heads are written anew in one
        transaction; a graph must then be built anew. Where nothing reaches it, nothing is stored.

        Args:
            recall: part of the best k that shall be found, such as 0.99.
            k: hits that searches will ask for; for more the shortlist grows in proportion.
            queries: texts, or their (B, D) vectors by this model, as users will ask; some hundred.
                None takes stored chunks, each without itself, which is a guess: queries can be
                harder.
            sample: how many chunks then.
            seed: of the choice of chunks and of the bootstrap.
            confidence: of the interval.

        Raises:
            ConfigError: a number cannot work, or there are not more than k chunks.
            InputError: the queries are no texts or vectors of this model.
            IndexFileError: the index is damaged, or cannot be written.
        """
        wanted = Wanted(recall=recall, k=k, sample=sample, seed=seed, confidence=confidence)
        self._check_writable()
        vectors = None
        if queries is not None:
            given = (
                queries
                if isinstance(queries, np.ndarray)
                else self._embedder_here("embed queries").embed_query(list(queries)).vectors
            )
            vectors = query_rows(given, self._identity.dim, self._identity)[0]
            if not len(vectors):
                raise InputError("queries is empty: pass some hundred, or None for stored chunks.")
        connection = connect(self.path)[0]  # its own, so that searches go on
        try:
            with typed_errors(self.path, "tune"), transaction(connection):
                state = read_state(connection)
                check_same_model(self.path, state.identity, self._identity, _WAY_OUT)
                if state.chunks <= k:
                    raise ConfigError(
                        f"{self.path} has {state.chunks} chunks: there is nothing to tune for "
                        f"k={k}. Add more first."
                    )
                heads = Heads(state.scan_width, self._threads)
                heads.refresh(
                    connection,
                    generation=state.generation,
                    next_number=state.next_number,
                    num_chunks=state.chunks,
                )
                live = np.flatnonzero(heads.live[: heads.count])
                own = pick_chunks(live, wanted) if vectors is None else None
                rows = stored_vectors(connection, state, heads, own) if own is not None else vectors
                assert rows is not None
                report = measure(
                    connection,
                    state,
                    shortened(rows, self._identity.dim),
                    own,
                    wanted,
                    self._threads,
                    lambda shortlist: rescore_ms(connection, state, heads, live, shortlist),
                )
        finally:
            connection.close()
        tuned = report.tuned()
        if tuned is None:
            return report
        with self._writing("tune") as change:
            if change.state.scan_width != tuned.scan_width:
                rewrite_heads(change, tuned.scan_width)
                report = replace(report, rewritten=True)
            change.state = replace(change.state, tuned=tuned.to_json())
            write_state(change.connection, change.state)
        return report

    def check(self) -> list[str]:
        """Read everything and compare it with its checksums: what does not fit; empty for a sound
        index. See `upkeep.check`.
        """
        return upkeep.check(self._open_path())

    def backup(self, destination: str | Path, *, force: bool = False) -> IndexFacts:
        """Copy the index as it is now, and check the copy; see `upkeep.backup`."""
        return upkeep.backup(self._open_path(), destination, force=force)

    def compact(self) -> upkeep.CompactReport:
        """Give back the space of what was deleted; see `upkeep.compact`."""
        self._check_writable()
        return upkeep.compact(self._open_path())

    def export_jsonl(
        self, destination: str | Path, *, vectors: bool = True, force: bool = False
    ) -> int:
        """Write all documents as JSON lines; see `jsonl.export_jsonl`."""
        return jsonl.export_jsonl(self._open_path(), destination, vectors=vectors, force=force)

    def import_jsonl(
        self,
        source: str | Path,
        *,
        reembed: bool = False,
        overflow: Overflow = "error",
        progress: Callable[[int, int], None] | None = None,
    ) -> jsonl.ImportReport:
        """Put the documents of an export in; see `jsonl.import_jsonl`."""
        self._check_writable()
        return jsonl.import_jsonl(
            self, source, reembed=reembed, overflow=overflow, progress=progress
        )

    def migrate(
        self,
        new_embedder: Embedder,
        *,
        overflow: Overflow = "error",
        progress: Callable[[int, int], None] | None = None,
        batch: int = 64,
    ) -> migration.MigrationReport:
        """Embed everything anew with another model, with which this index then goes on; see
        `migration.migrate`.

        Other threads may use this index meanwhile. Texts that they search for or add are embedded
        by the model that the file is of at that moment; vectors that they pass themselves must be
        the new model's once this returns.
        """
        self._check_writable()
        return migration.run(
            self._open_path(),
            new_embedder,
            overflow=overflow,
            progress=progress,
            batch=batch,
            index=self,
        )

    def _go_on_with(self, embedder: Embedder) -> None:
        """The file is of this model now. Call under both locks."""
        self._embedder, self._identity = embedder, ModelIdentity.of(embedder)

    def _open_path(self) -> Path:
        self._check_open()
        return self.path

    def __len__(self) -> int:
        """How many documents there are."""
        with self._reading("read") as connection:
            self._check_documents(connection)
            return int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])

    def close(self) -> None:
        """Release the file. The embedder stays open: it was not opened here."""
        with self._writing_lock, self._reading_lock:
            self._closed = True
            self._heads = Heads(self._heads.width, self._threads)
            self._filters.clear()
            self._graph = None
            with typed_errors(self.path, "close"):
                if self._writer is not None:
                    self._writer.close()
                self._reader.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _plan(
        self,
        k: int,
        dim: int | None,
        where: Mapping[Any, Any] | None,
        shortlist: int | None,
        *,
        exact: bool,
        approximate: bool,
    ) -> Plan:
        check_k(k)
        check_shortlist(shortlist)
        if dim is not None:
            check_dim(dim, self._identity.dims)
        if exact and (approximate or shortlist is not None):
            raise ConfigError(
                "exact=True compares every vector: leave approximate and shortlist out."
            )
        condition = None if where is None else to_sqlite(parse(where))
        return Plan(
            k=k,
            dim=dim,
            condition=condition,
            shortlist=shortlist,
            exact=exact,
            approximate=approximate,
        )

    def _search(
        self, plan: Plan, vectors: NDArray[np.float32] | None, words: list[str] | None, mode: Mode
    ) -> list[Hits]:
        """Everything about these queries from one state of the file."""
        count = plan.k if mode != "hybrid" else max(plan.k, FUSED)
        with self._reading("search") as connection:
            state = self._current(connection)
            if plan.condition is not None:
                self._check_documents(connection)
            by_vector: list[list[tuple[int, float]]] = []
            how = How(
                mode=mode,
                dim=None,
                scan_width=None,
                shortlist=None,
                vectors=0,
                approximate=False,
                kernel=None,
            )
            if vectors is not None:
                queries, dim = query_rows(vectors, plan.dim, state.identity)
                by_vector, how = self._by_vector(connection, state, plan, queries, dim, count, how)
            by_words: list[list[tuple[int, float]]] = []
            if words is not None:
                numbers = (
                    None
                    if plan.condition is None
                    else (_NUMBERS_WHERE.format(plan.condition[0]), list(plan.condition[1]))
                )
                by_words = [best_words(connection, query, count, numbers) for query in words]
            results = []
            for row in range(len(by_vector) or len(by_words)):
                cosine, bm25 = (
                    dict(by_vector[row]) if by_vector else {},
                    dict(by_words[row]) if by_words else {},
                )
                ranked = (
                    list((cosine or bm25).items())
                    if mode != "hybrid"
                    else reciprocal_rank_fusion([list(cosine), list(bm25)])
                )
                results.append(
                    Hits(
                        hits=tuple(
                            read_hit(
                                connection, number, score, cosine.get(number), bm25.get(number)
                            )
                            for number, score in ranked[: plan.k]
                        ),
                        how=how,
                    )
                )
            return results

    def _by_vector(
        self,
        connection: sqlite3.Connection,
        state: State,
        plan: Plan,
        queries: NDArray[np.float64],
        dim: int,
        count: int,
        how: How,
    ) -> tuple[list[list[tuple[int, float]]], How]:
        """Chunk numbers and cosines for each query, best first."""
        unit = shortened(queries, dim)
        self._heads.refresh(
            connection,
            generation=state.generation,
            next_number=state.next_number,
            num_chunks=state.chunks,
        )
        allowed = (
            None if plan.condition is None else self._allowed(connection, state, plan.condition)
        )
        searched = (
            state.chunks
            if allowed is None
            else int((allowed & self._heads.live[: self._heads.count]).sum())
        )
        if plan.exact:
            ranked = self._compare_all(connection, state, unit, dim, count, allowed)
            return ranked, replace(how, dim=dim, vectors=searched, kernel="numpy", scanned=searched)
        if queries.shape[1] < state.scan_width:
            raise InputError(
                f"the vector has {queries.shape[1]} channels, this index scans {state.scan_width}: "
                "pass a wider one, or exact=True."
            )
        shortlist, tuned_for = (
            (plan.shortlist, None) if plan.shortlist else default_shortlist(state, plan.k)
        )
        shortlist = max(count, shortlist)
        rough = shortened(queries, state.scan_width).astype(np.float32)
        scanned, kernel = searched, kernel_name()
        if plan.approximate:
            candidates, scanned = self._graph_candidates(state, rough, shortlist, allowed)
            kernel = kernel if scanned == searched else f"usearch {usearch_module().__version__}"
        else:
            candidates = self._heads.scan(rough, shortlist, allowed)
        ranked = [
            self._rescore(connection, state, unit[row], dim, numbers)[:count]
            for row, numbers in enumerate(candidates)
        ]
        return ranked, replace(
            how,
            dim=dim,
            scan_width=state.scan_width,
            shortlist=shortlist,
            vectors=searched,
            approximate=scanned < searched,
            kernel=kernel,
            scanned=scanned,
            tuned_for=tuned_for,
        )

    def _graph_candidates(
        self,
        state: State,
        queries: NDArray[np.float32],
        count: int,
        allowed: NDArray[np.bool_] | None,
    ) -> tuple[list[NDArray[np.int64]], int]:
        """As `graph.candidates`, from the graph file as it is now."""
        path = graph_path(self.path)
        stamp = stamp_of(path)
        if self._graph is None or self._graph_stamp != stamp:
            self._graph, self._graph_stamp = read_graph(path), stamp
        if self._graph is None:
            raise IndexFileError(
                f"{path}: no such file, and approximate=True needs it. Build it with `egemma index "
                f"graph {self.path}`."
            )
        problem = problem_with(self._graph.notes, state)
        if problem is not None:
            raise IndexFileError(
                f"{path} cannot be used: {problem}. Build it anew with `egemma index graph "
                f"{self.path}`."
            )
        return candidates(self._graph, self._heads, queries, count, allowed, path)

    def _rescore(
        self,
        connection: sqlite3.Connection,
        state: State,
        query: NDArray[np.float64],
        dim: int,
        numbers: NDArray[np.int64],
    ) -> list[tuple[int, float]]:
        """These chunks by falling cosine at `dim`, from their stored vectors, each checked against
        its checksum.
        """
        numbers = np.sort(numbers)
        # many, where all have the same head
        parts = [
            numbers[start : start + _EXACT_ROWS] for start in range(0, len(numbers), _EXACT_ROWS)
        ]
        scores = np.concatenate(
            [
                np.empty(0),
                *(
                    cosines(query, stored_vectors(connection, state, self._heads, part)[:, :dim])
                    for part in parts
                ),
            ]
        )
        order = np.lexsort((numbers, -scores))
        return list(zip(numbers[order].tolist(), scores[order].tolist(), strict=True))

    def _compare_all(
        self,
        connection: sqlite3.Connection,
        state: State,
        queries: NDArray[np.float64],
        dim: int,
        count: int,
        allowed: NDArray[np.bool_] | None,
    ) -> list[list[tuple[int, float]]]:
        """Every vector at `dim`, some thousand at a time."""
        live = (
            self._heads.live[: self._heads.count]
            if allowed is None
            else self._heads.live[: self._heads.count] & allowed
        )
        numbers = np.flatnonzero(live)
        best: list[list[tuple[int, float]]] = [[] for _ in queries]
        for start in range(0, len(numbers), _EXACT_ROWS):
            part = numbers[start : start + _EXACT_ROWS]
            stored = stored_vectors(connection, state, self._heads, part)[:, :dim]
            for row, query in enumerate(queries):
                scores = cosines(query, stored)
                kept = np.lexsort((part, -scores))[:count]
                joined = best[row] + list(
                    zip(part[kept].tolist(), scores[kept].tolist(), strict=True)
                )
                best[row] = sorted(joined, key=lambda pair: (-pair[1], pair[0]))[:count]
        return best

    def _check_documents(self, connection: sqlite3.Connection) -> None:
        """Once per opening: the checksum of a hit says nothing about a document that a filter
        passed over.
        """
        if not self._documents_checked:
            found = find_document_damage(connection, read_state(connection).chunks)
            if found is not None:
                raise Damage(found)
            self._documents_checked = True

    def _allowed(
        self, connection: sqlite3.Connection, state: State, condition: tuple[str, Sequence[object]]
    ) -> NDArray[np.bool_]:
        """(rows,) bool by chunk number: whose document passes the filter.

        Kept until the file changes.
        """
        if self._filters_generation != state.generation:
            self._filters.clear()
            self._filters_generation = state.generation
        key = (condition[0], repr(condition[1]))
        if key not in self._filters:
            allowed = np.zeros(state.next_number, np.bool_)
            rows = connection.execute(
                _NUMBERS_WHERE.format(condition[0]), tuple(condition[1])
            ).fetchall()
            numbers = np.fromiter((row[0] for row in rows), np.int64, len(rows))
            if len(rows) and not 0 <= numbers.min() <= numbers.max() < state.next_number:
                raise Damage(
                    f"chunks have the numbers {numbers.min()} to {numbers.max()}, given out were 0 "
                    f"to {state.next_number - 1}"
                )
            allowed[numbers] = True
            while len(self._filters) >= _KEPT_FILTERS:
                del self._filters[next(iter(self._filters))]
            self._filters[key] = allowed
        return self._filters[key]

    def _current(self, connection: sqlite3.Connection) -> State:
        """The file's state now, inside a read transaction; what was learnt of an earlier model is
        forgotten.
        """
        state = read_state(connection)
        check_same_model(self.path, state.identity, self._identity, _WAY_OUT)
        if state.scan_width != self._heads.width:
            self._heads = Heads(state.scan_width, self._threads)
        return state

    def _embedder_here(self, doing: str) -> Embedder:
        if self._embedder is None:
            raise ConfigError(
                f"{self.path} was opened without a model, so it cannot {doing}. Open it with an "
                "Embedder."
            )
        return self._embedder

    def _check_writable(self) -> None:
        if self.read_only:
            raise IndexFileError(
                f"{self.path} cannot be written here; it is open for search only. Copy it "
                "elsewhere first."
            )

    @contextmanager
    def _reading(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One state of the file for everything in the block."""
        with self._reading_lock:
            self._check_open()
            with typed_errors(self.path, doing), transaction(self._reader):
                if self._stamp is not None and stamp_of(self.path) != self._stamp:
                    raise IndexFileError(
                        f"{self.path} was changed while it was open for search only. Open it again."
                    )
                yield self._reader

    @contextmanager
    def _writing(self, doing: str) -> Iterator[Change]:
        """One transaction that is committed at the end of the block."""
        with self._writing_lock:
            self._check_open()
            if self._writer is None:
                self._writer = connect(self.path)[0]
            with typed_errors(self.path, doing), transaction(self._writer, "BEGIN IMMEDIATE"):
                change = Change(self._writer)
                check_same_model(self.path, change.state.identity, self._identity, _WAY_OUT)
                yield change
                change.finish()

    def _check_open(self) -> None:
        if self._closed:
            raise IndexFileError(f"{self.path} is closed. Open it again.")
        if os.getpid() != self._process:
            raise IndexFileError(
                f"{self.path} was opened by another process, and SQLite's connections must not be "
                "shared by a fork. Open it here."
            )
        if file_identity(self.path) != self._file:
            raise IndexFileError(
                f"{self.path} was moved, deleted or replaced while it was open. Open it again."
            )


_WAY_OUT = "Open it with that model, or re-embed it with `egemma index migrate`."
_NUMBERS_WHERE = (
    "SELECT chunks.number FROM documents JOIN chunks ON chunks.document = documents.number WHERE {}"
)
