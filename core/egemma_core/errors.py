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
Each error carries what its text says as data: `found`, `hint`, `position`, `place`.
"""

from __future__ import annotations

from typing import Any, TypeVar

Self = TypeVar("Self", bound="EgemmaError")


class EgemmaError(Exception):
    """The parent of every error that egemma raises on purpose.

    Args:
        found: what was found and what would have been right, in plain sentences.
        hint: the next step, where it is known; the text of the error ends with it.
        position: which of the texts or rows of the call it is about, from 0; None for none.
        place: the same for people, "text 3" or "notes.txt:3"; the text of the error begins with it.
    """

    def __init__(
        self, found: str, *, hint: str = "", position: int | None = None, place: str = ""
    ) -> None:
        super().__init__(_text(found, hint, place))
        self.found = found
        self.hint = hint
        self.position = position
        self.place = place

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError, a second parent, would show quotes

    def __reduce__(self) -> tuple[Any, ...]:
        # Without `__init__`, whose arguments a child may have changed: what it set is all kept.
        return _restored, (type(self), self.args, self.__dict__)

    def at(self: Self, place: str, *, position: int | None = None) -> Self:
        """Return this error as its caller should see it: the same, of another place.

        Args:
            place: a file, a line, a row; it stands where the error's own place stood.
            position: of the text or row in the caller's own call; None keeps the error's.
        """
        copy = _restored(type(self), (_text(self.found, self.hint, place),), self.__dict__)
        copy.place = place
        if position is not None:
            copy.position = position
        return copy.with_traceback(self.__traceback__)

    def within(self: Self, place: str) -> Self:
        """Return this error with `place` in front of its own place: a file before a row of it."""
        return self.at(f"{place}: {self.place}" if self.place else place)


def _text(found: str, hint: str, place: str) -> str:
    text = f"{place}: {found}" if place else found
    return f"{text} {hint}" if hint else text


def _restored(kind: type[Self], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> Self:
    """Return an error of that class with these attributes, without its own `__init__`."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class InputError(EgemmaError, ValueError):
    """A text, id, array or row cannot be embedded, stored or searched for as it is."""


class NotFoundError(InputError, KeyError):
    """Nothing is stored under the id or name that was asked for."""


class ConfigError(EgemmaError, ValueError):
    """A setting cannot work."""


class PromptError(EgemmaError, ValueError):
    """The model has no prompt for the task or title that was asked for."""


class DimensionError(EgemmaError, ValueError):
    """The model was not trained for the vector width that was asked for."""


class ShapeError(EgemmaError, ValueError):
    """Two arrays that belong together disagree in shape."""


class TokenLimitError(EgemmaError, ValueError):
    """A text is longer than the model reads, and the caller asked not to cut it."""


class CheckpointError(EgemmaError):
    """The checkpoint folder is incomplete, or describes a model that this code computes wrongly."""


class ExportError(EgemmaError):
    """A checkpoint could not be exported, or the written file failed its verification."""


class BundleError(EgemmaError):
    """A bundle folder is missing, damaged, or of a version or runtime that is not understood."""


class RuntimeUnavailableError(EgemmaError):
    """The runtime that the bundle needs cannot run here."""


class MissingDependencyError(EgemmaError, ImportError):
    """A library that only an extra brings is not installed, or is too old."""


class IndexFileError(EgemmaError):
    """An index file is missing, damaged, or of a version that is not understood."""


class IndexMismatchError(IndexFileError):
    """An index holds vectors of another model."""


class StoreError(EgemmaError):
    """A store on a server cannot be reached, or is in a state that cannot be used."""


class OutputError(EgemmaError):
    """Results cannot be written where they were asked for."""
