"""Writing an index, from index-format.md alone."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.contract.stranger import array
from tests.contract.stranger_index import (
    Layout,
    chunk_hash,
    facts_crc,
    fields_crc,
    number_crc,
    page_tables,
)

Row = dict[str, Any]


class Writer:
    """A new index file of a model, open for writing."""

    def __init__(self, path: Path, identity: Row, *, floats: bool) -> None:
        self.dims = identity["dims"]
        self.layout, self.floats = Layout(self.dims, self.dims[-1]), floats
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA page_size = 8192")
        self.db.execute("PRAGMA journal_mode = WAL")
        for statement in page_tables():
            self.db.execute(statement)
        self.db.execute(f"PRAGMA application_id = {0x65474D41}")
        self.db.execute("PRAGMA user_version = 2")
        self.facts: dict[str, str | None] = {
            "fingerprint": identity["fingerprint"],
            "model": identity["model"],
            "dims": json.dumps(self.dims),
            "parts": json.dumps(identity["parts"]),
            "scan_width": str(self.layout.W),
            "floats": str(int(floats)),
            "generation": "0",
            "numbering": "0",
            "next_number": "0",
            "chunks": "0",
        }

    def write(self, step: Row) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.touched, self.changed = False, set[int]()
        self.next = int(self.facts["next_number"] or 0)
        if "remove" in step:
            for id_ in step["remove"]:
                self._remove(id_)
        elif "ids" in step:
            rows = array(step["vectors"], "<f4", self.dims[0])
            new = []
            for position, id_ in enumerate(step["ids"]):
                text = step["texts"][position] if "texts" in step else ""
                number, stored = self._document({"id": id_})
                self._forget([chunk["number"] for chunk in stored])
                chunk = {"start": 0, "stop": len(text), "title": None, "text": text}
                new.append((number, 0, chunk | {"num_tokens": 0}, rows[position]))
            self._add(new)
        else:
            self._put(step["put"])
        self._finish()

    def _put(self, documents: list[Row]) -> None:
        new, copied, gone = [], [], []
        for document in documents:
            number, stored = self._document(document)
            taken = set[int]()
            for position, chunk in enumerate(document["chunks"]):
                hash_ = chunk_hash(chunk["title"], chunk["text"])
                same = [one for one in stored if one["hash"] == hash_]
                free = [one for one in same if one["number"] not in taken]
                if free:
                    taken.add(free[0]["number"])
                    self._move(free[0], position, chunk)
                elif same:
                    again = chunk | {"num_tokens": same[0]["num_tokens"]}
                    copied.append((number, position, again, self._stored(same[0]["number"])))
                else:
                    vector = array(chunk["vector"], "<f4")
                    new.append((number, position, chunk, vector))
            gone += [one["number"] for one in stored if one["number"] not in taken]
        self._forget(gone)
        self._add(new + copied)

    def _document(self, document: Row) -> tuple[int, list[Row]]:
        """Its number, and the chunks that are stored of it, by position."""
        self.touched = True
        packed = [
            None if document.get(name) is None else json.dumps(document[name], ensure_ascii=False)
            for name in ("metadata", "source")
        ]
        fields = (document["id"], document.get("title"), *packed)
        row = self.db.execute("SELECT number FROM documents WHERE id = ?", fields[:1]).fetchone()
        if row is None:
            (highest,) = self.db.execute("SELECT max(number) FROM documents").fetchone()
            number = (highest or 0) + 1
        else:
            (number,) = row
        self.db.execute(
            "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, ?)",
            (number, *fields, fields_crc(*fields)),
        )
        return number, self._chunks("document = ? ORDER BY position", number)

    def _chunks(self, where: str, *values: Any) -> list[Row]:
        found = self.db.execute(f"SELECT * FROM chunks WHERE {where}", values)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def _move(self, stored: Row, position: int, chunk: Row) -> None:
        moved = stored | {"position": position, "start": chunk["start"], "stop": chunk["stop"]}
        if moved != stored:
            self._chunk(moved)

    def _chunk(self, row: Row) -> None:
        names = ("number", "document", "position", "start", "stop", "num_tokens", "truncated", "title")  # fmt: skip
        fields = [row[name] for name in names]
        hash_ = chunk_hash(row["title"], row["text"])
        crc = fields_crc(*fields, row["text"])
        self.db.execute(
            f"INSERT OR REPLACE INTO chunks VALUES ({', '.join('?' * 11)})",
            (*fields, hash_, crc, row["text"]),
        )

    def _add(self, new: list[tuple[int, int, Row, Any]]) -> None:
        for document, position, chunk, vector in new:
            number, self.next = self.next, self.next + 1
            row = chunk | {"number": number, "document": document, "position": position}
            self._chunk(row | {"truncated": 0})
            self.db.execute(
                "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)",
                (number, chunk["title"] or "", chunk["text"]),
            )
            head, scales, rest = self.layout.encode(vector)
            floats = np.asarray(vector, "<f4").tobytes() if self.floats else None
            crc = number_crc(number, head, scales, rest, floats or b"")
            self.db.execute(
                "INSERT INTO vectors VALUES (?, ?, ?, ?, ?)", (number, crc, scales, rest, floats)
            )
            self._append_head(number // 256, head)
            self._mark(number, live=True)

    def _append_head(self, block: int, head: bytes) -> None:
        row = self.db.execute("SELECT squares, codes FROM heads WHERE block = ?", (block,)).fetchone()  # fmt: skip
        squares, codes = row or (b"", b"")
        squares += struct.pack("<i", sum(c * c for c in struct.unpack(f"<{len(head)}b", head)))
        codes += head
        crc = number_crc(block, squares, codes)
        self.db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", (block, crc, squares, codes))  # fmt: skip

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            (row,) = self._chunks("number = ?", number)
            self.db.execute(
                "INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)",
                (number, row["title"] or "", row["text"]),
            )
            self.db.execute("DELETE FROM chunks WHERE number = ?", (number,))
            self.db.execute("DELETE FROM vectors WHERE number = ?", (number,))
            self._mark(number, live=False)

    def _remove(self, id_: str) -> None:
        row = self.db.execute("SELECT number FROM documents WHERE id = ?", (id_,)).fetchone()
        if row is not None:
            self._forget([chunk["number"] for chunk in self._chunks("document = ?", row[0])])
            self.db.execute("DELETE FROM documents WHERE number = ?", row)

    def _stored(self, number: int) -> Any:
        scales, rest, floats = self.db.execute(
            "SELECT scales, rest, floats FROM vectors WHERE number = ?", (number,)
        ).fetchone()
        if floats is not None:
            return np.frombuffer(floats, "<f4")
        (codes,) = self.db.execute("SELECT codes FROM heads WHERE block = ?", (number // 256,)).fetchone()  # fmt: skip
        slot, W = number % 256, self.layout.W
        head = codes[slot * W : (slot + 1) * W]
        return np.array(self.layout.decode(head, scales, rest)).astype(np.float32)

    def _mark(self, number: int, *, live: bool) -> None:
        block, slot = divmod(number, 256)
        row = self.db.execute("SELECT live FROM blocks WHERE number = ?", (block,)).fetchone()
        bits = bytearray(row[0] if row else 32)
        bits[slot // 8] &= ~(1 << slot % 8)
        bits[slot // 8] |= live << slot % 8
        self.changed.add(block)
        changed = int(self.facts["generation"] or 0) + 1
        self.db.execute(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)",
            (block, changed, number_crc(block, bytes(bits)), bytes(bits)),
        )

    def _finish(self) -> None:
        if self.touched or self.changed:
            (count,) = self.db.execute("SELECT count(*) FROM chunks").fetchone()
            self.facts["generation"] = str(int(self.facts["generation"] or 0) + 1)
            self.facts |= {"next_number": str(self.next), "chunks": str(count)}
            facts = self.facts | {"crc32": facts_crc(self.facts)}
            self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))
        self.db.execute("COMMIT")
