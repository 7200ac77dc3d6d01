"""Checks of single values at the door: each returns the value that it accepts."""

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

    Args:
        name: what the caller called it, for the message: "k", "num_tokens[3]".
        most: None for no upper end.

    Raises:
        ConfigError, or `error`: it is none.
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
    above: float | None = None,
    below: float | None = None,
    error: type[EgemmaError] = ConfigError,
    hint: str = "",
) -> float:
    """Return `value` as a float when it is a finite number in a range.

    Args:
        least, most: the range, both ends included.
        above, below: the range, the end not included; in place of `least` or `most`.

    Raises:
        ConfigError, or `error`: it is no number, NaN, infinite, or outside.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        found = float(value)
        inside = (above is None or found > above) and (below is None or found < below)
        if least <= found <= most and inside:
            return found
    parts = [f"above {above:g}"] if above is not None else []
    parts += [f"of at least {least:g}"] if above is None and least > -math.inf else []
    parts += [f"below {below:g}"] if below is not None else []
    parts += [f"of at most {most:g}"] if below is None and most < math.inf else []
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
    """Return the one of `choices` that equals `value` and is of its type.

    Raises:
        ConfigError, or `error`: there is none; lists them.
    """
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise error(f"{name}={value!r} must be one of {list(choices)}.", hint=hint)


def unicode_text(
    what: str,
    value: object,
    *,
    error: type[EgemmaError] = InputError,
    position: int | None = None,
) -> str:
    """Return `value` when it is a str that can be written as UTF-8.

    Args:
        what: what the caller called it, for the message: "text 3", "the query".

    Raises:
        InputError, or `error`: it is no str, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise error(
            f"{what} is {type(value).__name__}, and must be str.",
            hint="Decode bytes first.",
            position=position,
        )
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
