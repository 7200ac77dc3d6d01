"""A table of a TOML file as a frozen dataclass: every key is known and every value of its type, or
an error names what was meant.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from egemma_core.checks import one_of
from egemma_core.errors import ConfigError

T = TypeVar("T")


def read_table(kind: type[T], table: object, where: str, **given: Any) -> T:
    """Return the dataclass `kind` with the values of a table.

    Args:
        where: how the file calls the table, for errors: "[stages.loop]".
        given: fields that do not come from the table, and may not stand in it.

    Raises:
        ConfigError: a key is unknown or missing, a value has another type, or the dataclass refuses
            it.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {table!r} is {type(table).__name__}, not a table.")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.name not in given}  # type: ignore[arg-type]
    check_keys(table, known, where)
    missing = [
        name
        for name, field in known.items()
        if name not in table and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(
            f"{where}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; it "
            f"has {list(table) or 'nothing'}."
        )
    values = {
        name: _converted(value, hints[name], f"{where} {name}") for name, value in table.items()
    }
    try:
        return kind(**values, **given)
    except ConfigError as error:
        raise error.within(where) from error


def check_keys(
    table: Mapping[str, Any], known: Mapping[str, Any] | tuple[str, ...], where: str
) -> None:
    """Refuse a table with a key that is not known.

    Raises:
        ConfigError: a key is not known; names the nearest one that is.
    """
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1)
            raise ConfigError(
                f"{where}: {key!r} is not known; "
                + (f"did you mean {near[0]!r}?" if near else f"there are {list(known)}.")
            )


def _converted(value: Any, hint: Any, where: str) -> Any:
    """Return a value of a file as the type that a field's annotation names."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    if get_origin(hint) is Literal:
        return one_of(where, value, get_args(hint))
    if get_origin(hint) is tuple:
        return _sequence(value, get_args(hint), where)
    if get_origin(hint) in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r} is {type(value).__name__}, not a table.")
        kind = get_args(hint)[1]
        return {key: _converted(part, kind, f"{where}.{key}") for key, part in value.items()}
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{where}={value!r} is {type(value).__name__}, not {hint.__name__}.")
    return float(value) if hint is float else value


def _sequence(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """Return a list as a tuple; where any number of texts may stand, one text is a list of one."""
    if isinstance(value, str) and hints == (str, Ellipsis):
        return (value,)
    if not isinstance(value, list):
        raise ConfigError(f"{where}={value!r} is {type(value).__name__}, not a list.")
    kinds = [hints[0]] * len(value) if hints[-1] is Ellipsis else list(hints)
    if len(kinds) != len(value):
        raise ConfigError(f"{where}={value!r} must have {len(kinds)} values.")
    return tuple(_converted(part, kind, where) for part, kind in zip(value, kinds, strict=True))
