"""Kills: a child does one operation after another and reports each before and after on a pipe; the
parent, which keeps this journal and a dictionary of what must be stored, sends SIGKILL at a random
moment of a chosen operation. Then the file must hold everything that was reported, and of the
operation in flight all or nothing (an import: whole batches); `check` must find nothing, and
searches must answer as a dictionary with NumPy does.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egemma.index import Index, describe_index, jsonl
from egemma_core.errors import EgemmaError, IndexFileError, IndexMismatchError
from tests.stress.expected import TOLERANCE, blank, check_copies, same_state, verify
from tests.stress.operations import (
    IDS,
    KINDS,
    MODELS,
    State,
    after,
    do,
    folder_import,
    make_import,
    make_op,
    one_chunk,
    words,
)
from tests.stress.pipes import Receiver, send_message


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
    reader: tuple[int, Receiver, int] | None = None
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
        ear = Receiver(receive)
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


def child(
    path: Path, state: State, kinds: Sequence[str], seed: int, pipe: int, folder: Path
) -> None:
    """Never returns."""
    code = 1
    try:
        rng = random.Random(seed)
        index = Index.open(path, MODELS[state.model], keep_floats=state.floats)
        send_message(pipe, ("open", None))
        imported = folder_import(folder)
        now = state
        for number, kind in enumerate(kinds):
            op = make_op(rng, kind, now, folder)
            send_message(pipe, ("begin", op))
            index = do(index, op, folder, seed + number)
            send_message(pipe, ("done", op))
            now = after(now, op, imported)[-1]
        send_message(pipe, ("all", None))
        signal.pause()
    except BaseException as error:
        send_message(pipe, ("error", f"{type(error).__name__}: {error}"))
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def start_reader(path: Path, floats: bool) -> tuple[int, Receiver, int]:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        read_on(path, floats, send)
    os.close(send)
    return pid, Receiver(receive), receive


def stop_reader(reader: tuple[int, Receiver, int] | None, report: Report) -> None:
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
                            send_message(pipe, ("searches", searches))
            except IndexMismatchError:
                pass
            except IndexFileError as error:
                if "no such file" not in str(error) and "is empty" not in str(error):
                    raise
    except BaseException as error:
        send_message(pipe, ("error", f"{type(error).__name__}: {error}"))
    finally:
        os._exit(1)


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
    reader: tuple[int, Receiver, int] | None = start_reader(path, True)
    report.files = 1
    while report.kills < kills:
        ears, pids = [], []
        for writer in range(2):
            receive, send = os.pipe()
            pid = os.fork()
            if pid == 0:
                own_writes(path, writer, rng.randrange(2**32) + writer, send)
            os.close(send)
            ears.append((receive, Receiver(receive)))
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
                send_message(pipe, ("begin", op))
                do(index, op, path.parent, 0)
                send_message(pipe, ("done", op))
    except BaseException as error:
        send_message(pipe, ("error", f"{type(error).__name__}: {error}"))
    finally:
        os._exit(1)
