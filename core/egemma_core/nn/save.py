"""An encoder as a checkpoint folder in the published layout, which sentence-transformers
opens too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import TOKENIZER, WEIGHTS
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.files import publish_folder
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.hf_tokenizer import tokenizer_json
from egemma_core.prompts import Prompts

# The published layout has no attention pooling: sentence-transformers and egemma-export refuse such
# a folder by its mode.
_POOLING_MODES = {"mean": "mean", "first": "cls", "last": "lasttoken", "attention": "attention"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# What sentence-transformers calls its modules, before and behind the dense ones.
_TRANSFORMER = "base.modules.transformer.Transformer"
_POOLING = "sentence_transformer.modules.pooling.Pooling"
_DENSE = "base.modules.dense.Dense"
_NORMALIZE = "base.modules.normalize.Normalize"
_FLOW = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_METADATA = {"format": "pt"}  # transformers refuses weight files without it


def save_checkpoint(
    encoder: Encoder,
    tokenizer_path: Path,
    prompts: Prompts,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `folder` whole or not at all; `open_checkpoint` and `load_encoder` read it back.

    Args:
        tokenizer_path: a SentencePiece BPE model; it is copied, and rewritten as the tokenizer.json
            that transformers wants.
        dtype: of the stored weights, float32 or bfloat16.

    Raises:
        ConfigError: another dtype.
        CheckpointError: `folder` exists, or a weight is not finite.
    """
    if dtype not in _DTYPE_NAMES:
        known = [str(known) for known in _DTYPE_NAMES]
        raise ConfigError(f"dtype={dtype} cannot be stored.", hint=f"Choose one of {known}.")
    if folder.exists():
        raise CheckpointError(f"{folder} exists.", hint="Remove it, or save to another folder.")
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
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in _layout(encoder.config, prompts, _DTYPE_NAMES[dtype]).items():
            _write_json(scratch / name, content, indent=2)
        shutil.copyfile(tokenizer_path, scratch / TOKENIZER)
        _write_json(scratch / "tokenizer.json", tokenizer_json(tokenizer_path), indent=None)
        _write_weights(scratch, weights)
        scratch.chmod(0o755)  # mkdtemp closes its folders to others, and safetensors its files
        for path in scratch.rglob(WEIGHTS):
            path.chmod(0o644)
        publish_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the weights of the dense head into folders of their own, the others beside them."""
    dense = [name for name in weights if name.startswith("dense.")]
    backbone = {name: weight for name, weight in weights.items() if name not in dense}
    save_file(backbone, folder / WEIGHTS, metadata=_METADATA)
    for position, name in enumerate(dense):
        path = folder / _dense_folder(position) / WEIGHTS
        save_file({"linear.weight": weights[name]}, path, metadata=_METADATA)


def _dense_folder(position: int) -> str:
    return f"{position + 2}_Dense"  # 0 is the transformer, 1 the pooling


def _layout(config: EncoderConfig, prompts: Prompts, dtype: str) -> dict[str, Any]:
    """Return the content of each JSON file, by its path in the folder."""
    kinds = [_TRANSFORMER, _POOLING, *[_DENSE] * len(config.dense), _NORMALIZE]
    return {
        "config.json": transformer_json(config, dtype),
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": dict(prompts.by_name),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "matryoshka_dims": list(config.dims),
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "max_seq_length": config.max_tokens,
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        },
        "1_Pooling/config.json": {
            "embedding_dimension": config.width,
            "pooling_mode": _POOLING_MODES[config.pooling],
            "include_prompt": True,
        },
        **{
            f"{_dense_folder(position)}/config.json": {
                "in_features": into,
                "out_features": out,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
                **_FLOW,
            }
            for position, (into, out) in enumerate(config.dense)
        },
        f"{len(kinds) - 1}_Normalize/config.json": _FLOW,
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{kind.rsplit('.', 1)[1]}" if index else "",
                "type": f"sentence_transformers.{kind}",
            }
            for index, kind in enumerate(kinds)
        ],
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "right",
            "model_max_length": config.max_tokens,
            "clean_up_tokenization_spaces": False,
        },
    }


def transformer_json(config: EncoderConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, as transformers 5 writes it."""
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


def _write_json(path: Path, content: Any, *, indent: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
