"""Quantization-aware training: forward and backward passes compute with exactly the weights that
ship, and the optimizer moves float ones.

Source: Jacob et al. 2018, arXiv:1712.05877 (straight-through fake quantization); arXiv:2509.20354,
section 2.3 (during finetuning).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from egemma_core.errors import ConfigError
from egemma_core.nn.compiled import is_compiled
from egemma_core.nn.encoder import Encoder
from egemma_quant.roles import role_of
from egemma_quant.schemes import Scheme, round_

_INSIDE_A_BLOCK: WeakSet[Encoder] = WeakSet()  # encoders whose weights are rounded now


@contextmanager
def rounded(encoder: Encoder, scheme: Scheme, *, activations: bool = False) -> Iterator[None]:
    """Let the encoder compute with the weights that ship while the block runs.

    Behind it, its float weights are back, to the last bit. The straight-through gradient is what
    lies in `.grad` after a backward pass inside: that of the rounded weights, applied to the float
    ones. Parameters stay the same objects, so an optimizer made before keeps its state. A backward
    pass behind the block, through a graph made inside, is refused by torch (a weight was modified
    in place).

    Args:
        encoder: float32 master weights. A shard of FSDP2 (DTensor) must hold whole rows, as
            `fully_shard` cuts.
        scheme: what each role is rounded to; the embedding table is one of them.
        activations: also round what goes into every linear layer to 8 bits per token, as the
            XNNPACK targets do at run time.

    Raises:
        ConfigError: the encoder is rounded already, or compiled and `activations` is asked for, a
            weight is not float32 or not finite, or its rows do not divide into groups.

    Example:
        >>> with rounded(encoder, INT4):
        ...     loss(encoder(ids, mask)).backward()
        >>> optimizer.step()
    """
    with rounded_weights(encoder, scheme), rounded_activations(encoder, enabled=activations):
        yield


@contextmanager
def rounded_weights(encoder: Encoder, scheme: Scheme) -> Iterator[dict[str, Tensor]]:
    """Do what `rounded` does to the weights, and give the float ones meanwhile, by their names.

    Raises:
        ConfigError: the encoder is rounded already, a weight is not float32 or not finite, or its
            rows do not divide into groups.
    """
    if encoder in _INSIDE_A_BLOCK:
        raise ConfigError(
            "This encoder is rounded already: its weights are not the float ones.",
            hint="Leave the outer `rounded` block first.",
        )
    weights: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    _INSIDE_A_BLOCK.add(encoder)
    try:
        for name, parameter in encoder.named_parameters():
            role = role_of(name)
            if role is not None:
                weights[name] = _local(name, parameter)
                masters[name] = weights[name].clone()
                round_(weights[name], scheme.format_of(role))
        yield masters
    finally:
        for name, master in masters.items():
            # in place, not a swapped `.data`: torch notices a late backward pass, and FSDP2 gathers
            # from this storage
            weights[name].copy_(master)
        _INSIDE_A_BLOCK.discard(encoder)


def _local(name: str, parameter: nn.Parameter) -> Tensor:
    """Return what this process holds of a parameter, in the same memory, without its graph."""
    weight = parameter.detach()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return weight
    # a second of imports that a single process does not need
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return weight
    if any(
        placement.is_partial() or (placement.is_shard() and not placement.is_shard(0))
        for placement in weight.placements
    ):
        raise ConfigError(
            f"{name} is distributed as {weight.placements}, and groups lie along rows.",
            hint="Shard whole rows (Shard(0)).",
        )
    return weight.to_local()


class _RoundedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, activations: Tensor) -> Tensor:
        return round_tokens(activations)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


@torch.no_grad()
def round_tokens(activations: Tensor) -> Tensor:
    """Return each row (token) rounded to 8 bits with a zero point.

    XNNPACK's dynamic quantization does so before every product.

    Args:
        activations: (..., channels), any float dtype.

    Returns:
        The same shape and dtype. Between the row's lowest and highest value (0 included) lie 255
        steps.

    Source: XNNPACK's qd8 kernels;
    torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric says the same in torch.
    """
    wide = activations.float()
    lowest = wide.amin(-1, keepdim=True).clamp(max=0)
    highest = wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((highest - lowest) / 255).clamp(min=torch.finfo(torch.float32).eps)
    from_lowest, from_highest = lowest / scale, highest / scale
    zero = (
        torch.where(
            (-128 + from_lowest) + (127 + from_highest) > 0, -128 - from_lowest, 127 - from_highest
        )
        .clamp(-128, 127)
        .round()
    )
    codes = (wide / scale + zero).round().clamp(-128, 127)
    return ((codes - zero) * scale).to(activations.dtype)


@contextmanager
def rounded_activations(encoder: Encoder, *, enabled: bool = True) -> Iterator[None]:
    """Let every linear layer see its input rounded by `round_tokens` while the block runs.

    The gradient is straight-through.
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_RoundedTokens.apply(inputs[0]), *inputs[1:])  # type: ignore[no-untyped-call]

    if enabled and is_compiled(encoder):
        raise ConfigError(
            "Activations cannot be rounded in a compiled encoder, which would not call the hooks "
            "that do it.",
            hint="Leave compile out.",
        )
    layers = (
        [module for module in encoder.modules() if isinstance(module, nn.Linear)] if enabled else []
    )
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
