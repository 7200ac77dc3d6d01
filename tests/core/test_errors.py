"""Errors carry what they are about as data, and are what Python users catch."""

from __future__ import annotations

import pickle

import pytest

from egemma_core import errors
from egemma_core.errors import (
    ConfigError,
    DimensionError,
    EgemmaError,
    IndexFileError,
    IndexMismatchError,
    InputError,
    MissingDependencyError,
    NotFoundError,
    PromptError,
    ShapeError,
    TokenLimitError,
)

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, EgemmaError)
]


def test_an_error_says_all_and_carries_its_parts() -> None:
    error = InputError("text 3 is blank.", hint="Leave it out.", position=3)
    assert str(error) == "text 3 is blank. Leave it out."
    assert (error.found, error.hint, error.position) == ("text 3 is blank.", "Leave it out.", 3)
    assert (str(InputError("x")), InputError("x").hint, InputError("x").position) == ("x", "", None)


def test_a_place_goes_in_front_and_nothing_else_changes() -> None:
    error = TokenLimitError("It has 9 tokens.", hint="Cut it.", position=1).at("notes.txt:3")
    assert type(error) is TokenLimitError
    assert str(error) == "notes.txt:3: It has 9 tokens. Cut it."
    assert (error.hint, error.position) == ("Cut it.", 1)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_the_way_between_processes(kind: type[EgemmaError]) -> None:
    error = pickle.loads(pickle.dumps(kind("found.", hint="hint.", position=2)))
    assert type(error) is kind
    assert (str(error), error.found, error.hint, error.position) == (
        "found. hint.",
        "found.",
        "hint.",
        2,
    )


def test_what_python_users_expect_catches_ours() -> None:
    for kind in (InputError, ConfigError, PromptError, DimensionError, ShapeError, TokenLimitError):
        assert issubclass(kind, ValueError)
    assert issubclass(NotFoundError, (InputError, KeyError))
    assert str(NotFoundError("no 'a'.")) == "no 'a'."
    assert issubclass(MissingDependencyError, ImportError)
    assert issubclass(IndexMismatchError, IndexFileError)
    assert not issubclass(IndexFileError, ValueError)


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = errors.__doc__
    for kind in ALL:
        assert kind.__name__ in drawn, f"{kind.__name__} is not drawn"
