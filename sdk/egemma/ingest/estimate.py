"""How fast the model reads the chunks of a plan, from a sample of them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from egemma.chunks import Chunk

if TYPE_CHECKING:
    from egemma.embedder import Embedder

_SAMPLE_CHUNKS = 48
_SAMPLE_S = 1.0
_BATCH = 8


class SpeedSample:
    """A few of the chunks to be embedded, each as likely as any other."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._seen = 0
        self._chunks: list[tuple[Chunk, int]] = []

    def add(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> None:
        """Offer chunks to the sample, with the tokens that the model reads for each."""
        for pair in zip(chunks, tokens, strict=True):
            self._seen += 1
            if len(self._chunks) < _SAMPLE_CHUNKS:
                self._chunks.append(pair)
            elif (place := self._random.randrange(self._seen)) < _SAMPLE_CHUNKS:
                self._chunks[place] = pair

    def tokens_per_s(self, embedder: Embedder) -> float | None:
        """Measure tokens per second in about a second; None where there is nothing to embed."""
        if not self._chunks:
            return None
        _embed(embedder, self._chunks[:1])  # the first run is slower than all others
        tokens, spent = 0, 0.0
        for start in range(0, len(self._chunks), _BATCH):
            batch = self._chunks[start : start + _BATCH]
            started = time.perf_counter()
            _embed(embedder, batch)
            spent += time.perf_counter() - started
            tokens += sum(count for _, count in batch)
            if spent > _SAMPLE_S:
                break
        return tokens / max(spent, 1e-9)


def _embed(embedder: Embedder, batch: Sequence[tuple[Chunk, int]]) -> None:
    embedder.embed_documents(
        [chunk.text for chunk, _ in batch], titles=[chunk.title for chunk, _ in batch]
    )
