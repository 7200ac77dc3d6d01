"""An encoder-decoder made from a decoder-only Gemma 3, for one purpose: what its encoder learns
while the decoder must rely on it.

The encoder is the decoder's layers with bidirectional masks, nothing new. The decoder is the same
layers once more, with a cross-attention between self-attention and feed-forward. Embeddings and
output are one table for both. Afterwards the decoder goes.

Source: T5Gemma, arXiv:2504.06225; transformers models/t5gemma/modular_t5gemma.py: cross-attention
has its own norms before and after, no rotary positions, no window; queries and keys are normed, as
Gemma 3 does where T5Gemma's Gemma 2 did not.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checks import one_of
from egemma_core.nn.encoder import MASKED, Attention, Encoder, FeedForward, RMSNorm, rotary_tables

CrossInit = Literal["balanced", "fresh"]


class CrossAttention(nn.Module):
    """Every token of the target asks all of the source.

    Parameters are named as `Attention`'s, so these can be copied over.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.channels, self.scale = config.head_dim, config.query_scale
        self.q_proj = nn.Linear(config.width, self.heads * self.channels, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.o_proj = nn.Linear(self.heads * self.channels, config.width, bias=False)
        self.q_norm = RMSNorm(self.channels, config.norm_eps)
        self.k_norm = RMSNorm(self.channels, config.norm_eps)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Return (B, S, D) of a (B, S, D) target and a (B, T, D) source after its final norm.

        Args:
            bias: (B, 1, 1, T), what is added to the scores of the source's tokens.
        """
        B, S, T, shared = len(x), x.shape[1], memory.shape[1], self.heads // self.kv_heads
        H, K, C = self.heads, self.kv_heads, self.channels
        # fmt: off
        query = self.q_norm(self.q_proj(x).view(B, S, H, C)).transpose(1, 2)     # (B, H, S, C)
        key = self.k_norm(self.k_proj(memory).view(B, T, K, C)).transpose(1, 2)  # (B, K, T, C)
        value = self.v_proj(memory).view(B, T, K, C).transpose(1, 2)             # (B, K, T, C)
        # fmt: on
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(shared, 1),
            value.repeat_interleave(shared, 1),
            attn_mask=bias,
            scale=self.scale,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(B, S, -1))  # (B, S, D)
        return out


class DecoderLayer(nn.Module):
    """A layer of the decoder: self-attention, cross-attention, feed-forward, each between norms."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.pre_cross_attn_layernorm = RMSNorm(config.width, config.norm_eps)
        self.cross_attn = CrossAttention(config)
        self.post_cross_attn_layernorm = RMSNorm(config.width, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)
        self.post_feedforward_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        bias: Tensor,
        memory: Tensor | None,
        memory_bias: Tensor | None,
    ) -> Tensor:
        """Return (B, S, D) of (B, S, D); without `memory` there is no cross-attention."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotary, bias))
        if memory is not None and memory_bias is not None:
            x = x + self.post_cross_attn_layernorm(
                self.cross_attn(self.pre_cross_attn_layernorm(x), memory, memory_bias)
            )
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Causal layers and the final norm; the table of tokens is the encoder's."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def hidden_states(
        self,
        ids: Tensor,
        table: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (B, S, D) after the final norm; the arguments are those of `forward`."""
        x, rotary, bias = causal_inputs(self.config, ids, table)
        memory_bias = (
            None
            if memory_mask is None
            else torch.where(memory_mask[:, None, None, :], 0.0, MASKED).to(x.dtype)
        )
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, rotary[kind], bias[kind], memory, memory_bias)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(
        self,
        ids: Tensor,
        table: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of the next token after each.

        Args:
            ids: (B, S) int64; padding may stand on the right only, where no real token sees it.
            table: (V, D) token vectors, of input and output.
            memory, memory_mask: (B, T, D) the encoder's last hidden states, (B, T) bool; None
                leaves cross-attention out, which is the decoder-only model that all this was made
                from.

        Returns:
            (B, S, V) float32.
        """
        return self.hidden_states(ids, table, memory, memory_mask).float() @ table.float().T


class EncoderDecoder(nn.Module):
    """A model that reads a source and writes a target.

    `encoder` is an ordinary `Encoder`, whose pooler and dense head are not used here.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """Return the (B, S, V) float32 scores of what comes next.

        Args:
            source, source_mask: (B, T) ids and bool mask.
            target: (B, S) ids, BOS first.
        """
        memory = self.encoder.hidden_states(source, source_mask)
        scores: Tensor = self.decoder(target, self.encoder.embed_tokens.weight, memory, source_mask)
        return scores

    def hidden_states(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """Return the (B, S, D) states that those scores are made of, for `token_loss`."""
        return self.decoder.hidden_states(
            target,
            self.encoder.embed_tokens.weight,
            self.encoder.hidden_states(source, source_mask),
            source_mask,
        )

    def cross_parameters(self) -> list[nn.Parameter]:
        """Return what was not in the decoder-only model.

        It is trained alone at first where it starts from nothing.
        """
        return [weight for name, weight in self.named_parameters() if "cross_attn" in name]


def adapt(encoder: Encoder, cross: CrossInit = "balanced", seed: int = 0) -> EncoderDecoder:
    """Return the encoder-decoder of a decoder-only model.

    Args:
        encoder: the decoder's weights in an `Encoder`, which has the same ones and other masks; it
            is used, not copied.
        cross: "balanced" copies each layer's self-attention and its norms into its cross-attention,
            for an encoder and a decoder of one size; "fresh" draws it at random, which wants a
            warm-up in which nothing else is trained.
        seed: of "fresh".
    """
    one_of("cross", cross, get_args(CrossInit))
    decoder = Decoder(encoder.config)
    own = dict(encoder.named_parameters())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            origin = name.replace("cross_attn.", "self_attn.").replace(
                "pre_cross_attn_layernorm", "input_layernorm"
            )
            origin = origin.replace("post_cross_attn_layernorm", "post_attention_layernorm")
            if origin == name or cross == "balanced":
                weight.copy_(own[origin])
            elif weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=random)
            else:
                weight.zero_()  # an RMSNorm multiplies by 1 + weight
    return EncoderDecoder(encoder, decoder)


def causal_hidden_states(encoder: Encoder, ids: Tensor) -> Tensor:
    """Return the (B, S, D) states of the decoder-only model that has the encoder's weights.

    Padding may stand on the right only.
    """
    x, rotary, bias = causal_inputs(encoder.config, ids, encoder.embed_tokens.weight)
    for layer, kind in zip(encoder.layers, encoder.config.layer_types, strict=True):
        x = layer(x, rotary[kind], bias[kind])
    return encoder.norm(x)  # type: ignore[no-any-return]


def causal_inputs(
    config: EncoderConfig, ids: Tensor, table: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return what the layers need of (B, S) ids.

    Returns:
        (B, S, D) token vectors, and for each kind of layer its rotary tables and its (1, 1, S, S)
        causal bias.
    """
    S = ids.shape[1]
    x = F.embedding(ids, table) * torch.tensor(config.width**0.5, dtype=table.dtype)  # (B, S, D)
    full_bias, sliding_bias = causal_biases(S, 2 * config.window, x)
    full_rotary = rotary_tables(S, config.head_dim, config.rope_theta_full, x)
    sliding_rotary = rotary_tables(S, config.head_dim, config.rope_theta_sliding, x)
    return x, {FULL: full_rotary, SLIDING: sliding_rotary}, {FULL: full_bias, SLIDING: sliding_bias}


def causal_biases(tokens: int, window: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (1, 1, S, S) biases of full and of sliding layers.

    Token i sees j <= i; in sliding layers only i - j < window, the whole width of the checkpoint's
    file (512).
    """
    position = torch.arange(tokens, device=like.device)
    back = position[:, None] - position[None, :]  # (S, S)
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    masked = torch.full((), MASKED, dtype=like.dtype, device=like.device)
    full = torch.where(back >= 0, zero, masked)
    sliding = torch.where((back >= 0) & (back < window), zero, masked)
    return full[None, None], sliding[None, None]
