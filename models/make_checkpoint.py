"""Write a random EmbeddingGemma in the published layout, by transformers and sentence-transformers
themselves.

EmbeddingGemma's own weights are gated; its shape is not. What these libraries save, ours must read,
and what they compute from it, ours must compute. The full size (24 layers, 262,144 rows, 1.2 GB) is
too large to commit.

    python models/make_checkpoint.py full OUT --tokenizer gemma3.model
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Source: google/embeddinggemma-300m, config.json and config_sentence_transformers.json.
FULL = {
    "vocab_size": 262144,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 96,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
SIZES: dict[str, dict[str, Any]] = {"full": FULL, "tiny": TINY}
_TASKS = {
    "query": "search result",
    "BitextMining": "search result",
    "Clustering": "clustering",
    "Classification": "classification",
    "InstructionRetrieval": "code retrieval",
    "MultilabelClassification": "classification",
    "PairClassification": "sentence similarity",
    "Reranking": "search result",
    "Retrieval": "search result",
    "Retrieval-query": "search result",
    "STS": "sentence similarity",
    "Summarization": "summarization",
}
PROMPTS = {name: f"task: {task} | query: " for name, task in _TASKS.items()}
PROMPTS |= {"document": "title: none | text: ", "Retrieval-document": "title: none | text: "}


def write_checkpoint(
    folder: Path, size: str = "tiny", tokenizer: Path | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write the folder and return it.

    Args:
        size: "tiny" (three layers, milliseconds) or "full".
        tokenizer: a SentencePiece model to lay beside it; without one the folder cannot embed text.
        changes: fields of config.json to set otherwise, such as num_key_value_heads=3.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )
    from tokenizers import Tokenizer, models
    from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

    shape = SIZES[size] | changes
    config = Gemma3TextConfig(
        **shape,
        use_bidirectional_attention=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    torch.manual_seed(seed)
    model = Gemma3TextModel(config)
    # norms start at exactly 1; move them, so that a lost norm weight changes vectors
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.2)
        # torch zeroes the padding row; a trained table has none such
        model.embed_tokens.weight[0].normal_(0, 0.02)
    width = shape["hidden_size"]
    scratch = folder / "transformer"
    model.save_pretrained(scratch)
    del model
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}, unk_token="<unk>")
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    ).save_pretrained(scratch)
    identity = torch.nn.Identity()
    modules = [
        Transformer(str(scratch), max_seq_length=shape["max_position_embeddings"]),
        Pooling(width, "mean"),
        Dense(width, 4 * width, bias=False, activation_function=identity),
        Dense(4 * width, width, bias=False, activation_function=identity),
        Normalize(),
    ]
    SentenceTransformer(
        modules=modules, prompts=PROMPTS, device="cpu", similarity_fn_name="cosine"
    ).save(str(folder))
    shutil.rmtree(scratch)
    for stand_in in ("tokenizer.json", "tokenizer_config.json"):
        # only there because the library insists on one
        (folder / stand_in).rename(folder / f"stand-in-{stand_in}")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def load_reference(folder: Path, **changes: Any) -> Any:
    """The folder opened by sentence-transformers: `reference(ids, mask)` gives (B, dim) vectors.

    Args:
        changes: fields of config.json to override.
    """
    model = load_reference_model(folder, **changes)

    @torch.no_grad()
    def reference(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model.forward({"input_ids": ids, "attention_mask": mask.long()})[
            "sentence_embedding"
        ]  # type: ignore[no-any-return]

    return reference


def load_reference_model(folder: Path, **changes: Any) -> Any:
    """The folder as a SentenceTransformer in evaluation mode."""
    from sentence_transformers import SentenceTransformer

    for stand_in in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / f"stand-in-{stand_in}", folder / stand_in)
    return SentenceTransformer(str(folder), device="cpu", config_kwargs=changes or None).eval()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model (Gemma 3's own for the full size)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = write_checkpoint(args.out, args.size, args.tokenizer, args.seed)
    print(
        f"{folder}: "
        f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
