"""Every error that egemma raises on purpose: one class per thing a caller could do differently.

    EgemmaError
    ├── InputError (ValueError)             a text, id, array or row that cannot be used
    │   └── NotFoundError (KeyError)        an id or a name that nothing is stored under
    ├── ConfigError (ValueError)            a setting that cannot work
    ├── PromptError (ValueError)            a task or title that the model has no prompt for
    ├── DimensionError (ValueError)         a vector width that the model was not trained for
    ├── ShapeError (ValueError)             arrays that belong together disagree in shape
    ├── TokenLimitError (ValueError)        a text is longer than the model reads
    ├── CheckpointError                     a checkpoint folder is incomplete or computes otherwise
    ├── ExportError                         a checkpoint could not be exported or verified
    ├── BundleError                         a bundle folder is missing, damaged or not understood
    ├── RuntimeUnavailableError             the runtime that the bundle needs cannot run here
    ├── MissingDependencyError (ImportError)   a library of an extra is not installed
    ├── IndexFileError                      an index file is missing, damaged or not understood
    │   └── IndexMismatchError              an index holds vectors of another model
    ├── StoreError                          a store on a server is out of reach or not usable
    └── OutputError                         results cannot be written where they were asked for

The class in brackets is a second parent, for code that catches what Python itself would raise.

Each carries what its text says as data: `found`, what was found and what would be right; `hint`,
the next step; `position`, which of the texts or rows of the call it is about, from 0; `place`, the
same for people. `at` gives the same error of a place that the caller knows better, such as a line.
"""

from egemma.exported import exported
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

for _name in __all__:
    exported(globals()[_name])
