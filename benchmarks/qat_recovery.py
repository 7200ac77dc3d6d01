"""How much of a float model's score does int4 keep, with quantization-aware finetuning and with
plain rounding?

    python benchmarks/qat_recovery.py --data ../shared/data --seed 0   # one seed
    python benchmarks/qat_recovery.py --report                         # all finished seeds

A run that was stopped goes on with the same command. The report is written to
benchmarks/results/qat_recovery.json.

A small model is trained in float; from there, with the same batches and rates, it is finetuned in
float (the control), and quantization-aware for each scheme. Scored are the control, the control
rounded afterwards (post-training), and the quantization-aware one rounded, which is what ships:
nDCG@10, mean of seven retrieval sets, none of which was trained on. Losses are relative to the
control of the same seed, so the extra steps are no advantage. Intervals are Student's t over seeds;
what training gets back has one from drawing the queries again as well. Not answered: how large
models lose; EmbeddingGemma's own weights are not here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.load import load_encoder
from egemma_quant.qat import rounded
from egemma_quant.schemes import SCHEMES, Scheme
from egemma_train.data.batches import BatchConfig, Batches
from egemma_train.evaluate import DevSets
from egemma_train.loop import Progress, run
from egemma_train.loop_config import LoopConfig
from egemma_train.metrics import t_interval
from egemma_train.objectives.contrast import Contrast, ContrastConfig
from models import small

RESULTS = small.ROOT / "benchmarks/results/qat_recovery.json"
BATCHES = BatchConfig(
    batch_size=96,
    max_query_tokens=48,
    max_document_tokens=64,
    hard_negatives=True,
    default_task_share=0.5,
    lower_case_share=0.25,
)
LOSS = ContrastConfig(share_negatives=True, hardness=0.0)
TRAINED = ("int4", "mixed")  # schemes that are finetuned for


def one_seed(args: argparse.Namespace) -> None:
    """Everything of one seed, into work/seed-N/result.json."""
    work: Path = args.work / f"seed-{args.seed}"
    sets = small.datasets(args.data)
    path, tokenizer, prompts = small.tokenizer_and_prompts()
    config = small.shape(
        args.width,
        args.layers,
        args.ffn_width,
        (args.width, args.width // 2, args.width // 4),
        args.head_dim,
    )
    dims = config.dims
    dev = {
        dim: DevSets(small.dev_sets(args.queries, 96, dim=dim), args.data, tokenizer, prompts)
        for dim in dims[:1]
    }

    def on_step(progress: Progress) -> None:
        if progress.step % 50 == 0:
            print(
                f"step {progress.step} of {progress.steps}, loss "
                f"{progress.outcome.losses['loss']:.3f}, {progress.seconds_left / 60:.0f} min left",
                flush=True,
            )

    def train(
        name: str,
        start: Path | None,
        steps: int,
        rate: float,
        seed: int,
        scheme: Scheme | None = None,
    ) -> Path:
        encoder = (
            small.started(config, sets, args.work, args.seed)
            if start is None
            else load_encoder(open_checkpoint(start)).requires_grad_()
        )
        objective = Contrast(
            encoder,
            Batches(sets, tokenizer, prompts, replace(BATCHES, seed=seed)),
            LOSS,
            tokenizer_path=path,
            prompts=prompts,
            scheme=scheme,
        )
        print(name, flush=True)
        return run(
            objective,
            LoopConfig(
                steps=steps, learning_rate=rate, warmup_steps=max(5, steps // 10), save_every=50
            ),
            work / name,
            {"seed": seed},
            on_step=on_step,
        ).model

    start = train(
        "float",
        None,
        args.steps,
        args.learning_rate,
        1000 + args.seed,
    )
    control = train(
        "control",
        start,
        args.extra_steps,
        args.extra_rate,
        2000 + args.seed,
    )
    models: dict[str, tuple[Path, Scheme | None]] = {
        "before": (start, None),
        "control": (control, None),
    }
    for name, scheme in SCHEMES.items():
        models[f"{name}, rounded afterwards"] = (control, scheme)
    for name in TRAINED:
        trained = train(
            name, start, args.extra_steps, args.extra_rate, 2000 + args.seed, SCHEMES[name]
        )
        models[f"{name}, trained"] = (trained, SCHEMES[name])
    values: dict[str, dict[int, dict[str, np.ndarray[Any, Any]]]] = {}
    for name, (model, scheme) in models.items():
        encoder = load_encoder(open_checkpoint(model))
        with rounded(encoder, scheme) if scheme is not None else nullcontext():
            values[name] = {dim: dev[dim].per_query(encoder) for dim in dev}
        print(name, {dim: round(mean(found), 4) for dim, found in values[name].items()}, flush=True)
    result: dict[str, Any] = {
        "seed": args.seed,
        "scores": {
            name: {dim: mean(found) for dim, found in by_dim.items()}
            for name, by_dim in values.items()
        },
    }
    np.savez(
        work / "values.npz",
        **{
            f"{name}|{key}": rows
            for name, by_dim in values.items()
            for key, rows in by_dim[dims[0]].items()
        },
    )
    result["asked"] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("report", "work", "data", "seed")
    }
    result |= {
        "machine": machine(),
        "commit": commit(),
        "parameters": sum(
            weight.numel() for weight in load_encoder(open_checkpoint(start)).parameters()
        ),
    }
    (work / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def mean(found: dict[str, Any]) -> float:
    return float(np.mean([value.mean() for value in found.values()]))


def report(work: Path) -> dict[str, Any]:
    """Means over seeds, and the relative loss to each seed's control, with Student's t interval."""
    seeds = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(work.glob("seed-*/result.json"))
    ]
    table: dict[str, Any] = {}
    for name in seeds[0]["scores"]:
        table[name] = {}
        for dim in seeds[0]["scores"][name]:
            scores = [seed["scores"][name][dim] for seed in seeds]
            losses = [
                100 * (1 - seed["scores"][name][dim] / seed["scores"]["control"][dim])
                for seed in seeds
            ]
            table[name][dim] = {
                "scores": [round(score, 4) for score in scores],
                "loss_percent": [round(loss, 2) for loss in losses],
                "mean_loss_percent": [round(value, 2) for value in t_interval(losses)]
                if len(seeds) > 1 and name != "control"
                else None,
            }
    width = next(iter(table["control"]))
    gains = {
        name: [
            round(value, 2)
            for value in t_interval(
                [
                    after - trained
                    for after, trained in zip(
                        table[f"{name}, rounded afterwards"][width]["loss_percent"],
                        table[f"{name}, trained"][width]["loss_percent"],
                        strict=True,
                    )
                ]
            )
        ]
        for name in TRAINED
        if len(seeds) > 1
    }
    by_query = {
        name: [
            round(value, 2) for value in over_queries(work, name, [seed["seed"] for seed in seeds])
        ]
        for name in TRAINED
    }
    return {
        "gain_percent": gains,
        "gain_percent_over_queries": by_query,
        "machine": seeds[0]["machine"],
        "commit": ", ".join(dict.fromkeys(seed["commit"] for seed in seeds)),
        "asked": seeds[0]["asked"],
        "parameters": seeds[0]["parameters"],
        "seeds": [seed["seed"] for seed in seeds],
        "table": table,
    }


def over_queries(
    work: Path, name: str, seeds: Sequence[int], draws: int = 5000
) -> tuple[float, float, float]:
    """What training gets back of a scheme, in percent of the control: mean over seeds, and its 95 %
    interval when the queries of every set are drawn again.
    """
    files = [np.load(work / f"seed-{seed}/values.npz") for seed in seeds]
    sets = sorted(key.split("|")[1] for key in files[0].files if key.startswith("control|"))
    gains = [
        np.mean(
            [
                file[f"{name}, trained|{key}"] - file[f"{name}, rounded afterwards|{key}"]
                for file in files
            ],
            axis=0,
        )
        for key in sets
    ]
    control = np.mean([[file[f"control|{key}"].mean() for key in sets] for file in files])
    random = np.random.default_rng(0)
    drawn = np.mean(
        [row[random.integers(0, len(row), (draws, len(row)))].mean(1) for row in gains], axis=0
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return tuple(
        float(100 * value / control)
        for value in (np.mean([row.mean() for row in gains]), low, high)
    )  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=small.DATA)
    parser.add_argument("--work", type=Path, default=small.ROOT / "build/qat-recovery")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn-width", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--extra-steps", type=int, default=250)
    parser.add_argument("--extra-rate", type=float, default=5e-4)
    parser.add_argument("--queries", type=int, default=500, help="at most so many per set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.report:
        found = report(args.work)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for name, by_dim in found["table"].items():
            print(
                f"{name:<40}",
                {
                    dim: (value["scores"], value["mean_loss_percent"])
                    for dim, value in by_dim.items()
                },
            )
    else:
        one_seed(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
