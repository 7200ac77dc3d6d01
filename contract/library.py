"""All that the contract takes from the library: the one file here that imports it.

The cases say what this code does today; where a name moves, this is the place to follow it.
"""

from __future__ import annotations

from typing import Any

from egemma import Embedder, Embeddings, Hits, Index, ModelIdentity
from egemma.chunks import Chunk, ChunkedDocument, Heading, split_text
from egemma.index.checksums import (
    block_crc32,
    chunk_crc32,
    chunk_hash,
    document_crc32,
    facts_crc32,
    head_crc32,
    vector_crc32,
)
from egemma.index.codes import Layout, decode, encode, squares
from egemma.index.words import match_of
from egemma.upkeep import check as check_index
from egemma.where import matches, parse
from egemma_core.bundle import Manifest, read_bundle
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import EgemmaError
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_core.vectors import shorten
from egemma_export.bundle_folder import describe_files, fingerprint_of

__all__ = [
    "EMBEDDING_GEMMA",
    "Chunk",
    "ChunkedDocument",
    "EgemmaError",
    "Embedder",
    "Embeddings",
    "Heading",
    "Index",
    "Layout",
    "Manifest",
    "ModelIdentity",
    "Prompts",
    "Tokenizer",
    "block_crc32",
    "check_index",
    "chunk_crc32",
    "chunk_hash",
    "decode",
    "describe_files",
    "document_crc32",
    "encode",
    "facts_crc32",
    "fingerprint_of",
    "head_crc32",
    "match_of",
    "matches",
    "parse",
    "read_bundle",
    "search_vector",
    "shorten",
    "split_text",
    "squares",
    "vector_crc32",
]


def search_vector(index: Index, vector: Any, **asked: Any) -> Hits:
    """The hits of a query's vector."""
    hits: Hits = index.search(vector, **asked)
    return hits
