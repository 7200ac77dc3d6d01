"""Metadata filters in SQLite's SQL, with the meaning that `where.matches` defines."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from egemma.where import ORDER, And, Compare, Condition, Not, Or, Scalar, comparable, is_number

# Keys that every writer of JSON leaves as they are, and that SQLite's paths can therefore find in
# the stored text: before 3.45 it compares them with the text between the quotation marks, escapes
# and all. "/" is missing because Apple's writer escapes it.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:@$#+-]+", re.ASCII)


def to_sqlite(
    condition: Condition, column: str = "documents.metadata"
) -> tuple[str, list[str | int | float]]:
    """Write a condition as an SQL expression that is 1 or 0.

    Args:
        column: SQL that gives a document's metadata as `pack_metadata` writes it, or NULL. Nothing
            else of the SQL comes from outside: names and values are parameters.

    Returns:
        The expression, and its parameters in the order of their question marks.
    """
    parameters: list[str | int | float] = []
    return _expression(condition, column, parameters), parameters


def _expression(condition: Condition, column: str, parameters: list[str | int | float]) -> str:
    if isinstance(condition, (And, Or)):
        if not condition.parts:
            return "1" if isinstance(condition, And) else "0"
        glue = " AND " if isinstance(condition, And) else " OR "
        return f"({glue.join(_expression(part, column, parameters) for part in condition.parts)})"
    if isinstance(condition, Not):
        return f"(NOT {_expression(condition.part, column, parameters)})"
    if condition.op == "$exists" and condition.value is False:
        exists = Compare(field=condition.field, op="$exists", value=True)
        return f"(NOT {_expression(exists, column, parameters)})"
    if all(_PLAIN_KEY.fullmatch(key) for key in condition.field):
        path = "$" + "".join(f'."{key}"' for key in condition.field)
        found = f"SELECT json_type({column}, ?) AS type, json_extract({column}, ?) AS value"
        parameters += [path, path]
        test = f"field.type IS NOT NULL AND {_test(condition, parameters)}"
        return f"(EXISTS (SELECT 1 FROM ({found}) AS field WHERE {test}))"
    depth = len(condition.field)
    steps = [f"json_each({column}) AS key0"]
    steps += [
        f"json_each(CASE key{n}.type WHEN 'object' THEN key{n}.value END) AS key{n + 1}"
        for n in range(depth - 1)
    ]
    names = " AND ".join(f"key{n}.key = ?" for n in range(depth))
    parameters += condition.field
    last = f"key{depth - 1}"
    test = _test(condition, parameters)
    # In an object of its own, so that both ways above ask the same test.
    return (
        f"(EXISTS (SELECT 1 FROM (SELECT {last}.type AS type, {last}.value AS value FROM "
        f"{', '.join(steps)} WHERE {names}) AS field WHERE {test}))"
    )


def _test(condition: Compare, parameters: list[str | int | float]) -> str:
    """Write SQL over `field.type` and `field.value`; EXISTS around it makes NULL false."""
    op, value = condition.op, condition.value
    if op == "$exists":
        return "1"
    if op in ("$eq", "$in"):
        return _one_of("field", value if isinstance(value, tuple) else (value,), parameters)
    array = ""
    if op == "$contains":
        # CASE, because a text may look like an array.
        members = "json_each(CASE field.type WHEN 'array' THEN field.value END) AS member"
        same = _one_of("member", (cast(Scalar, value),), parameters)
        array = f"EXISTS (SELECT 1 FROM {members} WHERE {same})"
        if not isinstance(value, str):
            return array
    if isinstance(value, str):
        found = "instr(field.value, ?)"
        other = {"$contains": found, "$startswith": f"{found} = 1"}
        test = other.get(op) or f"field.value {ORDER[op]} ?"
        parameters.append(value)
        text = f"(field.type = 'text' AND {test})"
        return f"({array} OR {text})" if array else text
    parameters.append(comparable(cast(float, value)))
    return f"(field.type IN ('integer', 'real') AND field.value {ORDER[op]} ?)"


def _one_of(name: str, values: tuple[Scalar, ...], parameters: list[str | int | float]) -> str:
    """Write SQL that is true where `name` equals one of the values; a kind is one parameter."""
    tests = []
    words = {json.dumps(value) for value in values if value is None or isinstance(value, bool)}
    if words:
        tests.append(f"{name}.type IN ({', '.join(repr(word) for word in sorted(words))})")
    texts = [value for value in values if isinstance(value, str)]
    numbers = [comparable(cast(float, value)) for value in values if is_number(value)]
    for types, found in (("('text')", texts), ("('integer', 'real')", numbers)):
        if len(found) == 1:
            parameters.append(cast(Any, found[0]))
            tests.append(f"({name}.type IN {types} AND {name}.value = ?)")
        elif found:
            parameters.append(json.dumps(found))
            tests.append(
                f"({name}.type IN {types} AND {name}.value IN (SELECT value FROM json_each(?)))"
            )
    return f"({' OR '.join(tests)})" if tests else "0"
