"""What can be exported, for which runtime, and what is done where a runtime has no kernel for a scheme."""

from __future__ import annotations

from dataclasses import dataclass

from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Scheme


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that `egemma-export --target` makes."""

    name: str
    runtime: str                 # a key of egemma_core.bundle.RUNTIMES
    scheme: Scheme | None        # None: float32 weights
    activations: str             # what the runtime's matrix kernels do with activations
    min_cosine_float: float      # the finished file against the float model, worst golden text and width
    min_cosine_quantized: float  # the finished file against float arithmetic on the same rounded weights
    instead: str = ""            # what is done instead of what the name suggests; empty when nothing is


_INT8_ROWS = "int8, one scale per token, computed at run time"
_XNNPACK_HAS_NO_INT8_BLOCKS = (
    "int8 per channel: XNNPACK has no int8 kernel with a scale per block of 32, so each output row has one scale"
)

# Bounds are for weights that were not trained for the rounding; see docs/decisions/0005-verification-bounds.md.
_INT4 = {"min_cosine_float": 0.90, "min_cosine_quantized": 0.98}
_MIXED = {"min_cosine_float": 0.80, "min_cosine_quantized": 0.98}
_INT8 = {"min_cosine_float": 0.98, "min_cosine_quantized": 0.98}


def _executorch(system: str) -> tuple[Target, ...]:
    return (
        Target(name=f"{system}-int4", runtime="executorch", scheme=INT4, activations=_INT8_ROWS, **_INT4),
        Target(name=f"{system}-mixed", runtime="executorch", scheme=MIXED, activations=_INT8_ROWS, **_MIXED),
        Target(name=f"{system}-int8", runtime="executorch", scheme=INT8_PER_CHANNEL, activations=_INT8_ROWS,
               instead=_XNNPACK_HAS_NO_INT8_BLOCKS, **_INT8),
    )


TARGETS = {
    target.name: target
    for target in (
        *_executorch("android"),
        *_executorch("ios"),
        Target(name="onnx-int4", runtime="onnxruntime", scheme=INT4, activations="int8, one scale per block of 32, computed at run time", **_INT4),
        Target(name="onnx-mixed", runtime="onnxruntime", scheme=MIXED, activations=_INT8_ROWS, **_MIXED),
        Target(name="onnx-int8", runtime="onnxruntime", scheme=INT8, activations="int8, one scale per block of 32, computed at run time", **_INT8),
        Target(name="onnx-fp32", runtime="onnxruntime", scheme=None, activations="float32",
               min_cosine_float=0.99999, min_cosine_quantized=0.99999),
    )
}
