"""The encoder in the form that XNNPACK takes whole: it computes the numbers of
`egemma_core.nn.encoder` with other operators.

A plain export leaves much outside the delegate, or computes it otherwise than asked. What is
written differently here, and what it gained, is in docs/decisions/0002-executorch-graph.md. Batch
is 1; the number of tokens is dynamic. Shapes: T tokens, D width, H query heads, K key/value heads,
S = H / K query heads that share a key, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.checkpoint.config import FULL, EncoderConfig
from egemma_core.errors import ExportError
from egemma_core.nn import encoder as float_encoder
from egemma_core.nn.encoder import MASKED, Encoder
from egemma_export.executorch_weights import (
    Embedding,
    Linear,
    Weight,
    round_to_int8,
    take_rows,
)

# gelu_tanh(x) = x * sigmoid(x * (A + B * x^2)). XNNPACK's own GELU is the erf one whatever
# `approximate` says: 4.7e-4 away.
GELU_A = 2 * (2 / torch.pi) ** 0.5
GELU_B = GELU_A * 0.044715


def layer_parts(heads: int, kv_heads: int, channels: int) -> list[tuple[str, Tensor | None]]:
    """Return the linears of one layer in the order in which the graph computes them.

    Each is the name of a parameter and the rows of it that are taken (None: all). Queries and keys
    are projected as two halves, because rotary positions mix channel c with c + C/2 and XNNPACK
    cannot slice at a dynamic length. Each key/value head has its own group of queries.
    """
    half = channels // 2
    # fmt: off
    query_rows = torch.arange(heads * channels).view(kv_heads, -1, 2, half)   # (K, S, 2, C/2)
    key_rows = torch.arange(kv_heads * channels).view(kv_heads, 1, 2, half)   # (K, 1, 2, C/2)
    # fmt: on
    parts: list[tuple[str, Tensor | None]] = []
    for group in range(kv_heads):
        for name, rows in (("q", query_rows), ("k", key_rows)):
            parameter = f"self_attn.{name}_proj.weight"
            parts.append((parameter, rows[group, :, 0].flatten()))
            parts.append((parameter, rows[group, :, 1].flatten()))
        parts.append(("self_attn.v_proj.weight", key_rows[group].flatten()))
    return [
        *parts,
        ("self_attn.o_proj.weight", None),
        ("mlp.gate_proj.weight", None),
        ("mlp.up_proj.weight", None),
        ("mlp.down_proj.weight", None),
    ]


class MeanSquare(nn.Module):
    """Sum of squares over channels / count + offset, as a matrix product.

    XNNPACK has no mean over the last axis.
    """

    row: Tensor  # (1, width)
    offset: Tensor  # (1,)

    def __init__(self, width: int, count: int, offset: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("row", torch.full((1, width), 1.0 / count))
        self.register_buffer("offset", torch.full((1,), offset))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * x, self.row, self.offset)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight)."""

    weight: Tensor  # (width,), 1 + the checkpoint's

    def __init__(self, norm: float_encoder.RMSNorm) -> None:
        super().__init__()
        self.mean_square = MeanSquare(len(norm.weight), len(norm.weight), norm.eps)
        self.register_buffer("weight", 1.0 + norm.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean_square(x)) * self.weight


class RotaryNorm(nn.Module):
    """RMSNorm over the channels of each head, then rotary positions; on two halves of channels."""

    low_weight: Tensor  # (C/2,), 1 + the checkpoint's, times the factor
    high_weight: Tensor

    def __init__(self, norm: float_encoder.RMSNorm, factor: float) -> None:
        super().__init__()
        channels = len(norm.weight)
        self.low_square = MeanSquare(channels // 2, channels, norm.eps)
        self.high_square = MeanSquare(channels // 2, channels)
        low, high = ((1.0 + norm.weight.detach().float()) * factor).chunk(2)
        self.register_buffer("low_weight", low.clone())
        self.register_buffer("high_weight", high.clone())

    def forward(self, low: Tensor, high: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Turn (1, T, S, C/2) twice by cosines and sines (1, T, 1, C/2) into (1, T, S, C)."""
        cos, sin = rotary
        inverse = torch.rsqrt(self.low_square(low) + self.high_square(high))  # (1, T, S, 1)
        low = low * inverse * self.low_weight
        high = high * inverse * self.high_weight
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Attention, one group of query heads after another."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: Mapping[str, Weight],
        norms: tuple[float_encoder.RMSNorm, float_encoder.RMSNorm],
    ) -> None:
        super().__init__()
        self.kv_heads, self.channels = config.num_kv_heads, config.head_dim
        self.projections = nn.ModuleList(
            Linear(take_rows(weights[name], rows))
            for name, rows in layer_parts(config.num_heads, config.num_kv_heads, config.head_dim)
            if rows is not None
        )
        self.o_proj = Linear(weights["self_attn.o_proj.weight"])
        self.q_norm = RotaryNorm(norms[0], config.query_scale)
        self.k_norm = RotaryNorm(norms[1], 1.0)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Turn (1, T, D) into (1, T, D).

        Args:
            rotary: cosines and sines (1, T, 1, C/2).
            bias: (1, 1 or S*T, T), added to the scores.
        """
        C, half = self.channels, self.channels // 2
        x = round_to_int8(x, self.o_proj)  # all linears of the attention have one format
        mixed = []
        for group in range(self.kv_heads):
            q_low, q_high, k_low, k_high, v = (
                project(x) for project in self.projections[5 * group : 5 * group + 5]
            )
            shared = q_low.shape[-1] // half
            # The S heads that share a key become one head of S*T rows, ordered token, then head: no
            # copy of the key.
            # fmt: off
            low, high = q_low.view(1, -1, shared, half), q_high.view(1, -1, shared, half)
            query = self.q_norm(low, high, rotary)                          # (1, T, S, C)
            low, high = k_low.view(1, -1, 1, half), k_high.view(1, -1, 1, half)
            key = self.k_norm(low, high, rotary)                            # (1, T, 1, C)
            rows, columns = query.view(1, -1, C), key.view(1, -1, C).transpose(1, 2)
            scores = torch.bmm(rows, columns)                               # (1, S*T, T)
            weights = (scores + bias).softmax(-1)                           # (1, S*T, T)
            mixed.append(torch.bmm(weights, v).view(1, -1, shared * C))     # (1, T, S*C)
            # fmt: on
        together = torch.cat(mixed, dim=-1) if len(mixed) > 1 else mixed[0]  # (1, T, H*C)
        return self.o_proj(round_to_int8(together, self.o_proj))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """The feed-forward network, its GELU in operators that XNNPACK has."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self.gate_proj = Linear(weights["mlp.gate_proj.weight"])
        self.up_proj = Linear(weights["mlp.up_proj.weight"])
        self.down_proj = Linear(weights["mlp.down_proj.weight"])

    def forward(self, x: Tensor) -> Tensor:
        x = round_to_int8(x, self.gate_proj)
        gate, up = self.gate_proj(x), self.up_proj(x)
        gelu = gate * torch.sigmoid(gate * (gate * gate * GELU_B + GELU_A))
        return self.down_proj(round_to_int8(gelu * up, self.down_proj))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(
        self, config: EncoderConfig, layer: float_encoder.Layer, weights: Mapping[str, Weight]
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(layer.input_layernorm)
        self.self_attn = Attention(
            config, weights, (layer.self_attn.q_norm, layer.self_attn.k_norm)
        )
        self.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm)
        self.pre_feedforward_layernorm = RMSNorm(layer.pre_feedforward_layernorm)
        self.mlp = FeedForward(weights)
        self.post_feedforward_layernorm = RMSNorm(layer.post_feedforward_layernorm)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotary, bias))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # type: ignore[no-any-return]


class DelegateEncoder(nn.Module):
    """Ids and mask of one text to its unit vector.

    Args of forward:
        ids: (1, T) int64 token ids.
        mask: (1, T) int64, 1 on real tokens, 0 on padding; at least one 1.

    Returns:
        (1, dim) float32.
    """

    # fmt: off
    position: Tensor           # (1, max_tokens, 1)
    per_shared_head: Tensor    # (1, 1, S) ones
    full_frequency: Tensor     # (C/2,) radians per position
    sliding_frequency: Tensor  # (C/2,)
    # fmt: on

    def __init__(self, encoder: Encoder, weights: Mapping[str, Weight], max_tokens: int) -> None:
        super().__init__()
        config = encoder.config
        if config.pooling != "mean":
            raise ExportError(
                f"pooling={config.pooling!r}: only 'mean', which EmbeddingGemma uses, is exported. "
                "Train with it."
            )
        self.width, self.window = config.width, config.window
        self.shared = config.num_heads // config.num_kv_heads
        self.full_layers = [kind == FULL for kind in config.layer_types]
        self.embed_tokens = Embedding(weights["embed_tokens.weight"])
        self.layers = nn.ModuleList()
        for number, layer in enumerate(encoder.layers):
            assert isinstance(layer, float_encoder.Layer)
            self.layers.append(Layer(config, layer, _below(weights, f"layers.{number}.")))
        self.norm = RMSNorm(encoder.norm)
        self.dense = nn.ModuleList(
            Linear(weights[f"dense.{number}.weight"]) for number in range(len(config.dense))
        )
        self.square_sum = MeanSquare(config.dim, 1, 1e-24)  # the offset keeps a zero vector zero
        self.register_buffer("position", torch.arange(max_tokens).float().view(1, -1, 1))
        self.register_buffer("per_shared_head", torch.ones(1, 1, self.shared))
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (C/2,)
        self.register_buffer("full_frequency", 1.0 / config.rope_theta_full**exponent)
        self.register_buffer("sliding_frequency", 1.0 / config.rope_theta_sliding**exponent)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        T = ids.shape[1]
        # fmt: off
        real = mask.float().view(1, 1, -1)                               # (1, 1, T)
        full_bias = (real - 1.0) * -MASKED                               # (1, 1, T)
        position = self.position[:, :T]                                  # (1, T, 1)
        row_position = (position * self.per_shared_head).view(1, -1, 1)  # (1, S*T, 1)
        distance = (row_position - position.view(1, 1, -1)).abs()        # (1, S*T, T)
        # fmt: on
        # Distances are whole numbers, so what is beyond the window is 1 or more past it.
        sliding_bias = (distance - float(self.window)).clamp(0.0, 1.0) * MASKED + full_bias
        full, sliding = (
            (angle.cos(), angle.sin())  # (1, T, 1, C/2)
            for angle in (
                position.view(1, -1, 1, 1) * self.full_frequency,
                position.view(1, -1, 1, 1) * self.sliding_frequency,
            )
        )
        x = self.embed_tokens(ids) * self.width**0.5  # (1, T, D)
        for layer, is_full in zip(self.layers, self.full_layers, strict=True):
            x = layer(x, full, full_bias) if is_full else layer(x, sliding, sliding_bias)
        pooled = torch.bmm(real, self.norm(x)) / torch.bmm(real, real.transpose(1, 2))  # (1, 1, D)
        for dense in self.dense:
            assert isinstance(dense, Linear)
            pooled = dense(round_to_int8(pooled, dense))
        return (pooled * torch.rsqrt(self.square_sum(pooled))).view(1, -1)  # (1, dim)


def _below(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Return what stands under a prefix, without it."""
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
