"""What an encoder's weights become in an ONNX graph: products, table rows and norms, as ONNX
Runtime's operators read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from egemma_core.errors import ExportError
from egemma_export.onnx_graph import CONTRIB, INPUT_IDS, Array, Graph
from egemma_quant.roles import role_of
from egemma_quant.schemes import Format, Quantized, quantize

# MatMulNBits accuracy_level: activations are rounded to 8 bits, per block or per token.
INT8_ACTIVATIONS = 4


def norm(graph: Graph, x: str, parameter: str) -> str:
    """Add x / rms(x) * (1 + weight) over the last axis."""
    return graph.node(
        "SimplifiedLayerNormalization",
        [x, norm_weight(graph, parameter)],
        parameter + ".out",
        axis=-1,
        epsilon=graph.config.norm_eps,
    )


def norm_weight(graph: Graph, parameter: str) -> str:
    """Add 1 + weight, which is what a norm multiplies by."""
    weight = graph.parameters[parameter].detach().float().numpy()
    return graph.constant(parameter, 1.0 + weight)


def embedding(graph: Graph, ids: str, parameter: str) -> str:
    """Add the lookup of table rows: (B, T) ids to (B, T, D) float32."""
    table = graph.parameters[parameter].detach()
    if graph.scheme is None:
        whole = graph.constant(parameter, table.float().numpy())
        return graph.node("Gather", [whole, ids], "embed_tokens")
    weight_format = _format_of(graph, parameter)
    graph.rows["embed_tokens"] = [(parameter, table.shape[0])]
    quantized = quantize(table, weight_format)
    scales = quantized.scales.numpy()
    if _exact_in_half(quantized):
        scales = scales.astype(np.float16)
    packed = _offset_codes(quantized.codes.numpy(), weight_format.bits)
    rows = graph.node(
        "GatherBlockQuantized",
        [
            graph.constant("embed_tokens.codes", packed),
            ids,
            graph.constant("embed_tokens.scales", scales),
        ],
        "embed_tokens",
        domain=CONTRIB,
        bits=weight_format.bits,
        # A block wider than the row is one scale per row; the kernel wants a power of two.
        block_size=weight_format.group_size or max(16, 1 << (table.shape[1] - 1).bit_length()),
        gather_axis=0,
        quantize_axis=1,
    )
    if scales.dtype == np.float32:
        return rows
    return graph.node("Cast", [rows], "embed_tokens.float", to=TensorProto.FLOAT)


def matmul(
    graph: Graph, x: str, parameters: Sequence[str], name: str, *, per: str = "tokens"
) -> str:
    """Add the product of x with matrices whose output channels follow one another.

    Args:
        x: (rows, columns).
        parameters: names of the matrices.
        per: what a row of x is: one of all "tokens", or one of the "texts".
    """
    weights = [graph.parameters[parameter].detach() for parameter in parameters]
    if graph.scheme is None:
        joined = torch.cat([weight.float() for weight in weights])
        matrix = graph.constant(name + ".weight", joined.t().numpy())
        return graph.node("MatMul", [x, matrix], name)
    named = list(zip(parameters, weights, strict=True))
    graph.rows[name] = [(parameter, weight.shape[0]) for parameter, weight in named]
    parts = [quantize(weight, _format_of(graph, parameter)) for parameter, weight in named]
    quantized = Quantized(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        format=parts[0].format,
    )
    if quantized.format.group_size is None:
        return _matmul_per_channel(graph, x, quantized, name, per)
    return _matmul_in_blocks(graph, x, quantized, name)


def _matmul_in_blocks(graph: Graph, x: str, weight: Quantized, name: str) -> str:
    size, bits = weight.format.group_size, weight.format.bits
    assert size is not None
    if size & (size - 1) or size > 256:
        raise ExportError(
            f"group_size={size}: MatMulNBits has kernels for powers of two up to 256."
        )
    rows, columns = weight.codes.shape
    packed = _offset_codes(weight.codes.numpy(), bits)
    packed = packed.reshape(rows, columns // size, -1)  # (N, G, g * bits / 8) uint8
    return graph.node(
        "MatMulNBits",
        [
            x,
            graph.constant(name + ".codes", packed),
            graph.constant(name + ".scales", weight.scales.numpy().reshape(-1)),
        ],
        name,
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=bits,
        block_size=size,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _matmul_per_channel(graph: Graph, x: str, weight: Quantized, name: str, per: str) -> str:
    """Round each row of x to 8 bits with its own scale, multiply as integers, scale back.

    Unsigned activations around 128: x86 has no fast kernel for signed times signed (20 times
    slower, measured). On x86 without VNNI the unsigned one saturates unless the session sets
    `session.x64quantprecision` to "1" (cosine 0.98).
    """
    node, minus_one = graph.node, graph.ints(-1)
    # A row of zeros has step 0 and undefined codes, which are multiplied by 0 again.
    inverse = graph.scalar("inverse_127", 1 / 127)
    # fmt: off
    absolute = node("Abs", [x], name + ".abs")                                  # (rows, columns)
    highest = node("ReduceMax", [absolute, minus_one], name + ".amax", keepdims=1)  # (rows, 1)
    step = node("Mul", [highest, inverse], name + ".step")                      # (rows, 1)
    flat = node("Reshape", [step, minus_one], name + ".flat_step")              # (rows,)
    middles = _middles(graph, per)                                              # (rows,) uint8
    rounded = node("QuantizeLinear", [x, flat, middles], name + ".rounded", axis=0)  # uint8
    # fmt: on
    codes = _codes_by_column(graph, weight, name + ".codes")
    scales = graph.constant(name + ".scales", weight.scales.numpy()[:, 0])
    product = graph.node(
        "MatMulIntegerToFloat",
        [rounded, codes, graph.scalar("one", 1.0), scales, _middle(graph)],
        name + ".product",
        domain=CONTRIB,
    )
    return graph.node("Mul", [product, step], name)


def _codes_by_column(graph: Graph, weight: Quantized, name: str) -> str:
    """Add the codes as (columns, N) int8; 4 bits in the file where 4 are enough."""
    matrix = np.ascontiguousarray(weight.codes.numpy().T)
    if weight.format.bits == 8:
        return graph.constant(name, matrix)
    packed = graph.int4_constant(name, matrix)
    # The runtime widens them once, when it loads.
    return graph.node("Cast", [packed], name + "8", to=TensorProto.INT8)


def _middle(graph: Graph) -> str:
    return graph.constant("middle", np.array(128, np.uint8))


def _middles(graph: Graph, per: str) -> str:
    """Add a zero point per row, (rows,) uint8 and all 128; once, because every matrix needs it."""
    name = f"middle_of_{per}"
    if not graph.has_node(name):
        axes = 1 if per == "texts" else 2
        shape = graph.node("Shape", [INPUT_IDS], f"shape_of_{per}", end=axes)
        count = graph.node("ReduceProd", [shape, graph.ints(0)], f"number_of_{per}", keepdims=1)
        graph.node("Expand", [_middle(graph), count], name)
    return name


def _format_of(graph: Graph, parameter: str) -> Format:
    role = role_of(parameter)
    assert role is not None
    assert graph.scheme is not None
    return graph.scheme.format_of(role)


def _offset_codes(codes: Array, bits: int) -> Array:
    """Return (rows, columns) int8 codes as uint8 around 8 or 128.

    4-bit codes go two to a byte, the even column in the low half.
    """
    unsigned: Array = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    if bits == 8:
        return unsigned
    packed: Array = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return packed


def _exact_in_half(quantized: Quantized) -> bool:
    """Say whether code * scale is exact in float16.

    A 3-bit code times 8 bits of scale is 11 bits, if no scale leaves the normal range.
    """
    if quantized.format.bits != 4:
        return False
    scales = quantized.scales
    return bool(scales.min() >= 2.0**-14) and bool(scales.max() <= 65504 / 8)
