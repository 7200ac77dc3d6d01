"""An index file, from index-format.md alone: its codes, its checksums, its search, its damage."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.contract import stranger_filters
from tests.contract.stranger import CONTRACT, Refused, blank
from tests.contract.stranger_text import match_expression

f32 = np.float32


def page_tables() -> list[str]:
    """The statements on the page, in one line each."""
    page = (CONTRACT / "index-format.md").read_text("utf-8")
    shown = re.search(r"```sql\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    statements = re.findall(r"CREATE .*?(?=\nCREATE|\Z)", shown.group(1), re.DOTALL)
    return [" ".join(statement.split()) for statement in statements]


class Layout:
    def __init__(self, dims: list[int], scan_width: int) -> None:
        self.dims, self.D, self.W = dims, dims[0], scan_width
        edges = [scan_width, *sorted(dim for dim in dims if dim > scan_width)]
        self.segments = list(pairwise(edges))
        self.packed = (scan_width + 1) // 2
        self.rest_bytes = self.packed + self.D - scan_width

    def encode(self, v: NDArray[Any]) -> tuple[bytes, bytes, bytes]:
        """Head, scales and rest of one float32 vector."""
        parts = [v[: self.W], *(v[a:b] for a, b in self.segments)]
        scales = [f32(np.abs(part).max()) / f32(127) for part in parts]
        divide = [scale if scale else f32(1) for scale in scales]
        codes, nibbles = [], []
        for channel in parts[0]:
            fine = max(-2032, min(2032, int(np.rint(f32(channel) * (f32(16) / divide[0])))))
            codes.append((fine + 8) // 16)
            nibbles.append(fine - 16 * codes[-1] + 8)
        nibbles += [8] * (len(nibbles) % 2)
        rest = bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
        for part, scale in zip(parts[1:], divide[1:], strict=True):
            whole = [max(-127, min(127, int(np.rint(f32(x) / scale)))) for x in part]
            rest += struct.pack(f"<{len(whole)}b", *whole)
        return struct.pack(f"<{self.W}b", *codes), struct.pack(f"<{len(scales)}f", *scales), rest

    def decode(self, head: bytes, scales: bytes, rest: bytes) -> list[float]:
        steps = struct.unpack(f"<{1 + len(self.segments)}f", scales)
        vector = []
        for channel, code in enumerate(struct.unpack(f"<{self.W}b", head)):
            byte = rest[channel // 2]
            nibble = byte >> 4 if channel % 2 else byte & 15
            vector.append(steps[0] * (code + (nibble - 8) / 16))
        codes = struct.unpack_from(f"<{self.D - self.W}b", rest, self.packed)
        for (start, stop), step in zip(self.segments, steps[1:], strict=True):
            vector += [step * code for code in codes[start - self.W : stop - self.W]]
        return vector


def number_crc(number: int, *parts: bytes) -> int:
    return zlib.crc32(struct.pack("<q", number) + b"".join(parts))


def fields_crc(*fields: Any) -> int:
    return zlib.crc32("\0".join("" if field is None else str(field) for field in fields).encode())


def facts_crc(facts: dict[str, str | None]) -> str:
    named = sorted((name, value) for name, value in facts.items() if value is not None)
    return str(fields_crc(*(part for entry in named for part in entry)))


def chunk_hash(title: str | None, text: str) -> bytes:
    return hashlib.sha256((title or "").encode() + b"\0" + text.encode()).digest()[:16]


@contextmanager
def _damage() -> Iterator[None]:
    """What cannot be read or does not fit is damage, and never anything else."""
    try:
        yield
    except (sqlite3.Error, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:  # fmt: skip
        raise Refused("IndexFileError") from error


def _require(true: bool, name: str = "IndexFileError") -> None:
    if not true:
        raise Refused(name)


class Index:
    """An index, opened for reading."""

    def __init__(self, path: Path, fingerprint: str | None) -> None:
        self.documents_checked = False
        with _damage():
            self.db = sqlite3.connect(path)
        try:
            with _damage():
                self._open(fingerprint)
        except BaseException:
            self.db.close()
            raise

    def _open(self, fingerprint: str | None) -> None:
        self.db.execute("PRAGMA trusted_schema = OFF")
        _require(self._one("PRAGMA application_id") == (0x65474D41,))
        _require(self._one("PRAGMA user_version") == (2,))
        hidden = ("words_data", "words_idx", "words_docsize", "words_config")
        made = [
            statement.replace('"', "")
            for name, statement in self.db.execute("SELECT name, sql FROM sqlite_master")
            if name not in hidden and not name.startswith("sqlite_")
        ]
        _require(sorted(made) == sorted(page_tables()))
        facts = dict(self.db.execute("SELECT name, value FROM facts"))
        given = facts.pop("crc32")
        _require(given == facts_crc({n: v for n, v in facts.items() if not n.startswith("next_") or n == "next_number"}))  # fmt: skip
        self.dims: list[int] = json.loads(facts["dims"])
        self.chunks, self.next_number = int(facts["chunks"]), int(facts["next_number"])
        self.generation = int(facts["generation"])
        self.floats = facts["floats"] == "1"
        _require(int(facts["scan_width"]) in self.dims and 0 <= self.chunks <= self.next_number)
        self.layout = Layout(self.dims, int(facts["scan_width"]))
        _require(fingerprint in (None, facts["fingerprint"]), "IndexMismatchError")

    def _one(self, sql: str, *parameters: Any) -> Any:
        return self.db.execute(sql, parameters).fetchone()

    def heads(self) -> dict[int, tuple[bytes, int]]:
        """Head and square of each live chunk, in order."""
        found: dict[int, tuple[bytes, int]] = {}
        W = self.layout.W
        for block, live, crc in self.db.execute(
            "SELECT number, live, crc32 FROM blocks ORDER BY 1"
        ):
            _require(len(live) == 32 and number_crc(block, live) == crc)
            squares, codes, head_crc = self._one(
                "SELECT squares, codes, crc32 FROM heads WHERE block = ?", block
            )
            _require(number_crc(block, squares, codes) == head_crc)
            _require(len(codes) * 4 == len(squares) * W)
            for slot in range(256):
                if live[slot // 8] >> (slot % 8) & 1:
                    number = 256 * block + slot
                    head = codes[slot * W : (slot + 1) * W]
                    _require(len(head) == W and number < self.next_number)
                    found[number] = head, struct.unpack_from("<i", squares, 4 * slot)[0]
        _require(len(found) == self.chunks)
        return found

    def vector(self, number: int, head: bytes) -> NDArray[np.float64]:
        scales, rest, floats, crc = self._one(
            "SELECT scales, rest, floats, crc32 FROM vectors WHERE number = ?", number
        )
        _require((floats is not None) == self.floats)
        _require(len(scales) == 4 * (1 + len(self.layout.segments)))
        _require(len(rest) == self.layout.rest_bytes)
        _require(number_crc(number, head, scales, rest, floats or b"") == crc)
        if floats is not None:
            return np.frombuffer(floats, "<f4").astype(np.float64)
        return np.array(self.layout.decode(head, scales, rest))

    def chunk(self, number: int) -> dict[str, Any]:
        """A chunk and its document, both checked."""
        names = ("number", "document", "position", "start", "stop", "num_tokens", "truncated", "title", "text")  # fmt: skip
        *row, crc = self._one(f"SELECT {', '.join(names)}, crc32 FROM chunks WHERE number = ?", number)  # fmt: skip
        _require(fields_crc(*row) == crc)
        found = dict(zip(names, row, strict=True))
        *fields, crc = self._one(
            "SELECT id, title, metadata, source, crc32 FROM documents WHERE number = ?",
            found["document"],
        )
        _require(fields_crc(*fields) == crc)
        return found | {"id": fields[0]}

    def ids(self, where: Any = None) -> list[str]:
        return [id_ for _, id_ in self._passing(where)]

    def _passing(self, where: Any) -> list[tuple[int, str]]:
        """Numbers and ids of documents that a filter lets through, after all of them were checked."""
        if where is not None:
            stranger_filters.check(where)
        with _damage():
            rows = self.db.execute(
                "SELECT number, id, title, metadata, source, crc32 FROM documents NOT INDEXED ORDER BY number"
            ).fetchall()
            _require(all(fields_crc(*row[1:5]) == row[5] for row in rows))
            owners = [row[0] for row in self.db.execute("SELECT document FROM chunks")]
            _require(set(owners) == {row[0] for row in rows} and len(owners) == self.chunks)
            return [
                (row[0], row[1])
                for row in rows
                if where is None
                or stranger_filters.holds(where, None if row[3] is None else json.loads(row[3]))
            ]

    def get(self, id_: str) -> dict[str, Any]:
        with _damage():
            row = self._one("SELECT number, title, metadata, source, crc32 FROM documents WHERE id = ?", id_)  # fmt: skip
            if row is None:
                raise Refused("NotFoundError")
            number, title, metadata, source, crc = row
            _require(fields_crc(id_, title, metadata, source) == crc)
            numbers = self.db.execute("SELECT number FROM chunks WHERE document = ? ORDER BY position", (number,))  # fmt: skip
            chunks = [self.chunk(one) for (one,) in numbers.fetchall()]
            _require(bool(chunks))
            text, read = "", 0
            for chunk in chunks:
                _require(chunk["start"] <= read)
                text += chunk["text"][read - chunk["start"] :]
                read = max(read, chunk["stop"])
            return {
                "id": id_,
                "title": title,
                "metadata": None if metadata is None else json.loads(metadata),
                "source": None if source is None else json.loads(source),
                "num_tokens": sum(chunk["num_tokens"] for chunk in chunks),
                "truncated": any(chunk["truncated"] for chunk in chunks),
                "num_chunks": len(chunks),
                "text": text,
            }

    def search(
        self,
        *,
        vector: NDArray[Any] | None = None,
        text: str | None = None,
        mode: str = "vector",
        k: int = 10,
        dim: int | None = None,
        where: Any = None,
        exact: bool = False,
        shortlist: int | None = None,
    ) -> list[list[Any]]:
        """[id, position, score] of each hit; in hybrid mode the cosine and the BM25 as well."""
        _require(1 <= k <= 10_000 and (shortlist is None or shortlist >= 1), "ConfigError")
        _require(not (exact and shortlist is not None), "ConfigError")
        _require(mode in ("vector", "text", "hybrid"), "ConfigError")
        _require(mode != "text" or (dim is None and shortlist is None and not exact), "ConfigError")
        _require(mode == "vector" or not blank(text or ""), "InputError")
        _require(dim is None or dim in self.dims, "DimensionError")
        allowed = None if where is None else {number for number, _ in self._passing(where)}
        count = max(k, 100) if mode == "hybrid" else k
        with _damage():
            near = self._near(vector, dim, allowed, count, exact, shortlist, k) if vector is not None and mode != "text" else []  # fmt: skip
            worded = self._worded(text or "", allowed, count) if mode != "vector" else []
            if mode != "hybrid":
                return [[*self._hit(number), score] for number, score in (near or worded)]
            shares: dict[int, Fraction] = {}
            for ranking in (near, worded):
                for rank, (number, _) in enumerate(ranking, start=1):
                    # each share is a float64; only their sum is exact
                    shares[number] = shares.get(number, Fraction(0)) + Fraction(1 / (60 + rank))
            ranked = sorted(shares.items(), key=lambda pair: -float(pair[1]))[:k]
            cosines, bm25 = dict(near), dict(worded)
            return [
                [*self._hit(number), float(score), cosines.get(number), bm25.get(number)]
                for number, score in ranked
            ]

    def _hit(self, number: int) -> tuple[str, int]:
        chunk = self.chunk(number)
        return chunk["id"], chunk["position"]

    def _near(
        self,
        vector: NDArray[Any],
        dim: int | None,
        allowed: set[int] | None,
        count: int,
        exact: bool,
        shortlist: int | None,
        k: int,
    ) -> list[tuple[int, float]]:
        width = len(vector)
        _require(width in self.dims, "DimensionError")
        _require(dim is None or dim <= width, "InputError")
        query = vector.astype(np.float64)
        for trained in self.dims:
            length = float(np.sqrt((query[:trained] ** 2).sum()))
            _require(trained > width or 0 < length < float("inf"), "InputError")
        query = query / np.sqrt((query * query).sum())
        part = query[: dim or width] / np.sqrt((query[: dim or width] ** 2).sum())
        heads = self.heads()
        if allowed is not None:
            owners = dict(self.db.execute("SELECT number, document FROM chunks"))
            heads = {number: head for number, head in heads.items() if owners[number] in allowed}
        numbers = list(heads)
        if not exact:
            numbers = self._scan(query, heads, max(count, shortlist or max(300, 10 * k)))
        scored = []
        for number in numbers:
            stored = self.vector(number, heads[number][0])[: len(part)]
            length = np.sqrt((stored * stored).sum())
            cosine = float((stored * part).sum() / length) if length else 0.0
            scored.append((number, max(-1.0, min(1.0, cosine))))
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:count]

    def _scan(
        self, query: NDArray[Any], heads: dict[int, tuple[bytes, int]], most: int
    ) -> list[int]:
        W = self.layout.W
        _require(len(query) >= W, "InputError")
        rough = (query[:W] / np.sqrt((query[:W] ** 2).sum())).astype(f32)
        codes = np.rint(rough * (f32(127) / np.abs(rough).max())).astype(np.int64)
        scores = {}
        for number, (head, square) in heads.items():
            product = int((np.frombuffer(head, np.int8).astype(np.int64) * codes).sum())
            inverse = f32(1) / np.sqrt(f32(square)) if square else f32(0)
            scores[number] = f32(product) * inverse
        if len(scores) <= most:
            return list(scores)
        last = sorted(scores.values(), reverse=True)[most - 1]
        return [number for number, score in scores.items() if score >= last]

    def _worded(self, text: str, allowed: set[int] | None, count: int) -> list[tuple[int, float]]:
        match = match_expression(text)
        if match is None:
            return []
        rows = self.db.execute(
            "SELECT rowid, bm25(words) FROM words WHERE words MATCH ? ORDER BY 2, 1", (match,)
        ).fetchall()
        _require(all(isinstance(score, float) for _, score in rows))
        if allowed is not None:
            owners = dict(self.db.execute("SELECT number, document FROM chunks"))
            rows = [row for row in rows if owners[row[0]] in allowed]
        return [(number, -score) for number, score in rows[:count]]

    def check(self) -> None:
        """Read everything and compare it with everything else."""
        with _damage():
            _require(self.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
            self._passing(None)
            heads = self.heads()
            numbers = [row[0] for row in self.db.execute("SELECT number FROM chunks ORDER BY 1")]
            _require(numbers == list(heads))
            for number, (head, square) in heads.items():
                self.vector(number, head)
                _require(
                    sum(code * code for code in struct.unpack(f"<{len(head)}b", head)) == square
                )
                chunk = self.chunk(number)
                stored = self._one("SELECT hash FROM chunks WHERE number = ?", number)[0]
                _require(chunk_hash(chunk["title"], chunk["text"]) == stored)
            _require(self._one("SELECT count(*) FROM vectors")[0] == len(numbers))
            blocks = -(-self.next_number // 256)
            for table, column in (("blocks", "number"), ("heads", "block")):
                rows = [
                    row[0] for row in self.db.execute(f"SELECT {column} FROM {table} ORDER BY 1")
                ]
                _require(rows == list(range(blocks)))
            for block, squares in self.db.execute("SELECT block, squares FROM heads"):
                _require(len(squares) == 4 * min(256, self.next_number - 256 * block))
            latest = self._one("SELECT max(changed), min(changed) FROM blocks")
            _require(latest[0] <= self.generation and latest[1] >= 0)
            for id_ in self.ids():
                read, rows = 0, self.db.execute(
                    "SELECT position, start, stop, text FROM chunks WHERE document = (SELECT number FROM documents "
                    "WHERE id = ?) ORDER BY position", (id_,)).fetchall()  # fmt: skip
                for expected, (position, start, stop, text) in enumerate(rows):
                    _require(position == expected and 0 <= start <= read)
                    _require(stop - start == len(text))
                    read = max(read, stop)
            self._check_words()

    def _check_words(self) -> None:
        """The full-text table made again from the chunks, and compared."""
        self.db.execute(
            "CREATE VIRTUAL TABLE temp.again USING fts5(title, text, content='', "
            "tokenize='unicode61 remove_diacritics 2')"
        )
        self.db.execute(
            "INSERT INTO temp.again (rowid, title, text) "
            "SELECT number, coalesce(title, ''), text FROM chunks ORDER BY number"
        )
        found = []
        for schema, table in (("temp", "again"), ("main", "words")):
            name = f"seen_{table}"
            self.db.execute(
                f"CREATE VIRTUAL TABLE temp.{name} USING fts5vocab({schema}, {table}, instance)"
            )
            rows = self.db.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3, 4").fetchall()
            sizes = self.db.execute(f"SELECT * FROM {schema}.{table}_docsize ORDER BY 1").fetchall()
            found.append((rows, sizes))
        _require(found[0] == found[1])
