"""How fast does the local index find, how much of the truth, and what does it cost to open, hold,
store and fill, beside what people use today?

The vectors are real: benchmarks/search_vectors.py makes them. Recall is against an exact float32
search at 768 channels. Every contender runs in a process of its own and they take turns, one query
each, so that a machine whose speed drifts slows all alike. The peers hold vectors and give back row
numbers; the index reads what it rescored from disk, checks checksums, and gives back texts and
metadata: that is inside its times. Not answered: other CPUs, other data, memory under pressure,
many users at once.

    python benchmarks/search.py [--sizes 100000,1000000] [--threads 2] [--runs 40]

What is missing in --work (default build/search-bench) is built first, which takes hours for a
million; a later run takes minutes. Writes benchmarks/results/search.json and
docs/recall-latency.png, and prints Markdown tables. `--prepare` stops after building.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine, resident_mb
from benchmarks.search_peers import (
    BIG_GRAPHS,
    DIMS,
    PEERS,
    K,
    Place,
    load_library,
    open_ours,
    open_peer,
    prepare_ours,
    prepare_peer,
    truth_of,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
PLOT = ROOT / "docs" / "recall-latency.png"
SHORTLISTS = {
    128: (50, 100, 200, 300, 500, 1000),
    256: (25, 50, 100, 200, 400),
    512: (15, 25, 50, 100, 200),
}
WIDTHS = {100_000: (128, 256, 512), 1_000_000: (128, 256)}
RECALL_QUERIES = 300  # for those that answer within _SLOW_MS
SLOW_QUERIES = 30  # for the others
FEWEST_QUERIES = 10  # for those that take longer than _VERY_SLOW_MS
_SLOW_MS = 40.0
_VERY_SLOW_MS = 400.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--vectors", type=Path, default=ROOT / "build" / "search-vectors")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "search-bench")
    parser.add_argument("--prepare", action="store_true", help="only build what is missing")
    parser.add_argument(
        "--tables",
        action="store_true",
        help="only print the tables and draw the plot of the last results",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    place = Place(args.vectors, args.work, args.threads)
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.worker:
        return worker(json.loads(args.worker), place)
    if not args.tables:
        for size in sizes:
            prepare(size, place)
        if args.prepare:
            return 0
        started = time.perf_counter()
        body: dict[str, Any] = {
            "question": __doc__.splitlines()[0],
            "machine": machine(),
            "threads": args.threads,
            "runs": args.runs,
            "commit": commit(),
            "versions": versions(),
            "sizes": {},
        }
        for size in sizes:
            body["sizes"][str(size)] = measure(size, place, args.runs)
            say(f"{size}: done after {time.perf_counter() - started:.0f} s")
        body["seconds"] = round(time.perf_counter() - started)
        RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    body = json.loads(RESULTS.read_text())
    plot(body)
    print(tables(body))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def peers_of(size: int) -> list[str]:
    return [name for name in PEERS if size <= 200_000 or name not in BIG_GRAPHS]


def widths_of(size: int) -> tuple[int, ...]:
    return WIDTHS.get(size, (128, 256, 512) if size <= 200_000 else (128, 256))


def prepare(size: int, place: Place) -> None:
    for width in widths_of(size):
        prepare_ours(size, width, place, say)
    truth_of(size, RECALL_QUERIES, place)
    file_bytes(place.index(size, DIMS[-1]), size)
    for name in peers_of(size):
        prepare_peer(name, size, place, say)


def measure(size: int, place: Place, runs: int) -> dict[str, Any]:
    path = place.index(size, DIMS[-1])
    found: dict[str, Any] = {
        "vectors": size,
        "built": built(size, place),
        "file": file_bytes(path, size),
    }
    for step in (cold, race, more_searches, writes):
        started = time.perf_counter()
        found |= step(size, place, runs)
        say(f"{size}: {step.__name__} took {time.perf_counter() - started:.0f} s")
    return found


# Contenders, each in a process.


class Process:
    """A contender: answers one JSON line with one JSON line."""

    def __init__(self, spec: dict[str, Any], place: Place) -> None:
        quiet = {
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "GOMP_SPINCOUNT": "0",
            "OMP_NUM_THREADS": str(place.threads),
            "OPENBLAS_NUM_THREADS": str(place.threads),
            "ORT_DISABLE_TELEMETRY": "1",
        }
        self.spec = spec
        self._process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                json.dumps(spec),
                "--vectors",
                str(place.vectors),
                "--work",
                str(place.work),
                "--threads",
                str(place.threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.spec} died with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> dict[str, Any]:
        answer = self.ask(do="stop")
        self._process.wait()
        return answer


def worker(spec: dict[str, Any], place: Place) -> int:
    """Answer until told to stop."""
    size, name = spec["size"], spec["name"]
    load_library(name)
    before = resident_mb()
    started = time.perf_counter()
    if name == "egemma":
        ours, many = open_ours(size, spec["width"], place)
    else:
        peer = open_peer(name, size, place)
    opened_ms = (time.perf_counter() - started) * 1e3

    def ids(number: int, options: dict[str, Any]) -> list[int]:
        return ours(number, options) if name == "egemma" else peer(number)

    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "stop":
            print(json.dumps({"resident_mb": resident_mb(), "python_mb": before}), flush=True)
            return 0
        if question["do"] == "opened":
            answer: dict[str, Any] = {"ms": opened_ms}
        elif question["do"] == "one":
            started = time.perf_counter()
            found = ids(question["query"], question.get("options", {}))
            answer = {
                "ms": (time.perf_counter() - started) * 1e3,
                "ids": found,
                "resident_mb": resident_mb(),
            }
        else:
            options = question.get("options", {})
            answer = {
                "ids": many(question["count"], options)
                if options.get("exact")
                else [ids(number, options) for number in range(question["count"])]
            }
        print(json.dumps(answer), flush=True)
    return 0


def race(size: int, place: Place, runs: int) -> dict[str, Any]:
    """Round-robin over all contenders: recall, median and 95th percentile."""
    truth = truth_of(size, RECALL_QUERIES, place)
    processes = {name: Process({"name": name, "size": size}, place) for name in peers_of(size)}
    contenders: list[tuple[dict[str, Any], Process]] = [
        ({"name": name}, process) for name, process in processes.items()
    ]
    for width in widths_of(size):
        process = processes[f"egemma {width}"] = Process(
            {"name": "egemma", "size": size, "width": width}, place
        )
        contenders += [
            ({"name": "egemma", "width": width, "options": {"shortlist": shortlist}}, process)
            for shortlist in SHORTLISTS[width]
        ]
    process = processes["egemma 128"]
    if size <= 200_000:  # it reads every vector from disk: a million take many seconds
        contenders += [
            ({"name": "egemma exact", "width": 128, "options": {"exact": True}}, process)
        ]
    rows = []
    for row, process in contenders:
        options = row.get("options", {})
        first = [process.ask(do="one", query=number, options=options)["ms"] for number in range(2)]
        count = (
            RECALL_QUERIES
            if min(first) < _SLOW_MS
            else SLOW_QUERIES
            if min(first) < _VERY_SLOW_MS or options.get("exact")
            else FEWEST_QUERIES
        )
        found = process.ask(do="all", count=count, options=options)["ids"]
        hits = [
            len({*got} & {*wanted}) / K for got, wanted in zip(found, truth.tolist(), strict=False)
        ]
        rows.append(
            row
            | {
                "recall": round(statistics.mean(hits), 4),
                "recall_queries": count,
                "times": [],
                "turns": 1
                if min(first) < _SLOW_MS
                else 4
                if min(first) < _VERY_SLOW_MS
                else runs // 2,
            }
        )
    for turn in range(runs):
        for row, (_, process) in zip(rows, contenders, strict=True):
            if turn % row["turns"] == 0:
                row["times"].append(
                    process.ask(
                        do="one", query=RECALL_QUERIES + turn, options=row.get("options", {})
                    )["ms"]
                )
    for row in rows:
        times = sorted(row.pop("times"))
        row |= {
            "p50_ms": round(statistics.median(times), 2),
            "p95_ms": round(times[min(len(times) - 1, int(0.95 * len(times)))], 2),
            "runs": len(times),
        }
        del row["turns"]
    for process in processes.values():
        process.stop()
    return {"rows": rows}


def cold(size: int, place: Place, runs: int) -> dict[str, Any]:
    """Opening and the first search in fresh processes, the files out of the page cache where this
    machine lets us; memory after some searches.
    """
    found: dict[str, Any] = {}
    specs: list[dict[str, Any]] = [
        {"name": "egemma", "size": size, "width": width} for width in widths_of(size)
    ]
    if size <= 200_000:
        specs += [{"name": name, "size": size} for name in peers_of(size)]
    dropped = "not dropped"
    for spec in specs:
        opens, firsts, memory = [], [], {}
        for _ in range(3 if spec["name"] == "egemma" else 1):
            dropped = drop_caches()
            process = Process(spec, place)
            opens.append(process.ask(do="opened")["ms"])
            firsts.append(process.ask(do="one", query=0)["ms"])
            for number in range(1, 4):
                process.ask(do="one", query=number)
            memory = process.stop()
        found[spec["name"] + (f" {spec['width']}" if "width" in spec else "")] = {
            "open_ms": round(statistics.median(opens), 1),
            "first_ms": round(statistics.median(firsts), 1),
            **memory,
        }
    warm = Process({"name": "egemma", "size": size, "width": DIMS[-1]}, place)
    found["egemma, files in the page cache"] = {
        "open_ms": round(warm.ask(do="opened")["ms"], 1),
        "first_ms": round(warm.ask(do="one", query=0)["ms"], 1),
    }
    warm.stop()
    return {"cold": found, "page_cache": dropped}


def drop_caches() -> str:
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "dropped"
    except OSError:
        return "not dropped: no permission"


# The index alone.


def more_searches(size: int, place: Place, runs: int) -> dict[str, Any]:
    from egemma import Embedder
    from egemma.index import Index

    queries = place.queries()
    texts = list(place.texts("queries.txt", len(queries)))
    found: dict[str, Any] = {}
    embedder = Embedder.open(place.vectors / "bundle", threads=place.threads)
    with (
        embedder,
        Index.open(place.index(size, DIMS[-1]), embedder, threads=place.threads) as index,
    ):
        index.search(queries[0])
        filters = {"1% pass": {"hundredth": 7}, "50% pass": {"half": 1}}
        for name, where in filters.items():
            started = time.perf_counter()
            index.search(queries[0], where=where)
            found[f"where, {name}, first time"] = {
                "p50_ms": round((time.perf_counter() - started) * 1e3, 2)
            }
        calls: dict[str, Callable[[int], Any]] = {
            "vector": lambda number: index.search(queries[number]),
            **{
                f"where, {name}": lambda number, where=where: index.search(
                    queries[number], where=where
                )
                for name, where in filters.items()
            },
            "embedding the query": lambda number: embedder.embed_query(texts[number]),
            "text": lambda number: index.search(texts[number], mode="text"),
            "hybrid, embedding included": lambda number: index.search(texts[number], mode="hybrid"),
            "100 queries in one call, each": lambda number: index.search(
                queries[number : number + 100]
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(max(5, runs // 2)):
            for name, call in calls.items():
                if name.startswith("100") and turn % 5:
                    continue
                started = time.perf_counter()
                call(500 + turn)
                times[name].append(
                    (time.perf_counter() - started) * 1e3 / (100 if name.startswith("100") else 1)
                )
        found |= {name: summary(values) for name, values in times.items()}
        where = {"hundredth": 7}
        exact = [
            [hit.id for hit in index.search(query, where=where, exact=True)]
            for query in queries[:5]
        ]
        got = [[hit.id for hit in index.search(query, where=where)] for query in queries[:5]]
        found["where, 1% pass, recall@10 against its own exact search"] = {
            "recall": round(
                statistics.mean(
                    len({*a} & {*b}) / max(1, len(a)) for a, b in zip(exact, got, strict=True)
                ),
                3,
            )
        }
    return {"searches": found}


def writes(size: int, place: Place, runs: int) -> dict[str, Any]:
    """Only for the smallest size: filling, single durable adds, and queries while another process
    fills.
    """
    if size > 200_000:
        return {}
    from egemma.index import Index

    found: dict[str, Any] = {}
    queries, passages = place.queries(), place.passages(min(size, 50_000))
    texts = list(place.texts("passages.txt", len(passages)))
    with Index.open(place.index(size, DIMS[-1])) as index:
        identity = index.identity
    path = place.work / "writes.egx"
    for batch in (1000, 2048):
        for with_text in (False, True):
            clean(path)
            with Index.open(path, identity) as index:
                started = time.perf_counter()
                for start in range(0, len(passages), batch):
                    rows = np.array(passages[start : start + batch])
                    index.add_vectors(
                        rows,
                        ids=[str(start + row) for row in range(len(rows))],
                        texts=texts[start : start + batch] if with_text else None,
                    )
                spent = time.perf_counter() - started
            found[f"batches of {batch}, {'with' if with_text else 'without'} text"] = {
                "vectors_per_s": round(len(passages) / spent)
            }
    clean(path)
    shutil.copy(place.index(size, DIMS[-1]), path)
    with Index.open(path, identity, threads=place.threads) as index:
        times = []
        for number in range(200):
            started = time.perf_counter()
            index.add_vectors(
                np.array(passages[number : number + 1]),
                ids=[f"new {number}"],
                texts=[texts[number]],
            )
            times.append((time.perf_counter() - started) * 1e3)
        found["one vector, text and full text, durable"] = summary(times)
        index.search(queries[0])
        idle = summary([timed(index, queries[number]) for number in range(200)])
        code = (
            "import sys, itertools, numpy as np\nfrom egemma.index import Index\nindex = "
            "Index.open(sys.argv[1])\n"
            "rows = np.memmap(sys.argv[2], '<f4', mode='r').reshape(-1, 768)[:1000].copy()\n"
            "print('ready', flush=True)\n"
            "for turn in itertools.count():\n index.add_vectors(rows, ids=[f'bulk {turn} {row}' "
            "for row in range(1000)], texts=['some words'] * 1000)\n"
        )
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(place.vectors / "passages.f32")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        before = len(index)
        busy = summary([timed(index, queries[number]) for number in range(400)])
        writer.kill()
        writer.wait()
        found["queries, idle"], found["queries while another process adds in bulk"] = (
            idle,
            busy | {"added_meanwhile": len(index) - before},
        )
        before, stopped = len(index), threading.Event()

        def fill() -> None:
            for turn in itertools.count():
                if stopped.is_set():
                    return
                index.add_vectors(
                    np.array(passages[:1000]),
                    ids=[f"thread {turn} {row}" for row in range(1000)],
                    texts=["some words"] * 1000,
                )

        thread = threading.Thread(target=fill)
        thread.start()
        busy = summary([timed(index, queries[number]) for number in range(400)])
        stopped.set()
        thread.join()
        found["queries while a thread of this process adds in bulk"] = busy | {
            "added_meanwhile": len(index) - before
        }
    clean(path)
    return {"writes": found}


def timed(index: Any, query: Any) -> float:
    started = time.perf_counter()
    index.search(query)
    return (time.perf_counter() - started) * 1e3


def summary(times: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "runs": len(ordered),
    }


def clean(path: Path) -> None:
    for left in path.parent.glob(path.name + "*"):
        left.unlink()


def file_bytes(path: Path, size: int) -> dict[str, Any]:
    """What a vector takes, by table; kept beside the file, because counting reads all of it."""
    kept = path.with_name(path.name + ".bytes.json")
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime:
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    import sqlite3

    connection = sqlite3.connect(path)
    tables: dict[str, int] = dict(
        connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name")
    )
    text = connection.execute(
        "SELECT sum(length(CAST(text AS BLOB)) + length(CAST(coalesce(title, '') AS BLOB))) FROM "
        "chunks"
    ).fetchone()[0]
    connection.close()
    words = sum(taken for name, taken in tables.items() if name.startswith("words"))
    per = {
        name: round(taken / size, 1)
        for name, taken in sorted(tables.items(), key=lambda pair: -pair[1])
        if taken / size >= 1
    }
    found = {
        "bytes": path.stat().st_size,
        "text_bytes": text,
        "full_text_bytes": words,
        "bytes_per_vector_beside_text": round((path.stat().st_size - text - words) / size, 1),
        "bytes_per_vector_by_table": per,
    }
    kept.write_text(json.dumps(found))
    return found


def built(size: int, place: Place) -> list[dict[str, Any]]:
    log = place.work / "built.jsonl"
    return [
        row
        for row in map(json.loads, log.read_text().splitlines() if log.exists() else [])
        if row["size"] == size
    ]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name)
        for name in ("numpy", "usearch", "numkong", "faiss-cpu", "sqlite-vec", "apsw")
    }


# What readers see.


def label(row: dict[str, Any]) -> str:
    if not row["name"].startswith("egemma"):
        return f"*{row['name']}*"
    options = row["options"]
    if options.get("exact"):
        return "**egemma**, `exact=True`"
    return f"**egemma**, scan of {row['width']}, shortlist {options['shortlist']}"


def of_few(row: dict[str, Any]) -> str:
    return "" if row["recall_queries"] == RECALL_QUERIES else f" of {row['recall_queries']} queries"


def tables(body: dict[str, Any]) -> str:
    """Markdown; benchmarks/tables.py may put it into a page."""
    lines = [
        f"{body['machine']}, {body['threads']} threads, commit {body['commit']}; top 10 of "
        "768-wide vectors of real texts; milliseconds, median and 95th "
        f"percentile of up to {body['runs']} interleaved queries; recall@10 against exact float32. "
        f"{', '.join(f'{name} {of}' for name, of in body['versions'].items())}."
    ]
    for size, found in body["sizes"].items():
        lines += [
            "",
            f"### {int(size):,} vectors",
            "",
            "| | recall@10 | p50 | p95 |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {label(row)} | {row['recall']:.4f}{of_few(row)} | {row['p50_ms']:.2f} | "
            f"{row['p95_ms']:.2f} |"
            for row in found["rows"]
        ]
        lines += [
            "",
            f"| page cache {found['page_cache']} | open ms | first search ms | resident MB, of "
            "which before opening |",
            "|---|---:|---:|---:|",
        ]
        for name, row in found["cold"].items():
            held = f"{row['resident_mb']}, {row['python_mb']}" if "resident_mb" in row else ""
            lines.append(
                f"| {name} | {row.get('open_ms', '')} | {row.get('first_ms', '')} | {held} |"
            )
        file = found["file"]
        lines += [
            "",
            f"File: {file['bytes_per_vector_beside_text']:.0f} bytes a vector beside the text "
            f"({file['text_bytes'] / int(size):.0f}) and its full-text "
            f"table ({file['full_text_bytes'] / int(size):.0f}). By table: "
            + ", ".join(
                f"{name} {taken:.0f}" for name, taken in file["bytes_per_vector_by_table"].items()
            )
            + ".",
            "",
            "| | p50 | p95 |",
            "|---|---:|---:|",
        ]
        for name, row in {**found["searches"], **found.get("writes", {})}.items():
            if "p50_ms" in row:
                more = (
                    f" ({row['added_meanwhile']} added meanwhile)"
                    if "added_meanwhile" in row
                    else ""
                )
                lines.append(f"| {name}{more} | {row['p50_ms']:.2f} | {row.get('p95_ms', '')} |")
            else:
                value = row.get("vectors_per_s", row.get("recall"))
                unit = " vectors/s" if "vectors_per_s" in row else ""
                lines.append(f"| {name} | {value}{unit} | |")
    return "\n".join(lines)


def plot(body: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(
        1,
        len(body["sizes"]),
        figsize=(max(7.5, 6.4 * len(body["sizes"])), 6),
        squeeze=False,
        layout="constrained",
    )
    colours = {128: "#1b6ca8", 256: "#d1495b", 512: "#3d8b40"}
    names = {
        128: "scan of 128 channels",
        256: "scan of 256 channels",
        512: "scan of 512 channels",
    }
    shapes = dict(zip((*PEERS, "egemma exact"), "s^vD<>PX*H", strict=True))
    for axis, (size, found) in zip(axes[0], body["sizes"].items(), strict=True):
        ours: dict[Any, list[dict[str, Any]]] = {}
        for row in found["rows"]:
            if row["name"] == "egemma":
                ours.setdefault(row["width"], []).append(row)
            else:
                axis.plot(
                    row["p50_ms"],
                    row["recall"],
                    marker=shapes[row["name"]],
                    markersize=8,
                    linestyle="none",
                    label=row["name"],
                    markerfacecolor="none",
                    color="black" if row["name"].startswith("egemma") else "#666666",
                )
        for key, rows in ours.items():
            axis.plot(
                [row["p50_ms"] for row in rows],
                [row["recall"] for row in rows],
                marker="o",
                markersize=4,
                color=colours[key],
                label=f"egemma, {names[key]}",
            )
            for row in rows:
                axis.annotate(
                    str(row["options"]["shortlist"]),
                    (row["p50_ms"], row["recall"]),
                    textcoords="offset points",
                    xytext=(4, -9),
                    fontsize=7,
                    color=colours[key],
                )
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds a query, median (log scale)")
        axis.set_ylabel("recall@10 against exact float32 at 768 channels")
        axis.set_title(f"{int(size):,} vectors, {body['threads']} threads; numbers: shortlist")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3, which="both")
    handles = {
        name: handle
        for axis in axes[0]
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
