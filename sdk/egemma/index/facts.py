"""What an index file is made of: its tables, the numbers of its format, and its facts.

contract/index-format.md describes the same for other languages.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from egemma.identity import ModelIdentity
from egemma.index.checksums import Damage, facts_crc32
from egemma.index.codes import Layout

APPLICATION_ID = 0x65474D41
FORMAT_VERSION = 2
MAX_WIDTH = 16_384  # channels of a vector
BLOCK_ROWS = 256  # chunk numbers of a block
LIVE_BYTES = BLOCK_ROWS // 8  # a bit for each of them

TABLES = {
    "facts": "CREATE TABLE facts (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL)",
    "documents": "CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, "
    "title TEXT, metadata TEXT, source TEXT, crc32 INTEGER NOT NULL)",
    "chunks": "CREATE TABLE chunks (number INTEGER PRIMARY KEY, document INTEGER NOT NULL, "
    "position INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, num_tokens INTEGER "
    "NOT NULL, truncated INTEGER NOT NULL, title TEXT, hash BLOB NOT NULL, crc32 INTEGER NOT NULL, "
    "text TEXT NOT NULL)",
    "chunks_of_document": "CREATE INDEX chunks_of_document ON chunks (document)",
    "vectors": "CREATE TABLE vectors (number INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL, scales "
    "BLOB NOT NULL, rest BLOB NOT NULL, floats BLOB)",
    "blocks": "CREATE TABLE blocks (number INTEGER PRIMARY KEY, changed INTEGER NOT NULL, crc32 "
    "INTEGER NOT NULL, live BLOB NOT NULL)",
    "blocks_by_change": "CREATE INDEX blocks_by_change ON blocks (changed)",
    "heads": "CREATE TABLE heads (block INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL, squares BLOB "
    "NOT NULL, codes BLOB NOT NULL)",
    "words": "CREATE VIRTUAL TABLE words USING fts5(title, text, content='', tokenize='unicode61 "
    "remove_diacritics 2')",
}
# While a migration to another model is half way: the new vectors, and what the new tokenizer
# counted. All three tables are there, or none.
NEXT_TABLES = {
    "next_vectors": TABLES["vectors"].replace("vectors", "next_vectors"),
    "next_heads": TABLES["heads"].replace("heads", "next_heads"),
    "next_tokens": "CREATE TABLE next_tokens (number INTEGER PRIMARY KEY, num_tokens INTEGER NOT "
    "NULL, truncated INTEGER NOT NULL)",
}


@dataclass(frozen=True, kw_only=True)
class State:
    """What the table `facts` says at one moment: model, layout, and how far the file has come."""

    identity: ModelIdentity
    scan_width: int  # channels of a head; one of the model's widths
    floats: bool  # vectors are kept as float32 beside their codes
    generation: int = 0  # rises with every write
    numbering: int = 0  # rises when chunks get new numbers
    next_number: int = 0  # of the next chunk; none below it is given out twice
    chunks: int = 0  # how many there are
    model_path: str | None = None  # where the bundle was; a hint
    tuned: str | None = None  # JSON of the last `tune`

    @property
    def layout(self) -> Layout:
        """How a vector of this file is stored."""
        return Layout.of(self.identity.dims, self.scan_width)

    def to_facts(self) -> dict[str, str | None]:
        """Return the rows of `facts`, by name."""
        return {
            "fingerprint": self.identity.fingerprint,
            "model": self.identity.name,
            "dims": json.dumps(list(self.identity.dims)),
            "parts": json.dumps(dict(self.identity.parts)),
            "scan_width": str(self.scan_width),
            "floats": str(int(self.floats)),
            "generation": str(self.generation),
            "numbering": str(self.numbering),
            "next_number": str(self.next_number),
            "chunks": str(self.chunks),
            "model_path": self.model_path,
            "tuned": self.tuned,
        }


def read_state(connection: sqlite3.Connection) -> State:
    """Read the facts, and check them against their checksum and each other."""
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    try:
        identity = ModelIdentity.from_json(
            json.dumps(
                {
                    "fingerprint": facts["fingerprint"],
                    "name": facts["model"],
                    "dims": json.loads(facts["dims"]),
                    "parts": json.loads(facts["parts"]),
                }
            )
        )
        state = State(
            identity=identity,
            scan_width=int(facts["scan_width"]),
            floats=facts["floats"] == "1",
            generation=int(facts["generation"]),
            numbering=int(facts["numbering"]),
            next_number=int(facts["next_number"]),
            chunks=int(facts["chunks"]),
            model_path=facts.get("model_path"),
            tuned=facts.get("tuned"),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"its table `facts` lacks or misspells something ({error})") from error
    if facts.get("crc32") != facts_crc32(state.to_facts()):
        raise Damage("its table `facts` is not what was stored")
    counts = (state.generation, state.numbering, state.next_number, state.chunks)
    if (
        state.scan_width not in identity.dims
        or min(counts) < 0
        or state.chunks > state.next_number
        or identity.dim > MAX_WIDTH
    ):
        raise Damage(f"its table `facts` does not fit together: {facts}")
    return state


def write_state(connection: sqlite3.Connection, state: State) -> None:
    """Store the facts; call it inside a write transaction."""
    facts = state.to_facts()
    for name, value in (facts | {"crc32": facts_crc32(facts)}).items():
        if value is None:
            connection.execute("DELETE FROM facts WHERE name = ?", (name,))
        else:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


FACTS_OF_MIGRATION = "substr(name, 1, 5) = 'next_' AND name != 'next_number'"


def read_migration(connection: sqlite3.Connection) -> dict[str, str]:
    """Return the facts of a migration that is half way; empty where there is none."""
    return dict(connection.execute(f"SELECT name, value FROM facts WHERE {FACTS_OF_MIGRATION}"))
