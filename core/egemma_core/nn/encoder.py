"""The EmbeddingGemma encoder, whole, in the order in which it computes: ids -> unit vectors.

Parameter names are those of the published checkpoint, so a state dict loads strictly; the dense
head is `dense.0`, `dense.1`. Shapes: B texts, T tokens, D width, H query heads, K key/value heads,
C channels of a head, F feed-forward width. Source: arXiv:2509.20354; transformers
models/gemma3/modeling_gemma3.py; sentence-transformers Pooling and Dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from egemma_core.checkpoint.config import FULL, EncoderConfig
from egemma_core.nn.pooling import make_pooler

# Finite on purpose: a row whose every key is masked then averages instead of giving NaN. No real
# token has such a row.
MASKED = -1e9


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32, returned in the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """The norm, differentiated by hand.

    torch would keep two float32 copies of x, and go over them more often (the norms were a fifth of
    a step).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, inverse, weight)
        return (wide * inverse).mul_(1.0 + weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        normed, slope = x.float() * inverse, outer.float()
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (slope * normed).flatten(0, -2).sum(0).to(weight.dtype)
        slope = slope * (1.0 + weight.float())
        share = (slope * normed).mean(-1, keepdim=True)  # changes the length alone: not passed on
        return slope.addcmul_(normed, share, value=-1).mul_(inverse).to(x.dtype), by_weight, None


class Attention(nn.Module):
    """Bidirectional attention with normed queries and keys, rotary positions, shared keys and
    values.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads
        self.channels = config.head_dim
        self.scale = config.query_scale
        self.q_proj = nn.Linear(config.width, self.heads * self.channels, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.o_proj = nn.Linear(self.heads * self.channels, config.width, bias=False)
        self.q_norm = RMSNorm(self.channels, config.norm_eps)
        self.k_norm = RMSNorm(self.channels, config.norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        B, T, _ = x.shape
        H, K, C = self.heads, self.kv_heads, self.channels
        # fmt: off
        query = self.q_norm(self.q_proj(x).view(B, T, H, C)).transpose(1, 2)  # (B, H, T, C)
        key = self.k_norm(self.k_proj(x).view(B, T, K, C)).transpose(1, 2)    # (B, K, T, C)
        value = self.v_proj(x).view(B, T, K, C).transpose(1, 2)               # (B, K, T, C)
        query = rotate(query, rotary)
        key = rotate(key, rotary).repeat_interleave(H // K, dim=1)            # (B, H, T, C)
        value = value.repeat_interleave(H // K, dim=1)                        # (B, H, T, C)
        # fmt: on
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # The CPU's bfloat16 attention takes almost three times as long backward as its float32.
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(
                    query.float(),
                    key.float(),
                    value.float(),
                    attn_mask=bias.float(),
                    scale=self.scale,
                )
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=bias,
                scale=self.scale,
            )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)
        return out


class FeedForward(nn.Module):
    """GeGLU: down(gelu(gate(x)) * up(x)), GELU in its tanh form."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)
        self.post_feedforward_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotary, bias))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Token ids to unit vectors.

    Example:
        >>> vectors = Encoder(config)(ids, mask)  # (B, T) int64, (B, T) bool -> (B, dim) float32
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.pooler = make_pooler(config.pooling, config.width)
        self.dense = nn.ModuleList(nn.Linear(into, out, bias=False) for into, out in config.dense)

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, T, D) last hidden states after the final norm, in the weights' dtype."""
        T = ids.shape[1]
        x = self.embed_tokens(ids)  # (B, T, D)
        # Gemma rounds sqrt(D) to the weights' dtype: 27.7128 becomes 27.75 in bfloat16.
        x = x * torch.tensor(self.config.width**0.5, dtype=x.dtype)
        full_bias, sliding_bias = self.biases(mask, x.dtype)  # (B, 1, T, T)
        full_rotary = rotary_tables(T, self.config.head_dim, self.config.rope_theta_full, x)
        sliding_rotary = rotary_tables(T, self.config.head_dim, self.config.rope_theta_sliding, x)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            if kind == FULL:
                x = layer(x, full_rotary, full_bias)
            else:
                x = layer(x, sliding_rotary, sliding_bias)
        return self.norm(x)  # type: ignore[no-any-return]

    def biases(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what full and sliding layers add to their scores; see `attention_biases`."""
        return attention_biases(mask, self.config.window, dtype)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return one unit vector per text.

        Args:
            ids: (B, T) int64 token ids, each below V.
            mask: (B, T) bool or int, true on real tokens; at least one per row.

        Returns:
            (B, dim) float32 unit vectors of the full width.
        """
        real = mask.bool()
        pooled = self.pooler(self.hidden_states(ids, real), real)  # (B, D)
        for dense in self.dense:
            pooled = dense(pooled.to(dense.weight.dtype))  # (B, 3072), then (B, 768)
        return F.normalize(pooled.float(), dim=-1)


def attention_biases(mask: Tensor, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what full and sliding layers add to their scores.

    It is 0 where token i may see token j, MASKED elsewhere. Every real key is seen by full layers;
    sliding layers see real keys with |i - j| <= window. Distances are between indices, so the side
    of the padding does not matter.

    Args:
        mask: (B, T) bool.

    Returns:
        Two (B, 1, T, T) tensors of `dtype`.
    """
    B, T = mask.shape
    position = torch.arange(T, device=mask.device)
    # fmt: off
    near = (position[:, None] - position[None, :]).abs() <= window  # (T, T)
    real = mask[:, None, None, :].expand(B, 1, T, T)                # (B, 1, T, T)
    # fmt: on
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    masked = torch.full((), MASKED, dtype=dtype, device=mask.device)
    return torch.where(real, zero, masked), torch.where(real & near, zero, masked)


def rotary_tables(tokens: int, channels: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T, C) cosines and sines, taken in float32, as `like` in dtype and device."""
    pair = torch.arange(0, channels, 2, device=like.device, dtype=torch.int64)
    position = torch.arange(tokens, device=like.device).float()
    # fmt: off
    exponent = pair.float() / channels                        # (C/2,)
    angle = position[:, None] * (1.0 / theta**exponent)       # (T, C/2)
    angle = torch.cat((angle, angle), dim=-1)                 # (T, C)
    # fmt: on
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (B, heads, T, C) by position: channel c together with channel c + C/2."""
    return _Rotation.apply(x, *rotary)  # type: ignore[no-any-return, no-untyped-call]


class _Rotation(torch.autograd.Function):
    """The turn, differentiated by hand.

    The way back needs the tables alone, where torch would keep two copies of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        low, high = x.chunk(2, dim=-1)
        return (x * cos).add_(torch.cat((-high, low), dim=-1) * sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        low, high = (outer * sin).chunk(2, dim=-1)
        return (outer * cos).add_(torch.cat((high, -low), dim=-1)).to(ctx.dtype), None, None
