"""Weights from a checkpoint folder into an `Encoder`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from egemma_core.checkpoint.folder import WEIGHTS, Checkpoint
from egemma_core.errors import CheckpointError
from egemma_core.nn.encoder import Encoder

_DTYPES = ("F32", "BF16")


def load_encoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Encoder:
    """Return the encoder of a checkpoint, in evaluation mode.

    Args:
        dtype: float32 or bfloat16. float16 is refused: this family's activations reach 800,000,
            float16 ends at 65,504.

    Raises:
        CheckpointError: a tensor is missing, surplus, of another shape, not float, or not finite.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"dtype={dtype} cannot be computed in: EmbeddingGemma's activations overflow float16.",
            hint="Choose float32 or bfloat16.",
        )
    with torch.device("meta"):
        encoder = Encoder(checkpoint.config).to(dtype)
    wanted = {name: weight.shape for name, weight in encoder.named_parameters()}
    found = read_tensors(checkpoint.folder / WEIGHTS, dtype)
    for position, folder in enumerate(checkpoint.dense_folders):
        tensors = read_tensors(folder / WEIGHTS, dtype)
        if set(tensors) != {"linear.weight"}:
            raise CheckpointError(
                f"{folder} holds {sorted(tensors)}; it must hold linear.weight and nothing else."
            )
        found[f"dense.{position}.weight"] = tensors["linear.weight"]

    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensors are missing {missing[:3]} and "
            f"{len(surplus)} are not understood {surplus[:3]}. "
            "The published layout has names such as layers.0.mlp.up_proj.weight, without a prefix."
        )
    for name, weight in found.items():
        if weight.shape != wanted[name]:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {tuple(weight.shape)}, the config says "
                f"{tuple(wanted[name])}."
            )
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{checkpoint.folder}: {name} holds NaN or infinite values; the file is damaged or "
                "training diverged."
            )
    encoder.load_state_dict(found, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def read_tensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, in one dtype.

    Raises:
        CheckpointError: the file is damaged, or holds a tensor of another type than float32 or
            bfloat16.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118  # not a dict
                kind = file.get_slice(name).get_dtype()
                if kind not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is {kind}; only {' and '.join(_DTYPES)} are read."
                    )
                tensors[name] = file.get_tensor(name).to(dtype)
            return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}. It may be cut off; fetch it "
            "again."
        ) from error
