"""What does an index lose when its process is killed, its files are damaged, its disk is full, or
its clock jumps? Nothing, or it says so.

    python benchmarks/durability.py --kills 1000          # a few minutes; writes
                                                          benchmarks/results/durability.json

A child does one operation after another and tells each before and after on a pipe; the parent,
which keeps this journal and a dictionary of what must be stored, sends SIGKILL at a random moment
of a chosen operation. Then the file must hold everything that was told, and of the operation in
flight all or nothing (an import: whole batches); `check` must find nothing, and searches must
answer as a dictionary with NumPy does. The rest is done to copies of files: bits flipped, files cut
off, disks filled, media read-only.

A kill loses nothing that was handed to the kernel, so this does not show what a power cut does: for
that the file relies on SQLite's `synchronous = FULL` and on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

# a child is forked from a process that has computed already
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


from egemma import upkeep
from egemma.chunks import Chunk, ChunkedDocument
from egemma.index import Index, describe_index, jsonl
from egemma.index.migration import abandon
from egemma.upkeep import check
from egemma_core.errors import EgemmaError, IndexFileError, IndexMismatchError
from tests.sdk.fakes import WordEmbedder

RESULTS = Path(__file__).resolve().parent / "results" / "durability.json"
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
TOLERANCE = {True: 1e-6, False: 0.03}  # of a cosine, by whether floats are kept


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


def child(
    path: Path, state: State, kinds: Sequence[str], seed: int, pipe: int, folder: Path
) -> None:
    """Never returns."""
    code = 1
    try:
        rng = random.Random(seed)
        index = Index.open(path, MODELS[state.model], keep_floats=state.floats)
        tell(pipe, ("open", None))
        imported = folder_import(folder)
        now = state
        for number, kind in enumerate(kinds):
            op = make_op(rng, kind, now, folder)
            tell(pipe, ("begin", op))
            index = do(index, op, folder, seed + number)
            tell(pipe, ("done", op))
            now = after(now, op, imported)[-1]
        tell(pipe, ("all", None))
        signal.pause()
    except BaseException as error:
        tell(pipe, ("error", f"{type(error).__name__}: {error}"))
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def folder_import(folder: Path) -> dict[str, Doc]:
    import pickle

    found = folder / "import.pickle"
    return pickle.loads(found.read_bytes()) if found.exists() else {}


def tell(pipe: int, what: Any) -> None:
    import pickle

    packed = pickle.dumps(what)
    data = len(packed).to_bytes(4, "little") + packed
    while data:
        data = data[os.write(pipe, data) :]


class Ear:
    """Reads what a child tells, until it is dead."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._data, self._closed = pipe, b"", False

    def next(self, timeout_s: float | None) -> Any:
        """The next message; None after the timeout, or at the end."""
        import pickle

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if len(self._data) >= 4 and len(self._data) >= 4 + (
                size := int.from_bytes(self._data[:4], "little")
            ):
                message, self._data = pickle.loads(self._data[4 : 4 + size]), self._data[4 + size :]
                return message
            if self._closed:
                return None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            data = os.read(self._pipe, 65536)
            self._closed = not data
            self._data += data


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


def read_on(path: Path, floats: bool, pipe: int) -> None:
    """A reader during all of it: every hit must be sound by itself. Never returns."""
    searches = 0
    try:
        rng = random.Random(0)
        while True:
            try:
                fingerprint = describe_index(path).fingerprint
                embedder = next(
                    model for model in MODELS.values() if model.fingerprint == fingerprint
                )
                with Index.open(path, embedder, create=False) as index:
                    for _ in range(200):
                        query = words(rng, 2)
                        vector = embedder.vector(query)
                        hits = index.search(query, 20).hits
                        assert [hit.score for hit in hits] == sorted(
                            (hit.score for hit in hits), reverse=True
                        )
                        for hit in hits:
                            wanted = float(embedder.vector(hit.text, hit.title or "") @ vector)
                            assert abs(hit.score - wanted) < TOLERANCE[floats], (
                                f"{hit} should score {wanted}"
                            )
                            if hit.metadata["n"] < 9:
                                assert hit.metadata["crc"] == zlib.crc32(hit.text.encode()), (
                                    f"{hit}: metadata of another document"
                                )
                        searches += 1
                        if searches % 100 == 0:
                            tell(pipe, ("searches", searches))
            except IndexMismatchError:
                pass
            except IndexFileError as error:
                if "no such file" not in str(error) and "is empty" not in str(error):
                    raise
    except BaseException as error:
        tell(pipe, ("error", f"{type(error).__name__}: {error}"))
    finally:
        os._exit(1)


@dataclass
class Report:
    """What came of it."""

    kills: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)  # operation in flight -> kills
    # of these, complete though not told yet
    found_whole: Counter[str] = field(default_factory=Counter)
    operations: int = 0  # told as done
    searches_meanwhile: int = 0  # of the reader
    files: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "by_operation_in_flight": dict(sorted(self.by_operation.items())),
            "complete_though_not_told": dict(sorted(self.found_whole.items())),
            "operations_told": self.operations,
            "searches_of_a_reader_meanwhile": self.searches_meanwhile,
            "index_files": self.files,
            "problems": self.problems,
        }


def kill_rounds(  # noqa: PLR0912, PLR0915
    kills: int,
    seed: int,
    work: Path,
    *,
    rounds_per_file: int = 40,
    kinds: Sequence[str] = KINDS,
    log: Callable[[str], None] = print,
) -> Report:
    """Kill children until it has been done `kills` times."""
    rng = random.Random(seed)
    report = Report()
    took: dict[str, float] = dict.fromkeys(KINDS, 0.02) | {"open": 0.01}
    folder = work
    state = State("words-1", True)
    reader: tuple[int, Ear, int] | None = None
    jsonl._DOCUMENTS_TOGETHER = 8
    for number in range(kills):
        if number % rounds_per_file == 0:
            reader = stop_reader(reader, report)
            folder = work / f"file{report.files}"
            folder.mkdir()
            report.files += 1
            state = State(rng.choice(sorted(MODELS)), rng.random() < 0.5)
            if report.files % 2 == 0:
                reader = start_reader(folder / "a.egx", state.floats)
        path = folder / "a.egx"
        make_import(rng, folder)
        imported = folder_import(folder)
        target = rng.choice(kinds) if rng.random() < 0.97 else "open"
        before = rng.randint(0, 3) if target != "open" else 0
        plan = (
            [rng.choice(kinds) for _ in range(before)]
            + [target if target != "open" else "add"]
            + [rng.choice(kinds) for _ in range(3)]
        )
        child_seed = rng.randrange(2**32)
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            child(path, state, plan, child_seed, send, folder)
        os.close(send)
        ear = Ear(receive)
        done, in_flight, error, states, op_started = 0, "open", None, [state], time.monotonic()
        kill_at = op_started + rng.uniform(0, 1.3) * took["open"] if target == "open" else None
        killed = False
        while True:
            message = ear.next(
                None if killed else 20 if kill_at is None else max(0.0, kill_at - time.monotonic())
            )
            if message is None:
                if killed:
                    break
                if kill_at is None:
                    report.problems.append(
                        f"seed {seed}, round {number}: the child hangs in {in_flight}"
                    )
                os.kill(pid, signal.SIGKILL)
                killed = True
                continue
            what, op = message
            if what == "open":
                took["open"] += 0.2 * (time.monotonic() - op_started - took["open"])
                in_flight = "between"
            elif what == "begin":
                in_flight, op_started, states = (
                    op[0],
                    time.monotonic(),
                    after(states[-1], op, imported),
                )
                if done == before and kill_at is None:
                    kill_at = op_started + rng.uniform(0, 1.2) * took[op[0]]
            elif what == "done":
                took[op[0]] += 0.2 * (time.monotonic() - op_started - took[op[0]])
                in_flight, done, states = "between", done + 1, [states[-1]]
            elif what == "error":
                error = op
                break
        os.close(receive)
        _, status = os.waitpid(pid, 0)
        report.kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        report.operations += done
        report.by_operation[in_flight] += 1
        try:
            assert error is None, f"in {in_flight}: {error}"
            if path.exists() and path.stat().st_size and not blank(path):
                which = verify(path, states, rng)
                report.found_whole[in_flight] += (
                    len(states) > 1 and which == len(states) - 1 and not same_state(states)
                )
                state = states[which]
            else:
                assert not states[0].docs, "the file is gone"
            check_copies(folder)
        except (AssertionError, EgemmaError) as problem:
            report.problems.append(
                f"seed {seed}, round {number}, killed in {in_flight}, plan {plan}: {problem}"
            )
            log(report.problems[-1])
            kept = work / f"problem{len(report.problems)}"
            shutil.copytree(folder, kept)
            if len(report.problems) >= 5:
                break
            # begin anew: the model does not know what is in the old one
            folder = work / f"file{report.files}"
            folder.mkdir()
            report.files += 1
            reader = stop_reader(reader, report)
            state = State("words-1", True)
        if number % 100 == 99:
            log(
                f"{number + 1} kills, {report.operations} operations told, {len(report.problems)} "
                "problems"
            )
    stop_reader(reader, report)
    return report


def same_state(states: list[State]) -> bool:
    return states[0].model == states[-1].model and states[0].docs == states[-1].docs


def blank(path: Path) -> bool:
    try:
        describe_index(path)
    except IndexFileError as error:
        if "is empty" in str(error):
            return True
        raise
    return False


def make_import(rng: random.Random, folder: Path) -> None:
    """An export of another index, and what is in it."""
    import pickle

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


def start_reader(path: Path, floats: bool) -> tuple[int, Ear, int]:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        read_on(path, floats, send)
    os.close(send)
    return pid, Ear(receive), receive


def stop_reader(reader: tuple[int, Ear, int] | None, report: Report) -> None:
    if reader is None:
        return
    pid, ear, receive = reader
    os.kill(pid, signal.SIGKILL)
    searches = 0
    while (message := ear.next(None)) is not None:
        if message[0] == "searches":
            searches = message[1]
        else:
            report.problems.append(f"the reader: {message[1]}")
    os.close(receive)
    os.waitpid(pid, 0)
    report.searches_meanwhile += searches


def writer_rounds(kills: int, seed: int, work: Path, log: Callable[[str], None] = print) -> Report:
    """Two processes that add and remove at once, each its own documents, while a third reads; one
    or both are killed.
    """
    rng = random.Random(seed)
    report = Report()
    folder = work / "writers"
    folder.mkdir()
    path = folder / "a.egx"
    state = State("words-1", True)
    with Index.open(path, MODELS["words-1"], keep_floats=True):
        pass
    reader: tuple[int, Ear, int] | None = start_reader(path, True)
    report.files = 1
    while report.kills < kills:
        ears, pids = [], []
        for writer in range(2):
            receive, send = os.pipe()
            pid = os.fork()
            if pid == 0:
                own_writes(path, writer, rng.randrange(2**32) + writer, send)
            os.close(send)
            ears.append((receive, Ear(receive)))
            pids.append(pid)
        time.sleep(rng.uniform(0.02, 0.15))
        for pid in rng.sample(pids, 2):
            os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0.03]))
        candidates = [state]
        for (receive, ear), pid in zip(ears, pids, strict=True):
            last: list[Any] = []
            while (message := ear.next(None)) is not None:
                what, op = message
                if what == "begin":
                    last = [op]
                elif what == "done":
                    candidates = [after(candidate, op, {})[-1] for candidate in candidates]
                    report.operations += 1
                    last = []
                else:
                    report.problems.append(f"seed {seed}: a writer: {op}")
            candidates += [after(candidate, op, {})[-1] for op in last for candidate in candidates]
            os.close(receive)
            _, status = os.waitpid(pid, 0)
            report.kills += os.WIFSIGNALED(status)
            report.by_operation["two writers"] += 1
        try:
            state = candidates[verify(path, candidates, rng)]
        except (AssertionError, EgemmaError) as problem:
            report.problems.append(f"seed {seed}, two writers: {problem}")
            log(report.problems[-1])
            break
    stop_reader(reader, report)
    return report


def own_writes(path: Path, writer: int, seed: int, pipe: int) -> None:
    """Never returns."""
    try:
        rng = random.Random(seed)
        with Index.open(path, MODELS["words-1"]) as index:
            while True:
                ids = [f"{writer}-{id_}" for id_ in rng.sample(IDS, 6)]
                op: tuple[Any, ...] = ("remove", ids)
                if rng.random() < 0.8:
                    texts = [words(rng) for _ in ids]
                    op = (
                        "add",
                        {
                            id_: one_chunk(
                                text, None, {"crc": zlib.crc32(text.encode()), "n": writer}
                            )
                            for id_, text in zip(ids, texts, strict=True)
                        },
                    )
                tell(pipe, ("begin", op))
                do(index, op, path.parent, 0)
                tell(pipe, ("done", op))
    except BaseException as error:
        tell(pipe, ("error", f"{type(error).__name__}: {error}"))
    finally:
        os._exit(1)


# Damaged files


def everything(path: Path, model: str) -> dict[str, Any]:
    """What an index says to many questions, or the error it says instead."""
    answers: dict[str, Any] = {}

    def ask(name: str, question: Callable[[], Any]) -> None:
        try:
            answers[name] = question()
        except IndexFileError as error:
            answers[name] = error

    try:
        with Index.open(path, MODELS[model], create=False) as index:
            for query in ("w1 w2", "w3", "w20 w21 w22"):
                ask(f"vector {query}", lambda query=query: index.search(query, 7).hits)
                ask(f"exact {query}", lambda query=query: index.search(query, 7, exact=True).hits)
                ask(f"text {query}", lambda query=query: index.search(query, 7, mode="text").hits)
                ask(
                    f"hybrid {query}",
                    lambda query=query: index.search(query, 7, mode="hybrid").hits,
                )
                ask(
                    f"where {query}",
                    lambda query=query: index.search(query, 7, where={"n": {"$lt": 2}}).hits,
                )
            ask("len", lambda: len(index))
            ask("ids", index.ids)
            ask("get", lambda: index.get(IDS[:40]))
            ask("sources", index.sources)
    except IndexFileError as error:
        answers["open"] = error
    return answers


def make_subject(folder: Path, *, floats: bool, seed: int = 0) -> Path:
    """An index with some documents replaced and removed."""
    rng = random.Random(seed)
    path = folder / "subject.egx"
    with Index.open(path, MODELS["words-1"], keep_floats=floats) as index:
        for kind in ("add", "put", "add", "add", "put", "remove", "add"):
            do(index, make_op(rng, kind, State("words-1", floats), folder), folder, seed)
        texts = {id_: words(rng) for id_ in IDS[:40]}
        index.add(
            list(texts.values()),
            ids=list(texts),
            metadata=[
                {"crc": zlib.crc32(text.encode()), "n": number % 4}
                for number, text in enumerate(texts.values())
            ],
        )
    return path


def damage_rounds(
    count: int, seed: int, work: Path, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Copies of an index with a bit flipped, cut off, or a page torn: answers as before, or an
    IndexFileError.
    """
    folder = work / "damage"
    folder.mkdir()
    results: dict[str, Any] = {}
    for floats in (False, True):
        (folder / str(floats)).mkdir()
        subject = make_subject(folder / str(floats), floats=floats)
        for how in ("bit flipped", "cut off", "page torn"):
            name = f"index{' with floats' if floats else ''}, {how}"
            results[name] = in_child(
                lambda how=how, subject=subject: damage_some(subject, how, count, seed)
            )
            log(f"{name}: {results[name]}")
    return results


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Damage may crash a process; this one has to go on."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            tell(send, work())
            os._exit(0)
        except BaseException as error:
            tell(send, {"problem": f"{type(error).__name__}: {error}"})
            os._exit(1)
    os.close(send)
    result = Ear(receive).next(None)
    os.close(receive)
    _, status = os.waitpid(pid, 0)
    return result if result is not None else {"problem": f"the process died with status {status}"}


def damage_some(subject: Path, how: str, count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=subject.parent) as folder:
        path = Path(folder) / subject.name
        sound = subject.read_bytes()
        path.write_bytes(sound)
        wanted = everything(path, "words-1")
        assert not any(isinstance(answer, Exception) for answer in wanted.values()), wanted
        counts: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        unfound = 0
        for _ in range(count):
            for leftover in Path(folder).iterdir():
                leftover.unlink()
            damaged = spoil(rng, sound, how)
            path.write_bytes(damaged)
            found = everything(path, "words-1")
            errors = [answer for answer in found.values() if isinstance(answer, Exception)]
            bad = (
                []
                if "open" in found
                else [
                    name
                    for name, answer in found.items()
                    if not isinstance(answer, Exception) and answer != wanted[name]
                ]
            )
            if bad:
                counts["wrong answer"] += 1
                wrong.update({name.split()[0] for name in bad})
                with suppress(IndexFileError):
                    unfound += not check(path)
            else:
                counts["a clear error" if errors else "all answers as before"] += 1
        result: dict[str, Any] = {"trials": count, **dict(sorted(counts.items()))}
        if wrong:
            result |= {"wrong by question": dict(wrong), "wrong and not found by check": unfound}
        return result


def spoil(rng: random.Random, content: bytes, how: str) -> bytes:
    if how == "cut off":
        length = rng.randrange(len(content))
        return content[: length if rng.random() < 0.5 else length // 8192 * 8192]
    changed = bytearray(content)
    if how == "bit flipped":
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:  # some sectors are of another place, as a torn write leaves them
        start, other = (rng.randrange(-(-len(content) // 512)) * 512 for _ in range(2))
        length = rng.choice([512, 4096])
        changed[start : start + length] = content[other : other + length].ljust(length, b"\0")[
            : len(changed) - start
        ]
    return bytes(changed)


def log_rounds(count: int, seed: int, work: Path) -> dict[str, Any]:
    """A damaged `-wal` loses at most commits from its end on, whole; a damaged `-shm` loses
    nothing.
    """
    rng = random.Random(seed)
    folder = work / "wal"
    folder.mkdir()
    path = folder / "a.egx"
    states: list[dict[str, Any]] = []
    with Index.open(path, MODELS["words-1"]) as index:
        for _ in range(6):
            texts = {id_: words(rng) for id_ in rng.sample(IDS, 12)}
            index.add(list(texts.values()), ids=list(texts), metadata=[{"n": 1} for _ in texts])
            states.append(plain(everything_else(path)))
        for end in ("", "-wal", "-shm"):
            shutil.copy(f"{path}{end}", f"{folder}/sound{end}")
    counts: dict[str, Counter[str]] = {"-wal": Counter(), "-shm": Counter()}
    problems = []
    for number in range(count):
        end = "-wal" if number % 3 else "-shm"
        trial = folder / f"trial{number}"
        trial.mkdir()
        for other in ("", "-wal", "-shm"):
            shutil.copy(f"{folder}/sound{other}", trial / f"a.egx{other}")
        content = Path(f"{folder}/sound{end}").read_bytes()
        (trial / f"a.egx{end}").write_bytes(
            spoil(rng, content, rng.choice(["bit flipped", "cut off", "page torn"]))
            if rng.random() < 0.9
            else rng.randbytes(len(content))
        )
        try:
            found = plain(everything_else(trial / "a.egx"))
            if found not in [*states, {}]:
                problems.append(f"{end}, trial {number}: no state that ever was")
            elif end == "-shm" and found != states[-1]:
                problems.append(f"{end}, trial {number}: an older state")
            else:
                counts[end][
                    "the last state" if found == states[-1] else "an older whole state"
                ] += 1
        except IndexFileError:
            counts[end]["a clear error"] += 1
        shutil.rmtree(trial)
    return {
        "trials": count,
        **{end: dict(sorted(counter.items())) for end, counter in counts.items()},
        "problems": problems,
    }


def everything_else(path: Path) -> dict[str, Any]:
    with Index.open(path, MODELS["words-1"], create=False) as index:
        return {document.id: document for document in index.get(index.ids())}


def plain(stored: dict[str, Any]) -> dict[str, str]:
    return {id_: document.text for id_, document in stored.items()}


# Disks and clocks


def small_disk(folder: Path, size: str) -> bool:
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        return False
    return (
        subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )


def full_disk(work: Path, seed: int, *, steps: int = 400) -> dict[str, Any]:
    """Everything that writes, on a disk that is full or nearly so."""
    folder = work / "full"
    if not small_disk(folder, "3m"):
        return {"skipped": "a small disk can be mounted by root only"}
    rng = random.Random(seed)
    refused: Counter[str] = Counter()
    done: Counter[str] = Counter()
    problems: list[str] = []
    try:
        state = State("words-1", True)
        path = folder / "a.egx"
        filler = folder / "filler"
        make_import(rng, folder)
        index = Index.open(path, MODELS["words-1"], keep_floats=True)
        do(
            index,
            ("add", {id_: one_chunk(f"w1 {words(rng)}", None, {"n": 1, "crc": 0}) for id_ in IDS}),
            folder,
            0,
        )
        state.docs = {
            document.id: one_chunk(document.text, None, document.metadata)
            for document in index.get(index.ids())
        }
        for number in range(steps):
            kind = rng.choice([kind for kind in KINDS if kind not in ("reopen", "abandon")])
            op = make_op(rng, kind, state, folder)
            free = shutil.disk_usage(folder).free
            with filler.open("ab") as out:
                out.write(bytes(max(0, free - rng.choice([0, 4096, 40_000, 200_000]))))
            states = after(state, op, folder_import(folder))
            try:
                index = do(index, op, folder, number)
                done[kind] += 1
                states = states[-1:]
            except IndexFileError:
                refused[kind] += 1
            except EgemmaError as error:  # an import says how far it came
                refused[kind] += 1
                if not isinstance(error.__cause__, IndexFileError):
                    problems.append(f"{kind}: {type(error).__name__}: {error}")
            filler.unlink()
            try:
                state = states[verify(path, states, rng)]
                check_copies(folder)
            except (AssertionError, EgemmaError) as problem:
                problems.append(f"seed {seed}, step {number}, {kind}: {problem}")
                break
            if rng.random() < 0.3:
                (folder / "backup.egx").unlink(missing_ok=True)
                (folder / "export.jsonl").unlink(missing_ok=True)
                upkeep.compact(index.path) if index.facts().migrating_to is None else None
        index.close()
    finally:
        subprocess.run(["umount", str(folder)], check=False)
    return {
        "done": dict(sorted(done.items())),
        "refused": dict(sorted(refused.items())),
        "problems": problems,
    }


def read_only_media(work: Path) -> dict[str, Any]:
    """A disk that was remounted read-only: searches as before, every write refused, also where a
    crash left a `-wal`.
    """
    folder = work / "readonly"
    if not small_disk(folder, "8m"):
        return {"skipped": "a small disk can be mounted by root only"}
    problems: list[str] = []
    try:
        path = make_subject(folder, floats=False)
        crashed = folder / "crashed.egx"
        with Index.open(crashed, MODELS["words-1"]) as index:
            index.add(["w1 w2"])
            for end in ("", "-wal"):
                shutil.copy(f"{crashed}{end}", f"{folder}/copy.egx{end}")
        wanted = everything(path, "words-1")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        if everything(path, "words-1") != wanted:
            problems.append("other answers on read-only media")
        if check(path):
            problems.append("check finds something on read-only media")
        with Index.open(path, MODELS["words-1"]) as index:
            upkeep.backup(index.path, work / "from_readonly.egx")
            upkeep.export_jsonl(index.path, work / "from_readonly.jsonl")
            writes: dict[str, Callable[[], object]] = {
                "add": lambda: index.add(["x"]),
                "remove": lambda: index.remove(["d1"]),
                "compact": lambda: upkeep.compact(index.path),
                "migrate": lambda: index.migrate(MODELS["words-2"]),
                "import": lambda: index.import_jsonl(work / "from_readonly.jsonl"),
                "tune": lambda: index.tune(recall=0.5, k=3, sample=10),
                "backup": lambda: upkeep.backup(index.path, folder / "b.egx"),
                "export": lambda: upkeep.export_jsonl(index.path, folder / "b.jsonl"),
            }
            for name, write in writes.items():
                try:
                    write()
                    problems.append(f"{name} is not refused")
                except IndexFileError:
                    pass
        if everything(work / "from_readonly.egx", "words-1").keys() != wanted.keys():
            problems.append("a backup from read-only media differs")
        try:
            with Index.open(folder / "copy.egx", MODELS["words-1"]) as index:
                problems.append(f"{len(index)} documents are read beside a -wal that cannot be")
        except IndexFileError as error:
            if "holds newer changes" not in str(error):
                problems.append(str(error))
    finally:
        subprocess.run(["umount", str(folder)], check=False)
    return {"writes_refused": 8, "problems": problems}


def clock_jumps(
    count: int,
    seed: int,
    work: Path,
    *,
    kinds: Sequence[str] = ("add", "put", "remove", "compact", "reopen"),
) -> dict[str, Any]:
    """The clocks jump years to and fro, and files get the times of other centuries, while an index
    is used and a folder is kept in sync.
    """
    from unittest import mock

    from egemma.ingest import IngestConfig, sync

    rng = random.Random(seed)
    folder = work / "clock"
    (folder / "notes").mkdir(parents=True)
    path = folder / "a.egx"
    problems: list[str] = []
    state = State("words-1", True)
    year_s = 365 * 86400
    monotonic, now_ns = time.monotonic, time.time_ns
    shift = 0.0
    notes: dict[str, str] = {}
    with (
        mock.patch("time.monotonic", side_effect=lambda: monotonic() + shift),
        mock.patch("time.time_ns", side_effect=lambda: now_ns() + round(shift * 1e9)),
    ):
        index = Index.open(path, MODELS["words-1"], keep_floats=True)
        for number in range(count):
            shift = rng.uniform(-20, 20) * year_s
            for file in folder.glob("a.egx*"):
                when = rng.choice([0, 1, 2**31, 2**32 + 5, time.time() + shift])
                os.utime(file, (max(0, when), max(0, when)))
            op = make_op(rng, rng.choice(kinds), state, folder)
            index = do(index, op, folder, number)
            state = after(state, op, {})[-1]
            if number % 10 == 0:
                state_problem = None
                try:
                    verify(path, [state], rng)
                except (AssertionError, EgemmaError) as problem:
                    state_problem = f"step {number}, {op[0]}: {problem}"
                if state_problem:
                    problems.append(state_problem)
        index.close()
        with Index.open(folder / "notes.egx", MODELS["words-1"]) as kept:
            for number in range(count):
                shift = rng.uniform(-20, 20) * year_s
                name = f"note{rng.randrange(6)}.txt"
                file = folder / "notes" / name
                old = file.stat() if file.exists() else None
                # always of one length... but for the words
                notes[name] = f"{words(rng, 3)} {number:06d}"
                file.write_text(notes[name])
                if old is not None and rng.random() < 0.7:
                    # as copying with times kept does
                    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
                elif rng.random() < 0.5:
                    os.utime(file, (0, rng.choice([0, 2**32])))
                sync(
                    kept, [folder / "notes"], IngestConfig(overlap_tokens=0), clock_ns=time.time_ns
                )
                stored = {
                    Path(document.id).name: document.text for document in kept.get(kept.ids())
                }
                if stored != notes:
                    problems.append(f"sync, step {number}: {stored} is not {notes}")
                    break
    return {"operations": count, "syncs": count, "problems": problems}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--writer-kills", type=int, default=200)
    parser.add_argument(
        "--damages", type=int, default=300, help="of each kind of file and of damage"
    )
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files are made (default: the system's folder for temporary files)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        kills = kill_rounds(args.kills, args.seed, work)
        writers = writer_rounds(args.writer_kills, args.seed, work)
        result = {
            "seed": args.seed,
            "killed": kills.to_json(),
            "two_writers_killed": writers.to_json(),
            "damaged": damage_rounds(args.damages, args.seed, work),
            "damaged_log": log_rounds(args.damages, args.seed, work),
            "full_disk": full_disk(work, args.seed),
            "read_only_media": read_only_media(work),
            "clock_jumps": clock_jumps(100, args.seed, work),
            "not_shown": "power cuts: a kill keeps what the kernel has",
            "seconds": None,
            "sqlite": __import__("sqlite3").sqlite_version,
            "python": sys.version.split()[0],
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
        }
    result["seconds"] = round(time.monotonic() - started)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int("problem" in json.dumps(result).replace('"problems": []', ""))


if __name__ == "__main__":
    sys.exit(main())
