"""What stands in for a model where a test is about everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from egemma.embeddings import Embedding, Embeddings
from egemma.index import Index
from egemma_core.bundle import TOKENIZER
from egemma_core.errors import TokenLimitError
from egemma_core.prompts import DEFAULT_TASK, Prompts
from egemma_core.vectors import check_dim, shorten

DIMS = (64, 32, 16)
MAX_TOKENS = 48
TEXTS = [
    "the cat sat on the mat",
    "a dog barked at the moon",
    "rain fell on the quiet harbour",
    "she fixed the bicycle chain",
]


class WordEmbedder:
    """Keeps the contract of `egemma.Embedder`: each word is a fixed random direction, a text the
    sum of its words and its title's.

    A token is a word. The prompt's words are counted as tokens, but point nowhere, so a query finds
    its own words with a cosine of 1.
    """

    def __init__(
        self, name: str = "words-1", *, dims: Sequence[int] = DIMS, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        # two models put a word into different directions
        self._salt = "" if name == "words-1" else name
        self.dims, self.dim, self.max_tokens = tuple(dims), dims[0], max_tokens
        self.tasks = ("question answering", DEFAULT_TASK)
        self.prompts = Prompts(
            by_name={"query": f"task: {DEFAULT_TASK} | query: ", "document": "title: none | text: "}
        )
        self.manifest = SimpleNamespace(
            fingerprint=self.fingerprint,
            dims=self.dims,
            source={"model": name, "weights": self.fingerprint},
            target="test",
            files={TOKENIZER: {"sha256": "0" * 64}},
            prompts=dict(self.prompts.by_name),
            architecture={"max_tokens": max_tokens},
            scheme={},
        )
        self.embedded: list[str] = []  # every document's text that was embedded, in order
        self.calls = 0  # of embed_documents
        self.broken: NDArray[np.float32] | None = None  # given out instead of what the words say

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def document_prompt(self, title: str | None = None) -> str:
        return self.prompts.document(title)

    def embed_query(
        self,
        text: str | Iterable[str],
        *,
        task: str = DEFAULT_TASK,
        dim: int | None = None,
        overflow: str = "error",
    ) -> Embedding | Embeddings:
        prompt = self.prompts.query(task)
        texts = [text] if isinstance(text, str) else text
        found = self._embed([("", prompt, one) for one in texts], dim, overflow)
        return found[0] if isinstance(text, str) else found

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        titles: Iterable[str | None] | None = None,
        dim: int | None = None,
        overflow: str = "error",
    ) -> Embeddings:
        texts = list(texts)
        rows = [
            (title or "", self.document_prompt(title), text)
            for title, text in zip(
                [None] * len(texts) if titles is None else titles, texts, strict=True
            )
        ]
        embeddings = self._embed(rows, dim, overflow)
        self.calls += 1
        self.embedded += texts
        if self.broken is not None:
            return Embeddings(
                vectors=self.broken,
                num_tokens=embeddings.num_tokens,
                truncated=embeddings.truncated,
                fingerprint=self.fingerprint,
            )
        return embeddings

    def vector(self, text: str, title: str = "") -> NDArray[np.float32]:
        """(D,) of a text that is short enough."""
        return self._embed([(title, "", text)], None, "truncate").vectors[0]

    def close(self) -> None:
        pass

    def _embed(
        self, rows: Sequence[tuple[str, str, str]], dim: int | None, overflow: str
    ) -> Embeddings:
        lengths = tuple(self.count_tokens(prompt + text) for _, prompt, text in rows)
        cut = tuple(length > self.max_tokens for length in lengths)
        if overflow == "error" and any(cut):
            first = cut.index(True)
            raise TokenLimitError(
                f"the text has {lengths[first]} tokens, the limit is {self.max_tokens}.",
                position=first,
                place=f"text {first}",
            )
        vectors = np.empty((len(rows), self.dim), np.float32)
        for row, (title, prompt, text) in enumerate(rows):
            words = (
                title.split() + text.split()[: max(0, self.max_tokens - self.count_tokens(prompt))]
            )
            vectors[row] = np.sum(
                [_direction(self._salt + word, self.dim) for word in words or [""]], axis=0
            )
        return Embeddings(
            vectors=shorten(vectors, check_dim(dim, self.dims), self.dims),
            num_tokens=lengths,
            truncated=cut,
            fingerprint=self.fingerprint,
        )


@lru_cache(maxsize=10_000)
def _direction(word: str, dim: int) -> NDArray[np.float64]:
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    ).normal(size=dim)


def open_index(path: Path, name: str = "words-1", **settings: Any) -> Index:
    """An index whose model is a `WordEmbedder` of this name."""
    return Index.open(path, cast(Any, WordEmbedder(name)), **settings)


def model_of(index: Index) -> WordEmbedder:
    """The fake behind an index that `open_index` opened."""
    return cast(WordEmbedder, index.embedder)
