"""Make the built-in model, models/egemma-small: vocabulary, token vectors, contrastive training,
checkpoint folder.

    python models/train_builtin.py --data ../shared/data --out models/egemma-small

Run the same command again after it was stopped: what is already in --work is not made again, and
the run goes on from its last state. Seeds are fixed; bfloat16 sums depend on the number of threads,
so another machine gets another model of the same quality.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from egemma_core.checkpoint.config import EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import ConfigError, EgemmaError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_train.data.batches import BatchConfig, Batches, BatchesAhead
from egemma_train.data.dataset_files import hold_out, read_dataset
from egemma_train.data.datasets import Dataset, DatasetConfig
from egemma_train.evaluate import DevSets
from egemma_train.loop import Progress, run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import Contrast, ContrastConfig
from egemma_train.start.vocabulary import initialize, train_vocabulary
from models import small

SEED = 20261123
DATASETS = (
    *small.DATASETS,
    DatasetConfig(
        name="afriqa",
        path=("pairs/afriqa.train.jsonl.gz",),
        kind="pairs",
        task=small.QUESTION,
        languages=("en",),
    ),
)
MOST_ROWS = 20_000  # of a set that count for how often it is drawn
HELD_OUT_ONE_IN = 100  # positives; of the intents nothing is held out
CONFIG = small.shape(256, 4, 256, (256, 128, 64))
# A small batch has few wrong answers: every hard negative is one to all of its queries, with weight
# 1. No spread-out loss.
LOSS = ContrastConfig(
    temperature=0.05,
    hardness=0.0,
    share_negatives=True,
    spread_out=0.0,
    precision="bfloat16",
    chunk_tokens=4096,
)


def read_sets(data: Path) -> tuple[list[Dataset], list[Dataset]]:
    """Training sets, each with the rate at which it is drawn, and the rows that were held out of
    them.
    """
    kept, held = [], []
    for config in DATASETS:
        dataset = read_dataset(config, data)
        if config.kind == "pairs":
            dataset, out = hold_out(dataset, HELD_OUT_ONE_IN)
            held.append(out)
        kept.append(
            replace(
                dataset, config=replace(config, rate=math.sqrt(min(len(dataset.rows), MOST_ROWS)))
            )
        )
    return kept, held


def make_vocabulary(sets: Sequence[Dataset], pieces: int, path: Path) -> None:
    if not path.exists():
        scratch = path.with_name(f".{path.name}")
        train_vocabulary(
            sorted(
                {
                    text
                    for dataset in sets
                    for row in dataset.rows
                    for text in (row.query, row.positive)
                }
            ),
            pieces,
            scratch,
        )
        scratch.replace(path)


def batch_config(batch_size: int, max_tokens: int) -> BatchConfig:
    """Documents are cut to `max_tokens`, queries to half."""
    return BatchConfig(
        batch_size=batch_size,
        max_query_tokens=max_tokens // 2,
        max_document_tokens=max_tokens,
        hard_negatives=True,
        sampling="rates",
        default_task_share=0.5,
        lower_case_share=0.25,
        seed=SEED,
    )


def make_model(
    data: Path, config: EncoderConfig, batches: BatchConfig, loop: LoopConfig, work: Path, out: Path
) -> None:
    """Vocabulary, start and run in `work`, where what is there is not made again; then the
    checkpoint folder `out`, in bfloat16.

    Raises:
        ConfigError: `out` exists, or `work` holds a run with other settings.
        InputError: a file of the data is absent or damaged.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Remove it, or give another folder.")
    sets, held = read_sets(data)
    tokenizer_path = work / "tokenizer.model"
    make_vocabulary(sets, config.vocab_size, tokenizer_path)
    tokenizer = tokenizer_of(tokenizer_path, config)
    encoder = Encoder(config)
    initialize(
        encoder, small.start_vectors(sets, tokenizer, config, work / "token_vectors.pt", SEED), SEED
    )
    dev = DevSets(
        (), data, tokenizer, EMBEDDING_GEMMA, held_out=held, max_tokens=batches.max_document_tokens
    )
    described = {
        "model": asdict(config),
        "start_seed": SEED,
        "data": [asdict(dataset.config) for dataset in sets],
        "batches": asdict(batches),
        "loss": asdict(LOSS),
    }
    with BatchesAhead(Batches(sets, tokenizer, EMBEDDING_GEMMA, batches)) as ahead:
        objective = Contrast(
            encoder, ahead, LOSS, tokenizer_path=tokenizer_path, prompts=EMBEDDING_GEMMA, dev=dev
        )
        finished = run(objective, loop, work / "run", described, on_step=_say)
    save_checkpoint(
        load_encoder(open_checkpoint(finished.model)),
        tokenizer_path,
        EMBEDDING_GEMMA,
        out,
        dtype=torch.bfloat16,
    )


def _say(progress: Progress) -> None:
    if progress.scores is not None:
        print(
            f"step {progress.step} of {progress.steps}: held-out nDCG@10 "
            f"{progress.scores['score']:.3f}",
            flush=True,
        )
    elif progress.step % 10 == 0:
        print(
            f"step {progress.step} of {progress.steps}: loss "
            f"{progress.outcome.losses['loss']:.3f}, {progress.seconds_left / 60:.0f} min left",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/egemma-small"),
        help="vocabulary, states and log of the run",
    )
    parser.add_argument("--out", type=Path, default=Path("models/egemma-small"))
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=50, help="steps between states on disk")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        help="documents are cut to this in training, queries to half",
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        loop = LoopConfig(
            steps=args.steps,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            save_every=args.save_every,
            evaluate_every=100,
        )
        make_model(
            args.data,
            CONFIG,
            batch_config(args.batch_size, args.max_tokens),
            loop,
            args.work,
            args.out,
        )
    except EgemmaError as error:
        print(f"train_builtin: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
