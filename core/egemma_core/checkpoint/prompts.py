"""The prompts that a published folder states, and EmbeddingGemma's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from egemma_core.errors import CheckpointError
from egemma_core.prompts import Prompts


def read_prompts(config: Mapping[str, Any]) -> Prompts:
    """Return the prompts of a parsed config_sentence_transformers.json.

    Raises:
        CheckpointError: `prompts` is missing or not a table of strings.
    """
    prompts = config.get("prompts")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(
            f"prompts={prompts!r}: config_sentence_transformers.json must map prompt names to "
            "strings."
        )
    return Prompts(by_name={name: text for name, text in prompts.items() if text})


# For a model that is not trained yet; a trained one's are read from its folder.
# Source: config_sentence_transformers.json of google/embeddinggemma-300m.
EMBEDDING_GEMMA = Prompts(
    by_name={
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "BitextMining": "task: search result | query: ",
        "Clustering": "task: clustering | query: ",
        "Classification": "task: classification | query: ",
        "InstructionRetrieval": "task: code retrieval | query: ",
        "MultilabelClassification": "task: classification | query: ",
        "PairClassification": "task: sentence similarity | query: ",
        "Reranking": "task: search result | query: ",
        "Retrieval": "task: search result | query: ",
        "Retrieval-query": "task: search result | query: ",
        "Retrieval-document": "title: none | text: ",
        "STS": "task: sentence similarity | query: ",
        "Summarization": "task: summarization | query: ",
    }
)
