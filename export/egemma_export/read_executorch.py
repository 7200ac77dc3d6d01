"""Reads codes and scales back out of a finished .pte: proof that the file holds the numbers that
were trained.

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


def read_pte_weights(path: Path) -> dict[str, Quantized]:
    """Codes and scales of every quantized weight of a file that `write_pte` wrote, by their names
    in the state dict.

    Args:
        path: a .pte file.

    Returns:
        name -> codes (rows, columns) and scales (rows, G), as
        `egemma_quant.roles.quantize_encoder` gives them; empty for a float32 file.

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
            f"{path} has {len(found)} quantized linears, {len(names)} were expected; was it "
            "written by this version?"
        )
    gathered: dict[str, list[tuple[Tensor | None, Quantized]]] = {}
    for (name, rows), part in zip(names, found, strict=True):
        gathered.setdefault(name, []).append((rows, part))
    return weights | {name: _join(pieces) for name, pieces in gathered.items()}


def _join(pieces: list[tuple[Tensor | None, Quantized]]) -> Quantized:
    """Puts the rows of a matrix that was projected in parts back where they came from."""
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
    """The quantized matrices of all fully connected nodes, in the order in which they run."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
    for delegate in plan.delegates:
        graph = _xnnpack_graph(
            bytes(file.program.backend_delegate_data[delegate.processed.index].data)
        )
        values = {
            value["xvalue_union"].get("tensor_value", value["xvalue_union"])["id_out"]: value
            for value in graph["xvalues"]
        }
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
    bits = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}[
        tensor["datatype"]
    ]
    if bits == 4:  # the even column in the low nibble, codes shifted by 8
        codes = torch.from_numpy(
            np.stack((raw & 15, raw >> 4), axis=-1).view(np.int8) - np.int8(8)
        ).view(rows, columns)
    else:
        codes = torch.from_numpy(raw.view(np.int8)).view(rows, columns)
    if tensor["datatype"] == "xnn_datatype_qbint4":
        return Quantized(
            codes=codes,
            scales=torch.from_numpy(scales.view(np.int16))
            .view(torch.bfloat16)
            .float()
            .view(rows, -1),
            format=WeightFormat(bits=4, group_size=quantization["group_size"]),
        )
    return Quantized(
        codes=codes,
        scales=torch.from_numpy(scales.view(np.float32)).view(rows, 1),
        format=WeightFormat(bits=bits, group_size=None),
    )


def _constant(
    file: PTEFile, graph: dict[str, Any], index: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    entry = graph["constant_data"][index]
    stored = bytes(
        file.named_data.buffers[file.named_data.pte_data[entry["named_key"]].buffer_index]
    )
    if len(stored) != entry["size"]:
        raise ExportError(
            f"constant {entry['named_key']} has {len(stored)} bytes, the graph says "
            f"{entry['size']}."
        )
    return np.frombuffer(bytearray(stored), np.uint8)


def _table(file: PTEFile) -> dict[str, Quantized]:
    """The embedding table, the weight operand of the one quantized lookup outside the delegate."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        name = plan.operators[call.op_index].name if hasattr(call, "op_index") else ""
        if name in ("quantized_decomposed::embedding_4bit", "quantized_decomposed::embedding_byte"):
            table, scales = (plan.values[argument].val for argument in call.args[:2])
            raw = np.frombuffer(
                bytearray(file.program.constant_buffer[table.data_buffer_idx].storage), np.uint8
            )
            if name.endswith("4bit"):  # the even column in the high nibble
                codes = np.stack((raw >> 4, raw & 15), axis=-1).view(np.int8) - np.int8(8)
            else:
                codes = raw.view(np.int8)
            width = table.sizes[1] * (2 if name.endswith("4bit") else 1)
            kind = {5: np.float16, 6: np.float32}[int(scales.scalar_type)]
            numbers = np.frombuffer(
                bytearray(file.program.constant_buffer[scales.data_buffer_idx].storage), kind
            )
            groups = scales.sizes[1]
            return {
                "embed_tokens.weight": Quantized(
                    codes=torch.from_numpy(codes).view(-1, width),
                    scales=torch.from_numpy(numbers.astype(np.float32)).view(-1, groups),
                    format=WeightFormat(
                        bits=4 if name.endswith("4bit") else 8,
                        group_size=None if groups == 1 else width // groups,
                    ),
                )
            }
    return {}


def _xnnpack_graph(blob: bytes) -> dict[str, Any]:
    """The delegate's flatbuffer as JSON; its constants are elsewhere, so it is small."""
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "graph.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(
            importlib.resources.files(executorch.backends.xnnpack.serialization)
            .joinpath("schema.fbs")
            .read_bytes()
        )
        binary.write_bytes(
            blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        )
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(Path(folder, "graph.json").read_text())  # type: ignore[no-any-return]
