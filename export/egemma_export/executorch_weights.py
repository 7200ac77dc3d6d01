"""What an encoder's weights become in an XNNPACK graph: linears and table rows, as its operators
read them.

Shapes: T tokens, D width, V vocabulary, G groups of weights that share a scale.
"""

from __future__ import annotations

# Importing this module registers quantized_decomposed::embedding_4bit and embedding_byte.
import executorch.exir.passes._quant_patterns_and_replacements  # type: ignore[import-untyped] # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.errors import ExportError
from egemma_quant.ggml import GgmlFormat
from egemma_quant.schemes import Quantized

Weight = Tensor | Quantized

quantized_ops = torch.ops.quantized_decomposed


def take_rows(weight: Weight, rows: Tensor | None) -> Weight:
    """Return some rows of a matrix in storage of their own.

    XNNPACK's serializer would write the whole storage behind a view.
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
                "negative ones; ggml's are float16 of either sign.",
                hint="Choose onnx, which holds them exactly, or an int4 or int8 target, which "
                "rounds the weights anew.",
            )
        if weight.format.group_size is not None and weight.format.bits != 4:
            raise ExportError(
                f"{weight.format}: XNNPACK has blockwise kernels for 4 bits only.",
                hint="Choose int8-per-channel.",
            )
        per_row = weight.format.group_size is None
        self.register_buffer("weight", weight.codes)
        self.register_buffer("scales", weight.scales.flatten() if per_row else weight.scales)
        # Symmetric. XNNPACK reads no zero points here, but the operators that its partitioner
        # recognizes take them.
        dtype = torch.int64 if per_row else torch.int8
        self.register_buffer("zeros", torch.zeros_like(self.scales, dtype=dtype))

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
    """Return x rounded to 8 bits per token (asymmetric), if `reader` is quantized.

    Called once per input, however many linears read it.
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
    """The table; of a quantized one the rows in use are dequantized, outside the delegate."""

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
