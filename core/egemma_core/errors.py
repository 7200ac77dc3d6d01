"""Every error that egemma raises on purpose: one class per thing a caller could do differently."""


class EgemmaError(Exception):
    """Parent of all; its text says what was found, what would be right, and the next step."""


class CheckpointError(EgemmaError):
    """The checkpoint folder is incomplete, or describes a model that this code would compute
    wrongly.
    """


class ConfigError(EgemmaError):
    """A setting that cannot work."""


class PromptError(EgemmaError):
    """A task or title that the model has no prompt for."""


class TokenLimitError(EgemmaError):
    """A text is longer than the model reads, and the caller asked not to cut it."""


class ShapeError(EgemmaError):
    """Two arrays that belong together disagree in shape."""


class InputError(EgemmaError):
    """A text or array that cannot be embedded or stored as it is."""


class DimensionError(EgemmaError):
    """A vector width that the model was not trained for."""


class BundleError(EgemmaError):
    """A bundle folder is missing, damaged, or of a version or runtime that is not understood."""


class RuntimeUnavailableError(EgemmaError):
    """The runtime that the bundle needs is not installed here."""


class ExportError(EgemmaError):
    """A checkpoint could not be exported, or the written file failed its verification."""


class IndexFileError(EgemmaError):
    """An index file is missing, damaged, or of a version that is not understood."""


class IndexMismatchError(IndexFileError):
    """An index holds vectors of another model."""
