"""filters.json: which filters are true for which metadata, and which are refused."""

from __future__ import annotations

from typing import Any

from contract.library import EgemmaError, matches, parse

# What JSON cannot say stands in a case under a name that begins with "@"; `stand_ins` gives it.
_STAND_INS: dict[str, tuple[dict[str, Any], Any]] = {
    "@a.b": ({"path": ["a", "b"]}, ("a", "b")),
    "@a.b.c": ({"path": ["a", "b", "c"]}, ("a", "b", "c")),
    "@a": ({"path": ["a"]}, ("a",)),
    "@$eq": ({"path": ["$eq"]}, ("$eq",)),
    "@list.0": ({"path": ["list", "0"]}, ("list", "0")),
    "@text.a": ({"path": ["text", "a"]}, ("text", "a")),
    "@ü.ß": ({"path": ["ü", "ß"]}, ("ü", "ß")),
    "@none": ({"path": []}, ()),
    "@deep": ({"path": ["k"] * 64}, ("k",) * 64),
    "@too deep": ({"path": ["k"] * 65}, ("k",) * 65),
    "@number in path": ({"path": ["a", 1]}, ("a", 1)),
    "@nan": ({"number": "nan"}, float("nan")),
    "@inf": ({"number": "inf"}, float("inf")),
    "@-inf": ({"number": "-inf"}, float("-inf")),
    "@10^400": ({"number": "1e400, a whole number"}, 10**400),
    "@surrogate": ({"utf16": [0x61, 0xD800]}, "a\ud800"),
    "@many": ({"repeat": 1, "times": 10_001}, [1] * 10_001),
    "@most": ({"repeat": 1, "times": 10_000}, [1] * 10_000),
}

METADATA: list[dict[str, Any] | None] = [
    None,
    {},
    {"n": 0}, {"n": 1}, {"n": 1.0}, {"n": -1}, {"n": 1.5}, {"n": True}, {"n": False}, {"n": None}, {"n": "1"}, {"n": ""},
    {"n": [1]}, {"n": []}, {"n": {}}, {"n": {"n": 1}}, {"n": 2**53}, {"n": 2**53 + 1}, {"n": float(2**53)}, {"n": 2**63 - 1},
    {"n": float(2**63)}, {"n": -(2**63)}, {"n": 1e300}, {"n": -0.0}, {"n": 0.1}, {"n": 1e-320},
    {"s": "abc"}, {"s": "ABC"}, {"s": "ab"}, {"s": ""}, {"s": "b"}, {"s": "ä"}, {"s": "a\u0308"}, {"s": "z"}, {"s": "🎉"}, {"s": "\uffff"},
    {"s": "a%b_c"}, {"s": "null"}, {"s": "true"}, {"s": "[1]"}, {"s": "日本語"}, {"s": None}, {"s": 1}, {"s": ["abc"]}, {"s": " abc "},
    {"tags": ["red", "green"]}, {"tags": ["RED"]}, {"tags": []}, {"tags": [1, "1", None, True]}, {"tags": [1.0]}, {"tags": [["red"]]},
    {"tags": "red"}, {"tags": "a red car"}, {"tags": {"red": 1}}, {"tags": None}, {"tags": [0, False, ""]},
    {"a": {"b": 1}}, {"a": {"b": {"c": "deep"}}}, {"a": [{"b": 1}]}, {"a": "b"}, {"a.b": 1}, {"a": {"b": None}}, {"a": {}}, {"a": None},
    {"$eq": 1}, {"": 1}, {"list": ["x", "y"]}, {"list": {"0": "x"}}, {"text": "{\"a\": 1}"}, {"ü": {"ß": "ä"}}, {"key with blanks": 1},
    {"k\"q": 1}, {"k'q": 1}, {"k\\q": 1}, {"a/b": 1}, {"a[0]": 1}, {"n": 1, "s": "abc", "tags": ["red"]}, {"n": 5, "s": "b", "tags": ["green"]},
]  # fmt: skip


def filters() -> dict[str, Any]:
    """Every filter against every piece of metadata above."""
    cases: list[dict[str, Any]] = []
    for where in _filters():
        names = sorted(_used(where))
        case: dict[str, Any] = {"where": where}
        if names:
            case["stand_ins"] = {name: _STAND_INS[name][0] for name in names}
        try:
            condition = parse(_meant(where))
        except EgemmaError as error:
            cases.append(case | {"error": type(error).__name__})
            continue
        true_for = [row for row, one in enumerate(METADATA) if matches(condition, one)]
        cases.append(case | {"true_for": true_for})
    return {
        "about": "Filters, and the numbers of those `metadata` that each is true for; it is false for all others. "
        "`error`: it is refused, with this class. What JSON cannot say stands in `where` as a name, as a key "
        "or as a value, and `stand_ins` gives its meaning: a `path` of keys, a `number`, a text of `utf16` units, "
        "or a list of `times` the value `repeat`.",
        "made_by": "contract/make.py from egemma.where.parse and matches",
        "tolerance": "none",
        "metadata": METADATA,
        "cases": cases,
    }


def _filters() -> list[Any]:
    values: list[Any] = [
        0,
        1,
        1.0,
        -1,
        1.5,
        True,
        False,
        None,
        "1",
        "",
        2**53,
        2**53 + 1,
        2**63 - 1,
        2**63,
        -(2**63),
        2**70,
        1e300,
        0.1,
    ]
    texts: list[Any] = [
        "abc",
        "a",
        "ab",
        "b",
        "",
        "ä",
        "a\u0308",
        "🎉",
        "\uffff",
        "%",
        "_",
        "null",
        "日本",
    ]
    made: list[Any] = [{}]
    made += [{"n": value} for value in values] + [{"n": {"$ne": value}} for value in values]
    made += [{"n": {op: value}} for op in ("$gt", "$gte", "$lt", "$lte") for value in values]
    made += [{"s": text} for text in texts] + [{"s": {"$ne": text}} for text in texts]
    made += [
        {"s": {op: text}}
        for op in ("$gt", "$gte", "$lt", "$lte", "$contains", "$startswith")
        for text in texts
    ]
    made += [
        {"s": {"$eq": "abc"}},
        {"s": 1},
        {"s": None},
        {"s": {"$gt": 0}},
        {"s": {"$startswith": "🎉"}},
    ]
    made += [
        {"tags": {"$contains": value}}
        for value in ["red", "RED", "r", "", 1, "1", 1.0, 0, True, False, None]
    ]
    made += [{"n": {"$contains": value}} for value in [1, "1", "", None]]
    made += [{"tags": {"$startswith": "a"}}, {"tags": "red"}, {"tags": {"$gt": "a"}}]
    lists = [
        [],
        [1],
        [1, "1"],
        [None],
        [True, False],
        ["abc", "ab", 1],
        [0.1, 2**53],
        [2**70],
        ["", None, 0],
        [1] * 3,
        "@most",
    ]
    made += [{field: {op: one}} for field in ("n", "s") for op in ("$in", "$nin") for one in lists]
    made += [
        {field: {"$exists": wanted}}
        for field in ("n", "s", "a", "a.b", "", "@a.b", "@$eq")
        for wanted in (True, False)
    ]
    made += [
        {"a.b": 1},
        {"@a.b": 1},
        {"@a.b": {"$gte": 0}},
        {"@a.b": None},
        {"@a.b": {"$ne": 1}},
        {"@a.b.c": "deep"},
        {"@a": None},
        {"@a": "b"},
    ]
    made += [
        {"@$eq": 1},
        {"": 1},
        {"@list.0": "x"},
        {"list": {"$contains": "x"}},
        {"@text.a": 1},
        {"@ü.ß": "ä"},
        {"@deep": 1},
        {"key with blanks": 1},
    ]
    made += [
        {'k"q': 1},
        {"k'q": 1},
        {"k\\q": 1},
        {"a/b": 1},
        {"a[0]": 1},
        {"@a.b": {"$contains": 1}},
        {"@a.b": {"$in": [1, None]}},
    ]
    both = {"n": {"$gte": 1, "$lt": 5}}
    made += [
        both,
        {"n": 1, "s": "abc"},
        {"n": {"$gt": 0}, "s": {"$startswith": "a"}, "tags": {"$contains": "red"}},
    ]
    made += [
        {"$and": [both, {"s": "abc"}]},
        {"$or": [{"n": 1}, {"s": "b"}]},
        {"$not": {"n": 1}},
        {"$not": {}},
        {"$or": [{}]},
        {"$and": [{}]},
    ]
    made += [
        {"$or": [{"n": 1}], "s": "abc"},
        {"$not": {"$or": [{"n": {"$exists": True}}, {"s": {"$exists": True}}]}},
    ]
    made += [
        {"$not": {"$not": {"n": 1}}},
        {"$and": [{"$or": [{"n": 1}, {"n": 5}]}, {"$not": {"s": "b"}}]},
        {"$not": {"n": 1, "s": "abc"}},
    ]
    made += [_nested(19), _nested(20), {"$or": [{"n": number} for number in range(200)]}]
    made += [{"n": {"$gt": 0, "$ne": 5, "$in": [1, 1.5, 5], "$nin": [1.5], "$exists": True}}]
    return made + _refused()


def _refused() -> list[Any]:
    made: list[Any] = [
        None,
        [],
        "n",
        1,
        True,
        {"$and": []},
        {"$or": []},
        {"$and": {}},
        {"$or": {"n": 1}},
        {"$or": None},
        {"$and": [1]},
    ]
    made += [
        {"$not": []},
        {"$not": None},
        {"$not": "n"},
        {"$nor": [{}]},
        {"$eq": 1},
        {"$in": [1]},
        {"$": 1},
        {"$and": [{}], "$x": 1},
    ]
    made += [
        {"n": {}},
        {"n": {"$regex": "a"}},
        {"n": {"eq": 1}},
        {"n": {"$not": {"$eq": 1}}},
        {"n": {"b": 1}},
        {"n": {"$and": [1]}},
    ]
    made += [
        {"n": [1]},
        {"n": []},
        {"n": {"$eq": [1]}},
        {"n": {"$eq": {}}},
        {"n": {"$ne": [1]}},
        {"n": {"$contains": [1]}},
    ]
    made += [
        {"n": {op: value}}
        for op in ("$gt", "$gte", "$lt", "$lte")
        for value in (None, True, False, [1])
    ]
    lists: list[Any] = [1, "abc", None, {}, [[1]], [{}], True, "@many"]
    made += [{"n": {"$in": value}} for value in lists]
    made += [{"n": {"$nin": value}} for value in (1, "abc", [[1]])]
    no_texts: list[Any] = [1, None, True, ["a"]]
    made += [{"n": {"$startswith": value}} for value in no_texts]
    made += [{"n": {"$exists": value}} for value in (1, 0, None, "true")]
    made += [
        {"n": value} for value in ("@nan", "@inf", "@-inf", "@10^400", "@surrogate", "a\u0000b")
    ]
    made += [
        {"n": {"$in": [1, "@nan"]}},
        {"n": {"$gt": "@inf"}},
        {"@surrogate": 1},
        {"a\u0000": 1},
        {"@none": 1},
        {"@too deep": 1},
        {"@number in path": 1},
    ]
    made += [
        _nested(21),
        {"$or": [{"n": number} for number in range(201)]},
        {"$not": {"$or": [{"n": {"$gt": 1, "$lt": 9}}] * 101}},
    ]
    return made


def _nested(depth: int) -> Any:
    where: Any = {"n": 1}
    for _ in range(depth):
        where = {"$not": where}
    return where


def _used(where: Any) -> set[str]:
    if isinstance(where, dict):
        return {name for entry in where.items() for part in entry for name in _used(part)}
    if isinstance(where, list):
        return {name for part in where for name in _used(part)}
    return {where} if isinstance(where, str) and where in _STAND_INS else set()


def _meant(where: Any) -> Any:
    """The filter with each stand-in replaced by what it stands for."""
    if isinstance(where, dict):
        return {_meant(key): _meant(value) for key, value in where.items()}
    if isinstance(where, list):
        return [_meant(part) for part in where]
    return _STAND_INS[where][1] if isinstance(where, str) and where in _STAND_INS else where
