"""golden.json of a bundle, checked: texts, and the vectors that they had at export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.bundle import GOLDEN, Bundle
from egemma_core.errors import BundleError

GOLDEN_VERSION = 1
# A float32 vector of 768 channels that was divided by its own length is within 1e-6 of length 1.
MAX_LENGTH_ERROR = 1e-5
_FIELDS = {
    "name": str,
    "text": str,
    "ids": list,
    "num_tokens": int,
    "truncated": bool,
    "vector": list,
    "quantized_vector": list,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenCase:
    """One text as it was embedded at export."""

    name: str
    text: str  # its prompt in front
    ids: list[int]
    num_tokens: int  # of the whole text, also where `ids` are of its beginning
    truncated: bool
    vector: NDArray[np.float64]  # (D,) of the float model
    quantized_vector: NDArray[np.float64]  # (D,) of float arithmetic on the rounded weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Mistake:
    """A known way to compute wrongly, and the vectors that it gives."""

    name: str
    vectors: Mapping[str, NDArray[np.float64]]  # case -> (D,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """What a bundle is compared with."""

    cases: tuple[GoldenCase, ...]
    batches: tuple[tuple[str, ...], ...]  # names of cases that are run together, padded
    mistakes: tuple[Mistake, ...]


def read_golden(bundle: Bundle) -> Golden:
    """Read golden.json.

    Raises:
        BundleError: it is of another version, has no cases, or a case lacks something.
    """
    body, width = bundle.golden(), bundle.manifest.dims[0]
    try:
        return _golden(body, width, batches_needed=bundle.manifest.batch == "dynamic")
    except BundleError as error:
        path = str(bundle.folder / GOLDEN)
        raise BundleError(error.found, hint="Export again.", place=path) from error


def _golden(body: Mapping[str, Any], width: int, *, batches_needed: bool) -> Golden:
    if body.get("format_version") != GOLDEN_VERSION:
        raise BundleError(
            f"format_version={body.get('format_version')!r}, this egemma reads {GOLDEN_VERSION}."
        )
    rows, batches = body.get("cases"), body.get("batches")
    if not isinstance(rows, list) or not rows:
        raise BundleError("it has no cases, so it proves nothing.")
    if not isinstance(batches, list) or (batches_needed and not batches):
        raise BundleError("it has no batches, so it does not prove that padding changes nothing.")
    cases = tuple(_case(number, row, width) for number, row in enumerate(rows))
    names = {case.name for case in cases}
    if len(names) < len(cases) or not all(
        isinstance(batch, list) and len(batch) > 1 and set(batch) <= names for batch in batches
    ):
        raise BundleError("two cases of one name, or a batch that is not of two or more cases.")
    mistakes = body.get("mistakes")
    listed = mistakes if isinstance(mistakes, list) else [None]
    found = [_mistake(row, names, width) for row in listed]
    if None in found:
        raise BundleError(
            f"mistakes must each have a name and vectors of {width} channels by case."
        )
    return Golden(
        cases=cases,
        batches=tuple(tuple(batch) for batch in batches),
        mistakes=tuple(mistake for mistake in found if mistake is not None),
    )


def _case(number: int, row: Any, width: int) -> GoldenCase:
    fields = row if isinstance(row, dict) else {}
    lacking = [key for key, kind in _FIELDS.items() if not isinstance(fields.get(key), kind)]
    if lacking:
        raise BundleError(f"case {number} lacks {lacking}.")
    vectors = {}
    for key in ("vector", "quantized_vector"):
        vector = _vector(fields[key], width)
        if vector is None or not abs(np.linalg.norm(vector) - 1) < MAX_LENGTH_ERROR:
            raise BundleError(
                f"{key} of case {fields['name']!r} is not a unit vector of {width} channels."
            )
        vectors[key] = vector
    return GoldenCase(**{key: fields[key] for key in _FIELDS} | vectors)


def _mistake(row: Any, names: set[str], width: int) -> Mistake | None:
    fields = row if isinstance(row, dict) else {}
    name, by_case = fields.get("name"), fields.get("vectors")
    if not isinstance(name, str) or not isinstance(by_case, dict) or not by_case:
        return None
    vectors = {case: _vector(numbers, width) for case, numbers in by_case.items()}
    known = {case: vector for case, vector in vectors.items() if vector is not None}
    return Mistake(name=name, vectors=known) if set(known) == set(by_case) <= names else None


def _vector(numbers: object, width: int) -> NDArray[np.float64] | None:
    """Return (width,) float64, or None where these are not as many numbers."""
    if not isinstance(numbers, list) or len(numbers) != width:
        return None
    if not all(isinstance(value, (int, float)) for value in numbers):
        return None
    return np.array(numbers, np.float64)
