"""What does an export cost, and how large and how faithful is the file?

Each target is exported by the command itself, in a process of its own, one after the other; wall
seconds and peak resident memory are the operating system's, the verification process included. Not
answered: other machines. Random weights are not trained for int4 and lose more to rounding than
trained ones, so the bound to the float model is lowered here and the cosine reported; the bound to
the rounded weights stays.

    python benchmarks/export_cost.py --model CHECKPOINT --work DIR [--only TARGET,...]

Leaves the bundles in DIR for latency.py; writes benchmarks/results/export_cost.json and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import TARGETS, commit, machine

RESULTS = Path(__file__).parent / "results" / "export_cost.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", help="comma-separated targets")
    args = parser.parse_args()
    rows = [
        cost(target, args.model, args.work)
        for target in (args.only.split(",") if args.only else TARGETS)
    ]
    body = {
        "question": __doc__.splitlines()[0],
        "machine": machine(),
        "commit": commit(),
        "model": args.model.name,
        "rows": rows,
    }
    if not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(table(body))
    return 0


def cost(target: str, model: Path, work: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "egemma_export",
        "--target",
        target,
        "--model",
        str(model),
        "--out",
        str(work / target),
        "--force",
        "--json",
        "--min-cosine-float",
        "0.5",
    ]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        if status:
            raise SystemExit(f"{target} failed: {status}")
        report = json.loads(output.read())
    return {
        "target": target,
        "seconds": round(seconds, 1),
        "stages": report["seconds"],
        "peak_mb": usage.ru_maxrss // 1024,
        "model_bytes": report["model_bytes"],
        "bundle_bytes": report["bundle_bytes"],
        "delegates": report["graph"].get("delegates"),
        "worst_cosine_float": round(report["worst_cosine_float"], 5),
        "worst_cosine_rounded": round(report["worst_cosine_quantized"], 5),
    }


def table(body: dict[str, Any]) -> str:
    lines = [
        f"{body['machine']}, commit {body['commit']}, {body['model']}.",
        "",
        "| target | export | peak memory | model file | worst cosine to rounded weights | worst "
        "cosine to float |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['target']} | {row['seconds']:.0f} s | {row['peak_mb'] / 1000:.1f} GB | "
        f"{row['model_bytes'] / 1e6:.1f} MB | "
        f"{row['worst_cosine_rounded']:.4f} | {row['worst_cosine_float']:.4f} |"
        for row in body["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
