"""What may come into an index: checks at the door, before anything is embedded or written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index.codes import to_array
from egemma_core.checks import unicode_text, whole_number
from egemma_core.errors import InputError
from egemma_core.vectors import check_dim, normalize

MAX_K = 10_000


def content_id(text: str, title: str | None = None) -> str:
    """Return the id of a text that came without one; equal titles and texts have equal ids."""
    return hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()[:32]


def one_per_text(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    """Return a list with one value per text; of Nones where no values are given."""
    if values is None:
        return [None] * count
    if isinstance(values, (str, Mapping)):
        raise InputError(f"{name} is one {type(values).__name__}: pass a list, one per text.")
    if len(values) != count:
        raise InputError(f"{len(values)} {name} for {count} texts: give one each.")
    return list(values)


def check_counts(num_tokens: Sequence[Any], count: int) -> list[int]:
    """Return one number of tokens per text."""
    return [
        whole_number(f"num_tokens[{row}]", value, 0, 2**31 - 1, error=InputError)
        for row, value in enumerate(one_per_text("num_tokens", num_tokens, count))
    ]


def check_text(name: str, text: object, *, blank: bool, position: int | None = None) -> None:
    """Check that a text can be stored.

    Args:
        name: of the text in messages: "the text", "the title of 'a'".
        blank: whether it may be blank.
        position: which of the call's texts it is, for the error.
    """
    checked = unicode_text(name, text, position=position)
    if "\0" in checked:
        raise InputError(
            f"{name} holds a NUL character at {checked.index(chr(0))}.",
            hint="Other languages stop reading there: remove it.",
            position=position,
        )
    if not blank and not checked.strip():
        raise InputError(
            f"{name} is blank.",
            hint="There is nothing to find in it: leave it out.",
            position=position,
        )


def check_id(id_: object) -> None:
    """Check that an id can be stored."""
    check_text(f"id {id_!r}", id_, blank=False)


def check_ids(ids: object) -> list[str]:
    """Return ids as a list, each checked."""
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InputError(f"ids is one {type(ids).__name__}: pass a list of ids.")
    for id_ in ids:
        check_id(id_)
    return list(ids)


def check_unique(ids: Sequence[str], contents: Sequence[object]) -> None:
    """Check that an id that comes twice in a call has the same content both times."""
    seen: dict[str, object] = {}
    for id_, content in zip(ids, contents, strict=True):
        if seen.setdefault(id_, content) != content:
            raise InputError(
                f"id {id_!r} is given to two different documents of one call. Give each its own."
            )


def pack_json(name: str, value: Mapping[str, Any] | None) -> str | None:
    """Return a JSON object as text, or None for None."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}={value!r} must be a mapping from str to JSON values, or None.")
    try:
        packed = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        packed.encode()
    # UnicodeEncodeError, a lone surrogate, is a ValueError
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}={str(value)[:200]} cannot be stored as JSON: {error}.") from error
    if "\\u0000" in packed:
        raise InputError(
            f"{name}={str(value)[:200]} holds a NUL character: other languages stop reading there. "
            "Remove it."
        )
    return packed


def query_rows(
    vectors: object, dim: int | None, identity: ModelIdentity
) -> tuple[NDArray[np.float64], int]:
    """Return queries as float64 unit rows of their own width, and the width to score at.

    Args:
        vectors: (B, W) floats, W a trained width; only their directions count.
        dim: a trained width, not above W; None for W.
    """
    array = to_array(vectors)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(
            f"the vectors have shape {array.shape} and type {array.dtype}: they must be rows of "
            "floats."
        )
    width = check_dim(array.shape[1], identity.dims)
    dim = width if dim is None else check_dim(dim, identity.dims)
    if dim > width:
        raise InputError(
            f"dim={dim}, but the vector has {width} channels: pass a wider vector or a smaller dim."
        )
    for narrower in {dim, *(trained for trained in identity.dims if trained <= width)}:
        # refuses what has no direction at that width
        normalize(array[:, :narrower].astype(np.float32))
    wide = array.astype(np.float64)
    return wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True)), dim
