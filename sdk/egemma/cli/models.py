"""Which bundle a command opens."""

from __future__ import annotations

import os
from pathlib import Path

from egemma.cli.parser import MODEL_VARIABLE
from egemma.embedder import BUILTIN
from egemma.index import IndexFacts
from egemma_core.errors import IndexFileError


def model_for(asked: str | None, index: IndexFacts | None) -> str:
    """Return the bundle to open.

    It is the one asked for, else the one that the index was made with, else the environment's,
    else "builtin".

    Raises:
        IndexFileError: the bundle that the index was made with is gone, and no other is named.
    """
    if asked is not None:
        return asked
    named = os.environ.get(MODEL_VARIABLE)
    if index is not None and index.model_path is not None:
        if index.model_path == BUILTIN or Path(index.model_path).is_dir():
            return index.model_path
        if not named:
            raise IndexFileError(
                f"{index.path} was made with {index.model} in {index.model_path}, which is gone.",
                hint="Say where that model is now with --model.",
            )
    return named or BUILTIN


def location_of(model: str) -> str:
    """Return what an index remembers of its model: the full path, or "builtin"."""
    return model if model == BUILTIN else str(Path(model).resolve())
