"""What does adapting the full size to pairs of one's own cost on this machine?

    python models/make_checkpoint.py full FULL --tokenizer ../shared/data/tokenizer/gemma3.model
    python benchmarks/train_cost.py --model FULL --data ../shared/data

The stages of the preset `adapt`, a few steps of each, on English questions and paragraphs; each
stage in a process of its own, which starts from the same checkpoint. Weights are random: they
change the scores, not the cost. Peak memory is the process's, reading the checkpoint and saving a
state included. Not answered: GPUs; texts as long as the preset allows (512 tokens; these have about
40).

Writes benchmarks/results/train_cost.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from benchmarks.train_throughput import peak_gb
from egemma_train.loop_config import LoopConfig
from egemma_train.recipe import Recipe, read_recipe
from egemma_train.runner import run_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/train_cost.json"
PAIRS = "pairs/squad-sentences.train.jsonl.gz"


def recipe(args: argparse.Namespace) -> Recipe:
    """The preset, with our model, our pairs and few steps."""
    with resources.as_file(resources.files("egemma_train") / "presets/adapt.toml") as preset:
        found = read_recipe(preset, args.data)
    loop = LoopConfig(steps=args.steps, learning_rate=1e-5, log_every=1, save_every=args.steps)
    return replace(
        found,
        start=replace(found.start, model=str(args.model)),
        data=tuple(replace(data, path=(PAIRS,), task="question answering") for data in found.data),
        dev=(),
        stages=tuple(replace(stage, loop=loop) for stage in found.stages),
    )


def one_stage(args: argparse.Namespace) -> dict[str, Any]:
    whole = recipe(args)
    stage = next(stage for stage in whole.stages if stage.name == args.stage)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run_recipe(replace(whole, stages=(stage,)), Path(folder, "run"))
        seconds = time.perf_counter() - started
        run = Path(folder, "run", f"1-{stage.name}")
        lines = [
            json.loads(line)
            for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        state_bytes = sum(
            path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file()
        )
    steps = [
        (after["seconds"] - before["seconds"], after["tokens"] - before["tokens"])
        for before, after in itertools.pairwise(lines)
    ]
    assert stage.batches is not None
    return {
        "stage": stage.name,
        "scheme": stage.scheme,
        "precision": stage.loss.precision,
        "batch_size": stage.batches.batch_size,
        "chunk_tokens": stage.loss.chunk_tokens,
        "tokens_per_step": round(statistics.median(tokens for _, tokens in steps)),
        "step_s": round(statistics.median(step for step, _ in steps), 1),
        "tokens_per_s": round(statistics.median(tokens / step for step, tokens in steps), 1),
        "whole_s": round(seconds, 1),
        "peak_gb": round(peak_gb(), 2),
        "state_gb": round(state_bytes / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--steps", type=int, default=4, help="the first does not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.stage:
        print(json.dumps(one_stage(args)))
        return 0
    rows = []
    for stage in recipe(args).stages:
        command = [
            sys.executable,
            __file__,
            "--stage",
            stage.name,
            "--model",
            str(args.model),
            "--data",
            str(args.data),
            "--steps",
            str(args.steps),
            "--threads",
            str(args.threads),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{stage.name} failed:\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1], indent=1), flush=True)
    args.out.write_text(
        json.dumps(
            {
                "machine": machine(),
                "threads": args.threads,
                "commit": commit(),
                "steps": args.steps,
                "rows": rows,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
