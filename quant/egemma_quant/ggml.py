"""The grids of ggml, for which Google publishes trained weights.

The checkpoints are called `...-qat-q4_0-unquantized` and `...-qat-q8_0-unquantized`. Their float
weights were trained for blocks of 32 with one float16 scale. Any other grid rounds them as no
training prepared them for, so the grid is asked for by name (scheme "q4_0" or "q8_0"), and `hint`
says when it was not.

Source: ggml-quants.c, quantize_row_q4_0_ref and quantize_row_q8_0_ref; the Python package gguf,
with which the tests compare.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from egemma_core.checkpoint.folder import Checkpoint
from egemma_core.errors import ConfigError

_NAME = re.compile(r"qat-(q[48]_0)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GgmlFormat:
    """How ggml stores one matrix.

    Q4_0 has codes in [-8, 7] and scales of either sign, Q8_0 codes in [-127, 127].
    """

    bits: int
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group_size != 32:
            raise ConfigError(
                f"bits={self.bits}, group_size={self.group_size}: ggml's Q4_0 and Q8_0 have 4 and "
                "8 bits, and blocks of 32."
            )


def into_codes(groups: Tensor, bits: int, codes: Tensor) -> Tensor:
    """Fill `codes` as ggml does it, and return the scales.

    Args:
        groups: (32, n) float32, finite; a block is a column.
        codes: (32, n) float32, overwritten.

    Returns:
        (n,) float32, each a float16 number; for 4 bits of either sign, 0 for a block of zeros.

    Raises:
        ConfigError: a scale is beyond float16.
    """
    magnitude = groups.abs()
    largest = magnitude.amax(0)  # (n,)
    if bits == 4:
        # The signed value of largest magnitude, the first among equals, becomes the code -8: this
        # decides the scale's sign.
        place = torch.arange(len(groups), device=groups.device).unsqueeze(-1)
        first = torch.where(magnitude == largest, place, len(groups)).amin(0)  # (n,)
        scales = groups.gather(0, first.unsqueeze(0))[0] / -8
    else:
        scales = largest / 127
    stored = scales.half().float()
    if not torch.isfinite(stored).all():
        raise ConfigError(
            f"a block of weights as large as {float(largest.max()):.3g} has a scale beyond "
            "float16, in which ggml stores it.",
            hint="Choose a scheme of ours, such as int4.",
        )
    # Codes are taken by the scale before float16 rounds it. Where nothing of it is left, all values
    # are 0 with any code.
    inverse = torch.where(stored == 0, torch.zeros_like(scales), 1 / scales)
    torch.mul(groups, inverse, out=codes)
    if bits == 4:
        codes.add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    else:  # C's roundf: halves away from zero
        whole = codes.abs().floor_()
        codes.copy_(codes.sign() * (whole + (2 * (codes.abs() - whole)).floor_()))
    return stored


def published_grid(checkpoint: Checkpoint) -> str | None:
    """Return the grid that the model was trained for, "q4_0" or "q8_0"; None where no name says so.

    The names are its folder's, its hub id, and those in config.json and in the README's header.
    Weights cannot tell: "unquantized" ones lie off every grid.
    """
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    names = [checkpoint.source, checkpoint.folder.name, str(config.get("_name_or_path", ""))]
    readme = checkpoint.folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        # Only the header between two lines of dashes: the text below may name every sibling.
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        names.append(header.group(1) if header else "")
    found = {match.lower() for name in names for match in _NAME.findall(name)}
    return found.pop() if len(found) == 1 else None


def hint(checkpoint: Checkpoint, scheme: str) -> str | None:
    """Return what to say where the model was trained for another grid than that of `scheme`."""
    grid = published_grid(checkpoint)
    if grid is None or grid == scheme:
        return None
    return (
        f"{checkpoint.source} was trained for {grid}, and {scheme} rounds it otherwise. Choose "
        f"scheme {grid}, unless its runtime has no kernel for that."
    )
