"""queries.json: what searches of contract/index.db find."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import numpy as np

from contract.library import EgemmaError, Index, search_vector
from contract.make_index import INDEX
from contract.notation import base64_of, unit_rows
from contract.words_model import DIMS, WordsModel

_TEXTS = [
    "the pump loses oil",
    "tomatoes in the garden",
    "lighthouse keeper winter",
    "東京タワー",
    "la lluvia",
    "table rows csv",
    "Łódź café",
    "day 7",
]
_FILTERS: list[Any] = [
    {"lang": "en"}, {"year": {"$gte": 2020, "$lt": 2025}}, {"tags": {"$contains": "red"}}, {"n": {"$in": [5, 33, 300, 12]}},
    {"$or": [{"lang": {"$ne": "en"}}, {"score": {"$gt": 40.5}}]}, {"$not": {"n": {"$exists": True}}}, {"path": {"$startswith": "en/"}},
    {"n": -1}, {"checked": True}, {"kind": "vector"},
]  # fmt: skip


def queries() -> dict[str, Any]:
    """Runs every search on a copy of the committed index."""
    model = WordsModel()
    vectors = {text: model.vector(text) for text in _TEXTS}
    vectors |= {f"direction {n}": row for n, row in enumerate(unit_rows("queries", 4, model.dim))}
    vectors["not of unit length"] = vectors["day 7"] * np.float32(37.5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.db")
        copyfile(INDEX, path)
        with Index.open(path, cast(Any, model)) as index:
            cases = [_run(index, vectors, case) for case in _cases(list(vectors))]
            documents = [_document(index, id_) for id_ in _IDS]
            ids = [{"where": where, "ids": index.ids(where)} for where in _FILTERS]
            ids.append({"where": None, "ids": index.ids()})
    return {
        "about": "Searches of contract/index.db. `vector` names a row of `vectors`: base64 of little-endian float32; `width`: "
        "only its first channels are given. `text` is searched for by words (mode text), or both ways (mode hybrid). "
        "What is left out has its default: k 10, dim that of the vector, no filter, mode vector, exact false, shortlist "
        "the larger of 300 and 10 k. `hits`: [document id, position of the chunk, score], and in hybrid mode also the "
        "cosine and the BM25, null where a hit is not among the best of that kind. `documents`: whole ones; `ids`: what "
        "filters leave over, in the order of document numbers.",
        "made_by": "contract/make.py from egemma.Index on contract/index.db",
        "tolerance": "ids, positions and order are equal; each score is within 1e-6",
        "index": {"file": "contract/index.db", "fingerprint": model.fingerprint},
        "vectors": {name: base64_of(row) for name, row in vectors.items()},
        "cases": cases,
        "documents": documents,
        "ids": ids,
    }


_IDS = ["en/lighthouse.md", "de/pumpe.md", "ja/tower.md", "th/science.md", "code/table.py", "guide.md", "note 0", "note 300", "note 301",
        "vector 5", "twin a", "twin b", "hi/rain.md", "note 4", "not there"]  # fmt: skip


def _cases(names: list[str]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"vector": name} for name in names]
    made += [{"vector": name, "exact": True} for name in names]
    made += [
        {"vector": name, "exact": True, "dim": dim, "k": 5} for name in names[:5] for dim in DIMS
    ]
    made += [{"vector": name, "dim": dim, "k": 5} for name in names[5:10] for dim in DIMS]
    made += [
        {"vector": name, "shortlist": most, "k": k}
        for name in names[::2]
        for most, k in ((1, 1), (5, 5), (20, 3), (3, 8))
    ]
    made += [
        {"vector": name, "width": width, "k": 4}
        for name in names[3:5]
        for width in (64, 48, 32, 16)
    ]
    made += [
        {"vector": "day 7", "width": 32, "dim": 16, "k": 4},
        {"vector": "day 7", "width": 48, "dim": 32, "exact": True, "k": 4},
    ]
    made += [
        {"vector": name, "where": where, "k": 6, "exact": exact}
        for name in names[:2]
        for where in _FILTERS
        for exact in (False, True)
    ]
    made += [{"vector": "la lluvia", "where": where, "shortlist": 8, "k": 3} for where in _FILTERS]
    made += [
        {"vector": "direction 0", "k": 150},
        {"vector": "direction 1", "k": 1},
        {"vector": "direction 0", "where": {}, "k": 3},
    ]
    texts = [
        *_TEXTS,
        "noise under the roof",
        "den 7",
        "zzz",
        "...",
        "PUMP oil OR tomatoes",
        '"red barn"',
        "cafe brucke",
        "installer",
    ]
    made += [{"text": text, "mode": "text"} for text in texts] + [
        {"text": "the", "mode": "text", "k": 40}
    ]
    made += [{"text": "day oil", "mode": "text", "where": where, "k": 5} for where in _FILTERS]
    made += [{"text": text, "vector": text, "mode": "hybrid"} for text in _TEXTS]
    made += [
        {"text": text, "vector": text, "mode": "hybrid", "exact": True, "dim": 32, "k": 120}
        for text in _TEXTS[:1]
    ]
    made += [
        {"text": "day 7", "vector": "day 7", "mode": "hybrid", "where": where, "k": 6}
        for where in _FILTERS
    ]
    made += [{"vector": "day 7", "k": k} for k in (0, -1, 10_001)] + [
        {"vector": "day 7", "shortlist": most} for most in (0, -3)
    ]
    made += [{"vector": "day 7", "dim": dim} for dim in (0, 17, 65, 128)] + [
        {"vector": "day 7", "width": 17},
        {"vector": "day 7", "width": 16, "dim": 32},
    ]
    made += [
        {"vector": "day 7", "exact": True, "shortlist": 5},
        {"vector": "day 7", "where": {"n": {"$regex": "a"}}},
    ]
    made += [
        {"text": "a", "mode": "text", "dim": 32},
        {"text": "a", "mode": "text", "exact": True},
        {"text": " ", "mode": "text"},
    ]
    made += [{"text": "a", "vector": "day 7", "mode": "words"}]
    return made


def _run(index: Index, vectors: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    names = ("k", "dim", "where", "exact", "shortlist")
    asked = {name: case[name] for name in names if name in case}
    try:
        if "text" in case:
            hits = index.search(case["text"], mode=case["mode"], **asked)
        else:
            hits = search_vector(index, vectors[case["vector"]][: case.get("width")], **asked)
    except EgemmaError as error:
        return case | {"error": type(error).__name__}
    rows: list[list[Any]] = [[hit.id, hit.position, hit.score] for hit in hits]
    if case.get("mode") == "hybrid":
        for row, hit in zip(rows, hits, strict=True):
            row += [hit.vector_score, hit.text_score]
    scores = [hit.score for hit in hits]
    for higher, lower in pairwise(scores):
        assert higher == lower or higher - lower > 1e-12, f"rounding decides the order in {case}"
    return case | {"hits": rows}


def _document(index: Index, id_: str) -> dict[str, Any]:
    try:
        found = index.get([id_])[0]
    except EgemmaError as error:
        return {"id": id_, "error": type(error).__name__}
    names = ("id", "title", "metadata", "source", "num_tokens", "truncated", "num_chunks", "text")
    return {name: getattr(found, name) for name in names}
