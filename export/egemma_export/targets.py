"""What can be exported, for which runtime, and what is done where a runtime lacks a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from egemma_core.bundle import Bounds
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Q4_0, Q8_0, Scheme


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that `egemma-export --target` makes."""

    name: str
    runtime: str  # a key of egemma_core.bundle.RUNTIMES
    scheme: Scheme | None  # None: float32 weights
    activations: str  # what the runtime's matrix kernels do with activations
    # for weights that were not trained for the rounding: docs/decisions/0005-verification-bounds.md
    bounds: Bounds
    instead: str = ""  # what is done instead of what the name suggests; empty when nothing is


_PER_TOKEN = "int8, one scale per token, computed at run time"
_PER_BLOCK = "int8, scaled at run time per block of 32 or per token, as the CPU's kernel does it"
_NO_INT8_BLOCKS = (
    "int8 per channel: XNNPACK has no int8 kernel with a scale per block of 32, so "
    "each output row has one scale"
)

_EXACT = Bounds(min_cosine_float=0.99999, min_cosine_quantized=0.99999, max_batch_difference=1e-5)
_INT8 = Bounds(min_cosine_float=0.98, min_cosine_quantized=0.99)
_INT4 = Bounds(min_cosine_float=0.90, min_cosine_quantized=0.99)
_MIXED = Bounds(min_cosine_float=0.80, min_cosine_quantized=0.99)


def _executorch(system: str) -> tuple[Target, ...]:
    return (
        Target(
            name=f"{system}-int4",
            runtime="executorch",
            scheme=INT4,
            activations=_PER_TOKEN,
            bounds=_INT4,
        ),
        Target(
            name=f"{system}-mixed",
            runtime="executorch",
            scheme=MIXED,
            activations=_PER_TOKEN,
            bounds=_MIXED,
        ),
        Target(
            name=f"{system}-int8",
            runtime="executorch",
            scheme=INT8_PER_CHANNEL,
            activations=_PER_TOKEN,
            bounds=_INT8,
            instead=_NO_INT8_BLOCKS,
        ),
    )


TARGETS = {
    target.name: target
    for target in (
        *_executorch("android"),
        *_executorch("ios"),
        Target(
            name="onnx-int4",
            runtime="onnxruntime",
            scheme=INT4,
            activations=_PER_BLOCK,
            bounds=_INT4,
        ),
        Target(
            name="onnx-mixed",
            runtime="onnxruntime",
            scheme=MIXED,
            activations=_PER_TOKEN,
            bounds=_MIXED,
        ),
        Target(
            name="onnx-int8",
            runtime="onnxruntime",
            scheme=INT8,
            activations=_PER_BLOCK,
            bounds=_INT8,
        ),
        # The grids of Google's published quantization-aware checkpoints; XNNPACK has no kernel for
        # their scales (docs/decisions/0001).
        Target(
            name="onnx-q4_0",
            runtime="onnxruntime",
            scheme=Q4_0,
            activations=_PER_BLOCK,
            bounds=_INT4,
        ),
        Target(
            name="onnx-q8_0",
            runtime="onnxruntime",
            scheme=Q8_0,
            activations=_PER_BLOCK,
            bounds=_INT8,
        ),
        Target(
            name="onnx-fp32",
            runtime="onnxruntime",
            scheme=None,
            activations="float32",
            bounds=_EXACT,
        ),
    )
}
