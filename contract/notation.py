"""How cases are written: numbers that every machine makes alike, and JSON with a case on each line."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parent
CASES = FOLDER / "cases"
ROOT = FOLDER.parent
BUILTIN = ROOT / "sdk" / "egemma" / "builtin"


def spread(name: str, count: int) -> NDArray[np.float32]:
    """(count,) multiples of 1 / 32768 in -1 to 1, from SHA-256: the same on every machine."""
    blocks = [
        hashlib.sha256(f"{name}/{number}".encode()).digest() for number in range(-(-count // 16))
    ]
    whole = np.frombuffer(b"".join(blocks), "<u2")[:count].astype(np.int32) - 32768
    values: NDArray[np.float32] = (whole / np.float32(32768)).astype(np.float32)
    return values


def unit_rows(name: str, rows: int, width: int) -> NDArray[np.float32]:
    """(rows, width) float32 of length 1, spread over all directions."""
    return np.stack([unit(row) for row in spread(name, rows * width).reshape(rows, width)])


def unit(row: Sequence[float] | NDArray[Any]) -> NDArray[np.float32]:
    """A row divided by its length; `fsum` rounds once, so no machine sums it in another order."""
    values = [float(value) for value in row]
    length = math.sqrt(math.fsum(value * value for value in values))
    return np.array([value / length for value in values], np.float32)


def base64_of(array: NDArray[Any]) -> str:
    """The little-endian bytes of an array, row after row."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def plain_text(text: str) -> Any:
    """A text as JSON holds it: one with a lone surrogate is a list of UTF-16 units instead."""
    try:
        text.encode()
    except UnicodeEncodeError:
        units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        return {"utf16": units.tolist()}
    return text


def to_json(content: dict[str, Any]) -> str:
    """The header field by field, and each long list with one entry a line."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {_compact(row)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(", ", ": "))
