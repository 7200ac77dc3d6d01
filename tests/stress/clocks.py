"""Clocks that jump years to and fro, and files with the times of other centuries."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egemma.index import Index
from egemma_core.errors import EgemmaError
from tests.stress.expected import verify
from tests.stress.operations import MODELS, State, after, do, make_op, words


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
