"""Metadata filters: what `where=` may say, and what it means.

    {"lang": "en", "year": {"$gte": 2020},
     "$or": [{"tags": {"$contains": "draft"}}, {"path": {"$startswith": "docs/"}}]}

A filter is true or false for every document, never unknown:

- A comparison with a field that is missing, or of another JSON type, is false. `$ne` is not `$eq`
  and `$nin` is not `$in`, so these are true there.
- true and false are not numbers. null equals null only; a missing field is not null (`$exists`
  tells them apart).
- Numbers compare by value, 1 and 1.0 alike: whole numbers of 64 bits exactly, all others as the
  nearest double. (Metadata holds no whole number beyond 64 bits; a filter may ask for more than any
  of them.)
- Texts compare by code point.
- A name is one key, dots included: {"a.b": 1} asks for the key "a.b". A key inside an object is
  asked for with a tuple, {("a", "b"): 1}; so is a key that begins with "$".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from egemma.metadata import MAX_METADATA_DEPTH, has_64_bits, shown, storable_text
from egemma_core.errors import ConfigError

Scalar: TypeAlias = "str | int | float | bool | None"
Op: TypeAlias = Literal[
    "$eq", "$gt", "$gte", "$lt", "$lte", "$in", "$exists", "$contains", "$startswith"
]

OPS = (
    *("$eq", "$ne", "$gt", "$gte", "$lt", "$lte"),
    *("$in", "$nin", "$exists", "$contains", "$startswith"),
)
LOGIC = ("$and", "$or", "$not")
# SQLite's parser gives up at expressions 1,000 deep, and a chain of n ANDs is n deep.
MAX_COMPARISONS = 200
MAX_FILTER_DEPTH = 20
MAX_VALUES = 10_000  # of one $in

ORDER = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$contains": operator.contains,
    "$startswith": str.startswith,
}


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One field against one value; `parse` has checked that they go together."""

    field: tuple[str, ...]  # keys, from the outermost object inwards
    op: Op
    value: Scalar | tuple[Scalar, ...]  # a tuple for $in


@dataclass(frozen=True)
class And:
    """True where all parts are; of no parts: true."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    """True where one of the parts is; of no parts: false."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Not:
    """True where the part is false."""

    part: Condition


Condition: TypeAlias = "Compare | And | Or | Not"


def parse(where: Mapping[Any, Any]) -> Condition:
    """Return a filter as the user writes it, checked, as a condition.

    Raises:
        ConfigError: an operator, a name or a value that means nothing here, or a filter too large;
            the message names the place.
    """
    condition = _parse(where, "where", 0)
    count = _count(condition)
    if count > MAX_COMPARISONS:
        raise ConfigError(
            f"where has {count} comparisons, and may have {MAX_COMPARISONS}.",
            hint="Use $in for many values of one field.",
        )
    return condition


def matches(condition: Condition, metadata: Mapping[str, Any] | None) -> bool:
    """Say whether the condition holds for one document.

    This is the definition that every engine must agree with.
    """
    if isinstance(condition, And):
        return all(matches(part, metadata) for part in condition.parts)
    if isinstance(condition, Or):
        return any(matches(part, metadata) for part in condition.parts)
    if isinstance(condition, Not):
        return not matches(condition.part, metadata)
    found: Any = metadata
    for key in condition.field:
        if not isinstance(found, Mapping) or key not in found:
            return condition.op == "$exists" and condition.value is False
        found = found[key]
    return _holds(condition.op, found, condition.value)


def comparable(number: float) -> int | float:
    """Return a number as filters compare it: whole and of 64 bits, or the nearest double."""
    return number if isinstance(number, int) and has_64_bits(number) else float(number)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(where: object, place: str, depth: int) -> Condition:
    if not isinstance(where, Mapping):
        raise ConfigError(
            f'{place} is {type(where).__name__}, and must be a mapping such as {{"lang": "en"}}.'
        )
    if depth > MAX_FILTER_DEPTH:
        found = f"{place} is nested more than {MAX_FILTER_DEPTH} deep."
        raise ConfigError(found, hint="Write it flatter.")
    return _all([_entry(key, value, place, depth) for key, value in where.items()])


def _entry(key: object, value: object, place: str, depth: int) -> Condition:
    if key in ("$and", "$or"):
        here = f"{place}[{key!r}]"
        if not isinstance(value, (list, tuple)) or not value:
            found = f"{here} is {shown(value)}, and must be a list of at least one filter."
            raise ConfigError(found)
        parts = [_parse(part, f"{here}[{n}]", depth + 1) for n, part in enumerate(value)]
        return _all(parts) if key == "$and" else Or(tuple(parts))
    if key == "$not":
        return Not(_parse(value, f"{place}['$not']", depth + 1))
    if isinstance(key, str) and key.startswith("$"):
        hint = (
            f"A comparison stands behind its field: {{field: {{{key!r}: value}}}}."
            if key in OPS
            else f"Known here are {', '.join(LOGIC)} and fields; the field {key!r} is written "
            f"({key!r},)."
        )
        raise ConfigError(f"{place} has no operator {shown(key)}.", hint=hint)
    field = _field(key, place)
    here = f"{place}[{shown(key)}]"
    if not isinstance(value, Mapping):
        return _compare(field, "$eq", value, here)
    if not value:
        hint = f"Give it an operator, one of {', '.join(OPS)}."
        raise ConfigError(f"{here} is an empty mapping.", hint=hint)
    return _all([_compare(field, op, operand, here) for op, operand in value.items()])


def _field(key: object, place: str) -> tuple[str, ...]:
    parts = key if isinstance(key, tuple) else (key,)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ConfigError(
            f"{place} has the name {shown(key)}; a field is named by a str, a key inside objects "
            "by a tuple of str."
        )
    if len(parts) > MAX_METADATA_DEPTH:
        found = f"{place} has a name of {len(parts)} keys, and metadata is at most"
        raise ConfigError(f"{found} {MAX_METADATA_DEPTH} deep.")
    return tuple(storable_text(f"a name in {place}", part, ConfigError) for part in parts)


def _compare(field: tuple[str, ...], op: object, value: object, place: str) -> Condition:
    if op not in OPS:
        raise ConfigError(
            f"{place} has no operator {shown(op)}; it can be one of {', '.join(OPS)}.",
            hint="A key inside an object is asked for with a tuple, {(outer, inner): value}; $not "
            "goes around the field.",
        )
    here = f"{place}[{op!r}]"
    if op in ("$ne", "$nin"):
        return Not(_compare(field, "$eq" if op == "$ne" else "$in", value, here))
    checked: Scalar | tuple[Scalar, ...]
    if op == "$in":
        if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MAX_VALUES:
            found = f"{here} is {shown(value)}, and must be a list of at most {MAX_VALUES} values."
            raise ConfigError(found)
        checked = tuple(_scalar(one, here) for one in value)
    else:
        checked = _scalar(value, here)
        if op in ORDER and not (isinstance(checked, str) or is_number(checked)):
            raise ConfigError(f"{here} is {shown(checked)}; only numbers and texts have an order.")
        if op == "$startswith" and not isinstance(checked, str):
            raise ConfigError(f"{here} is {shown(checked)}, and must be a str.")
        if op == "$exists" and not isinstance(checked, bool):
            raise ConfigError(f"{here} is {shown(checked)}, and must be True or False.")
    return Compare(field=field, op=cast(Op, op), value=checked)


def _scalar(value: object, place: str) -> Scalar:
    """Return the value in a plain JSON type; an enum member or a float64 becomes what it is."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return storable_text(place, value, ConfigError)
    if isinstance(value, (int, float)):
        plain = int(value) if isinstance(value, int) else float(value)
        try:
            if math.isfinite(plain):
                return plain
        except OverflowError:  # a whole number beyond every double
            pass
        raise ConfigError(f"{place} is {shown(plain)}, and no number in JSON equals it.")
    several = isinstance(value, (list, tuple, set, frozenset))
    hint = "Use $in for one of several values, $contains for arrays." if several else ""
    found = f"{place} is {shown(value)}, and must be a str, a number, True, False or None."
    raise ConfigError(found, hint=hint)


def _all(parts: Sequence[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _count(condition: Condition) -> int:
    if isinstance(condition, (And, Or)):
        return sum(_count(part) for part in condition.parts)
    return _count(condition.part) if isinstance(condition, Not) else 1


def _holds(op: Op, found: Any, value: Scalar | tuple[Scalar, ...]) -> bool:
    """Compare what a document has in a field."""
    if op == "$exists":
        return value is True
    if op == "$contains" and isinstance(found, (list, tuple)):
        return any(_equal(one, cast(Scalar, value)) for one in found)
    if op in ("$eq", "$in"):
        return any(_equal(found, one) for one in (value if isinstance(value, tuple) else (value,)))
    if op in ORDER and is_number(found) and is_number(value):
        return _TESTS[op](comparable(found), comparable(cast(float, value)))
    if isinstance(found, str) and isinstance(value, str):
        return _TESTS[op](found, value)
    return False


def _equal(found: Any, value: Scalar) -> bool:
    if is_number(found) and is_number(value):
        return comparable(found) == comparable(cast(float, value))
    if isinstance(found, bool) or isinstance(value, bool) or found is None or value is None:
        return found is value
    return isinstance(found, str) and found == value
