"""Writes the README's numbers from benchmarks/results/*.json, so that no number is typed twice.

    python benchmarks/tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.search import label, tables

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- numbers: benchmarks/tables.py -->\n", "<!-- end of numbers -->\n"
LENGTHS = ("16", "64", "256", "512")
PEERS = {"torch float32": "*sentence-transformers, torch float32*", "plain onnx float32": "*`torch.onnx` export, ONNX Runtime float32*",
         "plain onnx int4": "*the same, generic int4 (`MatMulNBits`; its table stays float32)*"}


def numbers() -> str:
    """The README's part between the markers."""
    latency, cost, footprint = (result(name) for name in ("latency", "export_cost", "footprint"))
    exports = {row["target"]: row for row in cost["rows"]}
    lines = [
        f"The full size (24 layers, 262,144 rows, random weights), one text, {latency['threads']} threads of {latency['machine']}; milliseconds, median of "
        f"{latency['runs']} interleaved runs (95th percentile), commit {latency['commit']}. Ratios travel better than milliseconds.",
        "",
        "| | 16 tokens | 64 tokens | 256 tokens | 512 tokens | load | peak memory | file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in latency["rows"]:
        cells = [f"{row['ms'][tokens]['median']:.0f} ({row['ms'][tokens]['p95']:.0f})" for tokens in LENGTHS]
        size = f"{row['file_mb']:.0f} MB" if row["file_mb"] else ""
        name = PEERS.get(row["name"], f"`{row['name']}`")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['load_s']:.1f} s | {row['peak_mb']} MB | {size} |")
    lines += [
        "",
        f"What an export of that size costs, verification included (commit {cost['commit']}); the cosine is the finished file's worst, over ten texts and four "
        "widths, to float arithmetic on the same rounded weights:",
        "",
        "| target | time | peak memory | model file | cosine |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [f"| `{name}` | {row['seconds']:.0f} s | {row['peak_mb'] / 1000:.1f} GB | {row['model_bytes'] / 1e6:.1f} MB | {row['worst_cosine_rounded']:.4f} |"
              for name, row in exports.items()]
    lines += [
        "",
        f"The base install in a clean environment (commit {footprint['commit']}): `import egemma` {footprint['import_s'] * 1e3:.0f} ms, first vector of the built-in "
        f"model {footprint['first_vector_s']:.2f} s after process start, {footprint['beside_onnxruntime_and_numpy_mb']:.0f} MB beside ONNX Runtime and NumPy, no torch.",
        "",
    ]
    return "\n".join([*lines, *search_lines(result("search"))])


def search_lines(search: dict[str, Any]) -> list[str]:
    """Search in short; docs/search-benchmark.md has all of it."""
    lines = [
        f"Local search for the 10 nearest of 768-wide vectors of real texts, {search['threads']} threads (commit {search['commit']}): median milliseconds and recall@10 "
        "against exact float32. [All of it](docs/search-benchmark.md), with what each costs in memory and disk.",
        "",
        "| | 100,000 vectors | recall | 1,000,000 vectors | recall |",
        "|---|---:|---:|---:|---:|",
    ]
    by_size = {size: {label(row): row for row in found["rows"]} for size, found in search["sizes"].items()}
    wanted = [("egemma", 128, 300), ("egemma", 256, 200), ("egemma graph", 128, 200)]
    ours = [name for name, row in by_size["100000"].items() if row["name"].startswith("egemma")
            and (row["name"], row.get("width"), row["options"].get("shortlist")) in wanted]
    peers = [name for name, row in by_size["100000"].items() if not row["name"].startswith("egemma")]
    for name in [*ours, *peers]:
        cells = []
        for size in ("100000", "1000000"):
            found = by_size[size].get(name)
            cells += [f"{found['p50_ms']:.1f}", f"{found['recall']:.3f}"] if found else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def search_page() -> str:
    """The generated part of docs/search-benchmark.md."""
    return tables(result("search")) + "\n"


def result(name: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return body


def with_numbers(page: str, of: Callable[[], str] = numbers) -> str:
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, "the page has no markers for numbers"
    return before + BEGIN + of() + END + after


def main() -> int:
    for name, of in PAGES.items():
        page = ROOT / name
        page.write_text(with_numbers(page.read_text(encoding="utf-8"), of), encoding="utf-8")
    return 0


PAGES: dict[str, Callable[[], str]] = {"README.md": numbers, "docs/search-benchmark.md": search_page}


if __name__ == "__main__":
    sys.exit(main())
