"""A model that every machine computes alike: each token is a direction, a text the sum of its tokens.

The index of the contract is made with it, because the last bits of a real model's vectors depend on
the processor, and the codes in the file must not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from contract.cases_chunks import PROMPTS, builtin_tokenizer
from contract.library import Embeddings, Manifest, shorten
from contract.notation import spread, unit

DIMS = (64, 48, 32, 16)
MAX_TOKENS = 64
# Channels behind a trained width are smaller, as in a model that was trained for these widths.
_SIZES = np.repeat([1.0, 0.5, 0.25, 0.25], 16)


class WordsModel:
    """Keeps the contract of `egemma.Embedder`, without a model file."""

    def __init__(self) -> None:
        self.dims: tuple[int, ...] = DIMS
        self.dim, self.max_tokens = DIMS[0], MAX_TOKENS
        self.fingerprint = hashlib.sha256(b"the words model of egemma's contract, 1").hexdigest()
        self.tasks = PROMPTS.tasks
        self._tokenizer = builtin_tokenizer()
        # every field of a manifest, because an index stores digests of some of them
        self.manifest = Manifest(
            target="none",
            runtime="onnxruntime",
            fingerprint=self.fingerprint,
            source={"model": "words model", "revision": None, "weights": {"words": "1"}},
            architecture={"width": 64, "max_tokens": MAX_TOKENS},
            tokenizer={"bos_id": 2, "eos_id": 1, "pad_id": 0, "vocab_size": 8000, "max_tokens": 64},
            prompts=dict(PROMPTS.by_name),
            dims=DIMS,
            scheme={"name": "float32", "weights": {}},
            batch="dynamic",
            verification={},
            tools={},
            files={"tokenizer.model": {"bytes": 0, "sha256": "0" * 64}},
        )

    def count_tokens(self, text: str) -> int:
        return self._tokenizer.encode(text, overflow="truncate").num_tokens

    def document_prompt(self, title: str | None = None) -> str:
        return PROMPTS.document(title)

    def embed_query(self, texts: Iterable[str], **_: object) -> Embeddings:
        return self._embeddings([self.vector(text) for text in texts], [0])

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: str = "error",
    ) -> Embeddings:
        texts = list(texts)
        named = [None] * len(texts) if titles is None else list(titles)
        rows, counts = [], []
        for text, title in zip(texts, named, strict=True):
            rows.append(self.vector(f"{title} {text}" if title else text))
            counts.append(self.count_tokens(PROMPTS.document(title) + text))
        assert dim is None
        assert overflow == "error"
        assert max(counts, default=0) <= MAX_TOKENS
        return self._embeddings(rows, counts)

    def vector(self, text: str) -> NDArray[np.float32]:
        """(64,) of a text; titles count as words of it."""
        ids = self._tokenizer.encode(text, overflow="truncate").ids[1:-1] or (3,)
        # multiples of 1 / 131072 below 64: their sums are exact in float64
        return unit(np.stack([_direction(token) for token in ids]).sum(axis=0))

    def _embeddings(self, rows: list[NDArray[np.float32]], counts: Sequence[int]) -> Embeddings:
        vectors = np.stack(rows)
        assert shorten(vectors, None, self.dims).shape == vectors.shape
        return Embeddings(
            vectors=vectors,
            num_tokens=tuple(counts),
            truncated=(False,) * len(counts),
            fingerprint=self.fingerprint,
        )


@lru_cache(maxsize=10_000)
def _direction(token: int) -> NDArray[np.float64]:
    direction: NDArray[np.float64] = spread(f"token {token}", DIMS[0]).astype(np.float64) * _SIZES
    return direction
