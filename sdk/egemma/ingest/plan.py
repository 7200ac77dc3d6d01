"""What an index lacks of some files and folders, before anything is embedded.

A document's id is the absolute path of its file: the same file is the same document whichever
folder above it is given, and two folders of one name stay apart. See
docs/decisions/0007-ingestion.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from egemma.chunks import Chunk
from egemma.ingest.config import IngestConfig
from egemma.ingest.errors import UnreadableFileError
from egemma.ingest.estimate import SpeedSample
from egemma.ingest.files import kind_of
from egemma.ingest.reader import Reader, recipe_of
from egemma.ingest.sandbox import check_libraries
from egemma.ingest.source import is_unchanged
from egemma.ingest.store import Store, index_files, missing_chunks, stored_sources
from egemma.ingest.walk import Skipped, resolve_roots, walk
from egemma_core.errors import InputError

if TYPE_CHECKING:
    from egemma.embedder import Embedder


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file that is to be read."""

    id: str
    size: int  # bytes
    chunks: int | None = None  # None until it was read
    embed_chunks: int | None = None  # of these, to be embedded
    embed_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `sync` will do."""

    roots: tuple[str, ...]
    config: IngestConfig
    new: tuple[PlannedFile, ...]
    changed: tuple[PlannedFile, ...]
    unchanged: int
    deleted: tuple[str, ...]  # stored documents whose files are gone
    kept: tuple[str, ...]  # stored documents whose files are there, but not wanted any more
    skipped: tuple[Skipped, ...]
    embed_s: float | None  # estimate for the model; None where nothing was measured
    read_s: float | None  # for reading and cutting files

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """All files that will be read, by path."""
        return tuple(sorted((*self.new, *self.changed), key=lambda file: file.id))

    @property
    def chunks(self) -> int:
        """How many chunks all files that will be read have."""
        return sum(file.chunks or 0 for file in self.files)

    @property
    def embed_chunks(self) -> int:
        """How many of these chunks will be embedded."""
        return sum(file.embed_chunks or 0 for file in self.files)

    @property
    def embed_tokens(self) -> int:
        """How many tokens the model will read."""
        return sum(file.embed_tokens or 0 for file in self.files)


def plan_folder(
    index: Store,
    roots: Sequence[str | Path],
    config: IngestConfig | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Plan:
    """Say what `sync` would do, and how long it would take.

    Reads and cuts everything that is new or changed, counts what would be embedded, and embeds a
    sample of it. The index stays as it is.

    Args:
        roots: files and folders.
        progress: called with the file, and how many of how many are done.
        clock_ns: the time of day.

    Raises:
        InputError: a root cannot be read, or is empty where the index has documents of it.
        MissingDependencyError: a file needs a library that is not installed.
        ConfigError: the settings do not fit the model.
    """
    plan = list_changes(index, roots, config, clock_ns=clock_ns)
    started = time.perf_counter()
    sample = SpeedSample()
    counted: dict[str, PlannedFile] = {}
    skipped, deleted, kept = list(plan.skipped), list(plan.deleted), list(plan.kept)
    changed_ids = {file.id for file in plan.changed}
    with Reader(index.embedder, plan.config) as reader:
        for done, file in enumerate(plan.files):
            if progress is not None:
                progress(file.id, done, len(plan.files))
            try:
                document, _ = reader.read(file.id)
            except UnreadableFileError as error:
                skipped.append(Skipped(path=file.id, reason=error.reason, detail=error.detail))
                if file.id in changed_ids:
                    (deleted if error.reason == "no text" else kept).append(file.id)
                continue
            missing = missing_chunks(index, document)
            tokens = [_count_tokens(index.embedder, chunk) for chunk in missing]
            sample.add(missing, tokens)
            counted[file.id] = replace(
                file,
                chunks=len(document.chunks),
                embed_chunks=len(missing),
                embed_tokens=sum(tokens),
            )
    read_s = time.perf_counter() - started
    plan = replace(
        plan,
        new=tuple(counted[file.id] for file in plan.new if file.id in counted),
        changed=tuple(counted[file.id] for file in plan.changed if file.id in counted),
        skipped=tuple(skipped),
        deleted=tuple(sorted(deleted)),
        kept=tuple(sorted(kept)),
        read_s=read_s,
    )
    speed = sample.tokens_per_s(index.embedder)
    return replace(plan, embed_s=plan.embed_tokens / speed if speed else 0.0)


def list_changes(
    index: Store,
    roots: Sequence[str | Path],
    config: IngestConfig | None = None,
    *,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Plan:
    """Return the plan that can be made without reading what is new; otherwise as `plan_folder`.

    Files are listed, and read only where their times do not show whether they changed.
    """
    from egemma.ingest.exclude import exclusions  # with pathspec, which takes time to load

    config = config or IngestConfig()
    resolved = resolve_roots(roots)
    recipe = recipe_of(index.embedder, config)
    stored = _stored_below(index, resolved)
    excluded = exclusions(config.exclude)
    files: dict[str, list[PlannedFile]] = {"new": [], "changed": [], "unchanged": []}
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for root in resolved:
        for item in walk(root, exclude=excluded, hidden=config.hidden, is_index=index_files(index)):
            if item.path in seen:
                continue
            seen.add(item.path)
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            state: Literal["new", "changed", "unchanged"] = "new"
            if source := stored.get(item.path):
                try:
                    same = is_unchanged(item, source, recipe, config.limits, clock_ns)
                except UnreadableFileError as error:
                    skipped.append(_skipped_but_stored(error))
                    continue
                state = "unchanged" if same else "changed"
            files[state].append(PlannedFile(id=item.path, size=item.size))
        if not config.allow_empty:
            _check_not_empty(root, seen, stored)
    for kind in sorted({kind_of(file.id) for file in (*files["new"], *files["changed"])}):
        check_libraries(kind)
    unseen = sorted(stored.keys() - seen)
    gone = {id_ for id_ in unseen if _is_gone(id_)}
    still_there = [id_ for id_ in unseen if id_ not in gone]
    return Plan(
        roots=resolved,
        config=config,
        new=tuple(files["new"]),
        changed=tuple(files["changed"]),
        unchanged=len(files["unchanged"]),
        deleted=tuple(sorted(gone)),
        kept=(*still_there, *sorted(item.path for item in skipped if item.path in stored)),
        skipped=tuple(skipped),
        embed_s=None,
        read_s=None,
    )


def _stored_below(index: Store, roots: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the sources of those documents whose files are below the roots: id -> source."""
    return {
        id_: source
        for id_, source in stored_sources(index).items()
        if source.get("kind") == "file" and any(_is_below(id_, root) for root in roots)
    }


def _skipped_but_stored(error: UnreadableFileError) -> Skipped:
    detail = f"{error.detail}; its earlier version stays"
    return Skipped(path=error.path, reason=error.reason, detail=detail)


def _check_not_empty(root: str, seen: Collection[str], stored: Collection[str]) -> None:
    """Refuse an empty folder of which documents are stored: its disk may not be mounted.

    Raises:
        InputError: it is one.
    """
    below = sum(_is_below(id_, root) for id_ in stored)
    if below and os.path.isdir(root) and not any(_is_below(path, root) for path in seen):
        raise InputError(
            f"{root} is empty, but the index has {below} documents of it. Nothing was changed.",
            hint="If it should be mounted, mount it; if they are to go, pass allow_empty=True.",
        )


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _is_gone(path: str) -> bool:
    """Whether a file does not exist, rather than being out of reach."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _count_tokens(embedder: Embedder, chunk: Chunk) -> int:
    """Count the tokens that the model reads for a chunk."""
    return embedder.count_tokens(embedder.document_prompt(chunk.title) + chunk.text)
