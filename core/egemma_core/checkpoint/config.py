"""The shape of an EmbeddingGemma encoder, read from a checkpoint's files and never retyped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from egemma_core.checks import number, whole_number
from egemma_core.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"
POOLINGS = ("mean", "first", "last", "attention")

_MEND = "Copy config.json from the published checkpoint again."


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
        falling = sorted(set(self.dims), reverse=True)
        _require(
            [*self.dims] == falling and falling[:1] == widths[-1:] and falling[-1] > 0,
            f"dims={self.dims} do not fall from the full width {widths[-1]}",
        )

    @property
    def dim(self) -> int:
        """Full width of the result."""
        return self.dims[0]


def read_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `EncoderConfig` that config.json decides.

    Both spellings of the rotary bases are read: `rope_theta` with `rope_local_base_freq`, and
    `rope_parameters`.

    Raises:
        CheckpointError: the file describes another architecture, a causal model, or the halved
            window that older transformers releases wrote back when they saved a checkpoint.
    """
    for name, right, why in (
        ("model_type", "gemma3_text", "only gemma3_text (EmbeddingGemma) is understood"),
        (
            "use_bidirectional_attention",
            True,
            "EmbeddingGemma attends in both directions; a causal decoder must be adapted first",
        ),
        ("hidden_activation", "gelu_pytorch_tanh", "only gelu_pytorch_tanh is understood"),
    ):
        found = config.get(name)
        _require(type(found) is type(right) and found == right, f"{name}={found!r}", why)
    for name, without in (
        ("attention_bias", False),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
    ):
        found = config.get(name, without)
        _require(found == without, f"{name}={found!r}", f"only {without!r} is understood")

    num_layers = _integer(config, "num_hidden_layers")
    sliding_window = _integer(config, "sliding_window")
    # The file holds the whole width (512: 256 to each side). transformers halves it to 257
    # (exclusive) in memory, and releases before its to_dict fix saved that 257, which the next load
    # halves again.
    _require(
        sliding_window % 2 == 0,
        f"sliding_window={sliding_window}",
        "an odd value is the halved window that older transformers releases saved; the checkpoint "
        f"was made with {(sliding_window - 1) * 2}: put that back into config.json",
    )
    full, sliding = _rotary_bases(config)
    return {
        "vocab_size": _integer(config, "vocab_size"),
        "width": _integer(config, "hidden_size"),
        "ffn_width": _integer(config, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": _integer(config, "num_attention_heads"),
        "num_kv_heads": _integer(config, "num_key_value_heads"),
        "head_dim": _integer(config, "head_dim"),
        "query_scale": _number(config, "query_pre_attn_scalar") ** -0.5,
        "norm_eps": _number(config, "rms_norm_eps"),
        "layer_types": _layer_types(config, num_layers),
        "window": sliding_window // 2,
        "rope_theta_full": full,
        "rope_theta_sliding": sliding,
        "bos_id": _integer(config, "bos_token_id", 0),
        "eos_id": _integer(config, "eos_token_id", 0),
        "pad_id": _integer(config, "pad_token_id", 0),
    }


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return tuple(layer_types)
    pattern = config.get("_sliding_window_pattern", config.get("sliding_window_pattern"))
    _require(
        pattern is not None,
        "neither layer_types nor sliding_window_pattern",
        "one of them says which layers attend to everything",
    )
    every = whole_number("sliding_window_pattern", pattern, 1, error=CheckpointError)
    return tuple(FULL if (layer + 1) % every == 0 else SLIDING for layer in range(num_layers))


def _rotary_bases(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the base of full layers and that of sliding ones."""
    ropes = config.get("rope_parameters")
    if ropes is None:
        scaling = config.get("rope_scaling")
        _require(not scaling, f"rope_scaling={scaling!r}", "scaled positions are not understood")
        bases = (config.get("rope_theta"), config.get("rope_local_base_freq"))
    else:
        for kind in (FULL, SLIDING):
            found = ropes.get(kind, {}).get("rope_type", "default")
            _require(
                found == "default", f"rope_type={found!r}", "scaled positions are not understood"
            )
        bases = (ropes.get(FULL, {}).get("rope_theta"), ropes.get(SLIDING, {}).get("rope_theta"))
    full, sliding = (
        number(f"the rotary base of {kind}", base, above=0, error=CheckpointError)
        for kind, base in zip((FULL, SLIDING), bases, strict=True)
    )
    return full, sliding


def _number(config: Mapping[str, Any], name: str) -> float:
    return number(name, config.get(name), above=0, error=CheckpointError, hint=_MEND)


def _integer(config: Mapping[str, Any], name: str, least: int = 1) -> int:
    return whole_number(name, config.get(name), least, error=CheckpointError, hint=_MEND)


def _require(
    condition: bool, found: str, right: str = "this is not a model that egemma computes correctly"
) -> None:
    if not condition:
        raise CheckpointError(f"{found}: {right}.")
