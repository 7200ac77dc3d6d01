"""Files as documents: read, parsed and cut into chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from egemma.chunks import ChunkedDocument, split_text
from egemma.ingest.config import CHUNK_TOKENS, IngestConfig
from egemma.ingest.errors import UnreadableFileError
from egemma.ingest.files import read_bytes
from egemma.ingest.parse import parse
from egemma.ingest.sandbox import Sandbox
from egemma.ingest.source import source_of
from egemma_core.errors import ConfigError, PromptError, TokenLimitError

if TYPE_CHECKING:
    from egemma.embedder import Embedder

RECIPE_VERSION = 1  # rises when the same file would give other chunks


def recipe_of(embedder: Embedder, config: IngestConfig) -> dict[str, Any]:
    """Return what besides the file decides its chunks; under another recipe it is cut anew.

    Raises:
        ConfigError: the model does not read chunks of that length.
    """
    tokens = config.chunk_tokens
    if tokens is None:
        tokens = min(CHUNK_TOKENS, embedder.max_tokens)
    if tokens > embedder.max_tokens:
        raise ConfigError(
            f"chunk_tokens={tokens} is too much: this model reads {embedder.max_tokens}.",
            hint="Pass that or less, or None.",
        )
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
    """Files as documents, with one process for all PDF and HTML among them.

    Args:
        clock_ns: the time of day.

    Raises:
        ConfigError: as `recipe_of`.
    """

    def __init__(
        self,
        embedder: Embedder,
        config: IngestConfig,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._embedder, self._limits, self._clock_ns = embedder, config.limits, clock_ns
        self._recipe = recipe_of(embedder, config)
        self._sandbox = Sandbox()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def read(self, id_: str) -> tuple[ChunkedDocument, tuple[str, ...]]:
        """Return a file as chunks, and what people should know of it.

        Args:
            id_: the path of the file.

        Raises:
            UnreadableFileError: its text cannot be had.
        """
        content = read_bytes(id_, self._limits, follow=False, clock_ns=self._clock_ns)
        parsed = parse(id_, content.data, limits=self._limits, sandbox=self._sandbox)
        name = id_.rpartition("/")[2]
        title = parsed.title or name
        titles = self._recipe["titles"]
        try:
            chunks = split_text(
                parsed.text,
                title=title if titles else None,
                count_tokens=self._embedder.count_tokens,
                max_tokens=self._recipe["chunk_tokens"],
                overlap_tokens=self._recipe["overlap_tokens"],
                headings=parsed.headings if titles else (),
                prompt=self._embedder.document_prompt,
            )
        except TokenLimitError as error:
            found = str(error).rstrip(".")
            raise UnreadableFileError(id_, "too large", found) from error
        if any(not chunk.text.strip() for chunk in chunks):
            raise UnreadableFileError(
                id_, "no text", "a whole chunk of it is blank", hint="Raise chunk_tokens."
            )
        document = ChunkedDocument(
            id=id_,
            title=title,
            metadata={"path": id_, "name": name, "kind": parsed.kind},
            source=source_of(content, self._recipe),
            chunks=tuple(chunks),
        )
        return document, parsed.notes
