"""writes.json: what stands in every table of an index after each of a few writes."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from contract.library import Chunk, ChunkedDocument, Index, ModelIdentity
from contract.make_index import tables_of
from contract.notation import base64_of, spread, unit, unit_rows
from contract.words_model import WordsModel

COLUMNS = {
    "documents": ["number", "id", "title", "metadata", "source", "crc32"],
    "chunks": ["number", "document", "position", "start", "stop", "num_tokens", "truncated", "title", "hash", "crc32", "text"],
    "vectors": ["number", "crc32", "scales", "rest", "floats"],
    "blocks": ["number", "changed", "crc32", "live"],
    "heads": ["block", "crc32", "squares", "codes"],
}  # fmt: skip


def writes() -> dict[str, Any]:
    """Each run makes a file and writes to it; the tables are shown after each step."""
    return {
        "about": "Writes to a new index file, and what its tables hold after each. `put`: documents with their chunks, each with its vector; "
        "a stored id is replaced, and a chunk with an equal hash keeps its number and vector. `vectors`: documents of one chunk each, with "
        "vectors from elsewhere; nothing of a replaced one is kept. `remove`: documents by id. `vector` and `vectors` are base64 of "
        "little-endian float32, blobs in tables are hexadecimal, `columns` names the columns of the rows. `words` has the rows of the full text: chunk, "
        "column, place, word. Metadata and source are JSON, with a blank behind each `,` and `:`; who writes them otherwise compares them as "
        "JSON, and has another checksum in their row.",
        "made_by": "contract/make.py from egemma.Index.put, add_vectors and remove",
        "tolerance": "none: rows are equal",
        "columns": COLUMNS,
        "runs": [
            _run((8, 4, 2), floats=False, steps=_story(8)),
            _run((5, 3), floats=True, steps=_story(5)),
            _run((2, 1), floats=False, steps=_many(), shown=("facts", "blocks", "heads")),
        ],
    }


class _Given(WordsModel):
    """Gives each text a vector of its own, of any width."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims, self.dim = dims, dims[0]
        self.fingerprint = hashlib.sha256(f"given vectors of {dims}".encode()).hexdigest()
        self.manifest = replace(self.manifest, dims=dims, fingerprint=self.fingerprint)

    def vector(self, text: str) -> NDArray[np.float32]:
        return unit(spread(f"given {text}", self.dim))


def _run(
    dims: tuple[int, ...], *, floats: bool, steps: list[dict[str, Any]], shown: tuple[str, ...] = ()
) -> dict[str, Any]:
    model = _Given(dims)
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "index.db")
        for step in steps:
            with Index.open(path, cast(Any, model), keep_floats=floats) as index:
                made.append(step | _applied(index, model, step))
            tables = _shown(tables_of(path))
            made[-1]["tables"] = {name: tables[name] for name in shown or tables}
    identity = ModelIdentity.of(model.manifest)
    return {
        "identity": {
            "fingerprint": identity.fingerprint,
            "model": identity.name,
            "dims": list(identity.dims),
            "parts": dict(identity.parts),
        },
        "floats": floats,
        "steps": made,
    }


def _applied(index: Index, model: _Given, step: dict[str, Any]) -> dict[str, Any]:
    """Do the step; what of it JSON has to say in addition."""
    if "remove" in step:
        index.remove(step["remove"])
        return {}
    if "ids" in step:
        rows = unit_rows(f"writes {step['ids'][0]}", len(step["ids"]), model.dim)
        index.add_vectors(rows, ids=step["ids"], texts=step.get("texts"))
        return {"vectors": base64_of(rows)}
    documents = []
    for document in step["put"]:
        chunks = tuple(
            Chunk(**{name: chunk[name] for name in ("start", "stop", "title", "text")})
            for chunk in document["chunks"]
        )
        documents.append(ChunkedDocument(**document | {"chunks": chunks}))
        for chunk in document["chunks"]:
            found = model.embed_documents([chunk["text"]], titles=[chunk["title"]])
            chunk["num_tokens"] = found.num_tokens[0]
            chunk["vector"] = base64_of(found.vectors)
    index.put(documents)
    return {}


def _story(width: int) -> list[dict[str, Any]]:
    """Documents come, change in all the ways that there are, and go."""
    one = ["Rain fell.  ", "The café closed at 7. ", "水が冷たい。"]
    return [
        {"put": [_document("a.md", one, title="Weather"), _document("b", ["Only this."], metadata={"n": 1, "ü": [None, True, 1.5]})]},
        # a chunk in front: the others move, and keep numbers and vectors
        {"put": [_document("a.md", ["New. ", *one], title="Weather")]},
        # the same words twice, one chunk gone, other metadata and source alone
        {"put": [_document("a.md", ["New. ", one[1], one[1]], title="Weather"), _document("b", ["Only this."], metadata={"n": 2}, source={"path": "b"})]},
        # another title is another hash
        {"put": [_document("a.md", ["New. ", one[1]], title="Climate")]},
        {"ids": ["v 1", "b", "v 2"], "texts": ["", "b is replaced", "words: été"]},
        {"remove": ["a.md", "not there"]},
        {"put": [_document("c", ["Overlapped text. ", "More of it."], overlap=5), _document("a.md", ["Rain fell.  "])]},
        {"remove": ["not there"]},
    ]  # fmt: skip


def _many() -> list[dict[str, Any]]:
    """Across the edge of a block, and back into it."""
    return [
        {"ids": [f"m {number}" for number in range(250)]},
        {"ids": [f"n {number}" for number in range(20)]},
        {"remove": ["m 0", "m 7", "m 8", "m 249", "n 5", "n 6", "n 19"]},
        {"ids": ["o"]},
    ]


def _document(
    id_: str,
    texts: list[str],
    *,
    title: str | None = None,
    metadata: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    overlap: int = 0,
) -> dict[str, Any]:
    chunks: list[dict[str, Any]] = []
    whole = "".join(texts)
    stop = 0
    for text in texts:
        start, stop = max(0, stop - overlap), stop + len(text)
        chunks.append({"start": start, "stop": stop, "title": title, "text": whole[start:stop]})
    return {"id": id_, "title": title, "metadata": metadata, "source": source, "chunks": chunks}


def _shown(tables: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"facts": dict(tables["facts"]), "words": tables["words"]}
    for name in COLUMNS:
        found[name] = [
            [value.hex() if isinstance(value, bytes) else value for value in row]
            for row in tables[name]
        ]
    return found
