"""What a 4-bit or 8-bit weight of ours may be: codes, and the numbers that scales are."""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {4: (-8, 7), 8: (-127, 127)}  # lowest and highest code, by bits
LARGEST_CODE = {4: 7, 8: 127}  # that a weight of either sign reaches


def as_scale(scale: Tensor) -> Tensor:
    """Return the nearest bfloat16 scales, normal and positive as XNNPACK demands.

    A group of zeros, whose codes are 0 anyway, has the scale 1.
    """
    rounded = scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).float()
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)
