"""Layers through torch.compile: the same arithmetic in fewer passes over memory."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from egemma_core.errors import ConfigError, MissingDependencyError
from egemma_train.ranks import is_shard

# of one function: with and without gradients, one row or several, each precision and width of a
# recipe's stages
MOST_GRAPHS = 64


def compile_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Compile what each layer computes, when a batch of a new kind of shape is first met.

    Layers alike are compiled once, for batches of any size, in about 10 s a time. Sums are made in
    another order than without; which one depends on the first batch. So a run that was killed goes
    on to the same weights only up to rounding.

    Raises:
        MissingDependencyError: there is no compiler, or no Triton on a GPU.
        ConfigError: the layers are shards.
    """
    import torch._dynamo  # two seconds of imports that few need

    layers = list(layers)
    if any(is_shard(weight) for layer in layers for weight in layer.parameters()):
        raise ConfigError(
            "compile=true and --shard do not work together.", hint="Leave one of them out."
        )
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise MissingDependencyError(
                "compile=true needs a C++ compiler on a CPU.",
                hint="Install g++ (Debian: apt-get install g++), or leave compile out.",
            ) from error
    elif find_spec("triton") is None:
        raise MissingDependencyError(
            "compile=true needs Triton on a GPU.",
            hint="Install it with `pip install triton`, or leave compile out.",
        )
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # otherwise torch goes on uncompiled, and mentions it in a log only
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in layers:
        layer.compile(dynamic=True)
