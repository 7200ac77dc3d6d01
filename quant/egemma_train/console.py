"""`egemma-train`: the recipe of `egemma_train`, with quantization-aware stages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from egemma_core.errors import ConfigError
from egemma_train import cli

if TYPE_CHECKING:  # at run time it would import torch for --help
    from egemma_core.nn.encoder import Encoder
    from egemma_train.objectives.contrast import Through


def through_of(scheme: str, activations: bool) -> Through:
    """The context in which an encoder computes with weights rounded to the scheme of that name.

    Raises:
        ConfigError: there is none.
    """
    from egemma_quant.qat import rounded
    from egemma_quant.schemes import SCHEMES

    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme!r}: one of {sorted(SCHEMES)}.")

    def through(encoder: Encoder) -> AbstractContextManager[None]:
        return rounded(encoder, SCHEMES[scheme], activations=activations)

    return through


main = partial(cli.main, through_of=through_of)


def run(argv: Sequence[str] | None = None) -> int:
    """The console script; also `python -m egemma_train.console`, which torchrun starts."""
    return main(argv)


if __name__ == "__main__":
    sys.exit(run())
