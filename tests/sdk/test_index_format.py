"""docs/index-format.md is enough: a reader written from that page alone, without a line of egemma,
finds what `Index` finds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egemma.identity import ModelIdentity
from egemma.index import Index
from egemma.index.facts import TABLES
from egemma_core.errors import InputError
from egemma_core.vectors import normalize

PAGE = (Path(__file__).parents[2] / "docs" / "index-format.md").read_text(encoding="utf-8")


class Stranger:
    """What somebody would write who has only the page: plain Python, one number after the other."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path)
        assert self.db.execute("PRAGMA application_id").fetchone() == (0x65474D41,)
        assert self.db.execute("PRAGMA user_version").fetchone() == (2,)
        self.facts: dict[str, str] = dict(self.db.execute("SELECT name, value FROM facts"))
        self.dims: list[int] = json.loads(self.facts["dims"])
        self.scan_width = int(self.facts["scan_width"])
        self.edges = sorted(dim for dim in self.dims if dim > self.scan_width)
        self.vectors = {number: self._vector(number) for number in self._live()}
        assert len(self.vectors) == int(self.facts["chunks"])

    def _live(self) -> list[int]:
        numbers = []
        for block, crc, live in self.db.execute("SELECT number, crc32, live FROM blocks"):
            assert zlib.crc32(struct.pack("<q", block) + live) == crc
            numbers += [256 * block + bit for bit in range(256) if live[bit // 8] >> (bit % 8) & 1]
        return numbers

    def _vector(self, number: int) -> list[float]:
        squares, codes, crc = self.db.execute(
            "SELECT squares, codes, crc32 FROM heads WHERE block = ?", (number // 256,)
        ).fetchone()
        assert zlib.crc32(struct.pack("<q", number // 256) + squares + codes) == crc
        scales, rest, floats, crc = self.db.execute(
            "SELECT scales, rest, floats, crc32 FROM vectors WHERE number = ?", (number,)
        ).fetchone()
        slot, width = number % 256, self.scan_width
        head = codes[slot * width : (slot + 1) * width]
        assert zlib.crc32(struct.pack("<q", number) + head + scales + rest + (floats or b"")) == crc
        signed = struct.unpack(f"<{width}b", head)
        assert sum(code * code for code in signed) == struct.unpack_from("<i", squares, 4 * slot)[0]
        if self.facts["floats"] == "1":
            return list(struct.unpack(f"<{self.dims[0]}f", floats))
        steps = struct.unpack(f"<{1 + len(self.edges)}f", scales)
        vector = []
        for channel, code in enumerate(signed):
            byte = rest[channel // 2]
            nibble = byte >> 4 if channel % 2 else byte & 15
            vector.append(steps[0] * (code + (nibble - 8) / 16))
        packed = (width + 1) // 2
        for channel in range(width, self.dims[0]):
            segment = next(
                number for number, edge in enumerate(self.edges, start=1) if channel < edge
            )
            vector.append(
                steps[segment] * struct.unpack_from("<b", rest, packed + channel - width)[0]
            )
        return vector

    def hits(self, query: Any, k: int, dim: int) -> list[tuple[int, float]]:
        def cosine(vector: list[float]) -> float:
            dot = sum(a * b for a, b in zip(query[:dim], vector[:dim], strict=True))
            return (
                dot
                / math.sqrt(sum(a * a for a in query[:dim]))
                / math.sqrt(sum(b * b for b in vector[:dim]))
            )

        ranked = sorted(((-cosine(vector), number) for number, vector in self.vectors.items()))
        return [(number, -score) for score, number in ranked[:k]]

    def chunk(self, number: int) -> tuple[str, str]:
        """(document id, text), checked."""
        document, position, start, stop, num_tokens, truncated, title, text, hash_, crc = (
            self.db.execute(
                "SELECT document, position, start, stop, num_tokens, truncated, title, text, hash, "
                "crc32 FROM chunks WHERE number = ?",
                (number,),
            ).fetchone()
        )
        fields = (number, document, position, start, stop, num_tokens, truncated, title, text)
        assert (
            zlib.crc32("\0".join("" if field is None else str(field) for field in fields).encode())
            == crc
        )
        assert hashlib.sha256((title or "").encode() + b"\0" + text.encode()).digest()[:16] == hash_
        id_, document_title, metadata, source, crc = self.db.execute(
            "SELECT id, title, metadata, source, crc32 FROM documents WHERE number = ?", (document,)
        ).fetchone()
        fields = (id_, document_title, metadata, source)
        assert (
            zlib.crc32("\0".join("" if field is None else str(field) for field in fields).encode())
            == crc
        )
        return id_, text


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("dims", [(48, 32, 16, 8), (7,), (20, 5)])
def test_a_reader_made_from_the_page_finds_the_same(
    tmp_path: Path, dims: tuple[int, ...], floats: bool
) -> None:
    random = np.random.default_rng(3)
    vectors = normalize(random.standard_normal((700, dims[0])).astype(np.float32))
    identity = ModelIdentity(fingerprint="0" * 64, name="a model", dims=dims, parts={})
    with Index.open(tmp_path / "a.db", identity, keep_floats=floats) as index:
        ids = [f"note {number}" for number in range(700)]
        index.add_vectors(
            vectors,
            ids=ids,
            texts=[f"text {number} ü 水" for number in range(700)],
            titles=["A title"] * 350 + [None] * 350,
            metadata=[{"n": number, "ü": None} for number in range(700)],
        )
        index.remove(ids[100:400:3])
        index.add_vectors(vectors[:5], ids=[f"again {number}" for number in range(5)])
        stranger = Stranger(tmp_path / "a.db")
        for query in random.standard_normal((5, dims[0])).astype(np.float32):
            for dim in dims:
                hits = index.search(query, 12, dim=dim, exact=True)
                expected = stranger.hits(query.astype(np.float64), 12, dim)
                assert [(hit.id, hit.text) for hit in hits] == [
                    stranger.chunk(number) for number, _ in expected
                ]
                np.testing.assert_allclose(
                    [hit.score for hit in hits], [score for _, score in expected], atol=1e-6
                )


def test_the_page_shows_the_tables_as_they_are_made() -> None:
    shown = re.search(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    statements = [
        " ".join(statement.split())
        for statement in re.findall(r"CREATE .*?(?=\nCREATE|\Z)", shown.group(1), re.DOTALL)
    ]
    assert statements == list(TABLES.values())


def test_every_fact_is_on_the_page(tmp_path: Path) -> None:
    with Index.open(
        tmp_path / "a.db", ModelIdentity(fingerprint="0" * 64, name="a model", dims=(8,), parts={})
    ) as index:
        index.add_vectors(np.eye(8, dtype=np.float32)[:1], ids=["1"])
    with sqlite3.connect(tmp_path / "a.db") as db:
        for (name,) in db.execute("SELECT name FROM facts"):
            assert f"`{name}`" in PAGE, name


def test_what_the_embedder_said_of_a_vector_is_stored_with_it(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)[:2]
    with Index.open(
        tmp_path / "a.db", ModelIdentity(fingerprint="0" * 64, name="a model", dims=(8,), parts={})
    ) as index:
        index.add_vectors(
            vectors,
            ids=["1", "2"],
            texts=["one", "two"],
            num_tokens=np.array([7, 9]).tolist(),
            truncated=[False, True],
        )
        assert [
            (document.num_tokens, document.truncated) for document in index.get(["1", "2"])
        ] == [(7, False), (9, True)]
        assert index.search(vectors[1], 1)[0].truncated is True
        for bad in ([1], [1, -1], [1, True], [1, 2.5]):
            with pytest.raises(InputError, match="num_tokens"):
                index.add_vectors(vectors, ids=["3", "4"], num_tokens=bad)  # type: ignore[arg-type]
        assert len(index) == 2
