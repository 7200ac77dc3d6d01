"""What is done to an index: operations as data, so that the process that carries them out and the one
that knows what must be stored afterwards mean the same.
"""

from __future__ import annotations

import pickle
import random
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from egemma import upkeep
from egemma.chunks import Chunk, ChunkedDocument
from egemma.index import Index, jsonl
from egemma.index.migration import abandon
from tests.sdk.fakes import WordEmbedder

# Any: they keep the contract of `Embedder` without being one.
MODELS: dict[str, Any] = {
    name: WordEmbedder(name, dims=dims)
    for name, dims in (("words-1", (64, 32, 16)), ("words-2", (64, 32, 16)), ("words-3", (48, 24)))
}
VOCABULARY = [f"w{number}" for number in range(30)]
IDS = [f"d{number}" for number in range(60)]
KINDS = (
    "add",
    "put",
    "add_vectors",
    "remove",
    "compact",
    "migrate",
    "tune",
    "backup",
    "export",
    "import",
    "abandon",
    "reopen",
)


@dataclass(frozen=True)
class Doc:
    """What must come back for an id."""

    text: str
    title: str | None
    metadata: Any
    chunks: tuple[tuple[int, int, str | None, str], ...]


@dataclass
class State:
    """What must be in the file."""

    model: str
    floats: bool
    docs: dict[str, Doc] = field(default_factory=dict)

    def copy(self) -> State:
        return State(self.model, self.floats, dict(self.docs))


def one_chunk(text: str, title: str | None, metadata: Any) -> Doc:
    return Doc(text, title, metadata, ((0, len(text), title, text),))


def words(rng: random.Random, count: int = 5) -> str:
    return " ".join(rng.choices(VOCABULARY, k=count))


def make_op(rng: random.Random, kind: str, state: State, folder: Path) -> tuple[Any, ...]:
    """An operation as data, so that parent and child mean the same."""

    def some() -> dict[str, Doc]:
        made = {}
        for id_ in rng.sample(IDS, rng.randint(1, 12)):
            text = words(rng)
            made[id_] = one_chunk(
                text,
                rng.choice([None, "Title w1"]),
                {"crc": zlib.crc32(text.encode()), "n": rng.randint(0, 3)},
            )
        return made

    if kind in ("add", "add_vectors"):
        return kind, some()
    if kind == "put":
        made = {}
        for id_ in rng.sample(IDS, rng.randint(1, 4)):
            text = " ".join(words(rng, 4) + "." for _ in range(4))
            cuts = [0, 12, 24, len(text)]
            chunks = tuple(
                (max(0, start - 3), stop, "Guide > Part", text[max(0, start - 3) : stop])
                for start, stop in pairwise(cuts)
            )
            made[id_] = Doc(text, "Guide", {"crc": zlib.crc32(text.encode()), "n": 9}, chunks)
        return kind, made
    if kind == "remove":
        return kind, rng.sample(IDS, rng.choice([1, 5, 40]))
    if kind == "migrate":
        return kind, rng.choice(sorted(MODELS.keys() - {state.model}))
    return kind, None


def do(index: Index, op: tuple[Any, ...], folder: Path, seed: int) -> Index:  # noqa: PLR0912
    """Carry an operation out in the child."""
    kind, what = op
    if kind == "add":
        index.add(
            [doc.text for doc in what.values()],
            ids=list(what),
            titles=[doc.title for doc in what.values()],
            metadata=[doc.metadata for doc in what.values()],
        )
    elif kind == "put":
        index.put(
            [
                ChunkedDocument(
                    id=id_,
                    title=doc.title,
                    metadata=doc.metadata,
                    source={"path": id_},
                    chunks=tuple(
                        Chunk(start=start, stop=stop, title=title, text=text)
                        for start, stop, title, text in doc.chunks
                    ),
                )
                for id_, doc in what.items()
            ]
        )
    elif kind == "add_vectors":
        model: Any = index.embedder
        vectors = model.embed_documents(
            [doc.text for doc in what.values()], titles=[doc.title for doc in what.values()]
        ).vectors
        index.add_vectors(
            vectors,
            ids=list(what),
            texts=[doc.text for doc in what.values()],
            titles=[doc.title for doc in what.values()],
            metadata=[doc.metadata for doc in what.values()],
        )
    elif kind == "remove":
        index.remove(what)
    elif kind == "compact":
        abandon(index.path)
        upkeep.compact(index.path)
    elif kind == "migrate":
        under_way = index.facts().migrating_to
        if under_way is not None and not under_way.startswith(what):
            abandon(index.path)
        index.migrate(MODELS[what], batch=8)
    elif kind == "tune":
        if index.facts().chunks > 20:
            index.tune(recall=0.9, k=3, sample=20, seed=seed)
    elif kind == "backup":
        upkeep.backup(index.path, folder / "backup.egx", force=True)
    elif kind == "export":
        upkeep.export_jsonl(index.path, folder / "export.jsonl", force=True)
    elif kind == "import":
        index.import_jsonl(folder / "import.jsonl", reembed=True)
    elif kind == "abandon":
        abandon(index.path)
    elif kind == "reopen":
        index.close()
        return Index.open(index.path, index.embedder)
    return index


def after(state: State, op: tuple[Any, ...], imported: dict[str, Doc]) -> list[State]:
    """The states that may be in the file after a kill in this operation: none of it, a part that
    counts as whole, all of it.
    """
    kind, what = op
    end = state.copy()
    states = [state]
    if kind in ("add", "put", "add_vectors"):
        end.docs.update(what)
    elif kind == "remove":
        for id_ in what:
            end.docs.pop(id_, None)
    elif kind == "migrate":
        end.model = what
    elif kind == "import":
        items = list(imported.items())
        for start in range(0, len(items), jsonl._DOCUMENTS_TOGETHER):
            end = end.copy()
            end.docs.update(items[start : start + jsonl._DOCUMENTS_TOGETHER])
            states.append(end)
        return states
    return [*states, end]


def make_import(rng: random.Random, folder: Path) -> None:
    """An export of another index, and what is in it."""
    if (folder / "import.jsonl").exists():
        return
    docs = {}
    for id_ in rng.sample(IDS, 30):
        text = words(rng)
        docs[id_] = one_chunk(text, None, {"crc": zlib.crc32(text.encode()), "n": 2})
    with Index.open(folder / "other.egx", MODELS["words-1"]) as other:
        other.add(
            [doc.text for doc in docs.values()],
            ids=list(docs),
            metadata=[doc.metadata for doc in docs.values()],
        )
        upkeep.export_jsonl(other.path, folder / "import.jsonl")
    (folder / "import.pickle").write_bytes(pickle.dumps(docs))


def folder_import(folder: Path) -> dict[str, Doc]:
    found = folder / "import.pickle"
    return pickle.loads(found.read_bytes()) if found.exists() else {}
