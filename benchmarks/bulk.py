"""How many texts a second does bulk embedding do, in one process and on Ray, with the same cores?

Every contender runs in a process of its own and they take turns. Counted is `embed_parquet` from
reading Parquet to the last file on the disk, loading the models and starting the worker processes
included; starting Ray itself is a fixed cost and stands beside it. Not answered: several machines,
the full-size model, texts of other lengths.

    python benchmarks/bulk.py --data ../shared/data [--bundle builtin] [--texts 5000] [--rounds 3]

Writes benchmarks/results/bulk.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine

RESULTS = Path(__file__).parent / "results" / "bulk.json"
SETS = ("medquad", "squad-sentences", "tldr-pages", "cpp-docs")
CONTENDERS = {  # engine, workers, threads of each
    "local, 1 thread": ("local", 1, 1),
    "local, 2 threads": ("local", 1, 2),
    "Ray, 1 worker of 2 threads": ("ray", 1, 2),
    "Ray, 2 workers of 1 thread": ("ray", 2, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds pairs/")
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.data, args.bundle)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.parquet"
        write_texts(args.data, source, args.texts)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for turn in range(args.rounds):
            for name in CONTENDERS:
                done = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--worker",
                        name,
                        "--data",
                        source,
                        "--bundle",
                        args.bundle,
                    ],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {turn + 1}: {name}: {runs[name][-1]}", file=sys.stderr)
    rows = [
        {
            "name": name,
            "texts_per_s": [run["texts_per_s"] for run in taken],
            "median_texts_per_s": round(statistics.median(run["texts_per_s"] for run in taken), 1),
            "median_ray_start_s": round(statistics.median(run["ray_start_s"] for run in taken), 1),
        }
        for name, taken in runs.items()
    ]
    body = {
        "question": __doc__.splitlines()[0],
        "machine": machine(),
        "commit": commit(),
        "bundle": args.bundle,
        "texts": args.texts,
        "tokens": int(next(iter(runs.values()))[0]["tokens"]),
        "rounds": args.rounds,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(table(body))
    return 0


def write_texts(data: Path, path: Path, count: int) -> None:
    """Answers and passages in equal parts of each set, in turn, so that every shard has all
    lengths.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: list[str] = []
    with ExitStack() as stack:
        files = [
            stack.enter_context(
                gzip.open(data / "pairs" / f"{name}.train.jsonl.gz", "rt", encoding="utf-8")
            )
            for name in SETS
        ]
        while len(texts) < count:
            texts += [json.loads(next(file))["positive"] for file in files]
    pq.write_table(pa.table({"text": texts[:count]}), path)


def worker(name: str, source: Path, bundle: str) -> int:
    from egemma_server.bulk import embed_parquet
    from egemma_server.bulk.on_ray import ray_running

    engine, workers, threads = CONTENDERS[name]

    def embed() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as out:
            report = embed_parquet(
                source,
                Path(out) / "out",
                bundle=bundle,
                overflow="truncate",
                shard_rows=512,
                engine=engine,
                workers=workers,
                threads_per_worker=threads,
            )
        return {"texts_per_s": round(report.texts_per_s, 1), "tokens": report.tokens}

    start = time.perf_counter()
    if engine == "local":
        body = embed() | {"ray_start_s": 0.0}
    else:
        with ray_running(cpus=workers * threads, threads=threads):
            ray_start_s = time.perf_counter() - start
            body = embed() | {"ray_start_s": round(ray_start_s, 2)}
    print(json.dumps(body), flush=True)
    return 0


def table(body: dict[str, Any]) -> str:
    lines = [
        f"{body['texts']} texts, {body['tokens']} tokens, {body['bundle']}, {body['machine']}, "
        f"median of {body['rounds']}",
        "",
        "| | texts a second | start of Ray |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {row['name']} | {row['median_texts_per_s']:.0f} | {row['median_ray_start_s'] or '–'} |"
        for row in body["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
