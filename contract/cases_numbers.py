"""vectors.json and codes.json: shortening, and vectors as integers and back."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from contract.library import (
    EgemmaError,
    Layout,
    block_crc32,
    chunk_crc32,
    chunk_hash,
    decode,
    document_crc32,
    encode,
    facts_crc32,
    head_crc32,
    shorten,
    squares,
    vector_crc32,
)
from contract.notation import base64_of, spread, unit, unit_rows

_BASE64 = "base64 of the little-endian bytes, row after row"


def vectors() -> dict[str, Any]:
    """Leading channels at unit length again, and what has no direction."""
    tables: dict[str, tuple[list[int], np.ndarray[Any, Any]]] = {
        "768": ([768, 512, 256, 128], unit_rows("shorten 768", 2, 768)),
        "256": ([256, 128, 64], unit_rows("shorten 256", 3, 256)),
        "edges": ([8, 4, 2, 1], _edge_rows()),
        "7": ([7], unit_rows("shorten 7", 3, 7)),
    }
    inputs: dict[str, str] = {}
    cases: list[dict[str, Any]] = []
    for name, (dims, rows) in tables.items():
        inputs[name] = base64_of(rows)
        for asked in [None, *dims, 0, -1, dims[0] + 1, dims[-1] + 1, True]:
            case = {"dims": dims, "dim": asked, "vectors": name}
            cases.append(case | _shortened(rows, asked, dims))
    for name, row in {
        "zeros": [0, 0, 0, 0],
        "zeros in front": [0, 0, 1, 0],
        "NaN": [1, float("nan"), 0, 0],
        "NaN behind": [1, 0, 0, float("nan")],
        "infinity": [float("inf"), 0, 0, 0],
        "minus infinity": [0, float("-inf"), 0, 0],
        "tiny": [1e-30, 0, 0, 0],
        "denormal": [1e-45, 0, 0, 0],
        "huge": [3e38, 3e38, 0, 0],
        "not of unit length": [3, 4, 12, 84],
    }.items():
        rows = np.array([row], np.float32)
        inputs[name] = base64_of(rows)
        for dim in (4, 2):
            case = {"dims": [4, 2], "dim": dim, "vectors": name}
            cases.append(case | _shortened(rows, dim, [4, 2]))
    return {
        "about": "Vectors of dims[0] channels, shortened to `dim` (null: dims[0]) and of length 1 again. "
        "`vectors` names rows of `inputs`; these and `expected` are float32 rows: " + _BASE64 + ".",
        "made_by": "contract/make.py from egemma_core.vectors.shorten",
        "tolerance": "each channel within 1.2e-7 (lengths are summed in float64)",
        "inputs": inputs,
        "cases": cases,
    }


def codes() -> dict[str, Any]:
    """Rows as integers, for several layouts, with their checksums, and back."""
    layouts: list[tuple[list[int], int]] = [
        ([768, 512, 256, 128], 128), ([256, 128, 64], 64), ([48, 32, 16, 8], 8),
        ([48, 32, 16, 8], 48), ([20, 5], 5), ([9, 3, 1], 3), ([9, 3, 1], 1), ([7], 7), ([1], 1),
    ]  # fmt: skip
    cases: list[dict[str, Any]] = []
    for dims, width in layouts:
        layout = Layout.of(dims, width)
        rows = np.concatenate([unit_rows(f"codes {dims} {width}", 2, dims[0]), _extremes(dims[0])])
        rows = rows[: 6 if dims[0] > 500 else None]
        heads, scales, rests = encode(rows, layout)
        back = decode(heads, scales, rests, layout)
        stored = zip(heads, scales.astype("<f4"), rests, rows.astype("<f4"), strict=True)
        parts = [tuple(part.tobytes() for part in row) for row in stored]
        numbers = [0, 1, 255, 256, 70000, 2**40, *range(len(rows) - 6)]
        square = squares(heads)
        square_bytes = square.astype("<i4").tobytes()
        bits = bytes((37 * number + dims[0]) % 256 for number in range(32))
        cases.append(
            {
                "dims": dims,
                "scan_width": width,
                "vectors": base64_of(rows),
                "heads": base64_of(heads),
                "scales": base64_of(scales),
                "rests": base64_of(rests),
                "squares": square.tolist(),
                # the bytes themselves where they are few
                **({"decoded": base64_of(back)} if dims[0] < 64 else {}),
                "decoded_crc32": [zlib.crc32(row.astype("<f8").tobytes()) for row in back],
                "numbers": numbers,
                "crc32": [
                    vector_crc32(number, head, scale, rest, None)
                    for number, (head, scale, rest, _) in zip(numbers, parts, strict=True)
                ],
                "crc32_with_floats": [
                    vector_crc32(number, *row) for number, row in zip(numbers, parts, strict=True)
                ],
                "block": 7,
                "heads_crc32": head_crc32(7, square_bytes, heads.tobytes()),
                "live": base64_of(np.frombuffer(bits, np.uint8)),
                "blocks_crc32": block_crc32(7, bits),
            }
        )
    return {
        "about": "Vectors as an index stores them. `vectors` are float32 rows of dims[0] channels, `heads` int8, "
        "`scales` float32, `rests` uint8, `decoded` float64, `live` uint8: " + _BASE64 + ". "
        "`decoded_crc32` is zlib's CRC-32 of each decoded row's bytes. "
        "`crc32` is that of row `numbers` of the table vectors, `crc32_with_floats` where the file keeps floats; "
        "`heads_crc32` and `blocks_crc32` those of block `block`. `rows`: checksums of rows of text.",
        "made_by": "contract/make.py from egemma.index.codes, checksums and heads",
        "tolerance": "none: codes, scales, squares, decoded numbers and checksums are equal",
        "cases": cases,
        "rows": _row_checksums(),
    }


def _shortened(rows: Any, dim: Any, dims: list[int]) -> dict[str, Any]:
    try:
        with np.errstate(all="ignore"):
            return {"expected": base64_of(shorten(rows, dim, dims))}
    except EgemmaError as error:
        return {"error": type(error).__name__}


def _edge_rows() -> np.ndarray[Any, Any]:
    rows: list[list[Any]] = [
        [1] + 7 * [0],
        [-1] + 7 * [0],
        [1, -1] * 4,
        [1e-6, 1, 0, 0, 0, 0, 0, 0],
        list(range(1, 9)),
    ]
    return np.stack([unit(row) for row in rows])


def _extremes(width: int) -> np.ndarray[Any, Any]:
    """Rows in which rounding, signs, zeros and sizes are at their ends."""
    rows = [
        [1.0] + (width - 1) * [0.0],
        (width - 1) * [0.0] + [-1.0],
        [(-1.0) ** channel for channel in range(width)],
        [1.0 / (1 + channel) for channel in range(width)],
        # halves between two codes, which round to the even one
        [1.0, *((2 * (channel % 64) + 1) / 254 for channel in range(1, width))],
        [1.0, *(((2 * (channel % 1024) + 1) / 4064) for channel in range(1, width))],
        [1.0, *(1e-30 for _ in range(1, width))],
        list(spread(f"extremes {width}", width) + np.float32(1.5)),
    ]
    return np.stack([unit(row) if number not in (4, 5) else np.array(row, np.float32)
                     for number, row in enumerate(rows)])  # fmt: skip


def _row_checksums() -> list[dict[str, Any]]:
    chunk = {
        "number": 7,
        "document": 3,
        "position": 0,
        "start": 0,
        "stop": 9,
        "num_tokens": 12,
        "truncated": 0,
    }
    chunks: list[dict[str, Any]] = [
        chunk | {"title": None, "text": "Wärme 水 🎉"},
        chunk | {"number": 2**40, "truncated": 1, "title": "A title", "text": ""},
        chunk | {"title": "", "text": "line\r\nline\t"},
    ]
    documents: list[list[str | None]] = [
        ["a", None, None, None],
        ["päth/ü.md", "Title", '{"n": 1, "ü": null}', '{"path": "päth/ü.md"}'],
        ["🎉", "", "{}", None],
    ]
    facts: dict[str, str | None] = {
        "fingerprint": "0" * 64, "model": "ein Modell ü", "dims": "[8, 4]", "parts": "{}", "scan_width": "4", "floats": "0",
        "generation": "12", "numbering": "0", "next_number": "300", "chunks": "7", "model_path": None, "tuned": None,
    }  # fmt: skip
    return [
        *(
            {
                "table": "chunks",
                "row": row,
                "crc32": chunk_crc32(**row),
                "hash": chunk_hash(row["title"], row["text"]).hex(),
            }
            for row in chunks
        ),
        *(
            {
                "table": "documents",
                "row": dict(zip(("id", "title", "metadata", "source"), row, strict=True)),
                "crc32": document_crc32(str(row[0]), *row[1:]),
            }
            for row in documents
        ),
        {"table": "facts", "row": facts, "crc32": facts_crc32(facts)},
    ]
