"""Tables of a recipe: every key known, every value of its type, and errors that name table
and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from egemma_core.errors import ConfigError
from egemma_train.tables import check_keys, read_table


@dataclass(frozen=True, kw_only=True)
class Knobs:
    steps: int
    rate: float = 0.5
    name: str | None = None
    on: bool = False
    kind: Literal["a", "b"] | None = None
    dims: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.0, 0.0)
    seeds: tuple[dict[str, float], ...] = ()
    made: str = "here"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: at least 1.")


def test_a_table_becomes_a_dataclass_and_every_value_has_its_type() -> None:
    table = {
        "steps": 3,
        "rate": 1,
        "name": "x",
        "on": True,
        "kind": "b",
        "dims": [4, 2],
        "betas": [0, 0.5],
        "seeds": [{"a": 1, "b": 0.5}],
    }
    read = read_table(Knobs, table, "[knobs]", made="elsewhere")
    assert read == Knobs(
        steps=3,
        rate=1.0,
        name="x",
        on=True,
        kind="b",
        dims=(4, 2),
        betas=(0.0, 0.5),
        seeds=({"a": 1.0, "b": 0.5},),
        made="elsewhere",
    )
    assert [type(value) for value in (read.rate, *read.betas, *read.seeds[0].values())] == [
        float
    ] * 5
    assert read_table(Knobs, {"steps": 1}, "[knobs]") == Knobs(steps=1)
    # one text may stand for a list of one
    for paths in ("a", ["a"]):
        assert read_table(Knobs, {"steps": 1, "paths": paths}, "[knobs]").paths == ("a",)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"steps": 3, "rat": 1.0}, r"^\[knobs\]: 'rat' is not known; did you mean 'rate'\?$"),
        (
            {"steps": 3, "zzz": 1.0},
            r"^\[knobs\]: 'zzz' is not known; there are \['steps', 'rate', ",
        ),
        # given by the caller, so no key of the file
        ({"steps": 3, "made": "x"}, r"'made' is not known"),
        ({}, r"^\[knobs\]: steps is missing; it has nothing\.$"),
        ({"rate": 1.0}, r"^\[knobs\]: steps is missing; it has \['rate'\]\.$"),
        ({"steps": 3.0}, r"^\[knobs\] steps=3\.0 is float, not int\.$"),
        ({"steps": True}, r"steps=True is bool, not int"),
        ({"steps": "3"}, r"steps='3' is str, not int"),
        ({"steps": 3, "rate": True}, r"rate=True is bool, not float"),
        ({"steps": 3, "rate": "1e-3"}, r"rate='1e-3' is str, not float"),
        ({"steps": 3, "on": 1}, r"on=1 is int, not bool"),
        ({"steps": 3, "name": 1}, r"name=1 is int, not str"),
        ({"steps": 3, "kind": "c"}, r"^\[knobs\] kind='c' must be one of \['a', 'b'\]\.$"),
        ({"steps": 3, "dims": 4}, r"dims=4 is int, not a list"),
        ({"steps": 3, "dims": [4, 2.5]}, r"dims=2\.5 is float, not int"),
        ({"steps": 3, "betas": [0.5]}, r"betas=\[0\.5\] must have 2 values"),
        ({"steps": 3, "seeds": [0.5]}, r"seeds=0\.5 is float, not a table"),
        ({"steps": 3, "seeds": [{"a": "x"}]}, r"seeds\.a='x' is str, not float"),
        ({"steps": 0}, r"^\[knobs\]: steps=0: at least 1\.$"),
        ([1], r"^\[knobs\]: \[1\] is list, not a table\.$"),
        (4, r"^\[knobs\]: 4 is int, not a table\.$"),
    ],
)
def test_what_cannot_be_read_is_named(table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_table(
            Knobs,
            table,
            "[knobs]",
            **({"made": "x"} if isinstance(table, dict) and "made" in table else {}),
        )


@dataclass(frozen=True, kw_only=True)
class Two:
    one: int
    other: int


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"^\[two\]: one and other are missing; it has nothing\.$"
    ):
        read_table(Two, {}, "[two]")


def test_known_keys_pass() -> None:
    check_keys({"a": 1}, ("a", "b"), "here")
    with pytest.raises(ConfigError, match=r"^here: 'aa' is not known; did you mean 'a'\?$"):
        check_keys({"aa": 1}, ("a", "b"), "here")
