"""The encoder as an ONNX graph, written by hand with ONNX Runtime's own fused operators.

Shapes: B texts, T tokens, D width, H query heads, K key/value heads, S = H / K query heads of one
key/value head, C channels of a head, F feed-forward width, V vocabulary. Between attention blocks
the tokens of all texts are one matrix of B*T rows. What was tried, and how fast each way is:
docs/decisions/0003-onnx-graph.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import MASKED, Encoder, rotary_tables
from egemma_quant.schemes import Format, Quantized, Scheme, quantize
from egemma_quant.roles import role_of

INPUT_IDS, ATTENTION_MASK, SENTENCE_EMBEDDING = "input_ids", "attention_mask", "sentence_embedding"
# the first with 4-bit tensors; every operator here is in ONNX Runtime 1.24, the newest for iOS
OPSET = 21
CONTRIB = "com.microsoft"
# metadata: node name -> [[parameter, rows], ...], because q, k, v are one product, as are gate, up
ROWS_KEY = "egemma.rows"
# MatMulNBits accuracy_level: activations are rounded to 8 bits, per block or per token
INT8_ACTIVATIONS = 4
FILE_LIMIT = 2**31 - 1  # bytes of one protobuf message
GRAPH_BYTES = 2**22  # more than the nodes and small tensors of any encoder take
MAPPED_BYTES = 2**16  # tensors of at least this many bytes are worth a place in the second file
PAGE_BYTES = 4096

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What was written, and at what cost."""

    files: tuple[str, ...]  # names: the .onnx, then its .data if there is one
    scheme: str  # name of the scheme, or "float32"
    nodes: dict[str, int]  # how many of each operator
    file_bytes: int  # of all files
    seconds: float  # quantizing and writing


def _silent(message: str) -> None:
    pass


def write_onnx(
    encoder: Encoder,
    scheme: Scheme | None,
    path: Path,
    *,
    weights_beside: bool = False,
    progress: Callable[[str], None] = _silent,
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
    graph = _Graph(encoder, scheme)
    _write_encoder(graph, config, progress)
    if graph.weight_bytes + GRAPH_BYTES > FILE_LIMIT and not weights_beside:
        raise ExportError(
            f"{path}: {graph.weight_bytes} bytes of weights do not fit into one file of 2 GB; pass "
            "weights_beside=True."
        )
    model = graph.to_model()
    files = [path, _move_weights(model, path)] if weights_beside else [path]
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


def _move_weights(model: onnx.ModelProto, path: Path) -> Path:
    """Move the large tensors of `model` into `<path>.data`, each at the start of a memory page;
    returns that file.
    """
    beside = path.with_name(path.name + ".data")
    with beside.open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= MAPPED_BYTES:
                file.write(bytes(-file.tell() % PAGE_BYTES))
                set_external_data(
                    tensor, beside.name, offset=file.tell(), length=len(tensor.raw_data)
                )
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
    return beside


class _Graph:
    """Nodes and initializers as they are added, and the weights they come from."""

    def __init__(self, encoder: Encoder, scheme: Scheme | None) -> None:
        self.config, self.scheme = encoder.config, scheme
        self.parameters = dict(encoder.named_parameters())
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.rows: dict[str, list[tuple[str, int]]] = {}
        self.made: set[str] = set()  # nodes that are added on first use
        self.weight_bytes = 0

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer once; later calls with its name return it."""
        if name not in self.initializers:
            self._add(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def int4_constant(self, name: str, codes: Array) -> str:
        """Add signed codes of any shape as a 4-bit tensor, the even element in the low half of its
        byte.
        """
        flat = codes.reshape(-1).view(np.uint8) & 0xF
        packed = flat[0::2] | (flat[1::2] << 4)
        self._add(
            TensorProto(
                name=name, dims=codes.shape, data_type=TensorProto.INT4, raw_data=packed.tobytes()
            )
        )
        return name

    def _add(self, tensor: onnx.TensorProto) -> None:
        self.initializers[tensor.name] = tensor
        self.weight_bytes += len(tensor.raw_data)

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output, which is called like the node unless `outputs` says
        otherwise.
        """
        outputs = outputs or (name,)
        self.nodes.append(
            helper.make_node(
                op, list(inputs), list(outputs), name=name, domain=domain, **attributes
            )
        )
        return outputs[0]

    def norm(self, x: str, parameter: str) -> str:
        """x / rms(x) * (1 + weight) over the last axis."""
        return self.node(
            "SimplifiedLayerNormalization",
            [x, self.norm_weight(parameter)],
            parameter + ".out",
            axis=-1,
            epsilon=self.config.norm_eps,
        )

    def norm_weight(self, parameter: str) -> str:
        return self.constant(parameter, 1.0 + self.parameters[parameter].detach().float().numpy())

    def matmul(self, x: str, parameters: Sequence[str], name: str, rows: str = "tokens") -> str:
        """(rows, columns) times the matrices of `parameters`, whose output channels follow one
        another.

        `rows` says what a row of x is: one of all "tokens" or one of the "texts".
        """
        weights = [self.parameters[parameter].detach() for parameter in parameters]
        if self.scheme is None:
            transposed = torch.cat([weight.float() for weight in weights]).t()
            return self.node(
                "MatMul", [x, self.constant(name + ".weight", transposed.numpy())], name
            )
        self.rows[name] = [
            (parameter, weight.shape[0])
            for parameter, weight in zip(parameters, weights, strict=True)
        ]
        parts = [
            quantize(weight, self._format(parameter))
            for parameter, weight in zip(parameters, weights, strict=True)
        ]
        joined = Quantized(
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            format=parts[0].format,
        )
        if joined.format.group_size is None:
            return self._matmul_per_channel(x, joined, name, rows)
        return self._matmul_nbits(x, joined, name)

    def _format(self, parameter: str) -> Format:
        role = role_of(parameter)
        assert role is not None
        assert self.scheme is not None
        return self.scheme.format_of(role)

    def _matmul_nbits(self, x: str, weight: Quantized, name: str) -> str:
        size, bits = weight.format.group_size, weight.format.bits
        assert size is not None
        if size & (size - 1) or size > 256:
            raise ExportError(
                f"group_size={size}: MatMulNBits has kernels for powers of two up to 256."
            )
        rows, columns = weight.codes.shape
        # (N, G, g * bits / 8) uint8
        packed = _offset_codes(weight.codes.numpy(), bits).reshape(rows, columns // size, -1)
        codes, scales = (
            self.constant(name + ".codes", packed),
            self.constant(name + ".scales", weight.scales.numpy().reshape(-1)),
        )
        return self.node(
            "MatMulNBits",
            [x, codes, scales],
            name,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _matmul_per_channel(self, x: str, weight: Quantized, name: str, rows: str) -> str:
        """Round each token to 8 bits with its own scale, multiply as integers, scale back.

        Unsigned activations around 128: x86 has no fast kernel for signed times signed (20 times
        slower, measured). On x86 without VNNI the unsigned one saturates unless the session sets
        `session.x64quantprecision` to "1" (cosine 0.98).
        """
        # (rows, 1)
        amax = self.node(
            "ReduceMax",
            [self.node("Abs", [x], name + ".abs"), self.ints(-1)],
            name + ".amax",
            keepdims=1,
        )
        # A row of zeros has step 0 and undefined codes, which are multiplied by 0 again.
        step = self.node("Mul", [amax, self.scalar("inverse_127", 1 / 127)], name + ".step")
        flat = self.node("Reshape", [step, self.ints(-1)], name + ".flat_step")  # (rows,)
        # (rows, columns) uint8
        rounded = self.node(
            "QuantizeLinear", [x, flat, self._middles(rows)], name + ".rounded", axis=0
        )
        matrix = np.ascontiguousarray(weight.codes.numpy().T)  # (columns, N)
        # 4 bits in the file; the runtime widens them once, when it loads
        if weight.format.bits == 4:
            codes = self.node(
                "Cast",
                [self.int4_constant(name + ".codes", matrix)],
                name + ".codes8",
                to=TensorProto.INT8,
            )
        else:
            codes = self.constant(name + ".codes", matrix)
        scales = self.constant(name + ".scales", weight.scales.numpy()[:, 0])
        product = self.node(
            "MatMulIntegerToFloat",
            [rounded, codes, self.scalar("one", 1.0), scales, self._middle()],
            name + ".product",
            domain=CONTRIB,
        )
        return self.node("Mul", [product, step], name)

    def _middle(self) -> str:
        return self.constant("middle", np.array(128, np.uint8))

    def _middles(self, rows: str) -> str:
        """(rows,) uint8, 128 everywhere: a zero point per row.

        Made once per run, because every matrix needs it.
        """
        name = f"middle_of_{rows}"
        if name not in self.made:
            self.made.add(name)
            shape = self.node(
                "Shape", [INPUT_IDS], f"shape_of_{rows}", end=1 if rows == "texts" else 2
            )
            count = self.node("ReduceProd", [shape, self.ints(0)], f"number_of_{rows}", keepdims=1)
            self.node("Expand", [self._middle(), count], name)
        return name

    def embedding(self, ids: str, parameter: str) -> str:
        """(B, T) ids to (B, T, D) float32 rows of the table."""
        table = self.parameters[parameter].detach()
        if self.scheme is None:
            return self.node(
                "Gather", [self.constant(parameter, table.float().numpy()), ids], "embed_tokens"
            )
        weight_format = self._format(parameter)
        self.rows["embed_tokens"] = [(parameter, table.shape[0])]
        quantized = quantize(table, weight_format)
        scales = quantized.scales.numpy()
        if _exact_in_half(quantized):
            scales = scales.astype(np.float16)
        # A block wider than the row is one scale per row; the kernel wants a power of two.
        size = weight_format.group_size or max(16, 1 << (table.shape[1] - 1).bit_length())
        codes = self.constant(
            "embed_tokens.codes", _offset_codes(quantized.codes.numpy(), weight_format.bits)
        )
        rows = self.node(
            "GatherBlockQuantized",
            [codes, ids, self.constant("embed_tokens.scales", scales)],
            "embed_tokens",
            domain=CONTRIB,
            bits=weight_format.bits,
            block_size=size,
            gather_axis=0,
            quantize_axis=1,
        )
        return (
            rows
            if scales.dtype == np.float32
            else self.node("Cast", [rows], "embed_tokens.float", to=TensorProto.FLOAT)
        )

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(node.op_type for node in self.nodes).items()))

    def to_model(self) -> onnx.ModelProto:
        tokens = ["batch", "tokens"]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
            for name in (INPUT_IDS, ATTENTION_MASK)
        ]
        width = [
            weight.shape[0] for name, weight in self.parameters.items() if name.startswith("dense.")
        ]
        dim = width[-1] if width else self.parameters["norm.weight"].shape[0]
        output = helper.make_tensor_value_info(
            SENTENCE_EMBEDDING, TensorProto.FLOAT, ["batch", dim]
        )
        model = onnx.ModelProto(
            ir_version=10,
            producer_name="egemma",
            opset_import=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            graph=onnx.GraphProto(name="egemma", node=self.nodes, input=inputs, output=[output]),
        )
        while self.initializers:  # one at a time, so that only one table is ever held twice
            model.graph.initializer.append(self.initializers.pop(next(iter(self.initializers))))
        helper.set_model_props(model, {ROWS_KEY: json.dumps(self.rows)})
        return model


def _write_encoder(graph: _Graph, config: EncoderConfig, progress: Callable[[str], None]) -> None:
    shapes = _Shapes(graph, config)
    biases = _attention_biases(graph, shapes)
    x = graph.embedding(INPUT_IDS, "embed_tokens.weight")  # (B, T, D)
    progress(f"embedding: {config.vocab_size} rows")
    # Gemma scales by sqrt(D), in the embedding's dtype: float32 here.
    x = graph.node("Mul", [x, graph.scalar("sqrt_width", config.width**0.5)], "scaled_embedding")
    x = graph.node("Reshape", [x, graph.ints(-1, config.width)], "tokens")  # (B*T, D)
    normed = graph.norm(x, "layers.0.input_layernorm.weight")
    for index, kind in enumerate(config.layer_types):
        layer = f"layers.{index}."
        mixed = _attention(graph, shapes, normed, index, biases[kind])
        x, normed = _add_and_norm(
            graph,
            x,
            mixed,
            layer + "post_attention_layernorm.weight",
            layer + "pre_feedforward_layernorm.weight",
        )
        fed = _feed_forward(graph, normed, layer + "mlp.")
        after = (
            f"layers.{index + 1}.input_layernorm.weight"
            if index + 1 < config.num_layers
            else "norm.weight"
        )
        x, normed = _add_and_norm(graph, x, fed, layer + "post_feedforward_layernorm.weight", after)
        progress(f"layer {index + 1} of {config.num_layers}")
    pooled = _mean_pool(graph, shapes, normed)  # (B, D)
    for index in range(len(config.dense)):
        # (B, 3072), then (B, 768)
        pooled = graph.matmul(pooled, [f"dense.{index}.weight"], f"dense.{index}", "texts")
    length = graph.node("ReduceL2", [pooled, graph.ints(-1)], "length", keepdims=1)
    length = graph.node("Max", [length, graph.scalar("smallest_length", 1e-12)], "safe_length")
    graph.node("Div", [pooled, length], "unit", outputs=[SENTENCE_EMBEDDING])


class _Shapes:
    """Shape tensors that depend on B and T, computed once per run and used by every layer."""

    def __init__(self, graph: _Graph, config: EncoderConfig) -> None:
        shape = graph.node("Shape", [INPUT_IDS], "shape")
        batch = graph.node("Slice", [shape, graph.ints(0), graph.ints(1)], "batch_size")
        self.length = graph.node("Slice", [shape, graph.ints(1), graph.ints(2)], "length_in_tokens")
        shared = config.num_heads // config.num_kv_heads

        def join(name: str, *parts: str) -> str:
            return graph.node("Concat", parts, name, axis=0)

        self.tokens = join("shape_tokens", shape, graph.ints(-1))  # (B, T, ...)
        heads = (
            (graph.ints(1), self.length)
            if config.num_kv_heads == 1
            else (self.length, graph.ints(config.num_kv_heads))
        )
        # (B, 1, T, C) or (B, T, K, C)
        self.key_heads = join("shape_key_heads", batch, *heads, graph.ints(config.head_dim))
        self.keys = join("shape_keys", batch, graph.ints(1, 1, 1), self.length)  # (B, 1, 1, 1, T)
        # (1, 1, T, 1, T)
        self.near = join("shape_near", graph.ints(1, 1), self.length, graph.ints(1), self.length)
        self.scores = join(
            "shape_scores", graph.ints(0, 0, -1), graph.ints(shared), self.length
        )  # (B, K, T, S, T)
        self.merged = join("shape_merged", graph.ints(0, 0, -1), self.length)  # (B, K, T*S, T)


def _attention_biases(graph: _Graph, shapes: _Shapes) -> dict[str, str]:
    """Added to the scores of sliding and of full layers: 0 where i may see j, MASKED elsewhere.

    Finite, so a padded token whose whole window is padding averages instead of giving NaN.
    """
    zero, masked = graph.scalar("zero", 0.0), graph.scalar("masked", MASKED)
    real = graph.node("Cast", [ATTENTION_MASK], "real", to=TensorProto.BOOL)  # (B, T)
    keys = graph.node("Reshape", [real, shapes.keys], "real_keys")  # (B, 1, 1, 1, T)
    full = graph.node("Where", [keys, zero, masked], "full_bias")
    length = graph.node("Squeeze", [shapes.length], "length_scalar")
    place = graph.node(
        "Range",
        [
            graph.constant("from_0", np.array(0, np.int64)),
            length,
            graph.constant("by_1", np.array(1, np.int64)),
        ],
        "place",
    )
    column = graph.node("Unsqueeze", [place, graph.ints(1)], "place_column")
    distance = graph.node(
        "Abs", [graph.node("Sub", [column, place], "offset")], "distance"
    )  # (T, T)
    near = graph.node(
        "LessOrEqual",
        [distance, graph.constant("window", np.array(graph.config.window, np.int64))],
        "near",
    )
    near = graph.node("Reshape", [near, shapes.near], "near_keys")
    seen = graph.node("And", [near, keys], "seen")  # (B, 1, T, 1, T)
    return {SLIDING: graph.node("Where", [seen, zero, masked], "sliding_bias"), FULL: full}


def _attention(graph: _Graph, shapes: _Shapes, x: str, index: int, bias: str) -> str:
    """(B*T, D) to (B*T, D).

    The S query heads of one key/value head are S rows per token, so nothing is repeated.
    """
    config, layer = graph.config, f"layers.{index}.self_attn."
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    # (B*T, (H + 2K)*C)
    projected = graph.matmul(x, [layer + name + "_proj.weight" for name in "qkv"], layer + "qkv")
    query, key, value = (layer + name for name in ("query", "key", "value"))
    graph.node(
        "Split",
        [projected, graph.ints(H * C, K * C, K * C)],
        layer + "split",
        outputs=[query, key, value],
        axis=1,
    )
    tables = _rotary_tables(graph, config.layer_types[index])
    query, key = (
        _rotated(graph, shapes, part, layer + name, tables)
        for part, name in ((query, "q"), (key, "k"))
    )
    # (B, 1, T, C) or (B, T, K, C)
    key, value = (
        graph.node("Reshape", [part, shapes.key_heads], part + "_4d") for part in (key, value)
    )
    if K == 1:  # the heads of a token already lie in a row: no transpose anywhere
        query = graph.node(
            "Reshape", [query, graph.ints(0, 1, -1, C)], layer + "query_rows"
        )  # (B, 1, T*H, C)
    else:
        key, value = (
            graph.node("Transpose", [part], part + "_by_head", perm=[0, 2, 1, 3])
            for part in (key, value)
        )
        query = graph.node("Reshape", [query, graph.ints(0, 0, K, H // K, C)], layer + "query_5d")
        query = graph.node(
            "Transpose", [query], layer + "query_by_head", perm=[0, 2, 1, 3, 4]
        )  # (B, K, T, S, C)
        query = graph.node(
            "Reshape", [query, graph.ints(0, 0, -1, C)], layer + "query_rows"
        )  # (B, K, T*S, C)
    scores = graph.node(
        "FusedMatMul",
        [query, key],
        layer + "scores",
        domain=CONTRIB,
        transB=1,
        alpha=config.query_scale,
    )
    scores = graph.node("Reshape", [scores, shapes.scores], layer + "scores_5d")  # (B, K, T, S, T)
    scores = graph.node(
        "Softmax", [graph.node("Add", [scores, bias], layer + "biased")], layer + "weights", axis=-1
    )
    scores = graph.node("Reshape", [scores, shapes.merged], layer + "weights_4d")  # (B, K, T*S, T)
    mixed = graph.node("MatMul", [scores, value], layer + "mixed")  # (B, K, T*S, C)
    if K > 1:
        mixed = graph.node("Reshape", [mixed, graph.ints(0, 0, -1, H // K, C)], layer + "mixed_5d")
        mixed = graph.node(
            "Transpose", [mixed], layer + "mixed_by_token", perm=[0, 2, 1, 3, 4]
        )  # (B, T, K, S, C)
    mixed = graph.node(
        "Reshape", [mixed, graph.ints(-1, H * C)], layer + "mixed_rows"
    )  # (B*T, H*C)
    return graph.matmul(mixed, [layer + "o_proj.weight"], layer + "o")


def _rotary_tables(graph: _Graph, kind: str) -> list[str]:
    """(max_tokens, C/2) cosines and sines of that kind of layer; the encoder's tables hold each
    half twice.
    """
    config = graph.config
    theta = config.rope_theta_full if kind == FULL else config.rope_theta_sliding
    tables = rotary_tables(config.max_tokens, config.head_dim, theta, torch.zeros(()))
    return [
        graph.constant(f"{kind}.{part}", table[:, : config.head_dim // 2].numpy())
        for part, table in zip(("cos", "sin"), tables, strict=True)
    ]


def _rotated(graph: _Graph, shapes: _Shapes, x: str, name: str, tables: list[str]) -> str:
    """(B*T, heads*C) to (B, T, heads*C): each head normed, then turned by its position."""
    heads = graph.node(
        "Reshape", [x, graph.ints(-1, graph.config.head_dim)], x + "_heads"
    )  # (B*T*heads, C)
    normed = graph.norm(heads, f"{name}_norm.weight")
    tokens = graph.node("Reshape", [normed, shapes.tokens], name + "_normed")  # (B, T, heads*C)
    return graph.node(
        "RotaryEmbedding", [tokens, graph.ints(0), *tables], name + "_rotated", domain=CONTRIB
    )


def _feed_forward(graph: _Graph, x: str, layer: str) -> str:
    projected = graph.matmul(
        x, [layer + "gate_proj.weight", layer + "up_proj.weight"], layer + "gate_up"
    )  # (B*T, 2F)
    gate, up = layer + "gate", layer + "up"
    graph.node(
        "Split",
        [projected, graph.ints(graph.config.ffn_width, graph.config.ffn_width)],
        layer + "split",
        outputs=[gate, up],
        axis=1,
    )
    gate = graph.node("FastGelu", [gate], layer + "gelu", domain=CONTRIB)  # the tanh form
    return graph.matmul(
        graph.node("Mul", [gate, up], layer + "gated"), [layer + "down_proj.weight"], layer + "down"
    )


def _add_and_norm(graph: _Graph, x: str, branch: str, norm: str, after: str) -> tuple[str, str]:
    """x + norm(branch), and that sum under the next norm."""
    normed = graph.norm(branch, norm)
    total = after.removesuffix("weight") + "sum"
    out = graph.node(
        "SkipSimplifiedLayerNormalization",
        [normed, x, graph.norm_weight(after)],
        after.removesuffix(".weight"),
        domain=CONTRIB,
        outputs=[after + ".out", "", "", total],
        epsilon=graph.config.norm_eps,
    )
    return total, out


def _mean_pool(graph: _Graph, shapes: _Shapes, rows: str) -> str:
    """(B*T, D) to (B, D): `Where`, not a product, so that nothing in a padded row can reach the
    mean.
    """
    hidden = graph.node("Reshape", [rows, shapes.tokens], "hidden")  # (B, T, D)
    mask = graph.node("Unsqueeze", ["real", graph.ints(-1)], "real_column")  # (B, T, 1)
    kept = graph.node("Where", [mask, hidden, "zero"], "kept")
    total = graph.node("ReduceSum", [kept, graph.ints(1)], "total", keepdims=0)  # (B, D)
    count = graph.node(
        "ReduceSum",
        [graph.node("Cast", ["real"], "ones", to=TensorProto.FLOAT), graph.ints(1)],
        "count",
        keepdims=1,
    )
    return graph.node("Div", [total, count], "pooled")


def _offset_codes(codes: Array, bits: int) -> Array:
    """(rows, columns) int8 to uint8 around 8 or 128; 4-bit codes go two to a byte, the even column
    in the low half.
    """
    unsigned: Array = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    return unsigned if bits == 8 else unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def _exact_in_half(quantized: Quantized) -> bool:
    """Whether code * scale is exact in float16: a 3-bit code times 8 bits of scale is 11 bits, if
    no scale leaves the normal range.
    """
    if quantized.format.bits != 4:
        return False
    scales = quantized.scales
    return bool(scales.min() >= 2.0**-14) and bool(scales.max() <= 65504 / 8)
