"""How long does one text take, by length, in each exported file and in what people use today?

Every contender runs in a process of its own (so load time and peak memory are its own) and they
take turns, one text each, so that a machine whose speed drifts slows all of them alike. Quote
ratios. Not answered: throughput of batches, other CPUs, energy, tokenization (about 0.1 ms).

    python benchmarks/latency.py --model CHECKPOINT --work DIR \\
        [--tokens 16,64,256,512] [--runs 20] [--threads 2]

Bundles that are not yet in DIR are exported first. Writes benchmarks/results/latency.json and
prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "latency.json"
TARGETS = (
    "android-int4",
    "android-mixed",
    "android-int8",
    "onnx-int4",
    "onnx-mixed",
    "onnx-int8",
    "onnx-fp32",
)
PEERS = {
    "torch float32": "sentence-transformers, torch",
    "plain onnx float32": "torch.onnx export as it is, ONNX Runtime",
    "plain onnx int4": "the same with every MatMul replaced by MatMulNBits",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="where the exported files are kept between runs"
    )
    parser.add_argument("--tokens", default="16,64,256,512")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="comma-separated contenders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.model, args.threads)
    lengths = [int(tokens) for tokens in args.tokens.split(",")]
    contenders = [
        name for name in (*TARGETS, *PEERS) if not args.only or name in args.only.split(",")
    ]
    prepare(contenders, args.model, args.work)
    rows = race(contenders, args.model, args.work, lengths, args.runs, args.threads)
    body = {
        "question": __doc__.splitlines()[0],
        "machine": machine(),
        "threads": args.threads,
        "runs": args.runs,
        "commit": commit(),
        "model": "24 layers, 262,144 rows, random weights"
        if "full" in args.model.name
        else args.model.name,
        "rows": rows,
    }
    if not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(table(body, lengths))
    return 0


def prepare(contenders: list[str], model: Path, work: Path) -> None:
    for name in contenders:
        path = location(name, work)
        if path.exists() or name == "torch float32":
            continue
        print(f"exporting {name}", file=sys.stderr)
        if name in TARGETS:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "egemma_export",
                    "--target",
                    name,
                    "--model",
                    model,
                    "--out",
                    path,
                    # random weights are not trained for int4
                    "--min-cosine-float",
                    "0.5",
                ],
                check=True,
            )
        else:
            # Each in a process of its own: the exporters keep gigabytes.
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.plain_onnx",
                    name.rsplit(" ", 1)[1],
                    model,
                    path,
                ],
                check=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            )


def location(name: str, work: Path) -> Path:
    return work / (name if name in TARGETS else name.replace(" ", "-") + ".onnx")


def race(
    contenders: list[str], model: Path, work: Path, lengths: list[int], runs: int, threads: int
) -> list[dict[str, Any]]:
    """Round-robin over the contenders' processes."""
    # Waiting threads must not burn the cores that another contender is measured on.
    quiet = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(threads),
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                f"{name}={location(name, work)}",
                "--model",
                model,
                "--work",
                work,
                "--threads",
                str(threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )
        for name in contenders
    }

    def ask(name: str, question: dict[str, Any]) -> dict[str, Any]:
        process = processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    rows = {
        name: {"name": name, "file_mb": file_mb(location(name, work)), "ms": {}}
        | ask(name, {"do": "load"})
        for name in contenders
    }
    for tokens in lengths:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(runs + 2):
            for name in contenders:
                ms = ask(name, {"do": "run", "tokens": tokens, "seed": turn})["ms"]
                if turn >= 2:  # the first two warm up
                    times[name].append(ms)
        for name in contenders:
            ordered = sorted(times[name])
            rows[name]["ms"][str(tokens)] = {
                "median": round(statistics.median(ordered), 2),
                "min": round(ordered[0], 2),
                "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
            }
    for name in contenders:
        rows[name] |= ask(name, {"do": "stop"})
        processes[name].wait()
    return list(rows.values())


def worker(which: str, model: Path, threads: int) -> int:
    """Answer one JSON line with one JSON line until told to stop."""
    name, _, path = which.partition("=")
    run: Callable[[Any, Any], Any] | None = None
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any]
        if question["do"] == "load":
            start = time.perf_counter()
            run = open_contender(name, Path(path), model, threads)
            answer = {"load_s": round(time.perf_counter() - start, 3), "loaded_mb": resident_mb()}
        elif question["do"] == "run":
            import numpy as np

            assert run is not None
            ids = np.random.default_rng(question["seed"]).integers(
                300, 5000, (1, question["tokens"]), dtype=np.int64
            )
            mask = np.ones_like(ids)
            start = time.perf_counter()
            run(ids, mask)
            answer = {"ms": (time.perf_counter() - start) * 1e3}
        else:
            answer = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
        print(json.dumps(answer), flush=True)
        if question["do"] == "stop":
            break
    return 0


def open_contender(name: str, path: Path, model: Path, threads: int) -> Callable[[Any, Any], Any]:
    if name in TARGETS:
        from egemma.runtimes import open_runtime
        from egemma_core.bundle import read_bundle

        return open_runtime(read_bundle(path), threads=threads, kleidiai=True).run
    if name == "torch float32":
        import torch

        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from models.make_checkpoint import load_reference

        torch.set_num_threads(threads)
        reference = load_reference(model)
        return lambda ids, mask: reference(torch.from_numpy(ids), torch.from_numpy(mask))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids_name, mask_name = (value.name for value in session.get_inputs())
    return lambda ids, mask: session.run(None, {ids_name: ids, mask_name: mask})


def resident_mb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmRSS")


def file_mb(path: Path) -> float | None:
    if path.is_dir():
        return round(
            sum(file.stat().st_size for file in path.iterdir() if file.name.startswith("model."))
            / 1e6,
            1,
        )
    return (
        round(sum(file.stat().st_size for file in path.parent.glob(path.name + "*")) / 1e6, 1)
        if path.exists()
        else None
    )


def machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}"
    )


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def table(body: dict[str, Any], lengths: list[int]) -> str:
    head = ["", *(f"{tokens} tokens" for tokens in lengths), "load", "peak memory", "file"]
    lines = [
        f"{body['machine']}, {body['threads']} threads, commit {body['commit']}; milliseconds, "
        "median (95th percentile) of "
        f"{body['runs']} interleaved runs; {body['model']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for row in body["rows"]:
        cells = [
            f"{row['ms'][str(tokens)]['median']:.0f} ({row['ms'][str(tokens)]['p95']:.0f})"
            for tokens in lengths
        ]
        size = f"{row['file_mb']:.0f} MB" if row["file_mb"] else "-"
        lines.append(
            f"| {row['name']} | "
            + " | ".join(cells)
            + f" | {row['load_s']:.1f} s | {row['peak_mb']} MB | {size} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
