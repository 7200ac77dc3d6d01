"""Whether a module goes through torch.compile."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Say whether any part of `module` is compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())
