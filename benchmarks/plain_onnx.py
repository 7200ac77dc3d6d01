"""The peer of our ONNX graph: what a generic export and a generic 4-bit quantization leave behind.

`torch.onnx.export` traces the encoder into standard operators, then ONNX Runtime's own
`MatMulNBitsQuantizer` packs every constant MatMul at 4 bits, block 32, 8-bit activations: the usual
recipe of 2026. Its embedding table stays float32, as that quantizer leaves Gather alone by default.
Latency compares fairly; file size and accuracy do not.

    python -m benchmarks.plain_onnx float32|int4 CHECKPOINT OUT.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import torch

from egemma_core.nn.encoder import Encoder


def write_plain_float(encoder: Encoder, path: Path) -> Path:
    """Write `encoder` as a plainly exported .onnx with our input and output names."""
    ids, mask = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    batch, tokens = (
        torch.export.Dim("batch", min=1, max=1024),
        torch.export.Dim("tokens", min=1, max=encoder.config.max_tokens),
    )
    shape = {0: batch, 1: tokens}
    program = torch.onnx.export(
        encoder.float().eval(),
        (ids, mask),
        dynamo=True,
        dynamic_shapes=(shape, shape),
        verbose=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
    )
    assert program is not None
    program.save(str(path), external_data=False)
    return path


def write_plain_nbits(encoder: Encoder, path: Path) -> Path:
    """The same, with every constant MatMul replaced by MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    float_path = write_plain_float(encoder, path.with_suffix(".float.onnx"))
    settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(float_path)), algo_config=settings)
    quantizer.process()
    onnx.save(quantizer.model.model, str(path))
    float_path.unlink()
    return path


def main() -> int:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder

    kind, model, out = sys.argv[1:]
    write = {"float32": write_plain_float, "int4": write_plain_nbits}[kind]
    write(load_encoder(open_checkpoint(model)), Path(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
