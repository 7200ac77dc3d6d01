"""Write the numbers of the pages from benchmarks/results/*.json, so that none is typed twice.

python benchmarks/tables.py
python benchmarks/tables.py --check   # write nothing, and say which page is not current
"""

from __future__ import annotations

import argparse
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
SCRIPT = "python benchmarks/tables.py"
LENGTHS = ("16", "64", "256", "512")
PEERS = {
    "torch float32": "*sentence-transformers, torch float32*",
    "plain onnx float32": "*`torch.onnx` export, ONNX Runtime float32*",
    "plain onnx int4": "*the same, generic int4 (`MatMulNBits`; its table stays float32)*",
}


def readme() -> str:
    """Three rows for the README: ours on phones, ours on boards, and what people run today."""
    latency = result("latency")
    lines = [
        f"The full size (24 layers, 262,144 rows, random weights), one text, {latency['threads']} "
        f"threads of {latency['machine']}; median milliseconds, commit {latency['commit']}.",
        "",
        "| | 16 tokens | 256 tokens | load | peak memory | file |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = {row["name"]: row for row in latency["rows"]}
    for name in ("android-int4", "onnx-int4", "torch float32"):
        row = rows[name]
        size = f"{row['file_mb']:.0f} MB" if row["file_mb"] else ""
        lines.append(
            f"| {PEERS.get(name, f'`{name}`')} | {row['ms']['16']['median']:.0f} | "
            f"{row['ms']['256']['median']:.0f} | {row['load_s']:.1f} s | {row['peak_mb']} MB | "
            f"{size} |"
        )
    return "\n".join(lines) + "\n"


def numbers() -> str:
    """The generated part of docs/numbers.md."""
    latency, cost, footprint = (result(name) for name in ("latency", "export_cost", "footprint"))
    exports = {row["target"]: row for row in cost["rows"]}
    lines = [
        "## The model",
        "",
        f"The full size (24 layers, 262,144 rows, random weights), one text, {latency['threads']} "
        f"threads of {latency['machine']}; milliseconds, median of "
        f"{latency['runs']} interleaved runs (95th percentile), commit {latency['commit']}. Ratios "
        "travel better than milliseconds.",
        "",
        "| | 16 tokens | 64 tokens | 256 tokens | 512 tokens | load | peak memory | file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in latency["rows"]:
        cells = [
            f"{row['ms'][tokens]['median']:.0f} ({row['ms'][tokens]['p95']:.0f})"
            for tokens in LENGTHS
        ]
        size = f"{row['file_mb']:.0f} MB" if row["file_mb"] else ""
        name = PEERS.get(row["name"], f"`{row['name']}`")
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row['load_s']:.1f} s | {row['peak_mb']} MB | "
            f"{size} |"
        )
    lines += [
        "",
        "## Export",
        "",
        f"What an export of that size costs, verification included (commit {cost['commit']}); the "
        "cosine is the finished file's worst, over ten texts and four "
        "widths, to float arithmetic on the same rounded weights:",
        "",
        "| target | time | peak memory | model file | cosine |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{name}` | {row['seconds']:.0f} s | {row['peak_mb'] / 1000:.1f} GB | "
        f"{row['model_bytes'] / 1e6:.1f} MB | {row['worst_cosine_rounded']:.4f} |"
        for name, row in exports.items()
    ]
    lines += [
        "",
        "## The package",
        "",
        f"The base install in a clean environment (commit {footprint['commit']}): `import egemma` "
        f"{footprint['import_s'] * 1e3:.0f} ms, first vector of the built-in "
        f"model {footprint['first_vector_s']:.2f} s after process start, "
        f"{footprint['beside_onnxruntime_and_numpy_mb']:.0f} MB beside ONNX Runtime and NumPy, no "
        "torch.",
        "",
    ]
    return "\n".join([*lines, *search_lines(result("search")), *training_lines()])


def search_lines(search: dict[str, Any]) -> list[str]:
    """Search in short; docs/search-benchmark.md has all of it."""
    lines = [
        "## Search",
        "",
        f"Local search for the 10 nearest of 768-wide vectors of real texts, {search['threads']} "
        f"threads (commit {search['commit']}): median milliseconds and recall@10 "
        "against exact float32. [All of it](search-benchmark.md), with what each costs in "
        "memory and disk.",
        "",
        "| | 100,000 vectors | recall | 1,000,000 vectors | recall |",
        "|---|---:|---:|---:|---:|",
    ]
    by_size = {
        size: {label(row): row for row in found["rows"]} for size, found in search["sizes"].items()
    }
    wanted = [("egemma", 128, 300), ("egemma", 256, 200)]
    ours = [
        name
        for name, row in by_size["100000"].items()
        if row["name"].startswith("egemma")
        and (row["name"], row.get("width"), row["options"].get("shortlist")) in wanted
    ]
    peers = [
        name for name, row in by_size["100000"].items() if not row["name"].startswith("egemma")
    ]
    for name in [*ours, *peers]:
        cells = []
        for size in ("100000", "1000000"):
            found = by_size[size].get(name)
            cells += [f"{found['p50_ms']:.1f}", f"{found['recall']:.3f}"] if found else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def training_lines() -> list[str]:
    """Training in short; docs/training-measured.md has all of it."""
    speed, recovery = result("train_throughput")["results"], result("qat_recovery")
    width, names = (
        next(iter(recovery["table"]["control"])),
        {"int4": "int4, a scale per block of 32", "mixed": "mixed, a scale per row"},
    )
    lines = [
        "## Training",
        "",
        "[All of it](training-measured.md). A step takes as many pairs a second as "
        "sentence-transformers' trainer times "
        + " and ".join(f"{found['ratio']:.2f} ({precision})" for precision, found in speed.items())
        + ", same model, rows, batches and losses. What a small model trained here loses of its "
        f"float score (mean nDCG@10 of seven sets, {len(recovery['seeds'])} seeds):",
        "",
        "| | rounded afterwards | trained for it | difference, paired by seed |",
        "|---|---:|---:|---:|",
    ]
    for name, title in names.items():
        cells = [
            interval(recovery["table"][f"{name}, {how}"][width]["mean_loss_percent"])
            for how in ("rounded afterwards", "trained")
        ] + [interval(recovery["gain_percent"][name])]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def interval(found: list[float]) -> str:
    """A loss in percent and its 95 % interval over seeds."""
    mean, low, high = found
    return f"{mean:.2f} % ({low:.2f} to {high:.2f})"


def training_page() -> str:
    """The generated part of docs/training-measured.md."""
    names = (
        "train_throughput",
        "train_compiled",
        "train_full_size",
        "train_cost",
        "qat_recovery",
        "ablations",
    )
    speed, compiled, full, cost, recovery, ablations = (result(name) for name in names)
    lines = [
        "### Speed beside sentence-transformers",
        "",
        f"{speed['machine']}, {speed['threads']} threads, commit {speed['commit']}; batches of "
        f"{speed['batch_size']} rows of query, positive and negative, {speed['rounds']} rounds by "
        "turns, "
        f"{speed['steps']} steps each; medians.",
        "",
        "| matrix products | ours, rows/s | theirs, rows/s | ratio | ratio per round |",
        "|---|---:|---:|---:|---|",
    ]
    for precision, found in speed["results"].items():
        rounds = ", ".join(f"{ratio:.2f}" for ratio in found["ratio_per_round"])
        lines.append(
            f"| {precision} | {found['pairs_per_s']['ours']} | {found['pairs_per_s']['theirs']} | "
            f"{found['ratio']:.2f} | {rounds} |"
        )
    lines += [
        "",
        f"The same with torch.compile on both sides (commit {compiled['commit']}; "
        f"{compiled['batch_size']} rows, {compiled['steps'] - compiled['spare']} steps after it "
        "has compiled, one round):",
        "",
        "| matrix products | ours, rows/s | theirs, rows/s | ratio |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {precision} | {found['pairs_per_s']['ours']:.1f} | "
        f"{found['pairs_per_s']['theirs']:.1f} | {found['ratio']:.2f} |"
        for precision, found in compiled["results"].items()
    ]
    lines += [
        "",
        "### The full size",
        "",
        f"308 million parameters, random weights, {full['batch_size']} rows a step, gradient "
        f"caching on both sides ({full['chunk_tokens']} tokens at a time; theirs "
        f"{full['mini_batch']} texts), "
        f"{full['threads']} threads, commit {full['commit']}; {full['steps'] - full['spare']} "
        "steps each that count:",
        "",
        "| matrix products | ours, rows/s | theirs, rows/s | ratio | peak memory, ours | theirs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {precision} | {found['pairs_per_s']['ours']:.2f} | "
        f"{found['pairs_per_s']['theirs']:.2f} | {found['ratio']:.2f} | "
        f"{found['peak_gb']['ours']:.1f} GB | {found['peak_gb']['theirs']:.1f} GB |"
        for precision, found in full["results"].items()
    ]
    lines += [
        "",
        f"The preset `adapt` on questions and their paragraphs, {cost['threads']} threads of "
        f"{cost['machine']}, commit {cost['commit']}; medians of {cost['steps'] - 1} steps:",
        "",
        "| stage | matrix products | rows a step | a step | tokens/s | peak memory | a state on "
        "disk |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['stage']} | {row['precision']} | {row['batch_size']} | {row['step_s']:.0f} s | "
        f"{row['tokens_per_s']:.0f} | {row['peak_gb']:.1f} GB | {row['state_gb']:.1f} GB |"
        for row in cost["rows"]
    ]
    width = next(iter(recovery["table"]["control"]))
    lines += [
        "",
        "### What rounding costs, and what training for it gets back",
        "",
        f"A model of {recovery['parameters']:,} parameters, trained in float, then "
        f"{recovery['asked']['extra_steps']} steps more: in float (the control), or through the "
        "rounding. "
        f"nDCG@10, mean of seven retrieval sets, at most {recovery['asked']['queries']} queries "
        f"each, {width} channels; seeds {recovery['seeds']}; loss is relative to the control of "
        f"the same seed, with Student's 95 % interval. Commit {recovery['commit']}.",
        "",
        "| | score by seed | loss by seed, % | mean loss |",
        "|---|---|---|---:|",
    ]
    for name, by_width in recovery["table"].items():
        found = by_width[width]
        loss = interval(found["mean_loss_percent"]) if found["mean_loss_percent"] else ""
        lines.append(
            f"| {name} | {', '.join(f'{score:.4f}' for score in found['scores'])} | "
            f"{', '.join(f'{value:.2f}' for value in found['loss_percent'])} | {loss} |"
        )
    lines += [
        "",
        *(
            f"What training gets back of {name}: {interval(found)} over seeds, "
            f"{interval(recovery['gain_percent_over_queries'][name])} over queries.\n"
            for name, found in recovery["gain_percent"].items()
        ),
    ]
    lines += [
        "",
        "### The report's ablations in miniature",
        "",
        f"nDCG@10, mean of four retrieval sets, at most {ablations['asked']['queries']} queries "
        f"each; seeds {ablations['seeds']}; differences to the row of its group that has none, "
        "paired by seed, "
        f"with Student's 95 % interval. Commit {ablations['commit']}.",
        "",
        "| | score by seed | mean | difference |",
        "|---|---|---:|---:|",
    ]
    for name, found in ablations["table"].items():
        difference = (
            ""
            if found["difference"] is None
            else "{:+.4f} ({:+.4f} to {:+.4f})".format(*found["difference"])
        )
        lines.append(
            f"| {name} | {', '.join(f'{score:.4f}' for score in found['scores'])} | "
            f"{found['mean']:.4f} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def search_page() -> str:
    """The generated part of docs/search-benchmark.md."""
    return tables(result("search")) + "\n"


def result(name: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        (ROOT / "benchmarks" / "results" / f"{name}.json").read_text()
    )
    return body


def with_numbers(page: str, of: Callable[[], str]) -> str:
    """Put what `of` gives between the markers of `page`."""
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, "the page has no markers for numbers"
    return before + BEGIN + of() + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; 1 where a page is not current",
    )
    check = parser.parse_args().check
    outdated = []
    for name, of in PAGES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        current = with_numbers(text, of)
        if current != text:
            outdated.append(name)
            if not check:
                page.write_text(current, encoding="utf-8")
    if check and outdated:
        print(f"{', '.join(outdated)}: other numbers than benchmarks/results. Run {SCRIPT}.")
    return int(check and bool(outdated))


PAGES: dict[str, Callable[[], str]] = {
    "README.md": readme,
    "docs/numbers.md": numbers,
    "docs/search-benchmark.md": search_page,
    "docs/training-measured.md": training_page,
}


if __name__ == "__main__":
    sys.exit(main())
