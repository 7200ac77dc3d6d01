"""What a file must hold and answer: compared with a dictionary, NumPy and `in`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from egemma.index import Index, describe_index
from egemma.upkeep import check
from egemma_core.errors import IndexFileError
from tests.stress.operations import MODELS, VOCABULARY, State, words

TOLERANCE = {True: 1e-6, False: 0.03}  # of a cosine, by whether floats are kept


def verify(path: Path, states: list[State], rng: random.Random) -> int:
    """Which of the states is in the file; raises AssertionError where it is none, or a search
    answers otherwise.
    """
    found = check(path)
    assert not found, f"check: {found}"
    fingerprint = describe_index(path).fingerprint
    model = next(name for name, embedder in MODELS.items() if embedder.fingerprint == fingerprint)
    with Index.open(path, MODELS[model]) as index:
        stored = {document.id: document for document in index.get(index.ids())}
        matches = [
            number
            for number, state in enumerate(states)
            if state.model == model and same(stored, state)
        ]
        assert matches, (
            f"{len(stored)} documents of {model} are none of "
            f"{[(state.model, len(state.docs)) for state in states]}"
        )
        compare(index, states[matches[-1]], rng)
    return matches[-1]


def same(stored: dict[str, Any], state: State) -> bool:
    return stored.keys() == state.docs.keys() and all(
        (document.text, document.title, document.metadata, document.num_chunks)
        == (
            state.docs[id_].text,
            state.docs[id_].title,
            state.docs[id_].metadata,
            len(state.docs[id_].chunks),
        )
        for id_, document in stored.items()
    )


def same_state(states: list[State]) -> bool:
    return states[0].model == states[-1].model and states[0].docs == states[-1].docs


def compare(index: Index, state: State, rng: random.Random) -> None:
    """Searches against a dictionary, NumPy and `in`."""
    model, tolerance = MODELS[state.model], TOLERANCE[state.floats]
    parts = {
        (id_, position): (title, text)
        for id_, doc in state.docs.items()
        for position, (_, _, title, text) in enumerate(doc.chunks)
    }
    vectors = {key: model.vector(text, title or "") for key, (title, text) in parts.items()}
    query = words(rng, 2)
    for where in (None, {"n": {"$lt": 2}}):
        allowed = {key for key in parts if where is None or state.docs[key[0]].metadata["n"] < 2}
        scores = {key: float(vectors[key] @ model.vector(query)) for key in allowed}
        k = rng.choice([1, 5, 30])
        best = sorted(scores.values(), reverse=True)[:k]
        ways: list[dict[str, Any]] = [{"exact": True}, {}]
        for way in ways:
            hits = index.search(query, k, where=where, **way).hits
            keys = [(hit.id, hit.position) for hit in hits]
            assert len(set(keys)) == len(keys), f"{way}: a chunk comes twice"
            assert set(keys) <= allowed, f"{way}: {set(keys) - allowed} must not be there"
            assert len(hits) == len(best), f"{way}: {len(hits)} hits, not {len(best)}"
            for hit, key in zip(hits, keys, strict=True):
                assert (hit.title, hit.text) == parts[key], f"{way}: {hit} is {parts[key]}"
                assert abs(hit.score - scores[key]) < tolerance, (
                    f"{way}: {hit} should score {scores[key]}"
                )
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            if way == {"exact": True}:
                assert all(
                    abs(hit.score - wanted) < tolerance
                    for hit, wanted in zip(hits, best, strict=True)
                ), "not the best"
        word = rng.choice(VOCABULARY)
        found = {
            (hit.id, hit.position) for hit in index.search(word, 1000, mode="text", where=where)
        }
        wanted_words = {
            key
            for key in allowed
            if word in f"{parts[key][0]} {parts[key][1]}".replace(".", " ").split()
        }
        assert found == wanted_words, f"{word}: {found ^ wanted_words}"


def blank(path: Path) -> bool:
    try:
        describe_index(path)
    except IndexFileError as error:
        if "is empty" in str(error):
            return True
        raise
    return False


def check_copies(folder: Path) -> None:
    """A backup or an export is whole, or not there."""
    if (folder / "backup.egx").exists():
        assert not check(folder / "backup.egx"), "the backup is damaged"
    if (folder / "export.jsonl").exists():
        lines = (folder / "export.jsonl").read_text().splitlines()
        assert (
            json.loads(lines[0])["documents"]
            == len(lines) - 1
            == sum(1 for line in lines[1:] if json.loads(line))
        ), "the export is not whole"
    for left in folder.glob(".*.part*"):
        left.unlink()  # of a killed backup or export
