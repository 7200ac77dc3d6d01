"""Metadata filters: what `where=` may say, what it means, and the same in SQLite's SQL.

    {"lang": "en", "year": {"$gte": 2020}, "$or": [{"tags": {"$contains": "draft"}}, {"path":
    {"$startswith": "docs/"}}]}

A filter is true or false for every document, never unknown:

- A comparison with a field that is missing, or of another JSON type, is false. `$ne` is not `$eq`
and `$nin` is not `$in`,
  so these are true there.
- true and false are not numbers. null equals null only; a missing field is not null (`$exists`
tells them apart). - Numbers compare by value, 1 and 1.0 alike: whole numbers of 64 bits exactly,
all others as the nearest double. (Metadata
  holds no whole number beyond 64 bits; a filter may ask for more than any of them.)
- Texts compare by code point.
- A name is one key, dots included: {"a.b": 1} asks for the key "a.b". A key inside an object is
asked for with a tuple,
  {("a", "b"): 1}; so is a key that begins with "$".
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from egemma_core.errors import ConfigError, InputError

Scalar: TypeAlias = "str | int | float | bool | None"
Op: TypeAlias = Literal[
    "$eq", "$gt", "$gte", "$lt", "$lte", "$in", "$exists", "$contains", "$startswith"
]

OPS = (
    "$eq",
    "$ne",
    "$gt",
    "$gte",
    "$lt",
    "$lte",
    "$in",
    "$nin",
    "$exists",
    "$contains",
    "$startswith",
)
LOGIC = ("$and", "$or", "$not")
# SQLite's parser gives up at expressions 1,000 deep, and a chain of n ANDs is n deep.
MAX_COMPARISONS = 200
MAX_FILTER_DEPTH = 20
MAX_VALUES = 10_000  # of one $in
MAX_METADATA_DEPTH = 64  # SQLite reads JSON 1,000 deep, other readers less

_ORDER = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$contains": operator.contains,
    "$startswith": str.startswith,
}
# Keys that every writer of JSON leaves as they are, and that SQLite's paths can therefore find in
# the stored text: before 3.45 it compares them with the text between the quotation marks, escapes
# and all. "/" is missing because Apple's writer escapes it.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:@$#+-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One field against one value; `parse` has checked that they go together."""

    field: tuple[str, ...]  # keys, from the outermost object inwards
    op: Op
    value: Scalar | tuple[Scalar, ...]  # a tuple for $in


@dataclass(frozen=True)
class All:
    parts: tuple[Condition, ...]  # of none: true


@dataclass(frozen=True)
class Any_:  # noqa: N801 - `typing.Any` is taken
    parts: tuple[Condition, ...]  # of none: false


@dataclass(frozen=True)
class Not:
    part: Condition


Condition: TypeAlias = "Compare | All | Any_ | Not"


def parse(where: Mapping[Any, Any]) -> Condition:
    """A filter as the user writes it, checked.

    Raises:
        ConfigError: an operator, a name or a value that means nothing here, or a filter too large;
            the message names the place.
    """
    condition = _parse(where, "where", 0)
    count = _count(condition)
    if count > MAX_COMPARISONS:
        raise ConfigError(
            f"where has {count} comparisons: at most {MAX_COMPARISONS}. Use $in for many values of "
            "one field."
        )
    return condition


def matches(condition: Condition, metadata: Mapping[str, Any] | None) -> bool:
    """Whether the condition holds for one document; this is the definition that every engine must
    agree with.
    """
    if isinstance(condition, All):
        return all(matches(part, metadata) for part in condition.parts)
    if isinstance(condition, Any_):
        return any(matches(part, metadata) for part in condition.parts)
    if isinstance(condition, Not):
        return not matches(condition.part, metadata)
    found: Any = metadata
    for key in condition.field:
        if not isinstance(found, Mapping) or key not in found:
            return condition.op == "$exists" and condition.value is False
        found = found[key]
    return _holds(condition.op, found, condition.value)


def to_sqlite(
    condition: Condition, column: str = "documents.metadata"
) -> tuple[str, list[str | int | float]]:
    """The condition as an SQL expression that is 1 or 0, and its parameters, in the order of their
    question marks.

    Args:
        column: SQL that gives a document's metadata as `pack_metadata` writes it, or NULL. Nothing
            else of the SQL comes from outside: names and values are parameters.
    """
    parameters: list[str | int | float] = []
    return _sqlite(condition, column, parameters), parameters


def pack_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    """A document's metadata as JSON text, None for none.

    Raises:
        InputError: something that JSON cannot hold, or that readers of JSON do not agree on; the
            message names the place.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InputError(
            f"metadata is {type(metadata).__name__}: pass a mapping from str to JSON values, or "
            "None."
        )
    return json.dumps(_json_value(metadata, "metadata", 0), ensure_ascii=False, allow_nan=False)


def comparable(number: float) -> int | float:
    """A number as filters compare it: a whole number of 64 bits stays, any other becomes the
    nearest double.
    """
    return number if isinstance(number, int) and _has_64_bits(number) else float(number)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(where: object, place: str, depth: int) -> Condition:
    if not isinstance(where, Mapping):
        raise ConfigError(
            f'{place} is {type(where).__name__}: a mapping is wanted, such as {{"lang": "en"}}.'
        )
    if depth > MAX_FILTER_DEPTH:
        raise ConfigError(f"{place} is nested more than {MAX_FILTER_DEPTH} deep. Write it flatter.")
    return _all([_entry(key, value, place, depth) for key, value in where.items()])


def _entry(key: object, value: object, place: str, depth: int) -> Condition:
    if key in ("$and", "$or"):
        here = f"{place}[{key!r}]"
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(
                f"{here} is {_shown(value)}: a list of at least one filter is wanted."
            )
        parts = [
            _parse(part, f"{here}[{position}]", depth + 1) for position, part in enumerate(value)
        ]
        return _all(parts) if key == "$and" else Any_(tuple(parts))
    if key == "$not":
        return Not(_parse(value, f"{place}['$not']", depth + 1))
    if isinstance(key, str) and key.startswith("$"):
        wanted = (
            f"A comparison stands behind its field: {{field: {{{key!r}: value}}}}."
            if key in OPS
            else f"Here can stand {', '.join(LOGIC)} or a field; the field {key!r} is written "
            f"({key!r},)."
        )
        raise ConfigError(f"{place} has no operator {_shown(key)}. {wanted}")
    field = _field(key, place)
    here = f"{place}[{_shown(key)}]"
    if not isinstance(value, Mapping):
        return _compare(field, "$eq", value, here)
    if not value:
        raise ConfigError(
            f"{here} is an empty mapping: give it an operator, one of {', '.join(OPS)}."
        )
    return _all([_compare(field, op, operand, here) for op, operand in value.items()])


def _field(key: object, place: str) -> tuple[str, ...]:
    parts = key if isinstance(key, tuple) else (key,)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ConfigError(
            f"{place} has the name {_shown(key)}: a field is named by a str, a key inside objects "
            "by a tuple of str."
        )
    if len(parts) > MAX_METADATA_DEPTH:
        raise ConfigError(
            f"{place} has a name of {len(parts)} keys: metadata is at most {MAX_METADATA_DEPTH} "
            "deep."
        )
    return tuple(_text(part, f"a name in {place}") for part in parts)


def _compare(field: tuple[str, ...], op: object, value: object, place: str) -> Condition:
    if op not in OPS:
        raise ConfigError(
            f"{place} has no operator {_shown(op)}; it can be one of {', '.join(OPS)}. "
            "A key inside an object is asked for with a tuple, {(outer, inner): value}; $not goes "
            "around the field."
        )
    here = f"{place}[{op!r}]"
    if op in ("$ne", "$nin"):
        return Not(_compare(field, "$eq" if op == "$ne" else "$in", value, here))
    checked: Scalar | tuple[Scalar, ...]
    if op == "$in":
        if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MAX_VALUES:
            raise ConfigError(
                f"{here} is {_shown(value)}: a list of at most {MAX_VALUES} values is wanted."
            )
        checked = tuple(_scalar(one, here) for one in value)
    else:
        checked = _scalar(value, here)
        if op in _ORDER and not (isinstance(checked, str) or is_number(checked)):
            raise ConfigError(f"{here} is {_shown(checked)}: only numbers and texts have an order.")
        if op == "$startswith" and not isinstance(checked, str):
            raise ConfigError(f"{here} is {_shown(checked)}: a str is wanted.")
        if op == "$exists" and not isinstance(checked, bool):
            raise ConfigError(f"{here} is {_shown(checked)}: True or False is wanted.")
    return Compare(field=field, op=cast(Op, op), value=checked)


def _scalar(value: object, place: str) -> Scalar:
    """The value as a plain JSON type; subclasses such as enum members and NumPy's float64 become
    what they are.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, place)
    if isinstance(value, (int, float)):
        plain = int(value) if isinstance(value, int) else float(value)
        if not _is_finite(plain):
            raise ConfigError(f"{place} is {_shown(plain)}: no number in JSON equals it.")
        return plain
    hint = (
        " Use $in for one of several values, $contains for arrays."
        if isinstance(value, (list, tuple, set, frozenset))
        else ""
    )
    raise ConfigError(
        f"{place} is {_shown(value)}: a str, a number, True, False or None is wanted.{hint}"
    )


def _text(text: str, place: str) -> str:
    if flaw := _text_flaw(text):
        raise ConfigError(f"{place} is {_shown(text)}, which holds {flaw}: no stored text does.")
    return str.__str__(text)


def _all(parts: Sequence[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _count(condition: Condition) -> int:
    if isinstance(condition, (All, Any_)):
        return sum(_count(part) for part in condition.parts)
    return _count(condition.part) if isinstance(condition, Not) else 1


def _shown(value: object) -> str:
    """What a message can carry of a value."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # such as an int of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _holds(op: Op, found: Any, value: Scalar | tuple[Scalar, ...]) -> bool:
    """One comparison with what a document has in that field."""
    if op == "$exists":
        return value is True
    if op == "$contains" and isinstance(found, (list, tuple)):
        return any(_equal(one, cast(Scalar, value)) for one in found)
    if op in ("$eq", "$in"):
        return any(_equal(found, one) for one in (value if isinstance(value, tuple) else (value,)))
    left: Any = found
    right: Any = value
    if op in _ORDER and is_number(found) and is_number(value):
        left, right = comparable(found), comparable(right)
    elif not (isinstance(found, str) and isinstance(value, str)):
        return False
    return _TESTS[op](left, right)


def _equal(found: Any, value: Scalar) -> bool:
    if is_number(found) and is_number(value):
        return comparable(found) == comparable(cast(float, value))
    if isinstance(found, bool) or isinstance(value, bool) or found is None or value is None:
        return found is value
    return isinstance(found, str) and found == value


def _sqlite(condition: Condition, column: str, parameters: list[str | int | float]) -> str:
    if isinstance(condition, (All, Any_)):
        if not condition.parts:
            return "1" if isinstance(condition, All) else "0"
        glue = " AND " if isinstance(condition, All) else " OR "
        return f"({glue.join(_sqlite(part, column, parameters) for part in condition.parts)})"
    if isinstance(condition, Not):
        return f"(NOT {_sqlite(condition.part, column, parameters)})"
    if condition.op == "$exists" and condition.value is False:
        exists = Compare(field=condition.field, op="$exists", value=True)
        return f"(NOT {_sqlite(exists, column, parameters)})"
    if all(_PLAIN_KEY.fullmatch(key) for key in condition.field):
        path = "$" + "".join(f'."{key}"' for key in condition.field)
        source = (
            f"(SELECT json_type({column}, ?) AS type, json_extract({column}, ?) AS value) AS field"
        )
        parameters += [path, path]
        test = _sqlite_test(condition, parameters)
        return f"(EXISTS (SELECT 1 FROM {source} WHERE field.type IS NOT NULL AND {test}))"
    steps = [f"json_each({column}) AS key0"]
    steps += [
        f"json_each(CASE key{n}.type WHEN 'object' THEN key{n}.value END) AS key{n + 1}"
        for n in range(len(condition.field) - 1)
    ]
    names = " AND ".join(f"key{n}.key = ?" for n in range(len(condition.field)))
    parameters += condition.field
    last = f"key{len(condition.field) - 1}"
    test = _sqlite_test(condition, parameters)
    # In an object of its own, so that both ways above ask the same test.
    return (
        f"(EXISTS (SELECT 1 FROM (SELECT {last}.type AS type, {last}.value AS value FROM "
        f"{', '.join(steps)} WHERE {names}) AS field WHERE {test}))"
    )


def _sqlite_test(condition: Compare, parameters: list[str | int | float]) -> str:
    """SQL over `field.type` and `field.value`; NULL counts as false, because EXISTS stands around
    it.
    """
    op, value = condition.op, condition.value
    if op == "$exists":
        return "1"
    if op in ("$eq", "$in"):
        return _sqlite_one_of("field", value if isinstance(value, tuple) else (value,), parameters)
    array = ""
    if op == "$contains":
        # CASE, because a text may look like an array.
        members = "json_each(CASE field.type WHEN 'array' THEN field.value END) AS member"
        array = (
            f"EXISTS (SELECT 1 FROM {members} WHERE "
            f"{_sqlite_one_of('member', (cast(Scalar, value),), parameters)})"
        )
        if not isinstance(value, str):
            return array
    if isinstance(value, str):
        test = {
            "$contains": "instr(field.value, ?)",
            "$startswith": "instr(field.value, ?) = 1",
        }.get(op) or f"field.value {_ORDER[op]} ?"
        parameters.append(value)
        text = f"(field.type = 'text' AND {test})"
        return f"({array} OR {text})" if array else text
    parameters.append(comparable(cast(float, value)))
    return f"(field.type IN ('integer', 'real') AND field.value {_ORDER[op]} ?)"


def _sqlite_one_of(
    name: str, values: tuple[Scalar, ...], parameters: list[str | int | float]
) -> str:
    """SQL that is true where `name` equals one of the values; each kind of value is one parameter,
    however many there are.
    """
    tests = []
    words = [
        {None: "null", True: "true", False: "false"}[value]
        for value in values
        if value is None or isinstance(value, bool)
    ]
    if words:
        tests.append(f"{name}.type IN ({', '.join(repr(word) for word in sorted(set(words)))})")
    for types, wanted in (
        ("('text')", [value for value in values if isinstance(value, str)]),
        (
            "('integer', 'real')",
            [comparable(cast(float, value)) for value in values if is_number(value)],
        ),
    ):
        if len(wanted) == 1:
            parameters.append(cast(Any, wanted[0]))
            tests.append(f"({name}.type IN {types} AND {name}.value = ?)")
        elif wanted:
            parameters.append(json.dumps(wanted))
            tests.append(
                f"({name}.type IN {types} AND {name}.value IN (SELECT value FROM json_each(?)))"
            )
    return f"({' OR '.join(tests)})" if tests else "0"


def _json_value(value: object, place: str, depth: int) -> Any:
    """The value in plain JSON types."""
    if depth > MAX_METADATA_DEPTH:
        raise InputError(
            f"{place[:200]} is nested more than {MAX_METADATA_DEPTH} deep. Store it flatter."
        )
    if isinstance(value, Mapping):
        return {
            _key(key, place): _json_value(entry, f"{place}[{_shown(key)}]", depth + 1)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _json_value(entry, f"{place}[{position}]", depth + 1)
            for position, entry in enumerate(value)
        ]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if flaw := _text_flaw(value):
            raise InputError(f"{place} is {_shown(value)}, which holds {flaw}. Remove it.")
        return str.__str__(value)
    if isinstance(value, int):
        if _has_64_bits(value):
            return int(value)
        # As a double it would equal its neighbours, and SQLite's versions disagree on which double
        # it is.
        raise InputError(
            f"{place} is {_shown(value)}, beyond 64 bits, which not every reader can hold. Store "
            "it as a text."
        )
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise InputError(
            f"{place} is {_shown(float(value))}: JSON has no such number. Use None, or leave it "
            "out."
        )
    raise InputError(
        f"{place} is {type(value).__name__}: metadata holds str, int, float, bool, None, lists and "
        "mappings."
    )


def _key(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{place} has the key {_shown(key)}: keys are str.")
    if flaw := _text_flaw(key):
        raise InputError(f"{place} has the key {_shown(key)}, which holds {flaw}. Remove it.")
    return str.__str__(key)


def _text_flaw(text: str) -> str | None:
    """Why a text cannot be stored: readers end a text at NUL, and a lone surrogate is no
    character.
    """
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate"
    return None


def _has_64_bits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False
