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

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ConfigError, ShapeError
from egemma_core.nn.encoder import MASKED, Attention, Encoder, FeedForward, RMSNorm, rotary_tables

CrossInit = Literal["balanced", "fresh"]


class CrossAttention(nn.Module):
    """Every token of the target asks all of the source.

    Parameters are named as `Attention`'s, so these can be copied over.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.channels, self.scale = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.query_scale,
        )
        self.q_proj = nn.Linear(config.width, self.heads * self.channels, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.channels, bias=False)
        self.o_proj = nn.Linear(self.heads * self.channels, config.width, bias=False)
        self.q_norm = RMSNorm(self.channels, config.norm_eps)
        self.k_norm = RMSNorm(self.channels, config.norm_eps)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """(B, S, D) target, (B, T, D) source after its final norm, (B, 1, 1, T) bias: (B, S, D)."""
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
        """(B, S, D) after the final norm; the arguments are those of `forward`."""
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
        """Scores of the next token after each.

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
    """Source to target.

    `encoder` is an ordinary `Encoder`, whose pooler and dense head are not used here.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """(B, T) ids and bool mask of the source, (B, S) ids of the target behind BOS -> (B, S, V)
        float32 scores of what comes next.
        """
        memory = self.encoder.hidden_states(source, source_mask)
        scores: Tensor = self.decoder(target, self.encoder.embed_tokens.weight, memory, source_mask)
        return scores

    def hidden_states(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """(B, S, D) what those scores are made of, for `token_loss`."""
        return self.decoder.hidden_states(
            target,
            self.encoder.embed_tokens.weight,
            self.encoder.hidden_states(source, source_mask),
            source_mask,
        )

    def cross_parameters(self) -> list[nn.Parameter]:
        """What was not in the decoder-only model: trained alone at first where it starts from
        nothing.
        """
        return [weight for name, weight in self.named_parameters() if "cross_attn" in name]


def adapt(encoder: Encoder, cross: CrossInit = "balanced", seed: int = 0) -> EncoderDecoder:
    """The encoder-decoder of a decoder-only model.

    Args:
        encoder: the decoder's weights in an `Encoder`, which has the same ones and other masks; it
            is used, not copied.
        cross: "balanced" copies each layer's self-attention and its norms into its cross-attention,
            for an encoder and a decoder of one size; "fresh" draws it at random, which wants a
            warm-up in which nothing else is trained.
        seed: of "fresh".
    """
    if cross not in ("balanced", "fresh"):
        raise ConfigError(f"cross={cross!r}: 'balanced' or 'fresh'.")
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
    """(B, S, D) of the decoder-only model that has the encoder's weights; padding may stand on the
    right only.
    """
    x, rotary, bias = causal_inputs(encoder.config, ids, encoder.embed_tokens.weight)
    for layer, kind in zip(encoder.layers, encoder.config.layer_types, strict=True):
        x = layer(x, rotary[kind], bias[kind])
    return encoder.norm(x)  # type: ignore[no-any-return]


def causal_inputs(
    config: EncoderConfig, ids: Tensor, table: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(B, S, D) token vectors of (B, S) ids; for each kind of layer its rotary tables and its (1,
    1, S, S) causal bias.
    """
    S = ids.shape[1]
    x = F.embedding(ids, table) * torch.tensor(config.width**0.5, dtype=table.dtype)  # (B, S, D)
    full_bias, sliding_bias = causal_biases(S, 2 * config.window, x)
    full_rotary = rotary_tables(S, config.head_dim, config.rope_theta_full, x)
    sliding_rotary = rotary_tables(S, config.head_dim, config.rope_theta_sliding, x)
    return x, {FULL: full_rotary, SLIDING: sliding_rotary}, {FULL: full_bias, SLIDING: sliding_bias}


def causal_biases(tokens: int, window: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two (1, 1, S, S): token i sees j <= i; in sliding layers only i - j < window, the whole width
    of the checkpoint's file (512).
    """
    position = torch.arange(tokens, device=like.device)
    back = position[:, None] - position[None, :]  # (S, S)
    zero, masked = (
        torch.zeros((), dtype=like.dtype, device=like.device),
        torch.full((), MASKED, dtype=like.dtype, device=like.device),
    )
    full, sliding = (
        torch.where(seen, zero, masked)[None, None]
        for seen in (back >= 0, (back >= 0) & (back < window))
    )
    return full, sliding


# Scores that are in memory at a time, in elements of 4 bytes: 256 tokens of Gemma's vocabulary.
BLOCK_SCORES = 2**26


def token_loss(
    hidden: Tensor, table: Tensor, target: Tensor, block_scores: int = BLOCK_SCORES
) -> Tensor:
    """Cross-entropy of the tokens to be written, summed, without ever holding all (N, V) scores.

    Block by block the scores are made, turned into the gradient in place, and dropped; so it is
    differentiated while it is computed. All in float32, also under autocast.

    Args:
        hidden: (N, D) last hidden states of the real tokens.
        table: (V, D) token vectors.
        target: (N,) int64 what comes next.
        block_scores: a block has as many tokens as keep N * V below this, and at least one.

    Returns:
        A float32 scalar, in nats.

    Raises:
        ShapeError: the three disagree.
    """
    if hidden.ndim != 2 or target.shape != hidden.shape[:1] or table.shape[1:] != hidden.shape[1:]:
        raise ShapeError(
            f"hidden {tuple(hidden.shape)}, table {tuple(table.shape)}, target "
            f"{tuple(target.shape)}: want (N, D), (V, D), (N,)."
        )
    loss: Tensor = _TokenLoss.apply(
        hidden, table, target, max(1, block_scores // len(table)), torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, block: int, differentiate: bool
    ) -> Tensor:
        by_hidden = (
            torch.empty_like(hidden, dtype=torch.float32)
            if differentiate and ctx.needs_input_grad[0]
            else None
        )
        by_table = (
            torch.zeros_like(table, dtype=torch.float32)
            if differentiate and ctx.needs_input_grad[1]
            else None
        )
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, wide = hidden.float(), table.float()
            # (n, V), all that there is of scores
            memory = torch.empty(min(block, len(rows)), len(wide), device=rows.device)
            for start in range(0, len(rows), block):
                # (n, D), (n, 1)
                part, right = rows[start : start + block], target[start : start + block, None]
                scores = torch.mm(part, wide.T, out=memory[: len(part)])  # (n, V)
                chosen = scores.gather(1, right)  # (n, 1)
                highest = scores.amax(1, keepdim=True)  # (n, 1)
                scores.sub_(highest).exp_()
                mass = scores.sum(1, keepdim=True)  # (n, 1)
                total += (highest + mass.log() - chosen).sum()
                if by_hidden is None and by_table is None:
                    continue
                # (n, V) probability - one hot
                slope = scores.div_(mass).scatter_add_(1, right, torch.full_like(mass, -1.0))
                if by_hidden is not None:
                    torch.mm(slope, wide, out=by_hidden[start : start + block])
                if by_table is not None:
                    by_table.addmm_(slope.T, part)
        ctx.gradients = by_hidden, by_table
        ctx.dtypes = hidden.dtype, table.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)
