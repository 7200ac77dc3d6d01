"""Quantization-aware training: the forward pass computes with exactly the weights that ship, gradients go to the float ones.

Source: Jacob et al. 2018, arXiv:1712.05877 (straight-through fake quantization); arXiv:2509.20354, section 2.3 (during finetuning).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from egemma_core.config import EncoderConfig
from egemma_core.nn.encoder import Encoder
from egemma_quant.schemes import Scheme, WeightFormat, quantize
from egemma_quant.weights import role_of


class _Rounded(torch.autograd.Function):
    """Weight to dequantized weight; the gradient passes as if nothing had happened.

    Not `weight + (rounded - weight).detach()`: that is two more roundings, which mostly cancel, but are not promised to.
    """

    @staticmethod
    def forward(ctx: object, weight: Tensor, weight_format: WeightFormat) -> Tensor:
        return quantize(weight, weight_format).dequantize().to(weight.dtype)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _RoundedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, activations: Tensor) -> Tensor:
        return round_tokens(activations)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def fake_quantize(weight: Tensor, weight_format: WeightFormat) -> Tensor:
    """A matrix as the exported file will hold it: codes times scales of `schemes.quantize`, with a straight-through gradient.

    Args:
        weight: (rows, columns) float32.

    Returns:
        The same shape and dtype, equal to the last bit to what is read back out of a .pte or .onnx of this weight.
    """
    return _Rounded.apply(weight, weight_format)  # type: ignore[no-untyped-call, no-any-return]


@torch.no_grad()
def round_tokens(activations: Tensor) -> Tensor:
    """Each row (token) to 8 bits with a zero point and back: what XNNPACK's dynamic quantization does before every product.

    Args:
        activations: (..., channels), any float dtype.

    Returns:
        The same shape and dtype. Between the row's lowest and highest value (0 included) lie 255 steps.

    Source: XNNPACK's qd8 kernels; torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric says the same in torch.
    """
    wide = activations.float()
    lowest, highest = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((highest - lowest) / 255).clamp(min=torch.finfo(torch.float32).eps)
    from_lowest, from_highest = lowest / scale, highest / scale
    zero = torch.where((-128 + from_lowest) + (127 + from_highest) > 0, -128 - from_lowest, 127 - from_highest).clamp(-128, 127).round()
    codes = (wide / scale + zero).round().clamp(-128, 127)
    return ((codes - zero) * scale).to(activations.dtype)


class QatEncoder(nn.Module):
    """An encoder that is trained as it will ship. It owns no weights of its own: `encoder` is what the optimizer moves.

    Args:
        encoder: float32 master weights.
        scheme: what each role is rounded to; the embedding table is one of them.
        activations: also round what goes into every linear layer to 8 bits per token, as the XNNPACK targets do at run time.
    """

    def __init__(self, encoder: Encoder, scheme: Scheme, *, activations: bool = False) -> None:
        super().__init__()
        self.encoder, self.scheme, self.activations = encoder, scheme, activations

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    def weights(self) -> dict[str, Tensor]:
        """What the forward pass computes with, by the encoder's own parameter names: rounded where the scheme says so."""
        return {name: fake_quantize(weight, self.scheme.format_of(role)) if (role := role_of(name)) is not None else weight
                for name, weight in self.encoder.named_parameters()}

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As `Encoder.forward`: (B, T) ids and mask to (B, dim) float32 unit vectors."""
        with rounded_activations(self.encoder, enabled=self.activations):
            return functional_call(self.encoder, self.weights(), (ids, mask))  # type: ignore[no-any-return]


@contextmanager
def rounded_activations(encoder: Encoder, *, enabled: bool = True) -> Iterator[None]:
    """Inside the block every linear layer sees its input rounded by `round_tokens`, with a straight-through gradient."""
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_RoundedTokens.apply(inputs[0]), *inputs[1:])  # type: ignore[no-untyped-call]

    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)] if enabled else []
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
