"""Is this version slower than another one? Import, embedding, adding, searching, exporting.

    python benchmarks/before_after.py --old OTHER/.venv/bin/python --new .venv/bin/python

Each interpreter belongs to an environment in which one version is installed. Both run the same
program in processes that take turns; the answer is the ratio new / old of each round's times, and
the median of these ratios. It leaves out the full size (benchmarks/latency.py, export_cost.py): the
built-in model and vectors of random directions show what the code around the model costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "before_after.json"
# Prints seconds by name. Speaks both the API of commit 5a18b06 and today's.
PROGRAM = """
import time
begin = time.perf_counter()
import egemma
times = {"import egemma": time.perf_counter() - begin}

import json, os, statistics, sys, tempfile
from pathlib import Path

import numpy as np
from egemma import Embedder, Index, ModelIdentity

ROWS, SINGLES, QUERIES = 100_000, 100, 200


def timed(name, work, repeats=1):
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begin)
    times[name] = statistics.median(spent)


begin = time.perf_counter()
embedder = Embedder.open("builtin", threads=2)
times["open the built-in model"] = time.perf_counter() - begin
embedder.embed_query("warm up")
timed("embed a query", lambda: embedder.embed_query("how do I keep uncommitted work?"), 200)
texts = [f"Passage {n}: " + "water the tomatoes every morning, and again at night. " * 5
         for n in range(200)]
timed("embed 200 documents", lambda: embedder.embed_documents(texts), 3)
with tempfile.TemporaryDirectory() as folder:
    with Index.open(Path(folder, "texts.db"), embedder, threads=2) as index:
        timed("add 200 documents", lambda: index.add(texts))
        once = [f"one more text, number {n}" for n in range(SINGLES)]
        entries = iter(once)
        timed("add one document", lambda: index.add([next(entries)]), SINGLES)
        timed("search by words", lambda: index.search("tomatoes 17", mode="text"), 100)
        timed("search hybrid", lambda: index.search("tomatoes 17", mode="hybrid"), 100)
    dims = (768, 512, 256, 128)
    identity = ModelIdentity(fingerprint="0" * 64, name="random", dims=dims, parts={})
    numbers = np.random.default_rng(0)
    with Index.open(Path(folder, "vectors.db"), identity, threads=2) as index:
        def add():
            for start in range(0, ROWS, 2048):
                count = min(2048, ROWS - start)
                rows = numbers.standard_normal((count, 768), np.float32)
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
                index.add_vectors(rows, ids=[str(n) for n in range(start, start + count)],
                                  metadata=[{"half": n % 2} for n in range(count)])
        timed("add 100,000 vectors", add)
    with Index.open(Path(folder, "vectors.db"), identity, threads=2) as index:
        search = getattr(index, "search_vector", index.search)
        queries = iter(numbers.standard_normal((3 * QUERIES, 768), np.float32))
        timed("first search", lambda: search(next(queries)))
        timed("search 100,000 vectors", lambda: search(next(queries)), QUERIES)
        search(next(queries), where={"half": 1})
        timed("search with a filter", lambda: search(next(queries), where={"half": 1}), QUERIES)
        timed("search exactly", lambda: search(next(queries), exact=True), 5)
print(json.dumps(times))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two installed versions, by turns.")
    parser.add_argument("--old", required=True, help="the other version's python")
    parser.add_argument("--new", required=True, help="this version's python")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exports", type=int, default=3, help="rounds of exports; 0 for none")
    args = parser.parse_args()
    # not resolved: an environment is found by the link's own place
    pythons = {"old": os.path.abspath(args.old), "new": os.path.abspath(args.new)}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = list(pythons) if number % 2 == 0 else list(reversed(pythons))
        found = {which: run(pythons[which], number < args.exports) for which in order}
        rounds.append(found)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    table = {}
    for name in rounds[0]["new"]:
        pairs = [found for found in rounds if name in found["new"]]
        ratios = sorted(found["new"][name] / found["old"][name] for found in pairs)
        table[name] = {
            "old_ms": round(1e3 * statistics.median(found["old"][name] for found in pairs), 3),
            "new_ms": round(1e3 * statistics.median(found["new"][name] for found in pairs), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    body = {"commit": commit(), "machine": machine(), "rounds": args.rounds, "table": table}
    RESULT.write_text(json.dumps(body, indent=1) + "\n")
    for name, row in table.items():
        print(f"{name:28} {row['old_ms']:12.2f} {row['new_ms']:12.2f} {row['ratio']:8.3f}")
    return 0


def run(python: str, exporting: bool) -> dict[str, float]:
    """Seconds by name, from processes of that interpreter in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=folder
        )
        times: dict[str, float] = json.loads(done.stdout)
        for target in ("onnx-int4", "android-int4") if exporting else ():
            command = [python, "-m", "egemma_export", "--target", target, "--json"]
            command += ["--model", str(ROOT / "models" / "egemma-small"), "--out", target]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
            report: dict[str, Any] = json.loads(done.stdout)
            times[f"export {target}"] = sum(report["seconds"].values())
    return times


if __name__ == "__main__":
    sys.exit(main())
