"""Filters say the same in Python, in SQLite and on paper, whatever stands in them."""

from __future__ import annotations

import enum
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egemma.metadata import MAX_METADATA_DEPTH, pack_metadata
from egemma.where import (
    MAX_COMPARISONS,
    MAX_FILTER_DEPTH,
    MAX_VALUES,
    And,
    Compare,
    Not,
    Or,
    matches,
    parse,
)
from egemma.where_sqlite import to_sqlite
from egemma_core.errors import ConfigError, InputError

# Few of each, so that filters and documents meet; and the ones that engines trip over.
NAMES = [
    "a",
    "b",
    "a.b",
    "",
    "$eq",
    "it's",
    'say "x"',
    "back\\slash",
    "a/b",
    "ключ",
    "😀",
    "\n",
    "1",
    "[0]",
    "#",
    "a b",
    "') OR 1 --",
    "%",
    "?",
    ":x",
    "é",
    "\u00e9",
]
TEXTS = [
    "",
    "x",
    "xy",
    "y",
    "X",
    "true",
    "1",
    "null",
    "é",
    "e\u0301",
    "😀",
    "\uffff",
    "\\",
    '"',
    "'",
    "%",
    "_",
    "' OR '1'='1",
    "a\nb",
    "\x01",
    "[1]",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    0.0,
    -0.0,
    1.0,
    0.5,
    0.1,
    0.30000000000000004,
    0.3,
    2**53,
    2**53 + 1,
    float(2**53),
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    float(2**63),
    2**64,
    10**30,
    1e30,
    10**308,
    1e308,
    5e-324,
    1e22,
    10**22,
    123456789012345678901234567890,
]

names = st.one_of(
    st.sampled_from(NAMES),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3),
)
texts = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
)
numbers = st.one_of(
    st.sampled_from(NUMBERS),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
stored = scalars.filter(lambda value: not isinstance(value, int) or -(2**63) <= value < 2**63)
values = st.recursive(
    stored,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)
metadata_of_documents = st.one_of(st.none(), st.dictionaries(names, values, max_size=5))

operators = st.one_of(
    st.tuples(st.sampled_from(["$eq", "$ne", "$contains"]), scalars),
    st.tuples(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.one_of(numbers, texts)),
    st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(scalars, max_size=5)),
    st.tuples(st.just("$exists"), st.booleans()),
    st.tuples(st.just("$startswith"), texts),
)
fields = st.one_of(
    names.filter(lambda name: not name.startswith("$")),
    st.lists(names, min_size=1, max_size=3).map(tuple),
)
comparisons = st.dictionaries(
    fields, st.one_of(scalars, st.lists(operators, min_size=1, max_size=2).map(dict)), max_size=3
)
filters = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$not": inner}),
    ),
    max_leaves=5,
)


@st.composite
def filters_that_meet(draw: st.DrawFn) -> tuple[dict[Any, Any], dict[str, Any]]:
    """A document, and a filter on one of its own fields with a value near the one that is there."""
    metadata = draw(st.dictionaries(names, values, min_size=1, max_size=4))
    path, found = [], metadata
    while isinstance(found, dict) and found:
        path.append(draw(st.sampled_from(sorted(found))))
        found = found[path[-1]]
        if draw(st.booleans()):
            break
    pool = [
        one
        for one in (found if isinstance(found, list) else [found])
        if not isinstance(one, (list, dict))
    ]
    near = st.one_of(st.sampled_from(pool), scalars) if pool else scalars
    value = draw(near)
    op = draw(
        st.sampled_from(
            [
                "$eq",
                "$ne",
                "$contains",
                "$in",
                "$nin",
                "$gt",
                "$gte",
                "$lt",
                "$lte",
                "$startswith",
                "$exists",
            ]
        )
    )
    if op in ("$in", "$nin"):
        value = [value, draw(near)]
    elif op == "$exists":
        value = draw(st.booleans())
    elif op == "$startswith" or (op[1] in "gl" and (isinstance(value, bool) or value is None)):
        value = value[:2] if isinstance(value, str) else "x"
    return {tuple(path): {op: value}}, metadata


@pytest.fixture(scope="module")
def sqlite() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE documents (metadata TEXT)")
    yield connection
    connection.close()


def in_sqlite(
    connection: sqlite3.Connection, where: dict[Any, Any], *stored: str | None
) -> list[Any]:
    """What SQLite answers for each stored text."""
    connection.execute("DELETE FROM documents")
    connection.executemany("INSERT INTO documents VALUES (?)", [(text,) for text in stored])
    sql, parameters = to_sqlite(parse(where))
    return [
        answer
        for (answer,) in connection.execute(
            f"SELECT {sql} FROM documents ORDER BY rowid", parameters
        )
    ]


def check_sqlite(
    connection: sqlite3.Connection, where: dict[Any, Any], metadata: dict[str, Any] | None
) -> None:
    wanted = int(matches(parse(where), metadata))
    stored = pack_metadata(metadata)
    escaped = None if metadata is None else json.dumps(metadata, ensure_ascii=True)
    assert in_sqlite(connection, where, stored, escaped) == [wanted, wanted], (where, metadata)


# What a filter means, by hand.

EN = {
    "lang": "en",
    "year": 2020,
    "tags": ["x", 1, None, True],
    "path": "docs/a.md",
    "draft": False,
    "gone": None,
    "a.b": 1,
    "a": {"b": 2},
}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "EN"}, False),
        ({"lang": {"$gt": "em", "$lt": "eo"}}, True),
        ({"year": 2020.0}, True),
        ({"year": "2020"}, False),
        ({"year": {"$gte": 2020, "$lt": 2021}}, True),
        ({"year": {"$gt": 2020}}, False),
        ({"year": {"$gt": "2019"}}, False),  # a number is not above a text, and not below it either
        ({"year": {"$lte": "2021"}}, False),
        ({"year": {"$ne": "2020"}}, True),
        ({"none": {"$ne": 1}}, True),
        ({"none": {"$nin": [1]}}, True),
        ({"none": {"$lt": 1}}, False),
        ({"none": None}, False),
        ({"gone": None}, True),
        ({"gone": {"$exists": True}}, True),
        ({"none": {"$exists": False}}, True),
        ({"draft": False}, True),
        ({"draft": 0}, False),
        ({"draft": {"$lt": 1}}, False),
        ({"year": {"$in": [1, 2020]}}, True),
        ({"year": {"$in": []}}, False),
        ({"year": {"$nin": []}}, True),
        ({"tags": {"$contains": "x"}}, True),
        ({"tags": {"$contains": True}}, True),
        ({"tags": {"$contains": 1.0}}, True),
        ({"tags": {"$contains": None}}, True),
        ({"tags": {"$contains": 0}}, False),
        ({"tags": "x"}, False),
        ({"path": {"$contains": "/a"}}, True),
        ({"path": {"$contains": ""}}, True),
        ({"year": {"$contains": "2"}}, False),
        ({"path": {"$startswith": "docs/"}}, True),
        ({"path": {"$startswith": "Docs"}}, False),
        ({"path": {"$startswith": "ocs"}}, False),
        ({"tags": {"$startswith": ""}}, False),
        ({"a.b": 1}, True),
        ({("a", "b"): 2}, True),
        ({("a", "b", "c"): {"$exists": True}}, False),
        ({("tags", "0"): {"$exists": True}}, False),  # arrays have no keys
        ({"$or": [{"lang": "de"}, {"year": 2020}]}, True),
        ({"$and": [{"lang": "en"}, {"year": 2021}]}, False),
        ({"$not": {"lang": "en", "year": 2021}}, True),
        ({"$not": {"none": {"$gt": 1}}}, True),
    ],
)
def test_a_filter_means_what_the_module_says(
    sqlite: sqlite3.Connection, where: dict[Any, Any], wanted: bool
) -> None:
    assert matches(parse(where), EN) is wanted
    check_sqlite(sqlite, where, EN)


def test_parse_gives_the_tree_that_is_written() -> None:
    assert parse({"lang": "en"}) == Compare(field=("lang",), op="$eq", value="en")
    assert parse(
        {"a": {"$ne": 1}, "$or": [{"b": {"$nin": [1]}}, {("c", "d"): {"$exists": True}}]}
    ) == And(
        (
            Not(Compare(field=("a",), op="$eq", value=1)),
            Or(
                (
                    Not(Compare(field=("b",), op="$in", value=(1,))),
                    Compare(field=("c", "d"), op="$exists", value=True),
                )
            ),
        )
    )


# The same in SQLite.


@settings(max_examples=600, deadline=None)
@given(where=filters, metadata=metadata_of_documents)
@example(where={"n": {"$gt": 2**53}}, metadata={"n": 2**53 + 1})
@example(where={"n": 2**63 + 1}, metadata={"n": float(2**63)})  # the same double
@example(where={"n": {"$gt": 2**63}}, metadata={"n": 2**63 - 1})
@example(where={"n": {"$lt": 2**63 + 1}}, metadata={"n": float(2**63)})
@example(where={"n": 2**63}, metadata={"n": 2**63 - 1})
@example(where={"n": float(2**53)}, metadata={"n": 2**53 + 1})
@example(where={("é", "b"): "x"}, metadata={"é": "no JSON"})
@example(where={("é", "b"): "x"}, metadata={"é": '{"b": "x"}'})  # a text, not an object
@example(where={("a", "b"): "x"}, metadata={"a": '{"b": "x"}'})
@example(where={"a": {"$contains": "x"}}, metadata={"a": '["x"]'})
@example(where={"a": {"$contains": 1}}, metadata={"a": "[1]"})
@example(where={"a": {"$contains": 1}}, metadata={"a": {"b": 1}})
@example(where={"a": {"$contains": 1}}, metadata={"a": 1})
@example(where={"n": 2**53}, metadata={"n": 2**53 + 1})  # 64-bit integers, not doubles
def test_sqlite_and_python_agree_on_any_filter(
    sqlite: sqlite3.Connection, where: dict[Any, Any], metadata: dict[str, Any] | None
) -> None:
    check_sqlite(sqlite, where, metadata)


@settings(max_examples=1500, deadline=None)
@given(pair=filters_that_meet())
def test_sqlite_and_python_agree_on_fields_that_are_there(
    sqlite: sqlite3.Connection, pair: tuple[dict[Any, Any], dict[str, Any]]
) -> None:
    check_sqlite(sqlite, *pair)


@settings(max_examples=200, deadline=None)
@given(where=comparisons, metadata=metadata_of_documents)
def test_a_filter_and_its_negation_never_agree(
    where: dict[Any, Any], metadata: dict[str, Any] | None
) -> None:
    assert matches(parse(where), metadata) is not matches(parse({"$not": where}), metadata)


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        "a') OR 1=1; DROP TABLE documents; --",
        '"; DROP TABLE documents; --',
        "$[0]",
        "$.a",
        'a".b"',
    ],
)
def test_a_name_is_data_and_never_sql(sqlite: sqlite3.Connection, name: str) -> None:
    sql, _ = to_sqlite(parse({(name,): name, (name, name): 1}))
    assert name not in sql or name in to_sqlite(parse({("zzz",): "zzz", ("zzz", "zzz"): 1}))[0]
    check_sqlite(sqlite, {(name,): name}, {name: name, "other": 1})
    check_sqlite(sqlite, {(name, name): name}, {name: {name: name}})
    check_sqlite(sqlite, {(name,): name}, {"other": name})


def test_the_largest_filters_that_parse_also_run_in_sqlite(sqlite: sqlite3.Connection) -> None:
    wide: dict[Any, Any] = {
        "$or": [{f"é{n}": {"$contains": "x"}} for n in range(MAX_COMPARISONS - 1)]
        + [{"a": {"$contains": "x"}}]
    }
    check_sqlite(sqlite, wide, {"a": ["x"]})
    deep: dict[Any, Any] = {
        "$or": [{f"é{n}": {"$contains": "x"}} for n in range(MAX_COMPARISONS - 1)] + [{"a": "x"}]
    }
    for _ in range(MAX_FILTER_DEPTH - 1):
        deep = {"$not": deep}
    check_sqlite(sqlite, deep, {"a": "x"})
    many = {"a": {"$in": [*range(MAX_VALUES - 1), "x"]}}
    check_sqlite(sqlite, many, {"a": "x"})
    check_sqlite(sqlite, many, {"a": MAX_VALUES - 2})
    inner: Any = "x"
    for _ in range(MAX_METADATA_DEPTH):
        inner = {"é": inner}
    check_sqlite(sqlite, {("é",) * MAX_METADATA_DEPTH: "x"}, inner)
    check_sqlite(sqlite, {("a",) * MAX_METADATA_DEPTH: {"$exists": False}}, inner)


# What is refused.

SELF: list[Any] = []
SELF.append(SELF)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (None, "where is NoneType"),
        ("lang = en", "where is str"),
        ([{"lang": "en"}], "where is list"),
        ({"$nor": [{"a": 1}]}, "'\\$nor'"),
        ({"$eq": 1}, "stands behind its field"),
        ({"a": {"$regex": "x"}}, "\\['a'\\] has no operator '\\$regex'"),
        ({"a": {"b": 1}}, "tuple"),
        ({"a": {}}, "empty mapping"),
        ({"a": [1]}, "\\$in"),
        ({"a": {"$eq": {"x": 1}}}, "\\$eq"),
        ({"a": {"$gt": True}}, "order"),
        ({"a": {"$lt": None}}, "order"),
        ({"a": {"$gt": float("nan")}}, "nan"),
        ({"a": float("inf")}, "inf"),
        ({"a": 10**400}, "no number"),
        ({"a": 10**5000}, "a int"),
        ({"a": b"x"}, "b'x'"),
        ({"a": np.int64(3)}, "int64"),
        ({"a": {"$in": "abc"}}, "a list of at most"),
        ({"a": {"$in": list(range(MAX_VALUES + 1))}}, "a list of at most"),
        ({"a": {"$in": [[1]]}}, "\\$in"),
        ({"a": {"$exists": 1}}, "True or False"),
        ({"a": {"$startswith": 1}}, "must be a str"),
        ({"a": "x\0"}, "NUL"),
        ({"a\0": "x"}, "NUL"),
        ({"a": "\ud800"}, "surrogate"),
        ({1: "x"}, "named by a str"),
        ({(): "x"}, "named by a str"),
        ({("a", 1): "x"}, "named by a str"),
        ({("a",) * (MAX_METADATA_DEPTH + 1): "x"}, "keys"),
        ({"$and": []}, "at least one"),
        ({"$or": {"a": 1}}, "at least one"),
        ({"$or": [1]}, "where\\['\\$or'\\]\\[0\\] is int"),
        ({"$not": [{"a": 1}]}, "where\\['\\$not'\\] is list"),
        ({"$or": [{"a": n} for n in range(MAX_COMPARISONS + 1)]}, "201 comparisons"),
        ({"a": SELF}, "\\$in"),
    ],
)
def test_what_means_nothing_is_refused_with_its_place(where: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(where)


def test_a_filter_nested_too_deep_is_refused_and_not_a_crash() -> None:
    deep: dict[Any, Any] = {"a": 1}
    for _ in range(100_000):
        deep = {"$not": deep}
    try:
        with pytest.raises(ConfigError, match="deep"):
            parse(deep)
    finally:  # freeing 100,000 levels at once would recurse in C
        while "$not" in deep:
            deep = deep.pop("$not")


def test_numbers_and_texts_of_other_classes_are_taken_for_what_they_are() -> None:
    class Language(str, enum.Enum):
        EN = "en"

    class Year(enum.IntEnum):
        NOW = 2020

    condition = parse({"lang": Language.EN, "year": {"$in": [Year.NOW, np.float64(0.5)]}})
    assert condition == And(
        (
            Compare(field=("lang",), op="$eq", value="en"),
            Compare(field=("year",), op="$in", value=(2020, 0.5)),
        )
    )
    assert isinstance(condition, And)
    first, second = condition.parts
    assert isinstance(first, Compare)
    assert isinstance(second, Compare)
    assert isinstance(second.value, tuple)
    assert [type(first.value), *map(type, second.value)] == [str, int, float]


@settings(max_examples=200, deadline=None)
@given(metadata=metadata_of_documents)
def test_packed_metadata_comes_back_equal(metadata: dict[str, Any] | None) -> None:
    packed = pack_metadata(metadata)
    assert (None if packed is None else json.loads(packed)) == metadata


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ([1], "list"),
        ("x", "str"),
        ({1: "x"}, "keys are str"),
        ({"a": {1: "x"}}, "metadata\\['a'\\] has the key 1"),
        ({"a": [0, float("nan")]}, "metadata\\['a'\\]\\[1\\] is nan"),
        ({"a": float("-inf")}, "-inf"),
        ({"a": 2**63}, "64 bits"),
        ({"a": -(2**63) - 1}, "64 bits"),
        ({"a": 10**5000}, "64 bits"),
        ({"a": {1, 2}}, "set"),
        ({"a": b"x"}, "bytes"),
        ({"a": "x\0y"}, "NUL"),
        ({"a\0": 1}, "NUL"),
        ({"a": "\udfff"}, "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        ({"a": SELF}, "deep"),
    ],
)
def test_metadata_that_readers_would_disagree_on_is_refused(metadata: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pack_metadata(metadata)
