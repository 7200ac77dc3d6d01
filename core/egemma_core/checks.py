"""Checks of single values at the door.

Each returns the value that it accepts and raises `error` for any other. `name` and `what` are for
the message, as the caller calls the value: "k", "num_tokens[3]", "text 3".
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import TypeVar

from egemma_core.errors import ConfigError, EgemmaError, InputError

T = TypeVar("T")


def whole_number(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    error: type[EgemmaError] = ConfigError,
    hint: str = "",
) -> int:
    """Return `value` as an int when it is a whole number from `least` to `most`, both included.

    NumPy's integers are numbers; True and False are not.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        whole = int(value)
        if whole >= least and (most is None or whole <= most):
            return whole
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise error(f"{name}={value!r} must be a whole number {wanted}.", hint=hint)


def number(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    error: type[EgemmaError] = ConfigError,
    hint: str = "",
) -> float:
    """Return `value` as a float when it is a finite number in a range.

    `least` and `most` belong to the range; `above` and `below`, given in their place, do not.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        found = float(value)
        if least <= found <= most and above < found < below:
            return found
    ends = {"above": above, "of at least": least, "below": below, "of at most": most}
    parts = [f"{word} {end:g}" for word, end in ends.items() if math.isfinite(end)]
    wanted = f" {' and '.join(parts)}" if parts else ", not NaN or infinite"
    raise error(f"{name}={value!r} must be a number{wanted}.", hint=hint)


def one_of(
    name: str,
    value: object,
    choices: Collection[T],
    *,
    error: type[EgemmaError] = ConfigError,
    hint: str = "",
) -> T:
    """Return the one of `choices` that equals `value` and is of its type."""
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise error(f"{name}={value!r} must be one of {list(choices)}.", hint=hint)


def unicode_text(
    what: str, value: object, *, error: type[EgemmaError] = InputError, position: int | None = None
) -> str:
    """Return `value` when it is a str that can be written as UTF-8, without a lone surrogate."""
    if not isinstance(value, str):
        found = f"{what} is {type(value).__name__}, and must be str."
        raise error(found, hint="Decode bytes first.", position=position)
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        code = ord(value[problem.start])
        raise error(
            f"{what} holds a lone surrogate U+{code:04X} at character {problem.start}, "
            "which is not Unicode text.",
            hint="Decode the source with errors='replace', or remove it.",
            position=position,
        ) from problem
    return value
