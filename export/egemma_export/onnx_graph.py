"""An ONNX graph while it is made: nodes, initializers, and the weights they come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from egemma_core.nn.encoder import Encoder
from egemma_quant.schemes import Scheme

INPUT_IDS, ATTENTION_MASK, SENTENCE_EMBEDDING = "input_ids", "attention_mask", "sentence_embedding"
# The first with 4-bit tensors; every operator here is in ONNX Runtime 1.24, the newest for iOS.
OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
# Metadata: node name -> [[parameter, rows], ...], because q, k, v are one product, as are gate, up.
ROWS_KEY = "egemma.rows"
MAPPED_BYTES = 2**16  # tensors of at least this many bytes are worth a place in the second file
PAGE_BYTES = 4096

Array = NDArray[Any]


class Graph:
    """Nodes and initializers, in the order in which they are added.

    Attributes:
        config, parameters: of the encoder.
        scheme: how weights are stored; None keeps float32.
        rows: which rows of a joined matrix belong to which parameter, by the name of its node.
        weight_bytes: of all initializers so far.
    """

    def __init__(self, encoder: Encoder, scheme: Scheme | None) -> None:
        self.config = encoder.config
        self.parameters = dict(encoder.named_parameters())
        self.scheme = scheme
        self.rows: dict[str, list[tuple[str, int]]] = {}
        self.weight_bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._names: set[str] = set()
        self._initializers: dict[str, onnx.TensorProto] = {}

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node and return its first output.

        Args:
            outputs: names of what it gives; one, called like the node, unless said otherwise.
        """
        outputs = outputs or (name,)
        node = helper.make_node(
            operator,
            list(inputs),
            list(outputs),
            name=name,
            domain=domain,
            **attributes,
        )
        self._nodes.append(node)
        self._names.add(name)
        return outputs[0]

    def has_node(self, name: str) -> bool:
        """Say whether a node of that name was added."""
        return name in self._names

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer once; later calls with its name return it."""
        if name not in self._initializers:
            self._add(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def int4_constant(self, name: str, codes: Array) -> str:
        """Add signed codes of any shape as a 4-bit tensor, the even element in the low half of its
        byte.
        """
        flat = codes.reshape(-1).view(np.uint8) & 0xF
        packed = flat[0::2] | (flat[1::2] << 4)
        tensor = TensorProto(
            name=name,
            dims=codes.shape,
            data_type=TensorProto.INT4,
            raw_data=packed.tobytes(),
        )
        self._add(tensor)
        return name

    def ints(self, *values: int) -> str:
        """Add whole numbers as an int64 vector, once."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def whole(self, name: str, value: int) -> str:
        """Add one whole number as an int64 scalar, once."""
        return self.constant(name, np.array(value, np.int64))

    def scalar(self, name: str, value: float) -> str:
        """Add one number as a float32 scalar, once."""
        return self.constant(name, np.array(value, np.float32))

    def counts(self) -> dict[str, int]:
        """Return how many nodes of each operator there are."""
        return dict(sorted(Counter(node.op_type for node in self._nodes).items()))

    def to_model(self) -> onnx.ModelProto:
        """Return the whole model; the initializers move into it and are gone from here."""
        tokens = ["batch", "tokens"]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
            for name in (INPUT_IDS, ATTENTION_MASK)
        ]
        output = helper.make_tensor_value_info(
            SENTENCE_EMBEDDING,
            TensorProto.FLOAT,
            ["batch", self.config.dim],
        )
        graph = onnx.GraphProto(
            name="egemma",
            node=self._nodes,
            input=inputs,
            output=[output],
        )
        model = onnx.ModelProto(
            ir_version=IR_VERSION,
            producer_name="egemma",
            opset_import=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            graph=graph,
        )
        while self._initializers:  # one at a time, so that only one table is ever held twice
            name = next(iter(self._initializers))
            model.graph.initializer.append(self._initializers.pop(name))
        helper.set_model_props(model, {ROWS_KEY: json.dumps(self.rows)})
        return model

    def _add(self, tensor: onnx.TensorProto) -> None:
        self._initializers[tensor.name] = tensor
        self.weight_bytes += len(tensor.raw_data)


def move_weights(model: onnx.ModelProto, path: Path) -> Path:
    """Move the large tensors of a model into `<path>.data` and return that file.

    Each starts at a memory page, so that a runtime can map it where it lies.
    """
    beside = path.with_name(path.name + ".data")
    with beside.open("wb") as file:
        for tensor in model.graph.initializer:
            length = len(tensor.raw_data)
            if length < MAPPED_BYTES:
                continue
            file.write(bytes(-file.tell() % PAGE_BYTES))
            set_external_data(tensor, beside.name, offset=file.tell(), length=length)
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
    return beside
