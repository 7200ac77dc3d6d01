"""Damage: bits flipped, files cut off, sectors torn; the answers are as before, or there is an error."""

from __future__ import annotations

import random
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from egemma.index import Index
from egemma.upkeep import check
from egemma_core.errors import IndexFileError
from tests.stress.operations import IDS, MODELS, State, do, make_op, words
from tests.stress.pipes import in_child


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
            path.write_bytes(spoil(rng, sound, how))
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


def make_subject(folder: Path, *, floats: bool, seed: int = 0) -> Path:
    """An index, some documents replaced and removed."""
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
