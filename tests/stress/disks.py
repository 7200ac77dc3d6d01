"""Disks that are full, and media that are read-only."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from egemma import upkeep
from egemma.index import Index
from egemma.upkeep import check
from egemma_core.errors import EgemmaError, IndexFileError
from tests.stress.damage import everything, make_subject
from tests.stress.expected import check_copies, verify
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
                "compact": lambda: upkeep.compact(path),
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
    return {"writes_refused": len(writes), "problems": problems}
