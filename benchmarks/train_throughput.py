"""How fast is our trainer beside sentence-transformers' own, with the same model, rows, batches and
losses, on this machine's CPU?

    python benchmarks/train_throughput.py --data ../shared/data

The same at full size, with gradient caching on both sides:

    python models/make_checkpoint.py full FULL --tokenizer ../shared/data/tokenizer/gemma3.model
    python benchmarks/train_throughput.py --model FULL --recompute --batch-size 32 \\
        --chunk-tokens 1024 --mini-batch 8 --steps 3 --spare 1 --rounds 1 \\
        --out benchmarks/results/train_full_size.json

Both start from models/egemma-small, or the given model, see the same rows in the same batches, and
minimise InfoNCE with hard negatives (hardness 5) and the spread-out term over the model's widths,
with AdamW. Each trainer runs in a process of its own, by turns; a step lasts from one step's end to
the next, so reading, tokenizing, padding and the optimizer are in it. sentence-transformers
subtracts 1/D from the spread-out term, which changes the printed loss by a constant and no
gradient. Peak memory is the process's. Not answered: GPUs.

Writes benchmarks/results/train_throughput.json, or --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_train.data.batches import BatchConfig, Batches, BatchesAhead
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import DatasetConfig
from egemma_train.loop import run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import Contrast, ContrastConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/egemma-small"
RESULTS = ROOT / "benchmarks/results/train_throughput.json"
TEMPERATURE, HARDNESS, RATE = 0.05, 5.0, 5e-5


def batches_of(data: Path, name: str, batch_size: int, max_tokens: int, model: Path) -> Batches:
    config = DatasetConfig(
        name=name,
        path=(f"pairs/{name}.train.jsonl.gz",),
        kind="pairs",
        task="question answering",
        languages=("en",),
    )
    dataset = read_dataset(config, data)
    # sentence-transformers wants one in every row
    rows = tuple(row for row in dataset.rows if row.negatives)
    dataset = type(dataset)(config, rows, dataset.dropped)
    checkpoint = open_checkpoint(model)
    return Batches(
        [dataset],
        checkpoint.tokenizer(),
        checkpoint.prompts,
        BatchConfig(
            batch_size=batch_size,
            max_query_tokens=max_tokens,
            max_document_tokens=max_tokens,
            hard_negatives=True,
        ),
    )


def ours(args: argparse.Namespace) -> list[tuple[float, float]]:
    """(seconds, loss) of every step."""
    checkpoint = open_checkpoint(args.model)
    encoder = load_encoder(checkpoint).requires_grad_()
    stamps: list[tuple[float, float]] = [(time.perf_counter(), 0.0)]
    with (
        BatchesAhead(
            batches_of(args.data, args.dataset, args.batch_size, args.max_tokens, args.model)
        ) as batches,
        tempfile.TemporaryDirectory() as folder,
    ):
        objective = Contrast(
            encoder,
            batches,
            ContrastConfig(
                temperature=TEMPERATURE,
                hardness=HARDNESS,
                share_negatives=True,
                precision=args.precision,
                compile=args.compile,
                chunk_tokens=args.chunk_tokens,
                recompute=args.recompute,
            ),
            tokenizer_path=checkpoint.tokenizer_path,
            prompts=checkpoint.prompts,
        )
        run(
            objective,
            LoopConfig(
                steps=args.steps,
                learning_rate=RATE,
                schedule="constant",
                log_every=1,
                save_every=args.steps,
            ),
            Path(folder, "run"),
            on_step=lambda progress: stamps.append(
                (time.perf_counter(), progress.outcome.losses["loss"])
            ),
        )
    return [(now - before, loss) for (before, _), (now, loss) in itertools.pairwise(stamps)]


def theirs(args: argparse.Namespace) -> list[tuple[float, float]]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        GlobalOrthogonalRegularizationLoss,
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )
    from torch import Tensor, nn
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    batches = batches_of(args.data, args.dataset, args.batch_size, args.max_tokens, args.model)
    drawn = [batches.at(step) for step in range(args.steps)]
    columns = {
        "query": [text for batch in drawn for text in batch.query_texts],
        "positive": [text for batch in drawn for text in batch.positive_texts],
        "negative": [text for batch in drawn for text in batch.negative_texts],
    }
    model = SentenceTransformer(
        str(args.model), device="cpu", model_kwargs={"dtype": torch.float32}
    )
    model.max_seq_length = args.max_tokens
    options: dict[str, Any] = {
        "scale": 1 / TEMPERATURE,
        "hardness_mode": "hard_negatives",
        "hardness_strength": HARDNESS,
    }

    class Both(nn.Module):
        """The two losses on one set of vectors, as sentence-transformers' page on the second one
        shows it.
        """

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.first = MultipleNegativesRankingLoss(model, **options)
            self.second = GlobalOrthogonalRegularizationLoss(
                model, mean_weight=0.0, aggregation="sum"
            )

        def forward(
            self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None
        ) -> Tensor:
            vectors = [self.model(features)["sentence_embedding"] for features in sentence_features]
            spread = self.second.compute_loss_from_embeddings(vectors[:2], labels)
            return (
                self.first.compute_loss_from_embeddings(vectors, labels)
                + torch.stack(list(spread.values())).sum()
            )

    inner: nn.Module = (
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch, **options)
        if args.recompute
        else Both()
    )
    loss = MatryoshkaLoss(model, inner, list(open_checkpoint(args.model).config.dims))
    stamps = [time.perf_counter()]
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            stamps[0] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

        def on_log(
            self,
            arguments: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **kwargs: Any,
        ) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(DefaultBatchSampler):
        def __init__(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> None:
            super().__init__(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    prompts = {
        "query": batches.prompts.query("question answering"),
        "positive": batches.prompts.document(),
        "negative": batches.prompts.document(),
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            adam_beta2=0.98,
            bf16=args.precision == "bfloat16",
            use_cpu=True,
            torch_compile=args.compile,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            prompts=prompts,
            batch_sampler=InOrder,
            dataloader_num_workers=args.workers,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=loss,
            callbacks=[Clock()],
        )
        trainer.train()
    return [
        (now - before, value)
        for before, now, value in zip(stamps, stamps[1:], losses, strict=False)
    ]


@dataclass(frozen=True)
class Run:
    steps: list[tuple[float, float]]  # (seconds, loss) of every step
    peak_gb: float

    def median(self, spare: int) -> float:
        return statistics.median(seconds for seconds, _ in self.steps[spare:])


def peak_gb() -> float:
    """Largest resident memory of this process until now (Linux, where it is given in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(side: str, args: argparse.Namespace) -> Run:
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--model",
        str(args.model),
        "--data",
        str(args.data),
        "--dataset",
        args.dataset,
        "--steps",
        str(args.steps),
        "--batch-size",
        str(args.batch_size),
        "--max-tokens",
        str(args.max_tokens),
        "--precision",
        args.precision,
        "--threads",
        str(args.threads),
        "--chunk-tokens",
        str(args.chunk_tokens),
        "--workers",
        str(args.workers),
        "--mini-batch",
        str(args.mini_batch),
        *(["--recompute"] if args.recompute else []),
        *(["--compile"] if args.compile else []),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a checkpoint folder")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--dataset", default="squad-sentences")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--spare", type=int, default=5, help="steps at the start that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=4096)
    parser.add_argument(
        "--workers", type=int, default=0, help="of sentence-transformers' data loader"
    )
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="gradient caching on both sides (theirs then without the spread-out term, which it "
        "cannot cache)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile on both sides; let --spare cover it"
    )
    parser.add_argument("--mini-batch", type=int, default=32, help="of their gradient caching")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.side:
        steps = (ours if args.side == "ours" else theirs)(args)
        print(json.dumps({"steps": steps, "peak_gb": peak_gb()}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.model != MODEL:  # one whose tokenizer.json both sides can read
            checkpoint = open_checkpoint(args.model)
            save_checkpoint(
                load_encoder(checkpoint),
                checkpoint.tokenizer_path,
                checkpoint.prompts,
                Path(folder, "model"),
            )
            args.model = Path(folder, "model")
        results = compare(args)
    facts = {
        "machine": machine(),
        "threads": args.threads,
        "commit": commit(),
        "steps": args.steps,
        "spare": args.spare,
        "rounds": args.rounds,
        "batch_size": args.batch_size,
        "max_tokens": args.max_tokens,
        "dataset": args.dataset,
        "chunk_tokens": args.chunk_tokens,
        "mini_batch": args.mini_batch,
        "recompute": args.recompute,
        "compile": args.compile,
        "results": results,
    }
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides by turns, at each precision."""
    results: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        args.precision = precision
        runs: dict[str, list[Run]] = {"ours": [], "theirs": []}
        for _ in range(args.rounds):
            for side, found in runs.items():
                found.append(measure(side, args))
        medians = {side: [run.median(args.spare) for run in found] for side, found in runs.items()}
        results[precision] = {
            "pairs_per_s": {
                side: round(args.batch_size / statistics.median(values), 2)
                for side, values in medians.items()
            },
            "peak_gb": {
                side: round(max(run.peak_gb for run in found), 2) for side, found in runs.items()
            },
            "ratio": round(
                statistics.median(medians["theirs"]) / statistics.median(medians["ours"]), 3
            ),
            "ratio_per_round": [
                round(other / own, 3)
                for own, other in zip(medians["ours"], medians["theirs"], strict=True)
            ],
            "losses": {
                side: [round(loss, 4) for _, loss in found[0].steps[:5]]
                for side, found in runs.items()
            },
        }
        print(json.dumps({precision: results[precision]}, indent=1), flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
