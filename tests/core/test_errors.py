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
    assert (error.found, error.hint, error.position) == ("It has 9 tokens.", "Cut it.", 1)


def test_the_place_that_a_caller_knows_stands_for_the_one_that_was_known_before() -> None:
    error = InputError("it is blank.", hint="Leave it out.", position=3, place="text 3")
    assert str(error) == "text 3: it is blank. Leave it out."
    moved = error.at("notes.txt:70", position=69)
    assert str(moved) == "notes.txt:70: it is blank. Leave it out."
    assert (moved.place, moved.position, moved.found) == ("notes.txt:70", 69, "it is blank.")


def test_what_encloses_a_place_stands_in_front_of_it() -> None:
    error = InputError("it is blank.", position=3, place="text 3").within("shard 7")
    assert str(error.within("folder")) == "folder: shard 7: text 3: it is blank."
    assert str(InputError("it is blank.").within("shard 7")) == "shard 7: it is blank."


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_the_way_between_processes(kind: type[EgemmaError]) -> None:
    error = pickle.loads(pickle.dumps(kind("found.", hint="hint.", position=2, place="here")))
    assert type(error) is kind
    assert str(error) == "here: found. hint."
    assert (error.found, error.hint, error.position, error.place) == ("found.", "hint.", 2, "here")


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
