"""Every error that egemma raises on purpose, as users import it; `help` shows the tree."""

from egemma.exported import exported
from egemma_core import errors as _tree
from egemma_core.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DimensionError,
    EgemmaError,
    ExportError,
    IndexFileError,
    IndexMismatchError,
    InputError,
    MissingDependencyError,
    NotFoundError,
    OutputError,
    PromptError,
    RuntimeUnavailableError,
    ShapeError,
    StoreError,
    TokenLimitError,
)

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DimensionError",
    "EgemmaError",
    "ExportError",
    "IndexFileError",
    "IndexMismatchError",
    "InputError",
    "MissingDependencyError",
    "NotFoundError",
    "OutputError",
    "PromptError",
    "RuntimeUnavailableError",
    "ShapeError",
    "StoreError",
    "TokenLimitError",
]

__doc__ = _tree.__doc__
for _name in __all__:
    exported(globals()[_name])
