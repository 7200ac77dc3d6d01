"""Bring an index up to date with files and folders.

What is committed stays: stop it at any time, and call it again to go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from egemma.chunks import ChunkedDocument
from egemma.ingest.config import IngestConfig
from egemma.ingest.errors import UnreadableFileError
from egemma.ingest.plan import Plan, list_changes
from egemma.ingest.printing import printable, render_skipped
from egemma.ingest.reader import Reader
from egemma.ingest.store import Store, missing_chunks, stored_chunks
from egemma.ingest.walk import Skipped, resolve_roots
from egemma_core.errors import ConfigError

GROUP_CHUNKS = 64  # committed together: what an interruption costs
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
        """Return the report as lines of text."""
        lines = [
            f"{self.new} new, {self.changed} changed, {self.unchanged} unchanged, "
            f"{self.removed} removed, {len(self.skipped)} skipped",
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
        plan: of the same roots, from `plan_folder`; None lists the changes anew.
        progress: called before each file and after each commit.
        clock_ns: the time of day.

    Raises:
        InputError, ConfigError, MissingDependencyError: as `plan_folder`.
        IndexFileError: the index cannot be written. What was committed before stays.
    """
    if plan is None:
        plan = list_changes(index, roots, config, clock_ns=clock_ns)
    elif plan.roots != resolve_roots(roots) or config not in (None, plan.config):
        raise ConfigError(
            f"the plan is of {', '.join(plan.roots)}, or of another config.",
            hint="Plan again with what is to be done.",
        )
    writer = _Writer(index, plan, progress)
    emptied: list[str] = []
    skipped, kept = list(plan.skipped), list(plan.kept)
    stored = {file.id for file in plan.changed}
    new = changed = 0
    notes: list[tuple[str, str]] = []
    with Reader(index.embedder, plan.config, clock_ns=clock_ns) as reader:
        for file in plan.files:
            writer.report(file.id)
            try:
                document, remarks = reader.read(file.id)
            except UnreadableFileError as error:
                detail = error.detail
                if file.id in stored and error.reason == "no text":
                    emptied.append(file.id)
                elif file.id in stored:
                    kept.append(file.id)
                    detail += "; its earlier version stays"
                skipped.append(Skipped(path=file.id, reason=error.reason, detail=detail))
                writer.skip(file.size)
                continue
            notes += [(file.id, remark) for remark in remarks]
            changed += file.id in stored
            new += file.id not in stored
            writer.add(document, file.size)
        writer.commit()
    gone = list(dict.fromkeys([*plan.deleted, *emptied]))
    removed = sum(
        index.remove(gone[start : start + _REMOVED_TOGETHER])
        for start in range(0, len(gone), _REMOVED_TOGETHER)
    )
    return SyncReport(
        new=new,
        changed=changed,
        unchanged=plan.unchanged,
        removed=removed,
        chunks=writer.chunks,
        embedded=writer.embedded,
        reused=writer.chunks - writer.embedded,
        kept=tuple(kept),
        skipped=tuple(skipped),
        notes=tuple(notes),
    )


class _Writer:
    """Puts documents into the index in small groups, and reports how far it has come.

    Attributes:
        chunks: of the documents that were put in.
        embedded: chunks that the model had to read.
    """

    def __init__(
        self, index: Store, plan: Plan, progress: Callable[[SyncProgress], None] | None
    ) -> None:
        self._index, self._progress = index, progress
        self._files, self._bytes = len(plan.files), sum(file.size for file in plan.files)
        self._group: list[ChunkedDocument] = []
        self._group_missing = self._group_bytes = 0
        self._files_done = self._bytes_done = 0
        self._path = ""
        self.chunks = self.embedded = 0

    def add(self, document: ChunkedDocument, size: int) -> None:
        """Store a document, now or with the next ones."""
        missing = len(missing_chunks(self._index, document))
        if missing > PART_CHUNKS:
            self.commit()
            self._put_parts(document)
        self._group.append(document)
        self._group_bytes += size
        self._group_missing += missing
        if self._group_missing >= GROUP_CHUNKS or len(self._group) >= GROUP_CHUNKS:
            self.commit()

    def commit(self) -> None:
        """Store the documents that wait."""
        if not self._group:
            return
        report = self._index.put(self._group)
        self.embedded += report.embedded
        self.chunks += report.chunks
        self._files_done += len(self._group)
        self._bytes_done += self._group_bytes
        self._group, self._group_bytes, self._group_missing = [], 0, 0
        self.report(self._path)

    def skip(self, size: int) -> None:
        """Count a file that cannot be read as done."""
        self._files_done += 1
        self._bytes_done += size

    def report(self, path: str) -> None:
        """Call the progress function with the file that is being read."""
        self._path = path
        if self._progress is not None:
            self._progress(
                SyncProgress(
                    path=path,
                    files_done=self._files_done,
                    files=self._files,
                    bytes_done=self._bytes_done,
                    bytes=self._bytes,
                    chunks_done=self.embedded,
                )
            )

    def _put_parts(self, document: ChunkedDocument) -> None:
        """Store all but the end of a long document, from its beginning, marked as partial.

        Never less than reaches to the last chunk that is stored already: it would lose its vector.
        """
        stored = stored_chunks(self._index, document)
        end = max(
            (place for place, is_stored in enumerate(stored, start=1) if is_stored), default=0
        )
        while (end := end + max(PART_CHUNKS, end // 4)) < len(document.chunks):
            source = {**(document.source or {}), "partial": True}
            part = replace(document, source=source, chunks=document.chunks[:end])
            self.embedded += self._index.put([part]).embedded
            self.report(document.id)
