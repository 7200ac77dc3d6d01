"""Codes and scales, read back out of a finished .onnx: the file is checked, not its writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from egemma_core.errors import ExportError
from egemma_export.onnx_graph import ROWS_KEY
from egemma_quant.schemes import Quantized, WeightFormat

Array = NDArray[Any]


def read_onnx_weights(path: Path) -> dict[str, Quantized]:
    """Return codes and scales of every quantized parameter, by its name in the state dict.

    Bits, blocks and values come from the operators and tensors that the runtime will execute; only
    which rows of a joined matrix are q, k, v or gate, up is read from the file's metadata.

    Raises:
        ExportError: the file was not written by `write_onnx`, or an operator is not as it writes
            them.
    """
    model = onnx.load(str(path))
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    if ROWS_KEY not in metadata:
        raise ExportError(
            f"{path} has no {ROWS_KEY!r} in its metadata; only files of write_onnx can be read."
        )
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    weights: dict[str, Quantized] = {}
    for name, parts in json.loads(metadata[ROWS_KEY]).items():
        whole = _read_node(path, nodes.get(name), nodes, tensors)
        start = 0
        for parameter, rows in parts:
            stop = start + rows
            weights[parameter] = Quantized(
                codes=whole.codes[start:stop], scales=whole.scales[start:stop], format=whole.format
            )
            start = stop
        if start != whole.codes.shape[0]:
            raise ExportError(
                f"{path}: {name} has {whole.codes.shape[0]} rows, its parameters have {start}."
            )
    return weights


def _read_node(
    path: Path,
    node: onnx.NodeProto | None,
    nodes: dict[str, onnx.NodeProto],
    tensors: dict[str, onnx.TensorProto],
) -> Quantized:
    if node is None:
        raise ExportError(f"{path}: a quantized product named in the metadata is missing.")
    if node.op_type == "MatMulNBits":
        return _read_nbits(path, node, tensors)
    if node.op_type == "GatherBlockQuantized":
        return _read_table(path, node, tensors)
    product = nodes.get(node.name + ".product")
    if node.op_type == "Mul" and product is not None and product.op_type == "MatMulIntegerToFloat":
        return _read_per_channel(product, nodes, tensors)
    raise ExportError(
        f"{path}: {node.name} is a {node.op_type}, which write_onnx does not use for quantized "
        "weights."
    )


def _read_nbits(
    path: Path, node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]
) -> Quantized:
    attributes = _attributes(node)
    _refuse_zero_points(path, node)
    rows, columns = attributes["N"], attributes["K"]
    bits, size = attributes["bits"], attributes["block_size"]
    packed = numpy_helper.to_array(tensors[node.input[1]]).reshape(rows, -1)
    scales = numpy_helper.to_array(tensors[node.input[2]]).reshape(rows, -1)
    codes = _unpack(packed, bits)[:, :columns]
    return _quantized(codes, scales, WeightFormat(bits=bits, group_size=size))


def _read_table(
    path: Path, node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]
) -> Quantized:
    attributes = _attributes(node)
    _refuse_zero_points(path, node)
    codes = _unpack(numpy_helper.to_array(tensors[node.input[0]]), attributes["bits"])
    scales = numpy_helper.to_array(tensors[node.input[2]])
    size: int | None = attributes["block_size"]
    if attributes["block_size"] > codes.shape[1] or scales.shape[1] == 1:
        size = None  # a block wider than the row: one scale per row
    return _quantized(codes, scales, WeightFormat(bits=attributes["bits"], group_size=size))


def _read_per_channel(
    product: onnx.NodeProto, nodes: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto]
) -> Quantized:
    weight, bits = product.input[1], 8
    if weight not in tensors:  # 4-bit codes, widened by a Cast at load
        weight, bits = nodes[weight].input[0], 4
    codes = numpy_helper.to_array(tensors[weight]).astype(np.int8).T  # (N, columns)
    scales = numpy_helper.to_array(tensors[product.input[3]])
    return _quantized(codes, scales.reshape(-1, 1), WeightFormat(bits=bits, group_size=None))


def _quantized(codes: Array, scales: Array, weight_format: WeightFormat) -> Quantized:
    return Quantized(
        codes=torch.from_numpy(np.ascontiguousarray(codes)),
        scales=torch.from_numpy(scales.astype(np.float32)),
        format=weight_format,
    )


def _unpack(packed: Array, bits: int) -> Array:
    """Return int8 codes from uint8 ones around 8 or 128, of which 4-bit ones are two to a byte."""
    if bits == 8:
        codes: Array = packed - np.uint8(128)
        return codes.view(np.int8)
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 0xF, packed >> 4
    codes -= np.uint8(8)
    return codes.view(np.int8)


def _refuse_zero_points(path: Path, node: onnx.NodeProto) -> None:
    if len(node.input) > 3 and node.input[3]:
        raise ExportError(f"{path}: {node.name} has zero points; our schemes are symmetric.")


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}
