"""One mark for everything that users import from `egemma`, wherever it is written."""

from __future__ import annotations

from typing import Any, TypeVar

Thing = TypeVar("Thing")


def exported(thing: Thing) -> Thing:
    """Return a class or function as one of `egemma` itself, so that a traceback says so.

    Its name is then looked up in `egemma`: by `pickle`, which finds it there, and by
    `typing.get_type_hints`, which would not find what the fields of a dataclass are made of. So
    those are looked up here.
    """
    marked: Any = thing
    if isinstance(thing, type) and hasattr(thing, "__dataclass_fields__"):
        from inspect import get_annotations

        marked.__annotations__ = get_annotations(thing, eval_str=True)
    marked.__module__ = "egemma"
    return thing
