"""The encoder as an ONNX graph, written by hand with ONNX Runtime's own fused operators.

Shapes: B texts, T tokens, D width, H query heads, K key/value heads, S = H / K query heads of one
key/value head, C channels of a head, F feed-forward width. Between attention blocks the tokens of
all texts are one matrix of B*T rows. What was tried, and how fast each way is:
docs/decisions/0003-onnx-graph.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import TensorProto

from egemma_core.checkpoint.config import FULL, SLIDING
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import MASKED, Encoder, rotary_tables
from egemma_export.onnx_graph import (
    ATTENTION_MASK,
    CONTRIB,
    INPUT_IDS,
    SENTENCE_EMBEDDING,
    Graph,
    move_weights,
)
from egemma_export.onnx_weights import embedding, matmul, norm, norm_weight
from egemma_quant.schemes import Scheme

FILE_LIMIT = 2**31 - 1  # bytes of one protobuf message
GRAPH_BYTES = 2**22  # more than the nodes and small tensors of any encoder take


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What was written, and at what cost."""

    files: tuple[str, ...]  # names: the .onnx, then its .data if there is one
    scheme: str  # name of the scheme, or "float32"
    nodes: dict[str, int]  # how many of each operator
    file_bytes: int  # of all files
    seconds: float  # quantizing and writing


def write_onnx(
    encoder: Encoder,
    scheme: Scheme | None,
    path: Path,
    *,
    weights_beside: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> GraphReport:
    """Write the whole encoder, token ids to unit vectors, as one .onnx file.

    The graph takes `input_ids` and `attention_mask`, both (B, T) int64 with 1 on real tokens and
    padding on either side, and gives `sentence_embedding`, (B, dim) float32 of length 1. B and T
    are free, T up to `max_tokens`. A text's vector does not depend on the texts beside it:
    activations are rounded per token, never per tensor.

    Args:
        encoder: trained weights, any float dtype.
        scheme: how weights are stored; None keeps float32.
        path: the file to write; its folder must exist.
        weights_beside: put large tensors into `<path>.data`, which the runtime maps into memory
            instead of reading it: the embedding table is then never copied, and only the rows in
            use are resident.
        progress: called with one line per finished part.

    Raises:
        ExportError: pooling is not "mean", the scheme needs a block size that the kernels lack, or
            the file would pass protobuf's 2 GB.
    """
    config = encoder.config
    if config.pooling != "mean":
        raise ExportError(
            f"pooling={config.pooling!r}: only 'mean', which EmbeddingGemma uses, is exported. "
            "Train with it."
        )
    began = time.perf_counter()
    graph = Graph(encoder, scheme)
    _add_encoder(graph, progress)
    if graph.weight_bytes + GRAPH_BYTES > FILE_LIMIT and not weights_beside:
        raise ExportError(
            f"{path}: {graph.weight_bytes} bytes of weights do not fit into one file of 2 GB; pass "
            "weights_beside=True."
        )
    model = graph.to_model()
    files = [path, move_weights(model, path)] if weights_beside else [path]
    path.write_bytes(model.SerializeToString())
    file_bytes = sum(file.stat().st_size for file in files)
    progress(f"wrote {path.name}, {file_bytes / 1e6:.1f} MB")
    return GraphReport(
        files=tuple(file.name for file in files),
        scheme=scheme.name if scheme else "float32",
        nodes=graph.counts(),
        file_bytes=file_bytes,
        seconds=time.perf_counter() - began,
    )


def _add_encoder(graph: Graph, progress: Callable[[str], None]) -> None:
    config = graph.config
    shapes = _Shapes(graph)
    biases = _attention_biases(graph, shapes)
    # fmt: off
    x = embedding(graph, INPUT_IDS, "embed_tokens.weight")                      # (B, T, D)
    progress(f"embedding: {config.vocab_size} rows")
    # Gemma scales by sqrt(D), in the embedding's dtype: float32 here.
    scale = graph.scalar("sqrt_width", config.width**0.5)
    x = graph.node("Mul", [x, scale], "scaled_embedding")                       # (B, T, D)
    x = graph.node("Reshape", [x, graph.ints(-1, config.width)], "tokens")      # (B*T, D)
    # fmt: on
    normed = norm(graph, x, "layers.0.input_layernorm.weight")
    for index in range(config.num_layers):
        x, normed = _add_layer(graph, shapes, x, normed, index, biases)
        progress(f"layer {index + 1} of {config.num_layers}")
    pooled = _mean_pool(graph, shapes, normed)  # (B, D)
    for index in range(len(config.dense)):
        # (B, 3072), then (B, 768)
        pooled = matmul(graph, pooled, [f"dense.{index}.weight"], f"dense.{index}", per="texts")
    length = graph.node("ReduceL2", [pooled, graph.ints(-1)], "length", keepdims=1)
    smallest = graph.scalar("smallest_length", 1e-12)
    length = graph.node("Max", [length, smallest], "safe_length")
    graph.node("Div", [pooled, length], "unit", outputs=[SENTENCE_EMBEDDING])


class _Shapes:
    """Shape tensors that depend on B and T, computed once per run and used by every layer."""

    def __init__(self, graph: Graph) -> None:
        config, ints = graph.config, graph.ints
        K, C = config.num_kv_heads, config.head_dim

        def join(name: str, *parts: str) -> str:
            return graph.node("Concat", parts, name, axis=0)

        shape = graph.node("Shape", [INPUT_IDS], "shape")
        batch = graph.node("Slice", [shape, ints(0), ints(1)], "batch_size")
        length = graph.node("Slice", [shape, ints(1), ints(2)], "length_in_tokens")
        self.length = length
        # fmt: off
        self.tokens = join("shape_tokens", shape, ints(-1))                     # (B, T, ...)
        heads = (ints(1), length) if K == 1 else (length, ints(K))
        # (B, 1, T, C), or (B, T, K, C) where there are several
        self.key_heads = join("shape_key_heads", batch, *heads, ints(C))
        self.keys = join("shape_keys", batch, ints(1, 1, 1), length)            # (B, 1, 1, 1, T)
        self.near = join("shape_near", ints(1, 1), length, ints(1), length)     # (1, 1, T, 1, T)
        shared = ints(0, 0, -1), ints(config.num_heads // K)
        self.scores = join("shape_scores", *shared, length)                     # (B, K, T, S, T)
        self.merged = join("shape_merged", ints(0, 0, -1), length)              # (B, K, T*S, T)
        # fmt: on


def _attention_biases(graph: Graph, shapes: _Shapes) -> dict[str, str]:
    """Add what is added to the scores of each kind of layer: 0 where i may see j, MASKED elsewhere.

    Finite, so a padded token whose whole window is padding averages instead of giving NaN.
    """
    node = graph.node
    zero, masked = graph.scalar("zero", 0.0), graph.scalar("masked", MASKED)
    # fmt: off
    real = node("Cast", [ATTENTION_MASK], "real", to=TensorProto.BOOL)          # (B, T)
    keys = node("Reshape", [real, shapes.keys], "real_keys")                    # (B, 1, 1, 1, T)
    full = node("Where", [keys, zero, masked], "full_bias")                     # (B, 1, 1, 1, T)
    length = node("Squeeze", [shapes.length], "length_scalar")                  # ()
    steps = [graph.whole("from_0", 0), length, graph.whole("by_1", 1)]
    place = node("Range", steps, "place")                                       # (T,)
    column = node("Unsqueeze", [place, graph.ints(1)], "place_column")          # (T, 1)
    offset = node("Sub", [column, place], "offset")                             # (T, T)
    distance = node("Abs", [offset], "distance")                                # (T, T)
    window = graph.whole("window", graph.config.window)
    near = node("LessOrEqual", [distance, window], "near")                      # (T, T)
    near = node("Reshape", [near, shapes.near], "near_keys")                    # (1, 1, T, 1, T)
    seen = node("And", [near, keys], "seen")                                    # (B, 1, T, 1, T)
    sliding = node("Where", [seen, zero, masked], "sliding_bias")               # (B, 1, T, 1, T)
    # fmt: on
    return {SLIDING: sliding, FULL: full}


def _add_layer(
    graph: Graph,
    shapes: _Shapes,
    x: str,
    normed: str,
    index: int,
    biases: dict[str, str],
) -> tuple[str, str]:
    """Add one layer.

    Args:
        x: (B*T, D) sums so far.
        normed: (B*T, D) the same under the layer's first norm.

    Returns:
        Both of the next layer; behind the last one, `normed` is under the encoder's final norm.
    """
    layer, next_norm = f"layers.{index}.", f"layers.{index + 1}.input_layernorm.weight"
    if index + 1 == graph.config.num_layers:
        next_norm = "norm.weight"
    mixed = _attention(graph, shapes, normed, index, biases[graph.config.layer_types[index]])
    x, normed = _add_and_norm(
        graph,
        x,
        mixed,
        layer + "post_attention_layernorm.weight",
        layer + "pre_feedforward_layernorm.weight",
    )
    fed = _feed_forward(graph, normed, layer + "mlp.")
    return _add_and_norm(
        graph,
        x,
        fed,
        layer + "post_feedforward_layernorm.weight",
        next_norm,
    )


def _attention(graph: Graph, shapes: _Shapes, x: str, index: int, bias: str) -> str:
    """Add attention, (B*T, D) to (B*T, D).

    The S query heads of one key/value head are S rows per token, so nothing is repeated.
    """
    config, node, ints = graph.config, graph.node, graph.ints
    layer = f"layers.{index}.self_attn."
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    tables = [layer + f"{name}_proj.weight" for name in "qkv"]
    projected = matmul(graph, x, tables, layer + "qkv")  # (B*T, (H + 2K)*C)
    query, key, value = layer + "query", layer + "key", layer + "value"
    node(
        "Split",
        [projected, ints(H * C, K * C, K * C)],
        layer + "split",
        outputs=[query, key, value],
        axis=1,
    )
    rotary = _rotary_tables(graph, config.layer_types[index])
    query = _rotated(graph, shapes, query, layer + "q", rotary)
    key = _rotated(graph, shapes, key, layer + "k", rotary)
    query, key, value = _by_head(graph, shapes, query, key, value, layer)
    scores = node(
        "FusedMatMul",
        [query, key],
        layer + "scores",
        domain=CONTRIB,
        transB=1,
        alpha=config.query_scale,
    )  # (B, K, T*S, T)
    # fmt: off
    scores = node("Reshape", [scores, shapes.scores], layer + "scores_5d")      # (B, K, T, S, T)
    scores = node("Add", [scores, bias], layer + "biased")                      # (B, K, T, S, T)
    weights = node("Softmax", [scores], layer + "weights", axis=-1)             # (B, K, T, S, T)
    weights = node("Reshape", [weights, shapes.merged], layer + "weights_4d")   # (B, K, T*S, T)
    mixed = node("MatMul", [weights, value], layer + "mixed")                   # (B, K, T*S, C)
    # fmt: on
    mixed = _by_token(graph, mixed, layer)
    return matmul(graph, mixed, [layer + "o_proj.weight"], layer + "o")


def _by_head(
    graph: Graph, shapes: _Shapes, query: str, key: str, value: str, layer: str
) -> tuple[str, str, str]:
    """Add what gathers the channels of a head.

    Returns:
        query (B, K, T*S, C), key and value (B, K, T, C).
    """
    config, node, ints = graph.config, graph.node, graph.ints
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    rows = layer + "query_rows"
    key, value = (node("Reshape", [part, shapes.key_heads], part + "_4d") for part in (key, value))
    if K == 1:  # the heads of a token already lie in a row: no transpose anywhere
        return node("Reshape", [query, ints(0, 1, -1, C)], rows), key, value
    key, value = (
        node("Transpose", [part], part + "_by_head", perm=[0, 2, 1, 3]) for part in (key, value)
    )
    by_head = layer + "query_by_head"
    # fmt: off
    query = node("Reshape", [query, ints(0, 0, K, H // K, C)], layer + "query_5d")
    query = node("Transpose", [query], by_head, perm=[0, 2, 1, 3, 4])           # (B, K, T, S, C)
    query = node("Reshape", [query, ints(0, 0, -1, C)], rows)                   # (B, K, T*S, C)
    # fmt: on
    return query, key, value


def _by_token(graph: Graph, mixed: str, layer: str) -> str:
    """Add what brings the heads of a token together: (B, K, T*S, C) to (B*T, H*C)."""
    config, node, ints = graph.config, graph.node, graph.ints
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    if K > 1:
        shape, by_token = ints(0, 0, -1, H // K, C), layer + "mixed_by_token"
        # fmt: off
        mixed = node("Reshape", [mixed, shape], layer + "mixed_5d")             # (B, K, T, S, C)
        mixed = node("Transpose", [mixed], by_token, perm=[0, 2, 1, 3, 4])      # (B, T, K, S, C)
        # fmt: on
    return node("Reshape", [mixed, ints(-1, H * C)], layer + "mixed_rows")


def _rotary_tables(graph: Graph, kind: str) -> list[str]:
    """Add (max_tokens, C/2) cosines and sines of that kind of layer, once.

    The encoder's own tables hold each half twice.
    """
    config = graph.config
    theta = config.rope_theta_full if kind == FULL else config.rope_theta_sliding
    cos, sin = rotary_tables(config.max_tokens, config.head_dim, theta, torch.zeros(()))
    half = config.head_dim // 2
    return [
        graph.constant(f"{kind}.cos", cos[:, :half].numpy()),
        graph.constant(f"{kind}.sin", sin[:, :half].numpy()),
    ]


def _rotated(graph: Graph, shapes: _Shapes, x: str, name: str, rotary: list[str]) -> str:
    """Add a norm of each head, then its turn by position: (B*T, heads*C) to (B, T, heads*C)."""
    channels = graph.ints(-1, graph.config.head_dim)
    # fmt: off
    heads = graph.node("Reshape", [x, channels], x + "_heads")                  # (B*T*heads, C)
    normed = norm(graph, heads, f"{name}_norm.weight")                          # (B*T*heads, C)
    tokens = graph.node("Reshape", [normed, shapes.tokens], name + "_normed")   # (B, T, heads*C)
    # fmt: on
    return graph.node(
        "RotaryEmbedding",
        [tokens, graph.ints(0), *rotary],
        name + "_rotated",
        domain=CONTRIB,
    )


def _feed_forward(graph: Graph, x: str, layer: str) -> str:
    """Add the feed-forward network, (B*T, D) to (B*T, D)."""
    width = graph.config.ffn_width
    weights = [layer + "gate_proj.weight", layer + "up_proj.weight"]
    projected = matmul(graph, x, weights, layer + "gate_up")  # (B*T, 2F)
    gate, up = layer + "gate", layer + "up"
    graph.node(
        "Split",
        [projected, graph.ints(width, width)],
        layer + "split",
        outputs=[gate, up],
        axis=1,
    )
    gate = graph.node("FastGelu", [gate], layer + "gelu", domain=CONTRIB)  # the tanh form
    gated = graph.node("Mul", [gate, up], layer + "gated")
    return matmul(graph, gated, [layer + "down_proj.weight"], layer + "down")


def _add_and_norm(
    graph: Graph, x: str, branch: str, branch_norm: str, next_norm: str
) -> tuple[str, str]:
    """Add x + norm(branch), and that sum under the norm behind it."""
    normed = norm(graph, branch, branch_norm)
    total = next_norm.removesuffix("weight") + "sum"
    out = graph.node(
        "SkipSimplifiedLayerNormalization",
        [normed, x, norm_weight(graph, next_norm)],
        next_norm.removesuffix(".weight"),
        domain=CONTRIB,
        outputs=[next_norm + ".out", "", "", total],
        epsilon=graph.config.norm_eps,
    )
    return total, out


def _mean_pool(graph: Graph, shapes: _Shapes, rows: str) -> str:
    """Add the mean over real tokens, (B*T, D) to (B, D).

    `Where`, not a product, so that nothing in a padded row can reach the mean.
    """
    node, ints = graph.node, graph.ints
    # fmt: off
    hidden = node("Reshape", [rows, shapes.tokens], "hidden")                   # (B, T, D)
    mask = node("Unsqueeze", ["real", ints(-1)], "real_column")                 # (B, T, 1)
    kept = node("Where", [mask, hidden, "zero"], "kept")                        # (B, T, D)
    total = node("ReduceSum", [kept, ints(1)], "total", keepdims=0)             # (B, D)
    ones = node("Cast", ["real"], "ones", to=TensorProto.FLOAT)                 # (B, T)
    count = node("ReduceSum", [ones, ints(1)], "count", keepdims=1)             # (B, 1)
    # fmt: on
    return node("Div", [total, count], "pooled")
