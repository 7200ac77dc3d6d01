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
from egemma_core.errors import ConfigError, InputError
from egemma_core.vectors import check_dim, normalize

MAX_K = 10_000


def content_id(text: str, title: str | None = None) -> str:
    """The id of a text that came without one: the same title and text always get the same."""
    return hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()[:32]


def check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise ConfigError(f"k={k!r}: a whole number from 1 to {MAX_K}.")


def check_shortlist(shortlist: int | None) -> None:
    if shortlist is not None and (
        isinstance(shortlist, bool) or not isinstance(shortlist, int) or shortlist < 1
    ):
        raise ConfigError(
            f"shortlist={shortlist!r}: a whole number of at least 1, or None for the index's own "
            "choice."
        )


def one_per_text(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, (str, Mapping)):
        raise InputError(f"{name} is one {type(values).__name__}: pass a list, one per text.")
    if len(values) != count:
        raise InputError(f"{len(values)} {name} for {count} texts: give one each.")
    return list(values)


def check_counts(num_tokens: Sequence[Any], count: int) -> list[int]:
    counts = one_per_text("num_tokens", num_tokens, count)
    for row, value in enumerate(counts):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, np.integer))
            or not 0 <= value < 2**31
        ):
            raise InputError(f"num_tokens[{row}]={value!r}: a whole number of tokens, 0 or more.")
    return [int(value) for value in counts]


def check_text(what: str, text: object, *, blank: bool, position: int | None = None) -> None:
    try:
        _check_text(what, text, blank=blank)
    except InputError as error:
        raise error.at(error.place, position=position) from error


def _check_text(what: str, text: object, *, blank: bool) -> None:
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}: pass str; decode bytes first.")
    if "\0" in text:
        raise InputError(
            f"{what} holds a NUL character at {text.index(chr(0))}: other languages stop reading "
            "there. Remove it."
        )
    if not blank and not text.strip():
        raise InputError(f"{what} is blank: there is nothing to find in it. Leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is not "
            "Unicode text. Decode the source with errors='replace', or remove it."
        ) from error


def check_id(id_: object) -> None:
    check_text(f"id {id_!r}", id_, blank=False)


def check_ids(ids: object) -> list[str]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InputError(f"ids is one {type(ids).__name__}: pass a list of ids.")
    for id_ in ids:
        check_id(id_)
    return list(ids)


def check_unique(ids: Sequence[str], contents: Sequence[object]) -> None:
    """One id may come twice in a call only with the same content."""
    seen: dict[str, object] = {}
    for id_, content in zip(ids, contents, strict=True):
        if seen.setdefault(id_, content) != content:
            raise InputError(
                f"id {id_!r} is given to two different documents of one call. Give each its own."
            )


def pack_json(name: str, value: Mapping[str, Any] | None) -> str | None:
    """
    Raises:
        InputError: not a JSON object.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}={value!r}: a mapping from str to JSON values, or None.")
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
    """Queries as float64 unit rows of the width they came in, and the width to score at.

    Args:
        vectors: (B, W) floats, W a trained width; only their directions count.
        dim: a trained width, not above W; None for W.

    Raises:
        InputError, DimensionError: a shape, width or value that cannot work.
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
