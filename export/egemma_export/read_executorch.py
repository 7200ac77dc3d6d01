"""Codes and scales, read back out of a finished .pte: proof that it holds what was trained.

Nothing here shares code with the writer except the order of the linears, `layer_parts`.
"""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executorch.backends.xnnpack.serialization  # type: ignore[import-untyped]
import numpy as np
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader  # type: ignore[import-untyped]
from executorch.exir._serialize._flatbuffer import _flatc_decompile  # type: ignore[import-untyped]
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary  # type: ignore[import-untyped]
from torch import Tensor

from egemma_core.errors import ExportError
from egemma_export.executorch_graph import layer_parts
from egemma_quant.schemes import Quantized, WeightFormat

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Operators that look rows up, and the bits of their tables.
_LOOKUPS = {
    "quantized_decomposed::embedding_4bit": 4,
    "quantized_decomposed::embedding_byte": 8,
}


def read_pte_weights(path: Path) -> dict[str, Quantized]:
    """Return codes and scales of every quantized weight of a file that `write_pte` wrote.

    Args:
        path: a .pte file.

    Returns:
        By name in the state dict, as `egemma_quant.roles.quantize_encoder` gives them; empty for a
        float32 file.

    Raises:
        ExportError: the file holds another graph than `write_pte` writes.
    """
    file = deserialize_pte_binary(path.read_bytes())
    numbers = {
        plan.name: plan.values[plan.outputs[0]].val.int_val
        for plan in file.program.execution_plan
        if plan.name != "forward"
    }
    found = list(_delegate_weights(file))
    weights = _table(file)
    if not found:
        return weights
    parts = layer_parts(numbers["num_heads"], numbers["num_kv_heads"], numbers["head_dim"])
    names = [
        (f"layers.{layer}.{name}", rows)
        for layer in range(numbers["num_layers"])
        for name, rows in parts
    ]
    names += [(f"dense.{number}.weight", None) for number in range(numbers["num_dense"])]
    if len(found) != len(names):
        raise ExportError(
            f"{path} has {len(found)} quantized linears; this version writes {len(names)}.",
            hint="Export the model again.",
        )
    gathered: dict[str, list[tuple[Tensor | None, Quantized]]] = {}
    for (name, rows), part in zip(names, found, strict=True):
        gathered.setdefault(name, []).append((rows, part))
    return weights | {name: _join(pieces) for name, pieces in gathered.items()}


def _join(pieces: list[tuple[Tensor | None, Quantized]]) -> Quantized:
    """Put the rows of a matrix that was projected in parts back where they came from."""
    rows, first = pieces[0]
    if rows is None:
        return first
    order = torch.cat([rows for rows, _ in pieces if rows is not None]).argsort()
    return Quantized(
        codes=torch.cat([piece.codes for _, piece in pieces])[order],
        scales=torch.cat([piece.scales for _, piece in pieces])[order],
        format=first.format,
    )


def _delegate_weights(file: PTEFile) -> Iterator[Quantized]:
    """Give the quantized matrices of all fully connected nodes, in the order in which they run."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
    for delegate in plan.delegates:
        blob = file.program.backend_delegate_data[delegate.processed.index].data
        graph = _xnnpack_graph(bytes(blob))
        values = {}
        for value in graph["xvalues"]:
            union = value["xvalue_union"]
            values[union.get("tensor_value", union)["id_out"]] = value
        for node in graph["xnodes"]:
            if node["xnode_union_type"] != "XNNFullyConnected":
                continue
            value = values[node["xnode_union"]["filter_id"]]
            if value["xvalue_union_type"] == "XNNQuantizedTensorValue":
                yield _matrix(file, graph, value["xvalue_union"])


def _matrix(file: PTEFile, graph: dict[str, Any], value: dict[str, Any]) -> Quantized:
    tensor, quantization = value["tensor_value"], value["quant_params"]
    rows, columns = tensor["dims"]
    raw = _constant(file, graph, tensor["constant_buffer_idx"])
    scales = _constant(file, graph, quantization["scale_buffer_idx"])
    kind = tensor["datatype"]
    bits = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}[kind]
    if bits == 4:  # the even column in the low nibble, codes shifted by 8
        raw = np.stack((raw & 15, raw >> 4), axis=-1).view(np.int8) - np.int8(8)
    codes = torch.from_numpy(raw.view(np.int8)).view(rows, columns)
    if kind == "xnn_datatype_qbint4":  # bfloat16 scales
        halves = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16)
        return Quantized(
            codes=codes,
            scales=halves.float().view(rows, -1),
            format=WeightFormat(bits=4, group_size=quantization["group_size"]),
        )
    return Quantized(
        codes=codes,
        scales=torch.from_numpy(scales.view(np.float32)).view(rows, 1),
        format=WeightFormat(bits=bits, group_size=None),
    )


def _constant(file: PTEFile, graph: dict[str, Any], index: int) -> Bytes:
    """Return the bytes of one constant of a delegate."""
    entry = graph["constant_data"][index]
    place = file.named_data.pte_data[entry["named_key"]].buffer_index
    stored = bytes(file.named_data.buffers[place])
    if len(stored) != entry["size"]:
        raise ExportError(
            f"constant {entry['named_key']} has {len(stored)} bytes, the graph says "
            f"{entry['size']}."
        )
    return np.frombuffer(bytearray(stored), np.uint8)


def _table(file: PTEFile) -> dict[str, Quantized]:
    """Return the embedding table: the weight of the one quantized lookup outside the delegate."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        name = plan.operators[call.op_index].name if hasattr(call, "op_index") else ""
        if name not in _LOOKUPS:
            continue
        table, scales = (plan.values[argument].val for argument in call.args[:2])
        bits, groups = _LOOKUPS[name], scales.sizes[1]
        width = table.sizes[1] * (2 if bits == 4 else 1)
        codes = _stored(file, table)
        if bits == 4:  # the even column in the high nibble
            codes = np.stack((codes >> 4, codes & 15), axis=-1).view(np.int8) - np.int8(8)
        kind = {5: np.float16, 6: np.float32}[int(scales.scalar_type)]
        numbers = _stored(file, scales).view(kind).astype(np.float32)
        return {
            "embed_tokens.weight": Quantized(
                codes=torch.from_numpy(codes.view(np.int8)).view(-1, width),
                scales=torch.from_numpy(numbers).view(-1, groups),
                format=WeightFormat(
                    bits=bits,
                    group_size=None if groups == 1 else width // groups,
                ),
            )
        }
    return {}


def _stored(file: PTEFile, tensor: Any) -> Bytes:
    """Return the bytes of one constant outside of the delegates."""
    buffer = file.program.constant_buffer[tensor.data_buffer_idx].storage
    return np.frombuffer(bytearray(buffer), np.uint8)


def _xnnpack_graph(blob: bytes) -> dict[str, Any]:
    """Return a delegate's flatbuffer as JSON; its constants are elsewhere, so it is small."""
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start, length = header.flatbuffer_offset, header.flatbuffer_size
    package = importlib.resources.files(executorch.backends.xnnpack.serialization)
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "graph.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(package.joinpath("schema.fbs").read_bytes())
        binary.write_bytes(blob[start : start + length])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(Path(folder, "graph.json").read_text())  # type: ignore[no-any-return]
