"""What an index lacks of some files and folders, before anything is embedded.

A document's id is the absolute path of its file: the same file is the same document whichever
folder above it is given, and two folders of one name stay apart. See
docs/decisions/0007-ingestion.md.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from egemma.chunks import Chunk, ChunkedDocument, split_text
from egemma.ingest.parse import (
    FileBytes,
    ParseLimits,
    UnreadableFileError,
    kind_of,
    parse,
    read_bytes,
)
from egemma.ingest.sandbox import Sandbox, check_libraries
from egemma.ingest.walk import Found, Skipped, exclusions, resolve_roots, walk
from egemma_core.errors import ConfigError, InputError, PromptError, TokenLimitError

if TYPE_CHECKING:
    from egemma.embedder import Embedder
    from egemma.index import PutReport

DEFAULT_EXCLUDE = ("node_modules/", "__pycache__/")
CHUNK_TOKENS = 400
OVERLAP_TOKENS = 40
RECIPE_VERSION = 1  # rises when the same file would give other chunks
_LEAST_CHUNK_TOKENS = 64
# A file system may keep times no finer than this (FAT: 2 s): what changed so shortly before it was
# read may change again unseen.
_RACY_NS = 2_000_000_000
_SAMPLE_CHUNKS = 48
_SAMPLE_S = 1.0


class Store(Protocol):
    """What ingestion asks of an index.

    `chunk_hashes`: of those of the ids that are stored, the hashes of their chunks.
    """

    @property
    def path(self) -> Path: ...
    @property
    def embedder(self) -> Embedder: ...
    def put(self, documents: Sequence[ChunkedDocument]) -> PutReport: ...
    def remove(self, ids: Sequence[str]) -> int: ...
    def sources(self) -> Mapping[str, Mapping[str, Any]]: ...
    def chunk_hashes(self, ids: Sequence[str]) -> Mapping[str, Collection[bytes]]: ...


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How files become documents."""

    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # as in .gitignore, below each root
    hidden: bool = False  # read files and folders that begin with a dot
    # longest chunk, prompt and title included; None: 400, or what the model reads
    chunk_tokens: int | None = None
    overlap_tokens: int = OVERLAP_TOKENS  # of the chunk before, repeated
    limits: ParseLimits = field(default_factory=ParseLimits)
    allow_empty: bool = False  # a folder without any file takes its documents out of the index

    def __post_init__(self) -> None:
        exclusions(self.exclude)
        if self.chunk_tokens is not None and (
            isinstance(self.chunk_tokens, bool)
            or not isinstance(self.chunk_tokens, int)
            or self.chunk_tokens < _LEAST_CHUNK_TOKENS
        ):
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens!r}: a whole number of at least "
                f"{_LEAST_CHUNK_TOKENS}, or None."
            )
        if (
            isinstance(self.overlap_tokens, bool)
            or not isinstance(self.overlap_tokens, int)
            or self.overlap_tokens < 0
        ):
            raise ConfigError(f"overlap_tokens={self.overlap_tokens!r}: a whole number of tokens.")


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
        return tuple(sorted((*self.new, *self.changed), key=lambda file: file.id))

    @property
    def chunks(self) -> int:
        """Of all files that will be read."""
        return sum(file.chunks or 0 for file in self.files)

    @property
    def embed_chunks(self) -> int:
        return sum(file.embed_chunks or 0 for file in self.files)

    @property
    def embed_tokens(self) -> int:
        return sum(file.embed_tokens or 0 for file in self.files)


def plan_folder(
    index: Store,
    roots: Sequence[str | Path],
    config: IngestConfig | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Plan:
    """Read and cut everything that is new or changed, count what would be embedded, and embed a
    sample to say how long that takes.

    Args:
        roots: files and folders.
        progress: called with the file, and how many of how many are done.
        clock_ns: the time of day.

    Raises:
        InputError: a root cannot be read, or is empty where the index has documents of it.
        RuntimeUnavailableError: a file needs a library that is not installed.
        ConfigError: the settings do not fit the model.
    """
    plan = look(index, roots, config, clock_ns=clock_ns)
    started = time.perf_counter()
    sample = _Sample()
    counted: dict[str, PlannedFile] = {}
    skipped, deleted, kept = list(plan.skipped), list(plan.deleted), list(plan.kept)
    changed_ids = {file.id for file in plan.changed}
    with Reader(index, plan.config) as reader:
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
            missing = reader.missing(document)
            tokens = [reader.count(chunk) for chunk in missing]
            sample.add(missing, tokens)
            counted[file.id] = replace(
                file,
                chunks=len(document.chunks),
                embed_chunks=len(missing),
                embed_tokens=sum(tokens),
            )
    new, changed = (
        tuple(counted[file.id] for file in files if file.id in counted)
        for files in (plan.new, plan.changed)
    )
    read_s = time.perf_counter() - started
    tokens_per_s = sample.measure(index.embedder)
    plan = replace(
        plan,
        new=new,
        changed=changed,
        skipped=tuple(skipped),
        deleted=tuple(sorted(deleted)),
        kept=tuple(sorted(kept)),
        read_s=read_s,
    )
    return replace(plan, embed_s=plan.embed_tokens / tokens_per_s if tokens_per_s else 0.0)


def look(
    index: Store,
    roots: Sequence[str | Path],
    config: IngestConfig | None = None,
    *,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Plan:
    """As `plan_folder`, without reading what is new: files are listed, and read only where their
    times do not tell whether they changed.
    """
    config = config or IngestConfig()
    resolved = resolve_roots(roots)
    recipe = recipe_of(index.embedder, config)
    stored = {
        id_: source
        for id_, source in index.sources().items()
        if source.get("kind") == "file" and any(_is_below(id_, root) for root in resolved)
    }
    new: list[PlannedFile] = []
    changed: list[PlannedFile] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    unchanged = 0
    for root in resolved:
        before = len(seen)
        for item in walk(
            root,
            exclude=exclusions(config.exclude),
            hidden=config.hidden,
            own=_own_files(index.path),
        ):
            if item.path in seen:
                continue
            seen.add(item.path)
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            file = PlannedFile(id=item.path, size=item.size)
            if item.path not in stored:
                new.append(file)
                continue
            try:
                same = _is_unchanged(item, stored[item.path], recipe, config.limits, clock_ns)
            except UnreadableFileError as error:
                skipped.append(
                    Skipped(
                        path=item.path,
                        reason=error.reason,
                        detail=f"{error.detail}; its earlier version stays",
                    )
                )
                continue
            unchanged += same
            if not same:
                changed.append(file)
        below = sum(_is_below(id_, root) for id_ in stored)
        if (
            len(seen) == before
            and below
            and os.path.isdir(root)
            and not config.allow_empty
            and not any(_is_below(path, root) for path in seen)
        ):
            raise InputError(
                f"{root} is empty, but the index has {below} documents of it. If it should be "
                "mounted, mount it; if they are to go, "
                "pass allow_empty=True. Nothing was changed."
            )
    for kind in sorted({kind_of(file.id) for file in (*new, *changed)}):
        check_libraries(kind)
    gone = sorted(id_ for id_ in stored.keys() - seen if _is_gone(id_))
    kept = sorted(id_ for id_ in stored.keys() - seen if not _is_gone(id_)) + sorted(
        item.path for item in skipped if item.path in stored
    )
    return Plan(
        roots=resolved,
        config=config,
        new=tuple(new),
        changed=tuple(changed),
        unchanged=unchanged,
        deleted=tuple(gone),
        kept=tuple(kept),
        skipped=tuple(skipped),
        embed_s=None,
        read_s=None,
    )


def recipe_of(embedder: Embedder, config: IngestConfig) -> dict[str, Any]:
    """What besides the file decides its chunks; a document of another recipe is cut anew.

    Raises:
        ConfigError: the model does not read chunks of that length.
    """
    tokens = (
        min(CHUNK_TOKENS, embedder.max_tokens)
        if config.chunk_tokens is None
        else config.chunk_tokens
    )
    if tokens > embedder.max_tokens:
        raise ConfigError(f"chunk_tokens={tokens}: this model reads {embedder.max_tokens}.")
    try:
        embedder.document_prompt("a title")
        titles = True
    except PromptError:  # a checkpoint whose document prompt has no place for one
        titles = False
    return {
        "version": RECIPE_VERSION,
        "chunk_tokens": tokens,
        "overlap_tokens": config.overlap_tokens,
        "titles": titles,
    }


class Reader:
    """Files as documents, one process for all PDF and HTML among them."""

    def __init__(
        self, index: Store, config: IngestConfig, *, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._index, self._config, self._clock_ns = index, config, clock_ns
        self._embedder = index.embedder
        self._recipe = recipe_of(self._embedder, config)
        self._sandbox = Sandbox()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def read(self, id_: str) -> tuple[ChunkedDocument, tuple[str, ...]]:
        """A file as chunks, and what people should know of it.

        Raises:
            UnreadableFileError: its text cannot be had.
        """
        limits = self._config.limits
        content = read_bytes(id_, limits, follow=False, clock_ns=self._clock_ns)
        parsed = parse(id_, content.data, limits=limits, sandbox=self._sandbox)
        name = id_.rpartition("/")[2]
        title = parsed.title or name
        try:
            chunks = split_text(
                parsed.text,
                title=title if self._recipe["titles"] else None,
                count_tokens=self._embedder.count_tokens,
                max_tokens=self._recipe["chunk_tokens"],
                overlap_tokens=self._recipe["overlap_tokens"],
                headings=parsed.headings if self._recipe["titles"] else (),
                prompt=self._embedder.document_prompt,
            )
        except TokenLimitError as error:
            raise UnreadableFileError(id_, "too large", str(error).rstrip(".")) from error
        if any(not chunk.text.strip() for chunk in chunks):
            raise UnreadableFileError(
                id_, "no text", "a whole chunk of it is blank. Raise chunk_tokens"
            )
        document = ChunkedDocument(
            id=id_,
            title=title,
            metadata={"path": id_, "name": name, "kind": parsed.kind},
            source=_source(content, self._recipe),
            chunks=tuple(chunks),
        )
        return document, parsed.notes

    def missing(self, document: ChunkedDocument) -> list[Chunk]:
        """Chunks that the index has no vector of, each once."""
        stored = self._index.chunk_hashes([document.id]).get(document.id, ())
        return list(
            {
                hash_: chunk for chunk in document.chunks if (hash_ := hash_of(chunk)) not in stored
            }.values()
        )

    def count(self, chunk: Chunk) -> int:
        """Tokens that the model reads for it."""
        return self._embedder.count_tokens(self._embedder.document_prompt(chunk.title) + chunk.text)


def hash_of(chunk: Chunk) -> bytes:
    """As the index stores it."""
    from egemma.index.checksums import chunk_hash

    return chunk_hash(chunk.title, chunk.text)


def render(plan: Plan) -> list[str]:
    """A plan as lines of text."""
    lines = [
        f"{len(plan.new)} new, {len(plan.changed)} changed, {plan.unchanged} unchanged, "
        f"{len(plan.deleted)} deleted, "
        f"{len(plan.skipped)} skipped, in {', '.join(map(printable, plan.roots))}"
    ]
    if plan.embed_s is not None:
        lines.append(
            f"to embed: {plan.embed_chunks} chunks, {plan.embed_tokens} tokens, "
            f"{duration(plan.embed_s + (plan.read_s or 0))}; "
            f"{plan.chunks - plan.embed_chunks} chunks keep their vectors"
        )
    for name, ids in (
        ("to remove, their files are gone", plan.deleted),
        ("stay although they are not read any more", plan.kept),
    ):
        if ids:
            lines.append(f"{name}: {_some(ids)}")
    return lines + render_skipped(plan.skipped)


def render_skipped(skipped: Sequence[Skipped]) -> list[str]:
    """By reason; expected ones in one line each, the others with what is wrong with them."""
    by_reason: dict[str, list[Skipped]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(item)
    lines = []
    for reason, items in sorted(by_reason.items()):
        if reason in ("hidden", "excluded", "index", "link"):
            lines.append(f"skipped, {reason}: {_some([item.path for item in items])}")
        else:
            lines += [
                f"skipped, {reason}: {printable(item.path)}: {printable(item.detail)}"
                for item in items[:10]
            ]
            if len(items) > 10:
                lines.append(f"skipped, {reason}: {len(items) - 10} more")
    return lines


def duration(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def printable(text: str) -> str:
    """A file name may hold what moves the cursor."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(printable(path) for path in paths[:3])
    return f"{len(paths)} ({shown}{', ...' if len(paths) > 3 else ''})"


def _source(content: FileBytes, recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "file",
        "size": content.size,
        "mtime_ns": content.mtime_ns,
        "ctime_ns": content.ctime_ns,
        "inode": str(content.inode),
        "sha256": content.sha256,
        "looked_ns": content.looked_ns,
        "recipe": dict(recipe),
    }


def _is_unchanged(
    file: Found,
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    limits: ParseLimits,
    clock_ns: Callable[[], int],
) -> bool:
    """By size and times where these can be trusted, else by the bytes.

    They cannot where the file changed shortly before it was read, as it may have changed again
    within the same tick; or where the clock stood later then than it does now.
    """
    if source.get("recipe") != recipe or source.get("partial") or source.get("size") != file.size:
        return False
    looked_ns = source.get("looked_ns", 0)
    last_ns = max(file.mtime_ns, file.ctime_ns)
    same_times = (source.get("mtime_ns"), source.get("ctime_ns"), source.get("inode")) == (
        file.mtime_ns,
        file.ctime_ns,
        str(file.inode),
    )
    if same_times and last_ns + _RACY_NS < looked_ns <= clock_ns():
        return True
    return read_bytes(file.path, limits, follow=False).sha256 == source.get("sha256")


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _is_gone(path: str) -> bool:
    """Really gone, not only out of reach."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _own_files(index_path: Path) -> Callable[[str], bool]:
    """The index file and what stands beside it: -wal, -shm, derived files."""
    own = Path(index_path).resolve().as_posix()
    return lambda path: path == own or path.startswith((f"{own}-", f"{own}."))


class _Sample:
    """A few of the chunks to be embedded, each as likely as any other, and how fast the model reads
    them.
    """

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._seen = 0
        self._chunks: list[tuple[Chunk, int]] = []

    def add(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> None:
        for pair in zip(chunks, tokens, strict=True):
            self._seen += 1
            if len(self._chunks) < _SAMPLE_CHUNKS:
                self._chunks.append(pair)
            elif (place := self._random.randrange(self._seen)) < _SAMPLE_CHUNKS:
                self._chunks[place] = pair

    def measure(self, embedder: Embedder) -> float | None:
        """Tokens per second, from about a second of work; None where there is nothing to embed."""
        if not self._chunks:
            return None
        # the first run is slower than all others
        embedder.embed_documents([self._chunks[0][0].text], titles=[self._chunks[0][0].title])
        tokens, spent, batch = 0, 0.0, 8
        for start in range(0, len(self._chunks), batch):
            part = self._chunks[start : start + batch]
            started = time.perf_counter()
            embedder.embed_documents(
                [chunk.text for chunk, _ in part], titles=[chunk.title for chunk, _ in part]
            )
            spent += time.perf_counter() - started
            tokens += sum(count for _, count in part)
            if spent > _SAMPLE_S:
                break
        return tokens / max(spent, 1e-9)
