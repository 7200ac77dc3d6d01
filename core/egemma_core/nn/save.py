"""An encoder as a checkpoint folder in the published layout, which sentence-transformers
opens too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from egemma_core.checkpoint import TOKENIZER, WEIGHTS
from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import Prompts

# The published layout has no attention pooling: sentence-transformers and egemma-export refuse such
# a folder by its mode.
_POOLING_MODES = {"mean": "mean", "first": "cls", "last": "lasttoken", "attention": "attention"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def save_checkpoint(
    encoder: Encoder,
    tokenizer_path: Path,
    prompts: Prompts,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `folder` whole or not at all. `open_checkpoint` and `load_encoder` read it back.

    Args:
        tokenizer_path: a SentencePiece BPE model; it is copied, and rewritten as the tokenizer.json
            that transformers wants.
        dtype: of the stored weights, float32 or bfloat16.

    Raises:
        ConfigError: another dtype.
        CheckpointError: `folder` exists, or a weight is not finite.
    """
    config = encoder.config
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype={dtype}: one of {[str(known) for known in _DTYPE_NAMES]}.")
    if folder.exists():
        raise CheckpointError(f"{folder} exists. Remove it, or save to another folder.")
    weights = {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in encoder.named_parameters()
    }
    damaged = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if damaged:
        raise CheckpointError(
            f"{damaged[:3]} hold NaN or infinite values; training diverged, nothing was saved."
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(temporary, config, weights, tokenizer_path, prompts)
        temporary.chmod(0o755)  # mkdtemp closes its folders to others, and safetensors its files
        for path in temporary.rglob(WEIGHTS):
            path.chmod(0o644)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path,
    config: EncoderConfig,
    weights: dict[str, Tensor],
    tokenizer_path: Path,
    prompts: Prompts,
) -> None:
    dense = {name: weight for name, weight in weights.items() if name.startswith("dense.")}
    metadata = {"format": "pt"}  # transformers refuses files without it
    save_file(
        {name: weight for name, weight in weights.items() if name not in dense},
        folder / WEIGHTS,
        metadata=metadata,
    )
    shutil.copyfile(tokenizer_path, folder / TOKENIZER)
    _json(folder / "config.json", _transformer(config, _DTYPE_NAMES[weights["norm.weight"].dtype]))
    _json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": dict(prompts.by_name),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "matryoshka_dims": list(config.dims),
        },
    )
    _json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "max_seq_length": config.max_tokens,
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        },
    )
    _json(
        folder / "1_Pooling/config.json",
        {
            "embedding_dimension": config.width,
            "pooling_mode": _POOLING_MODES[config.pooling],
            "include_prompt": True,
        },
    )
    flow = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    types = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    for position, (into, out) in enumerate(config.dense):
        place = folder / f"{len(types)}_Dense"
        _json(
            place / "config.json",
            {
                "in_features": into,
                "out_features": out,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
                **flow,
            },
        )
        save_file(
            {"linear.weight": dense[f"dense.{position}.weight"]}, place / WEIGHTS, metadata=metadata
        )
        types.append("base.modules.dense.Dense")
    _json(folder / f"{len(types)}_Normalize/config.json", flow)
    types.append("base.modules.normalize.Normalize")
    _json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{kind.rsplit('.', 1)[1]}" if index else "",
                "type": f"sentence_transformers.{kind}",
            }
            for index, kind in enumerate(types)
        ],
    )
    _json(folder / "tokenizer.json", tokenizer_json(tokenizer_path), indent=None)
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "right",
            "model_max_length": config.max_tokens,
            "clean_up_tokenization_spaces": False,
        },
    )


def _transformer(config: EncoderConfig, dtype: str) -> dict[str, Any]:
    """config.json, as transformers 5 writes it."""
    return {
        "architectures": ["Gemma3TextModel"],
        "model_type": "gemma3_text",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_tokens,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_eps,
        "layer_types": list(config.layer_types),
        "sliding_window": 2 * config.window,
        "use_bidirectional_attention": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": False,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": config.rope_theta_full},
            SLIDING: {"rope_type": "default", "rope_theta": config.rope_theta_sliding},
        },
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


def tokenizer_json(path: Path) -> dict[str, Any]:
    """A SentencePiece BPE model in the `tokenizers` format: same ids, [BOS] pieces [EOS] around a
    text.

    SentencePiece stores pieces in merge order and not what was merged. Every split of a piece into
    two pieces is a merge, in the order of the piece it makes and, for several splits of one, of its
    parts.

    Source: transformers, convert_slow_tokenizer.generate_merges and GemmaTokenizer.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    pieces = [model.id_to_piece(token) for token in range(model.vocab_size())]
    ids = {piece: token for token, piece in enumerate(pieces)}
    controls = [
        token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)
    ]
    others = [
        token for token in range(len(pieces)) if token not in controls and not model.is_byte(token)
    ]
    # SentencePiece scores what it merged -0, -1, -2, ... and pieces that a user defined +0; its
    # Python class tells no more.
    normal = [token for token in others if math.copysign(1, model.get_score(token)) < 0]
    user_defined = sorted(set(others) - set(normal))
    mergeable = {pieces[token] for token in normal}
    merges = []
    for token in sorted(normal, key=model.get_score, reverse=True):
        piece = pieces[token]
        splits = [
            (piece[:at], piece[at:])
            for at in range(1, len(piece))
            if piece[:at] in mergeable and piece[at:] in mergeable
        ]
        merges += sorted(splits, key=lambda pair: (ids[pair[0]], ids[pair[1]]))

    def added(token: int, special: bool) -> dict[str, Any]:
        return {
            "id": token,
            "content": pieces[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not special,
            "special": special,
        }  # runs of blanks are found after they became "▁"

    bos, eos = pieces[model.bos_id()], pieces[model.eos_id()]
    special = {
        bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]},
        eos: {"id": eos, "ids": [model.eos_id()], "tokens": [eos]},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(added(token, True) for token in controls),
            *(added(token, False) for token in user_defined),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": special,
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": eos, "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": eos, "type_id": 0}},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def _json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
