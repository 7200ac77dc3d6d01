"""The shape of an EmbeddingGemma encoder, read from a checkpoint's files and never retyped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from egemma_core.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"
POOLINGS = ("mean", "first", "last", "attention")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Everything that decides what the encoder computes.

    Source: config.json, modules.json, 1_Pooling and Dense configs of the published checkpoint.
    """

    vocab_size: int  # V, rows of the embedding table
    width: int  # D, channels of a token
    ffn_width: int  # F
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # K
    head_dim: int  # C, even
    query_scale: float  # factor on q·k, query_pre_attn_scalar ** -0.5
    norm_eps: float
    layer_types: tuple[str, ...]  # SLIDING or FULL, one per layer
    window: int  # the largest |i - j| that a sliding layer attends to (256)
    rope_theta_full: float
    rope_theta_sliding: float
    max_tokens: int  # BOS and EOS included
    bos_id: int
    eos_id: int
    pad_id: int
    pooling: str  # one of POOLINGS
    dense: tuple[tuple[int, int], ...]  # (in, out) of each bias-free linear after pooling
    dims: tuple[int, ...]  # trained widths of the result, falling; dims[0] is the full one

    def __post_init__(self) -> None:
        _require(
            len(self.layer_types) == self.num_layers,
            f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
            f"{self.num_layers}",
        )
        _require(
            set(self.layer_types) <= {SLIDING, FULL},
            f"layer_types has {sorted(set(self.layer_types))}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly",
        )
        _require(
            self.head_dim % 2 == 0, f"head_dim={self.head_dim} is odd; rotary positions need pairs"
        )
        _require(self.pooling in POOLINGS, f"pooling={self.pooling!r} is none of {POOLINGS}")
        widths = [self.width, *(out for _, out in self.dense)]
        _require(
            [into for into, _ in self.dense] == widths[:-1],
            f"dense widths {self.dense} do not chain from {self.width}",
        )
        _require(
            self.dims[0] == widths[-1]
            and list(self.dims) == sorted(set(self.dims), reverse=True)
            and self.dims[-1] > 0,
            f"dims={self.dims}: they must fall from the full width {widths[-1]}",
        )

    @property
    def dim(self) -> int:
        """Full width of the result."""
        return self.dims[0]


def read_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `EncoderConfig` that config.json decides.

    Both spellings of the rotary bases are read: `rope_theta` with `rope_local_base_freq`, and
    `rope_parameters`.

    Raises:
        CheckpointError: the file describes another architecture, a causal model, or the halved
            window that older transformers releases wrote back when they saved a checkpoint.
    """
    model_type = config.get("model_type")
    _require(
        model_type == "gemma3_text",
        f"model_type={model_type!r}",
        "only gemma3_text (EmbeddingGemma) is understood",
    )
    _require(
        config.get("use_bidirectional_attention") is True,
        f"use_bidirectional_attention={config.get('use_bidirectional_attention')!r}",
        "EmbeddingGemma attends in both directions; a causal decoder must be adapted first",
    )
    _require(
        config.get("hidden_activation") == "gelu_pytorch_tanh",
        f"hidden_activation={config.get('hidden_activation')!r}",
        "only gelu_pytorch_tanh is understood",
    )
    for name, wanted in (
        ("attention_bias", False),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
    ):
        _require(
            config.get(name, wanted) == wanted,
            f"{name}={config.get(name)!r}",
            f"only {wanted!r} is understood",
        )

    layers = _integer(config, "num_hidden_layers")
    sliding_window = _integer(config, "sliding_window")
    # The file holds the whole width (512: 256 to each side). transformers halves it to 257
    # (exclusive) in memory, and releases before its to_dict fix saved that 257, which the next load
    # halves again.
    _require(
        sliding_window % 2 == 0,
        f"sliding_window={sliding_window}",
        "an odd value is the halved window that older transformers releases saved; the checkpoint "
        "was made with "
        f"{(sliding_window - 1) * 2}: put that back into config.json",
    )
    layer_types = config.get("layer_types")
    if layer_types is None:
        pattern = config.get("_sliding_window_pattern", config.get("sliding_window_pattern"))
        _require(
            isinstance(pattern, int) and pattern > 0,
            "neither layer_types nor sliding_window_pattern",
            "one of them says which layers attend to everything",
        )
        assert isinstance(pattern, int)
        layer_types = [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(layers)]

    ropes = config.get("rope_parameters")
    if ropes is None:
        _require(
            not config.get("rope_scaling"),
            f"rope_scaling={config.get('rope_scaling')!r}",
            "scaled positions are not understood",
        )
        thetas = config.get("rope_theta"), config.get("rope_local_base_freq")
    else:
        for kind in (FULL, SLIDING):
            rope = ropes.get(kind, {})
            _require(
                rope.get("rope_type", "default") == "default",
                f"rope_type={rope.get('rope_type')!r}",
                "scaled positions are not understood",
            )
        thetas = ropes.get(FULL, {}).get("rope_theta"), ropes.get(SLIDING, {}).get("rope_theta")
    _require(
        None not in thetas,
        f"rotary bases {thetas}",
        "config.json must give one for full and one for sliding layers",
    )

    return {
        "vocab_size": _integer(config, "vocab_size"),
        "width": _integer(config, "hidden_size"),
        "ffn_width": _integer(config, "intermediate_size"),
        "num_layers": layers,
        "num_heads": _integer(config, "num_attention_heads"),
        "num_kv_heads": _integer(config, "num_key_value_heads"),
        "head_dim": _integer(config, "head_dim"),
        "query_scale": float(_number(config, "query_pre_attn_scalar")) ** -0.5,
        "norm_eps": float(_number(config, "rms_norm_eps")),
        "layer_types": tuple(layer_types),
        "window": sliding_window // 2,
        "rope_theta_full": float(thetas[0]),  # type: ignore[arg-type]  # None was refused above
        "rope_theta_sliding": float(thetas[1]),  # type: ignore[arg-type]
        "bos_id": _integer(config, "bos_token_id", lowest=0),
        "eos_id": _integer(config, "eos_token_id", lowest=0),
        "pad_id": _integer(config, "pad_token_id", lowest=0),
    }


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    _require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
        f"{name}={value!r}",
        "config.json must give a positive number",
    )
    return value  # type: ignore[return-value]  # checked above


def _integer(config: Mapping[str, Any], name: str, lowest: int = 1) -> int:
    value = config.get(name)
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= lowest,
        f"{name}={value!r}",
        f"config.json must give a whole number of at least {lowest}",
    )
    return value  # type: ignore[return-value]  # checked above


def _require(
    condition: bool, found: str, right: str = "this is not a model that egemma computes correctly"
) -> None:
    if not condition:
        raise CheckpointError(f"{found}: {right}.")
