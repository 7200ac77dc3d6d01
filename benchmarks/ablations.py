"""Do the report's ablations (initialisation, pooling, soup) show their signs at a thousandth of its
size?

    python benchmarks/ablations.py --data ../shared/data --seed 0   # everything of one seed
    python benchmarks/ablations.py --report                         # all finished seeds

A run that was stopped goes on with the same command. The report is written to
benchmarks/results/ablations.json.

Per seed: a decoder-only model learns the next token of our training texts from nothing; it is
adapted by UL2 as an encoder-decoder; and, as a control of the same number of steps, it goes on as a
decoder. Then the same short finetuning starts from each, from the decoder as it was, and from
random weights; from the adapted encoder with four poolers. Its mean-pooled model is then finetuned
further with three mixtures of the datasets, whose models are averaged. Scored: nDCG@10, mean of
four retrieval sets. Tables 2 to 4 of arXiv:2509.20354 have the report's numbers, from 2.1 trillion
tokens; ours see a few million, so a sign that does not appear here says nothing about theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.folder import open_checkpoint, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_train.data.batches import BatchConfig, Batches
from egemma_train.data.texts import TextConfig, read_texts
from egemma_train.evaluate import DevSets
from egemma_train.loop import Objective, Progress, run
from egemma_train.loop_config import LoopConfig
from egemma_train.metrics import t_interval
from egemma_train.mixtures.rates import dirichlet_rates
from egemma_train.mixtures.soup import soup
from egemma_train.objectives.contrast import Contrast, ContrastConfig
from egemma_train.objectives.denoise import DenoisingObjective
from egemma_train.objectives.language_model import LanguageModelObjective
from egemma_train.start.decoder import HeadConfig, random_encoder, read_decoder
from egemma_train.start.vocabulary import train_vocabulary
from models import small

RESULTS = small.ROOT / "benchmarks/results/ablations.json"
WIDTH, LAYERS, FFN, HEAD_DIM, DIMS = 128, 2, 256, 32, (128, 64)
DEV = ("retrieval/medquad-test", "code/nl2bash-test", "code/tldr-test", "code/mbxp-test/python")
BATCHES = BatchConfig(
    batch_size=32, max_query_tokens=32, max_document_tokens=40, hard_negatives=True
)
TEXTS = TextConfig(batch_size=32, max_tokens=40)
LOSS = ContrastConfig(share_negatives=True, hardness=0.0)
MIXTURES = 3


# one experiment, read top to bottom
def one_seed(args: argparse.Namespace) -> None:  # noqa: PLR0915
    work: Path = args.work / f"seed-{args.seed}"
    sets = small.datasets(args.data)
    texts = read_texts(
        [
            args.data / path
            for dataset in sets
            for path in dataset.config.path
            if dataset.config.kind == "pairs"
        ],
        ("query", "positive"),
    )
    # the same vocabulary as the built-in model's: English and code
    texts = [text for text in texts if text.isascii()]
    vocabulary = args.work / "tokenizer.model"  # with spare pieces, which UL2 needs
    if not vocabulary.exists():
        vocabulary.parent.mkdir(parents=True, exist_ok=True)
        scratch = vocabulary.with_suffix(f".{args.seed}")
        train_vocabulary(texts, 8000, scratch, spare=105)
        scratch.rename(vocabulary)
    config = replace(
        small.shape(WIDTH, LAYERS, FFN, DIMS, HEAD_DIM, max_tokens=256),
        dense=((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)),
    )
    head = HeadConfig(dims=DIMS, max_tokens=256, seed=args.seed)
    tokenizer = tokenizer_of(vocabulary, config)
    dev = DevSets(small.dev_sets(args.queries, 64, DEV), args.data, tokenizer, EMBEDDING_GEMMA)
    text_config = replace(TEXTS, seed=args.seed)

    def train(name: str, objective: Objective, steps: int, rate: float) -> Path:
        print(name, flush=True)

        def on_step(progress: Progress) -> None:
            if progress.step % 100 == 0:
                print(
                    f"step {progress.step} of {progress.steps}, loss "
                    f"{progress.outcome.losses['loss']:.3f}, {progress.seconds_left / 60:.0f} min "
                    "left",
                    flush=True,
                )

        return run(
            objective,
            LoopConfig(
                steps=steps,
                learning_rate=rate,
                warmup_steps=max(5, steps // 10),
                save_every=100,
                keep=1,
            ),
            work / name,
            on_step=on_step,
        ).model

    decoder = train(
        "decoder",
        LanguageModelObjective(
            random_encoder(config, args.seed), texts, text_config, tokenizer_path=vocabulary
        ),
        args.decoder_steps,
        2e-3,
    )
    longer_config = replace(text_config, seed=args.seed + 100)
    longer = train(
        "decoder-longer",
        LanguageModelObjective(
            read_decoder(decoder, head)[0], texts, longer_config, tokenizer_path=vocabulary
        ),
        args.adapt_steps,
        1e-3,
    )
    adapted = train(
        "adapted",
        DenoisingObjective(
            read_decoder(decoder, head)[0],
            texts,
            longer_config,
            tokenizer_path=vocabulary,
            prompts=EMBEDDING_GEMMA,
        ),
        args.adapt_steps,
        1e-3,
    )

    def finetuned(
        name: str, encoder: Encoder, rates: dict[str, float] | None = None
    ) -> tuple[Path, dict[str, float]]:
        chosen, batches, steps, rate = sets, replace(BATCHES, seed=args.seed), args.steps, 3e-3
        if rates is not None:
            steps, rate = args.mixture_steps, 1e-3
            chosen = [
                replace(dataset, config=replace(dataset.config, rate=rates[dataset.name]))
                for dataset in sets
            ]
            batches = replace(batches, sampling="rates")
        objective = Contrast(
            encoder.requires_grad_(),
            Batches(chosen, tokenizer, EMBEDDING_GEMMA, batches),
            LOSS,
            tokenizer_path=vocabulary,
            prompts=EMBEDDING_GEMMA,
        )
        model = train(name, objective, steps, rate)
        scores = dev.score(load_encoder(open_checkpoint(model)))
        print(name, round(scores["score"], 4), flush=True)
        return model, scores

    def from_adapted(pooling: str) -> Encoder:
        encoder = load_encoder(open_checkpoint(adapted))
        # its pooler, where that has weights
        other = random_encoder(replace(encoder.config, pooling=pooling), args.seed)
        other.load_state_dict({**other.state_dict(), **encoder.state_dict()})
        return other

    results: dict[str, dict[str, float]] = {}
    whole, results["init: encoder-decoder"] = finetuned("encoder-decoder", from_adapted("mean"))
    results["pooling: mean"] = results["init: encoder-decoder"]
    results["init: decoder-only"] = finetuned("decoder-only", read_decoder(decoder, head)[0])[1]
    results["init: decoder-only, as long"] = finetuned(
        "decoder-only-longer", read_decoder(longer, head)[0]
    )[1]
    results["init: random"] = finetuned("random", random_encoder(config, args.seed + 200))[1]
    for pooling in ("last", "first", "attention"):
        results[f"pooling: {pooling}"] = finetuned(f"pooling-{pooling}", from_adapted(pooling))[1]
    models = []
    for number, rates in enumerate(
        dirichlet_rates([dataset.name for dataset in sets], MIXTURES, 1.0, args.seed), start=1
    ):
        model, results[f"soup: mixture {number}"] = finetuned(
            f"mixture-{number}", load_encoder(open_checkpoint(whole)), rates
        )
        models.append(model)
    if not (work / "soup").exists():
        soup(models, work / "soup")
    results["soup: average of the three"] = dev.score(load_encoder(open_checkpoint(work / "soup")))
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("report", "work", "data", "seed")
    }
    (work / "result.json").write_text(
        json.dumps(
            {
                "seed": args.seed,
                "asked": asked,
                "machine": machine(),
                "commit": commit(),
                "results": results,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


def report(work: Path) -> dict[str, Any]:
    seeds = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(work.glob("seed-*/result.json"))
    ]
    reference = {
        "init": "init: encoder-decoder",
        "pooling": "pooling: mean",
        "soup": "soup: average of the three",
    }
    table = {}
    for name in seeds[0]["results"]:
        scores = [seed["results"][name]["score"] for seed in seeds]
        base = reference[name.split(":")[0]]
        differences = [
            seed["results"][name]["score"] - seed["results"][base]["score"] for seed in seeds
        ]
        table[name] = {
            "scores": [round(score, 4) for score in scores],
            "mean": round(sum(scores) / len(scores), 4),
            "against": base,
            "difference": None
            if name == base
            else [round(value, 4) for value in t_interval(differences)],
        }
    return {
        "machine": seeds[0]["machine"],
        "commit": seeds[0]["commit"],
        "asked": seeds[0]["asked"],
        "seeds": [seed["seed"] for seed in seeds],
        "table": table,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=small.DATA)
    parser.add_argument("--work", type=Path, default=small.ROOT / "build/ablations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-steps", type=int, default=400)
    parser.add_argument("--adapt-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--mixture-steps", type=int, default=200)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.report:
        found = report(args.work)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for name, row in found["table"].items():
            print(f"{name:<32} {row['scores']} {row['mean']:.4f} {row['difference']}")
    else:
        one_seed(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
