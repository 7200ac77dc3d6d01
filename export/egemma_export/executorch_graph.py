"""The encoder in the form that XNNPACK takes whole: the numbers of `egemma_core.nn.encoder`, other
operators.

A plain export leaves much outside the delegate, or computes it otherwise than asked. What is
written differently here, and what it gained, is in docs/decisions/0002-executorch-graph.md. Batch
is 1; the number of tokens is dynamic. Shapes: T tokens, D width, H query heads, K key/value heads,
S = H / K query heads that share a key, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

# Importing this module registers quantized_decomposed::embedding_4bit and embedding_byte.
import executorch.exir.passes._quant_patterns_and_replacements  # type: ignore[import-untyped] # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.config import FULL, EncoderConfig
from egemma_core.errors import ExportError
from egemma_core.nn import encoder as float_encoder
from egemma_core.nn.encoder import MASKED, Encoder
from egemma_quant.ggml import GgmlFormat
from egemma_quant.schemes import Quantized

# gelu_tanh(x) = x * sigmoid(x * (A + B * x^2)). XNNPACK's own GELU is the erf one whatever
# `approximate` says: 4.7e-4 away.
GELU_A = 2 * (2 / torch.pi) ** 0.5
GELU_B = GELU_A * 0.044715

Weight = Tensor | Quantized

quantized_ops = torch.ops.quantized_decomposed


def layer_parts(heads: int, kv_heads: int, channels: int) -> list[tuple[str, Tensor | None]]:
    """The linears of one layer in the order in which the graph computes them: parameter name, and
    rows of it (None: all).

    Queries and keys are projected as two halves, because rotary positions mix channel c with c +
    C/2 and XNNPACK cannot slice at a dynamic length. Each key/value head has its own group of
    queries.
    """
    query_rows = torch.arange(heads * channels).view(
        kv_heads, -1, 2, channels // 2
    )  # (K, S, 2, C/2)
    key_rows = torch.arange(kv_heads * channels).view(
        kv_heads, 1, 2, channels // 2
    )  # (K, 1, 2, C/2)
    parts: list[tuple[str, Tensor | None]] = []
    for group in range(kv_heads):
        for name, rows in (("q", query_rows), ("k", key_rows)):
            parts += [
                (f"self_attn.{name}_proj.weight", rows[group, :, half].flatten()) for half in (0, 1)
            ]
        parts.append(("self_attn.v_proj.weight", key_rows[group].flatten()))
    return [
        *parts,
        ("self_attn.o_proj.weight", None),
        ("mlp.gate_proj.weight", None),
        ("mlp.up_proj.weight", None),
        ("mlp.down_proj.weight", None),
    ]


def take_rows(weight: Weight, rows: Tensor | None) -> Weight:
    """Some rows of a matrix, in storage of their own: the XNNPACK serializer writes the whole
    storage behind a view.
    """
    if rows is None:
        return weight
    if isinstance(weight, Quantized):
        return Quantized(codes=weight.codes[rows], scales=weight.scales[rows], format=weight.format)
    return weight[rows]


class Linear(nn.Module):
    """y = x W^T for a float32 matrix, or for codes and scales that XNNPACK multiplies as they are.

    The input of a quantized linear has been through `round_to_int8`.
    """

    weight: Tensor  # (rows, columns) float32 or int8
    scales: Tensor  # (rows,) or (rows, G) float32
    zeros: Tensor

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.format = weight.format if isinstance(weight, Quantized) else None
        if not isinstance(weight, Quantized):
            self.register_buffer("weight", weight)
            return
        if isinstance(weight.format, GgmlFormat):
            raise ExportError(
                f"{weight.format}: XNNPACK's blockwise kernel stores bfloat16 scales and refuses "
                "negative ones, ggml's are float16 of "
                "either sign. Choose onnx, which holds them exactly, or an int4 or int8 target, "
                "which rounds the weights anew."
            )
        if weight.format.group_size is not None and weight.format.bits != 4:
            raise ExportError(
                f"{weight.format}: XNNPACK has blockwise kernels for 4 bits only; choose "
                "int8-per-channel."
            )
        per_row = weight.format.group_size is None
        self.register_buffer("weight", weight.codes)
        self.register_buffer("scales", weight.scales.flatten() if per_row else weight.scales)
        # Symmetric. XNNPACK reads no zero points here, but the operators that its partitioner
        # recognizes take them.
        self.register_buffer(
            "zeros", torch.zeros_like(self.scales, dtype=torch.int64 if per_row else torch.int8)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None:
            return F.linear(x, self.weight)
        lowest, highest = (-8, 7) if self.format.bits == 4 else (-127, 127)
        # Of the two operators, only per_channel becomes qc4w or qc8w; per_channel_group becomes
        # qb4w even for one group.
        if self.format.group_size is None:
            weight = quantized_ops.dequantize_per_channel.default(
                self.weight, self.scales, self.zeros, 0, lowest, highest, torch.int8
            )
        else:
            weight = quantized_ops.dequantize_per_channel_group.default(
                self.weight,
                self.scales,
                self.zeros,
                lowest,
                highest,
                torch.int8,
                self.format.group_size,
                torch.float32,
            )
        return F.linear(x, weight)


def round_to_int8(x: Tensor, reader: Linear) -> Tensor:
    """x rounded to 8 bits per token (asymmetric), if `reader` is quantized.

    Once per input, however many linears read it.
    """
    if reader.format is None:
        return x
    scale, zero = quantized_ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = quantized_ops.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    rounded: Tensor = quantized_ops.dequantize_per_token.default(
        codes, scale, zero, -128, 127, torch.int8, torch.float32
    )
    return rounded


class Embedding(nn.Module):
    """Rows of the table; a quantized table is dequantized row by row, outside the delegate."""

    weight: Tensor  # (V, D) float32 or int8, or (V, D/2) uint8
    scales: Tensor  # (V, G) float16 or float32

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.bits = weight.format.bits if isinstance(weight, Quantized) else 32
        if not isinstance(weight, Quantized):
            self.register_buffer("weight", weight)
            return
        if self.bits == 4:  # the even column in the high nibble, codes shifted by 8
            shifted = weight.codes.view(torch.uint8) + 8
            self.register_buffer("weight", shifted[:, ::2] << 4 | shifted[:, 1::2])
        else:
            self.register_buffer("weight", weight.codes)
        half = weight.scales.half()
        exact = torch.equal(half.float(), weight.scales)
        # 2 bytes instead of 4 for each of 6 million groups
        self.register_buffer("scales", half if exact else weight.scales)

    def forward(self, ids: Tensor) -> Tensor:
        if self.bits == 32:
            return F.embedding(ids, self.weight)
        if self.bits == 4:
            lookup, lowest, highest = quantized_ops.embedding_4bit.dtype, -8, 7
        else:
            lookup, lowest, highest = quantized_ops.embedding_byte.dtype, -128, 127
        return lookup(self.weight, self.scales, None, lowest, highest, ids, dtype=torch.float32)  # type: ignore[no-any-return]


class MeanSquare(nn.Module):
    """Sum of squares over channels / count + offset, as a matrix product: XNNPACK has no mean over
    the last axis.
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
    weight: Tensor  # (width,), 1 + the checkpoint's

    def __init__(self, norm: float_encoder.RMSNorm) -> None:
        super().__init__()
        self.mean_square = MeanSquare(len(norm.weight), len(norm.weight), norm.eps)
        self.register_buffer("weight", 1.0 + norm.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean_square(x)) * self.weight


class RotaryNorm(nn.Module):
    """RMSNorm over the channels of each head, then rotary positions, on the two halves of the
    channels.
    """

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
        """(1, T, S, C/2) twice, with cosines and sines (1, T, 1, C/2) -> (1, T, S, C)."""
        cos, sin = rotary
        inverse = torch.rsqrt(self.low_square(low) + self.high_square(high))  # (1, T, S, 1)
        low = low * inverse * self.low_weight
        high = high * inverse * self.high_weight
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
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
        """(1, T, D), rotary tables (1, T, 1, C/2), bias (1, 1 or S*T, T) -> (1, T, D)."""
        half = self.channels // 2
        x = round_to_int8(x, self.o_proj)  # all linears of the attention have one format
        mixed = []
        for group in range(self.kv_heads):
            q_low, q_high, k_low, k_high, v = (
                project(x) for project in self.projections[5 * group : 5 * group + 5]
            )
            # The S heads that share a key become one head of S*T rows, ordered token, then head: no
            # copy of the key.
            query = self.q_norm(
                q_low.view(1, -1, q_low.shape[-1] // half, half),
                # (1, T, S, C)
                q_high.view(1, -1, q_low.shape[-1] // half, half),
                rotary,
            )
            # (1, T, 1, C)
            key = self.k_norm(k_low.view(1, -1, 1, half), k_high.view(1, -1, 1, half), rotary)
            scores = torch.bmm(
                query.view(1, -1, self.channels), key.view(1, -1, self.channels).transpose(1, 2)
            )
            weights = (scores + bias).softmax(-1)  # (1, S*T, T)
            # (1, T, S*C)
            mixed.append(torch.bmm(weights, v).view(1, -1, query.shape[2] * self.channels))
        together = torch.cat(mixed, dim=-1) if len(mixed) > 1 else mixed[0]  # (1, T, H*C)
        return self.o_proj(round_to_int8(together, self.o_proj))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
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
    position: Tensor         # (1, max_tokens, 1)
    per_shared_head: Tensor  # (1, 1, S) ones
    full_frequency: Tensor   # (C/2,) radians per position
    # fmt: on
    sliding_frequency: Tensor

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
            prefix = f"layers.{number}."
            self.layers.append(
                Layer(
                    config,
                    layer,
                    {
                        name.removeprefix(prefix): weight
                        for name, weight in weights.items()
                        if name.startswith(prefix)
                    },
                )
            )
        self.norm = RMSNorm(encoder.norm)
        self.dense = nn.ModuleList(
            Linear(weights[f"dense.{number}.weight"]) for number in range(len(config.dense))
        )
        self.square_sum = MeanSquare(config.dim, 1, 1e-24)  # the offset keeps a zero vector zero
        self.register_buffer("position", torch.arange(max_tokens).float().view(1, -1, 1))
        self.register_buffer("per_shared_head", torch.ones(1, 1, self.shared))
        for name, theta in (
            ("full", config.rope_theta_full),
            ("sliding", config.rope_theta_sliding),
        ):
            exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (C/2,)
            self.register_buffer(f"{name}_frequency", 1.0 / theta**exponent)

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
