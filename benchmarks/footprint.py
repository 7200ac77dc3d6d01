"""What does the base install weigh, and how soon is the first vector there?

Makes a fresh virtual environment without torch and without the executorch package, installs this
source tree into it as a user would, and measures from outside. Not answered: other machines' disks,
cold file caches.

    python benchmarks/footprint.py [--runs 15] [--bundle FOLDER ...]

Each bundle given is verified in that environment and timed to its first vector as well.

Writes benchmarks/results/footprint.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("numpy", "numpy.libs", "onnxruntime")  # what the size is counted beside
FIRST_VECTOR = (
    "import egemma; print(egemma.Embedder.open('builtin').embed_query('hello').vector.shape)"
)
FIRST_BUNDLE_VECTOR = (
    "import egemma, sys; print(egemma.Embedder.open(sys.argv[1]).embed_query('hello').vector.shape)"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument(
        "--bundle",
        action="append",
        default=[],
        help="a bundle to verify and time there as well; may be repeated",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", Path(folder) / "env"], check=True)
        start = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True)
        install_s = time.perf_counter() - start
        site = next((Path(folder) / "env" / "lib").glob("python*/site-packages"))
        names = {path.name for path in site.iterdir()}
        assert not names & {"torch", "executorch"}, "the base install must not bring torch"
        sizes = {
            path.name: megabytes(path)
            for path in site.iterdir()
            if not path.name.startswith(("pip", "setuptools", "__", "_distutils"))
        }
        empty = median_seconds([python, "-c", "pass"], args.runs)
        body: dict[str, Any] = {
            "question": __doc__.splitlines()[0],
            "machine": machine(),
            "commit": commit(),
            "runs": args.runs,
            "install_s": round(install_s, 1),
            "installed_mb": {
                name: round(size, 1)
                for name, size in sorted(sizes.items(), key=lambda row: -row[1])
                if size > 0.1
            },
            "beside_onnxruntime_and_numpy_mb": round(
                sum(size for name, size in sizes.items() if not name.startswith(BESIDE)), 1
            ),
            "python_start_s": round(empty, 3),
            "import_s": round(
                median_seconds([python, "-c", "import egemma"], args.runs) - empty, 3
            ),
            "import_embedder_s": round(
                median_seconds([python, "-c", "from egemma import Embedder, Index"], args.runs)
                - empty,
                3,
            ),
            "first_vector_s": round(median_seconds([python, "-c", FIRST_VECTOR], args.runs), 3),
        }
        for bundle in args.bundle:
            ended = subprocess.run(
                [python, "-m", "egemma", "verify", bundle, "--json"],
                capture_output=True,
                text=True,
                check=False,
            )
            verification = json.loads(ended.stdout)
            body.setdefault("bundles", {})[Path(bundle).name] = {
                "passed": verification["passed"],
                "runtime": verification["runtime"],
                "worst_cosine_float": round(verification["worst_cosine_float"], 5),
                "worst_cosine_rounded": round(verification["worst_cosine_quantized"], 5),
                "first_vector_s": round(
                    median_seconds([python, "-c", FIRST_BUNDLE_VECTOR, bundle], args.runs), 3
                ),
            }
    results = ROOT / "benchmarks" / "results" / "footprint.json"
    results.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))
    return 0


def megabytes(path: Path) -> float:
    files = (
        [path]
        if path.is_file()
        else [
            file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts
        ]
    )
    return sum(file.stat().st_size for file in files) / 1e6


def median_seconds(command: list[str | Path], runs: int) -> float:
    """Whole process, from start to exit; the first two runs warm the file cache."""
    seconds = []
    for turn in range(runs + 2):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
