"""The filter language, from filters.md alone."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from tests.contract.stranger import Refused, is_unicode

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$contains", "$startswith")  # fmt: skip
MISSING = object()


def check(where: Any, depth: int = 0) -> int:
    """How many comparisons a filter has; refuses what is none."""
    if not isinstance(where, dict) or depth > 20:
        raise Refused("ConfigError")
    total = 0
    for key, value in where.items():
        if key in ("$and", "$or"):
            if not isinstance(value, list) or not value:
                raise Refused("ConfigError")
            total += sum(check(part, depth + 1) for part in value)
        elif key == "$not":
            total += check(value, depth + 1)
        else:
            path = key if isinstance(key, tuple) else (key,)
            if isinstance(key, str) and key.startswith("$"):
                raise Refused("ConfigError")
            if not 1 <= len(path) <= 64 or not all(_is_text(part) for part in path):
                raise Refused("ConfigError")
            tests = value if isinstance(value, dict) else {"$eq": value}
            if not tests or any(not _fits(op, operand) for op, operand in tests.items()):
                raise Refused("ConfigError")
            total += len(tests)
    if depth == 0 and total > 200:
        raise Refused("ConfigError")
    return total


def holds(where: dict[Any, Any], metadata: dict[str, Any] | None) -> bool:
    for key, value in where.items():
        if key == "$and":
            true = all(holds(part, metadata) for part in value)
        elif key == "$or":
            true = any(holds(part, metadata) for part in value)
        elif key == "$not":
            true = not holds(value, metadata)
        else:
            found: Any = metadata
            for part in key if isinstance(key, tuple) else (key,):
                inside = isinstance(found, dict) and part in found
                found = found[part] if inside else MISSING
            tests = value if isinstance(value, dict) else {"$eq": value}
            true = all(_true(op, found, operand) for op, operand in tests.items())
        if not true:
            return False
    return True


def _true(op: str, found: Any, value: Any) -> bool:
    if op in ("$ne", "$nin"):
        return not _true("$eq" if op == "$ne" else "$in", found, value)
    if op == "$exists":
        return (found is not MISSING) is value
    texts = isinstance(found, str) and isinstance(value, str)
    if op in ("$eq", "$in"):
        true = any(_equal(found, one) for one in (value if op == "$in" else [value]))
    elif op == "$contains" and isinstance(found, list):
        true = any(_equal(one, value) for one in found)
    elif op in ("$contains", "$startswith"):
        true = texts and (value in found if op == "$contains" else found.startswith(value))
    elif texts or (_is_number(found) and _is_number(value)):
        left: Any = list(map(ord, found)) if texts else _exactly(found)
        right: Any = list(map(ord, value)) if texts else _exactly(value)
        order = (left > right) - (left < right)
        true = {"$gt": order > 0, "$gte": order >= 0, "$lt": order < 0, "$lte": order <= 0}[op]
    else:
        true = False
    return true


def _equal(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return _exactly(one) == _exactly(other)
    kinds = (str, bool, type(None))
    return isinstance(one, kinds) and type(one) is type(other) and one == other


def _exactly(number: Any) -> Fraction:
    whole = isinstance(number, int) and -(2**63) <= number < 2**63
    return Fraction(number) if whole else Fraction(float(number))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and is_unicode(value)


def _is_value(value: Any) -> bool:
    if _is_number(value):
        try:
            return abs(float(value)) < float("inf")
        except OverflowError:
            return False
    return value is None or isinstance(value, bool) or _is_text(value)


def _fits(op: str, value: Any) -> bool:
    if op in ("$in", "$nin"):
        return isinstance(value, list) and len(value) <= 10_000 and all(map(_is_value, value))
    if op == "$exists":
        return isinstance(value, bool)
    if op not in OPERATORS or not _is_value(value):
        return False
    if op == "$startswith":
        return isinstance(value, str)
    return op in ("$eq", "$ne", "$contains") or _is_number(value) or isinstance(value, str)


def meant(where: Any, stand_ins: dict[str, Any]) -> Any:
    """A filter of the cases, with each stand-in replaced by what it stands for."""
    if isinstance(where, dict):
        return {meant(key, stand_ins): meant(value, stand_ins) for key, value in where.items()}
    if isinstance(where, list):
        return [meant(part, stand_ins) for part in where]
    return _stand_in(stand_ins[where]) if isinstance(where, str) and where in stand_ins else where


def _stand_in(given: dict[str, Any]) -> Any:
    if "path" in given:
        return tuple(given["path"])
    if "utf16" in given:
        return "".join(map(chr, given["utf16"]))
    if "number" in given:
        text = given["number"]
        return 10**400 if text.startswith("1e400") else float(text)
    return [given["repeat"]] * given["times"]
