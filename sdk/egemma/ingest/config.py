"""Settings of ingestion: which files are read, how they are cut, and what one file may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from egemma_core.checks import number, whole_number

DEFAULT_EXCLUDE = ("node_modules/", "__pycache__/")
CHUNK_TOKENS = 400
OVERLAP_TOKENS = 40
_LEAST_CHUNK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class ParseLimits:
    """How much one file may cost: what is above a limit is refused, never cut."""

    file_bytes: int = 64 * 2**20
    characters: int = 32 * 2**20  # of extracted text
    pdf_pages: int = 5_000
    stream_bytes: int = 75_000_000  # of one decompressed stream of a PDF
    memory_bytes: int = 2**30  # of the process that reads PDF and HTML
    time_s: float = 60.0  # for one PDF or HTML file

    def __post_init__(self) -> None:
        for name in ("file_bytes", "characters", "pdf_pages", "stream_bytes", "memory_bytes"):
            whole_number(name, getattr(self, name), 1)
        number("time_s", self.time_s, above=0)


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
        from egemma.ingest.exclude import exclusions  # with pathspec, which takes time to load

        exclusions(self.exclude)
        if self.chunk_tokens is not None:
            whole_number(
                "chunk_tokens",
                self.chunk_tokens,
                _LEAST_CHUNK_TOKENS,
                hint=f"None takes {CHUNK_TOKENS}, or what the model reads if that is less.",
            )
        whole_number("overlap_tokens", self.overlap_tokens, 0)
