"""Single values at the door: what is accepted comes back as a plain Python value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from egemma_core.checks import number, one_of, unicode_text, whole_number
from egemma_core.errors import ConfigError, InputError


@pytest.mark.parametrize("value", [1, 10, np.int64(3), np.uint8(10)])
def test_a_whole_number_in_its_range_is_an_int(value: object) -> None:
    found = whole_number("k", value, 1, 10)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize("value", [0, 11, -1, True, np.True_, 1.0, "1", None, [1], float("nan")])
def test_what_is_no_whole_number_in_the_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"k=.* must be a whole number from 1 to 10\. Or so\."):
        whole_number("k", value, 1, 10, hint="Or so.")


def test_a_whole_number_may_have_no_upper_end() -> None:
    assert whole_number("n", 10**30, 0) == 10**30
    with pytest.raises(InputError, match="n=-1 must be a whole number of at least 0"):
        whole_number("n", -1, 0, error=InputError)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25)])
def test_a_number_in_its_range_is_a_float(value: object) -> None:
    assert type(number("share", value, 0, 1)) is float


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None, 1j])
def test_what_is_no_number_in_the_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a number of at least 0 and of at most 1"):
        number("share", value, 0, 1)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: number("x", 0, above=0, below=1), "above 0 and below 1"),
        (lambda: number("x", 1, above=0, below=1), "above 0 and below 1"),
        (lambda: number("x", 1, most=0.5), "of at most 0.5"),
        (lambda: number("x", float("inf")), "must be a number, not NaN or infinite"),
    ],
)
def test_ends_that_are_not_included_and_ranges_without_an_end(
    check: Callable[[], float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check()
    assert number("x", 0.5, above=0, below=1) == 0.5


def test_a_choice_is_one_of_those_that_are_listed() -> None:
    assert one_of("mode", "text", ("vector", "text")) == "text"
    for value in ("words", None, ["text"], 1.0):
        with pytest.raises(ConfigError, match=r"must be one of \['vector', 'text', 1\]"):
            one_of("mode", value, ("vector", "text", 1))


def test_a_text_is_a_str_that_is_unicode() -> None:
    assert unicode_text("text 0", "ä\U0001f600") == "ä\U0001f600"
    with pytest.raises(
        InputError, match="text 3 holds a lone surrogate U\\+D800 at character 1"
    ) as caught:
        unicode_text("text 3", "a\ud800", position=3)
    assert caught.value.position == 3
    with pytest.raises(ConfigError, match="the query is bytes, and must be str"):
        unicode_text("the query", b"a", error=ConfigError)
