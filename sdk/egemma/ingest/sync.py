"""Bring an index up to date with files and folders.

What is committed stays: stop it at any time, and call it again to go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from egemma.chunks import ChunkedDocument
from egemma.ingest.parse import UnreadableFileError
from egemma.ingest.plan import (
    IngestConfig,
    Plan,
    Reader,
    Store,
    hash_of,
    look,
    printable,
    render_skipped,
)
from egemma.ingest.walk import Skipped, resolve_roots
from egemma_core.errors import ConfigError

# Chunks that are committed together: what an interruption costs.
GROUP_CHUNKS = 64
# of one new, long document; each next part is a quarter of what is there, if that is more
PART_CHUNKS = 256
_REMOVED_TOGETHER = 500


@dataclass(frozen=True, kw_only=True)
class SyncProgress:
    """How far `sync` has come: what is done is committed, but for up to GROUP_CHUNKS chunks."""

    path: str  # the file that is being read
    files_done: int
    files: int
    bytes_done: int  # of the files
    bytes: int
    chunks_done: int  # stored by this call


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What `sync` did."""

    new: int  # documents
    changed: int
    unchanged: int
    removed: int
    chunks: int  # of new and changed documents
    embedded: int  # of these
    reused: int
    kept: tuple[str, ...]  # stored documents whose files are there, but were not read
    skipped: tuple[Skipped, ...]
    notes: tuple[tuple[str, str], ...]  # (file, what was left out or changed)

    def to_lines(self) -> list[str]:
        lines = [
            f"{self.new} new, {self.changed} changed, {self.unchanged} unchanged, {self.removed} "
            f"removed, {len(self.skipped)} skipped",
            f"{self.embedded} chunks embedded, {self.reused} kept their vectors",
        ]
        lines += [f"{printable(path)}: {printable(note)}" for path, note in self.notes]
        return lines + render_skipped(self.skipped)


def sync(
    index: Store,
    roots: Sequence[str | Path],
    config: IngestConfig | None = None,
    *,
    plan: Plan | None = None,
    progress: Callable[[SyncProgress], None] | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
) -> SyncReport:
    """Embed what is new or changed, remove what is gone, leave all else alone.

    Only documents of files below `roots` are ever removed, and only when their file is gone or has
    no text any more.

    Args:
        roots: files and folders.
        plan: of the same roots, from `plan_folder`; None looks for itself.
        progress: called before each file and after each commit.
        clock_ns: the time of day.

    Raises:
        InputError, ConfigError, RuntimeUnavailableError: as `plan_folder`.
        IndexFileError: the index cannot be written. What was committed before stays.
    """
    if plan is None:
        plan = look(index, roots, config, clock_ns=clock_ns)
    elif plan.roots != resolve_roots(roots) or config not in (None, plan.config):
        raise ConfigError(
            f"the plan is of {', '.join(plan.roots)}, or of another config. Plan again with what "
            "is to be done."
        )
    work = _Work(index, plan, progress)
    emptied: list[str] = []
    skipped, kept = list(plan.skipped), list(plan.kept)
    stored = {file.id for file in plan.changed}
    counts = {"new": 0, "changed": 0}
    with Reader(index, plan.config, clock_ns=clock_ns) as reader:
        for file in plan.files:
            work.tell(file.id)
            try:
                document, notes = reader.read(file.id)
            except UnreadableFileError as error:
                if error.reason == "no text" and file.id in stored:
                    emptied.append(file.id)
                elif file.id in stored:
                    kept.append(file.id)
                stays = "; its earlier version stays" if file.id in kept else ""
                skipped.append(
                    Skipped(path=file.id, reason=error.reason, detail=error.detail + stays)
                )
                work.pass_over(file.size)
                continue
            work.notes += [(file.id, note) for note in notes]
            counts["changed" if file.id in stored else "new"] += 1
            work.add(document, file.size, len(reader.missing(document)))
        work.commit()
    gone = list(dict.fromkeys([*plan.deleted, *emptied]))
    removed = sum(
        index.remove(gone[start : start + _REMOVED_TOGETHER])
        for start in range(0, len(gone), _REMOVED_TOGETHER)
    )
    return SyncReport(
        **counts,
        unchanged=plan.unchanged,
        removed=removed,
        chunks=work.chunks,
        embedded=work.embedded,
        reused=work.chunks - work.embedded,
        kept=tuple(kept),
        skipped=tuple(skipped),
        notes=tuple(work.notes),
    )


class _Work:
    """Documents on their way into the index, in small groups."""

    def __init__(
        self, index: Store, plan: Plan, progress: Callable[[SyncProgress], None] | None
    ) -> None:
        self._index, self._progress = index, progress
        self._files, self._bytes = len(plan.files), sum(file.size for file in plan.files)
        self._group: list[ChunkedDocument] = []
        self._waiting_chunks = self._waiting_bytes = 0
        self._files_done = self._bytes_done = self._chunks_done = 0
        self._path = ""
        self.chunks = self.embedded = 0
        self.notes: list[tuple[str, str]] = []

    def add(self, document: ChunkedDocument, size: int, missing: int) -> None:
        """Store a document, now or with the next ones."""
        if missing > PART_CHUNKS:
            self.commit()
            self._put_parts(document)
        self._group.append(document)
        self._waiting_bytes += size
        self._waiting_chunks += missing
        if self._waiting_chunks >= GROUP_CHUNKS or len(self._group) >= GROUP_CHUNKS:
            self.commit()

    def commit(self) -> None:
        if not self._group:
            return
        report = self._index.put(self._group)
        self.embedded += report.embedded
        self.chunks += report.chunks
        self._chunks_done += report.embedded
        self._files_done += len(self._group)
        self._bytes_done += self._waiting_bytes
        self._group, self._waiting_bytes, self._waiting_chunks = [], 0, 0
        self.tell(self._path)

    def pass_over(self, size: int) -> None:
        self._files_done += 1
        self._bytes_done += size

    def tell(self, path: str) -> None:
        self._path = path
        if self._progress is not None:
            self._progress(
                SyncProgress(
                    path=path,
                    files_done=self._files_done,
                    files=self._files,
                    bytes_done=self._bytes_done,
                    bytes=self._bytes,
                    chunks_done=self._chunks_done,
                )
            )

    def _put_parts(self, document: ChunkedDocument) -> None:
        """All but the end of a long document, from its beginning, as a document that is marked as
        partial.

        Never less than reaches to the last chunk that is stored already: it would lose its vector.
        """
        stored = self._index.chunk_hashes([document.id]).get(document.id, ())
        end = max(
            (
                number
                for number, chunk in enumerate(document.chunks, start=1)
                if hash_of(chunk) in stored
            ),
            default=0,
        )
        while (end := end + max(PART_CHUNKS, end // 4)) < len(document.chunks):
            source = {**(document.source or {}), "partial": True}
            report = self._index.put(
                [replace(document, source=source, chunks=document.chunks[:end])]
            )
            self.embedded += report.embedded
            self._chunks_done += report.embedded
            self.tell(document.id)
