"""Filters in PostgreSQL's SQL, over a column of jsonb; they mean what `egemma.where.matches`
says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from egemma.where import And, Compare, Condition, Not, Or, Scalar, comparable, is_number

_ORDER = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}


def to_postgres(condition: Condition) -> tuple[str, list[Any]]:
    """Return a condition as SQL over the column `filter`, and its parameters in order.

    The expression is true or false, never NULL. `filter` is a document's metadata as jsonb, its
    numbers as `egemma.where.comparable` has them, written out in full.
    """
    parameters: list[Any] = []
    return _sql(condition, parameters), parameters


def _sql(condition: Condition, parameters: list[Any]) -> str:
    if isinstance(condition, (And, Or)):
        if not condition.parts:
            return "true" if isinstance(condition, And) else "false"
        glue = " AND " if isinstance(condition, And) else " OR "
        return f"({glue.join(_sql(part, parameters) for part in condition.parts)})"
    if isinstance(condition, Not):
        return f"(NOT {_sql(condition.part, parameters)})"
    return _test(condition, parameters)


def _test(condition: Compare, parameters: list[Any]) -> str:
    op, value = condition.op, condition.value

    def field() -> str:
        """The field as jsonb, NULL where it is missing; `->` with a text finds nothing in an array.

        Call it where its SQL stands.
        """
        parameters.extend(condition.field)
        return f"(filter{' -> %s::text' * len(condition.field)})"

    def typed(kind: str, test: Callable[[str], str]) -> str:
        """True where the field has this type and passes the test; CASE, because a cast of another
        type would be an error.
        """
        return (
            f"coalesce(CASE WHEN jsonb_typeof({field()}) = '{kind}' THEN {test(field())} END, "
            "false)"
        )

    if op == "$exists":
        return f"({field()} IS {'NOT ' if value else ''}NULL)"
    if op in ("$eq", "$in"):
        test = f"coalesce({field()} = ANY(%s::text[]::jsonb[]), false)"
        parameters.append([_json(one) for one in (value if isinstance(value, tuple) else (value,))])
        return test
    if op == "$contains":
        array = typed("array", lambda found: f"{found} @> %s::jsonb")
        parameters.append(f"[{_json(cast(Scalar, value))}]")
        if not isinstance(value, str):
            return array
        text = typed("string", lambda found: f"strpos({found} #>> '{{}}', %s) > 0")
        parameters.append(value)
        return f"({array} OR {text})"
    if op == "$startswith":
        text = typed("string", lambda found: f"starts_with({found} #>> '{{}}', %s)")
    elif isinstance(value, str):
        text = typed("string", lambda found: f"({found} #>> '{{}}') COLLATE \"C\" {_ORDER[op]} %s")
    else:
        text = typed("number", lambda found: f"{found}::numeric {_ORDER[op]} %s::numeric")
        value = _json(cast(Scalar, value))
    parameters.append(value)
    return text


def _json(value: Scalar) -> str:
    """Return a value as `filter` has it.

    Doubles that are whole numbers have all their digits, because jsonb compares decimal numbers.
    """
    if isinstance(value, (int, float)) and is_number(value):
        number = comparable(value)
        return str(int(number)) if number == int(number) else repr(number)
    return json.dumps(value, ensure_ascii=False)


def filterable(metadata: str | None) -> str:
    """Return what the column `filter` holds of a document's metadata."""
    return (
        "{}"
        if metadata is None
        else json.dumps(_written_out(json.loads(metadata)), ensure_ascii=False)
    )


def _written_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written_out(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_written_out(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
