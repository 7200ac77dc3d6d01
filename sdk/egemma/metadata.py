"""What metadata may hold: JSON that every reader of an index gives back equal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from egemma_core.checks import unicode_text
from egemma_core.errors import EgemmaError, InputError

MAX_METADATA_DEPTH = 64  # SQLite reads JSON 1,000 deep, other readers less


def pack_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    """Return a document's metadata as JSON text, None for none.

    Raises:
        InputError: it holds what JSON cannot hold, or what readers of JSON do not agree on; the
            message names the place.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        found = f"metadata is {type(metadata).__name__}, and must be a mapping from str"
        raise InputError(f"{found} to JSON values, or None.")
    return json.dumps(_plain(metadata, "metadata", 0), ensure_ascii=False, allow_nan=False)


def storable_text(what: str, text: str, error: type[EgemmaError]) -> str:
    """Return a text as a plain str when every reader gives it back whole.

    Raises:
        InputError, or what `error` says: it holds a NUL character or a lone surrogate.
    """
    if "\0" in text:
        place = text.index("\0")
        found = f"{what} holds a NUL character at {place}, where other languages end a text."
        raise error(found, hint="Remove it.")
    return str.__str__(unicode_text(what, text, error=error))


def has_64_bits(number: int) -> bool:
    """Say whether SQLite and all readers hold this whole number exactly."""
    return -(2**63) <= number < 2**63


def shown(value: object) -> str:
    """Return what a message can carry of a value."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # such as an int of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: object, place: str, depth: int) -> Any:
    """Return the value in plain JSON types."""
    if depth > MAX_METADATA_DEPTH:
        found = f"{place[:200]} is nested more than {MAX_METADATA_DEPTH} deep."
        raise InputError(found, hint="Store it flatter.")
    if isinstance(value, Mapping):
        return {
            _key(key, place): _plain(entry, f"{place}[{shown(key)}]", depth + 1)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{place}[{n}]", depth + 1) for n, entry in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return storable_text(place, value, InputError)
    if isinstance(value, int):
        if has_64_bits(value):
            return int(value)
        # As a double it would equal its neighbours, and SQLite's versions disagree on which double
        # it is.
        found = f"{place} is {shown(value)}, beyond 64 bits, which not every reader can hold."
        raise InputError(found, hint="Store it as a text.")
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        found = f"{place} is {shown(float(value))}, and JSON has no such number."
        raise InputError(found, hint="Use None, or leave it out.")
    raise InputError(
        f"{place} is {type(value).__name__}; metadata holds str, int, float, bool, None, lists and "
        "mappings."
    )


def _key(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{place} has the key {shown(key)}, but keys are str.")
    return storable_text(f"the key {shown(key)} of {place}", key, InputError)
