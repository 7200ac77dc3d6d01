"""Filters in Qdrant's terms, without its paths and types: each document carries what it may be
asked for as words of our own.

Qdrant's own conditions are not those of `egemma.where`: a match on a field is also true where an
array holds the value, 1.0 is not 1, and a name with a quote has no path. So `terms_of` writes every
(field, value) as one keyword, which a point either has or has not, and numbers under a hash of
their field, for ranges. What these cannot say (the order of texts, parts of texts, numbers beyond
2^53) is widened here and decided by `egemma.where.matches` on the points that come back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from egemma.where import And, Compare, Condition, Not, Scalar, comparable, is_number

TERMS, NUMBERS = "terms", "numbers"  # keys of a point's payload
# Qdrant compares numbers as doubles; below this no two whole numbers are one double
_EXACT_NUMBER = 2**53
_BOUNDS = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}


def terms_of(metadata: Mapping[str, Any] | None) -> tuple[list[str], dict[str, float]]:
    """Return what a point carries to be filtered by.

    Returns:
        Its keywords, and its numbers by the hash of their field.
    """
    terms: set[str] = set()
    numbers: dict[str, float] = {}
    _walk(metadata or {}, (), terms, numbers)
    return sorted(terms), numbers


def to_qdrant(condition: Condition) -> tuple[Any, bool]:
    """Return a condition as far as Qdrant can decide it.

    Returns:
        A `models.Filter` that is true wherever the condition is, None for everywhere; and whether
        it is true nowhere else.
    """
    from qdrant_client import models

    if isinstance(condition, Compare):
        return _comparison(condition)
    if isinstance(condition, Not):
        inner, exact = to_qdrant(condition.part)
        if not exact:
            return None, False
        return (models.Filter(must_not=[inner]), True) if inner is not None else _never()
    parts = [to_qdrant(part) for part in condition.parts]
    exact = all(exact for _, exact in parts)
    filters = [part for part, _ in parts if part is not None]
    if isinstance(condition, And):
        return (models.Filter(must=filters) if filters else None), exact
    if not parts:
        return _never()
    return (models.Filter(should=filters) if len(filters) == len(parts) else None), exact


def _comparison(condition: Compare) -> tuple[Any, bool]:
    from qdrant_client import models

    field, op, value = condition.field, condition.op, condition.value
    if op == "$exists":
        there = _has(_term("is", field))
        return (there if value else models.Filter(must_not=[there])), True
    if op in ("$eq", "$in"):
        values = value if isinstance(value, tuple) else (value,)
        terms = sorted({_term("eq", field, one) for one in values})
        return (_has(*terms), True) if terms else _never()
    if op == "$contains":
        member = _has(_term("in", field, cast(Scalar, value)))
        if isinstance(value, str):
            return models.Filter(should=[member, _has(_term("text", field))]), False
        return member, True
    if isinstance(value, str):
        return _has(_term("text", field)), False
    bound = comparable(cast(float, value))
    exact = abs(bound) < _EXACT_NUMBER
    # Rounding keeps the order but may make equals: then the bound itself must come along, to be
    # looked at.
    name = _BOUNDS[op] if exact else _BOUNDS[op][:2] + "e"
    range_ = models.Range(**{name: float(bound)})
    test = models.FieldCondition(key=f"{NUMBERS}.{_key(field)}", range=range_)
    return models.Filter(must=[test]), exact


def _has(*terms: str) -> Any:
    from qdrant_client import models

    return models.Filter(
        must=[models.FieldCondition(key=TERMS, match=models.MatchAny(any=list(terms)))]
    )


def _never() -> tuple[Any, bool]:
    """Return a filter that no point passes: `_term` writes JSON arrays, and this is none."""
    return _has("never"), True


def _walk(
    found: Mapping[str, Any], field: tuple[str, ...], terms: set[str], numbers: dict[str, float]
) -> None:
    for key, value in found.items():
        here = (*field, key)
        terms.add(_term("is", here))
        if isinstance(value, Mapping):
            _walk(value, here, terms, numbers)
        elif isinstance(value, list):
            terms.update(
                _term("in", here, one) for one in value if not isinstance(one, (list, Mapping))
            )
        else:
            terms.add(_term("eq", here, value))
            if isinstance(value, str):
                terms.add(_term("text", here))
            elif is_number(value):
                numbers[_key(here)] = float(value)


def _term(kind: str, field: tuple[str, ...], *value: Scalar) -> str:
    """Return a keyword; a long one as its hash, because a server refuses to index it."""
    plain = [_plain(one) for one in value]
    term = json.dumps([kind, field, *plain])
    return term if len(term) <= 200 else f"sha256:{hashlib.sha256(term.encode()).hexdigest()}"


def _key(field: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(field).encode()).hexdigest()[:32]


def _plain(value: Scalar) -> Scalar:
    """Return a whole number as int, also where it came as 1.0: equal numbers, equal keywords."""
    if not is_number(value):
        return value
    number = comparable(cast(float, value))
    return int(number) if number == int(number) else number
