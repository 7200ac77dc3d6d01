"""`egemma-train`: parse, build a config, call one function, print."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError, EgemmaError

# Verbs import what they need when they run: --help needs no torch.


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="egemma-train",
        description="Train or adapt an EmbeddingGemma by the published recipe. docs/training.md "
        "explains recipes.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    run = verbs.add_parser("run", help="run a recipe, or go on with it")
    run.add_argument("recipe", type=Path, help="TOML file")
    run.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the run; the last model will lie in OUT/model",
    )
    _data(run)
    run.add_argument(
        "--shard",
        action="store_true",
        help="divide the encoder among torchrun's processes in contrast stages, instead of a whole "
        "one in each",
    )
    _machine(run)

    toy = verbs.add_parser(
        "toy",
        help="write a toy recipe with its data into a folder and run all its stages (about a "
        "minute on 2 quiet cores)",
    )
    toy.add_argument("--out", type=Path, required=True, help="folder for recipe, data and runs")
    _machine(toy)

    check = verbs.add_parser(
        "check", help="read a recipe and every row of its data, and show what would be trained on"
    )
    check.add_argument("recipe", type=Path, help="TOML file")
    _data(check)

    preset = verbs.add_parser("preset", help="print a recipe to start from")
    preset.add_argument("name", nargs="?", help="which one; without it, their names")

    evaluate = verbs.add_parser("evaluate", help="score a model on a recipe's dev sets")
    evaluate.add_argument("recipe", type=Path, help="TOML file with tables [dev.NAME]")
    evaluate.add_argument("--model", required=True, help="checkpoint folder or hub id")
    evaluate.add_argument(
        "--scheme",
        help="score the model with its weights rounded as well: int4, int8, int8-per-channel, "
        "mixed; q4_0, q8_0 for published QAT checkpoints",
    )
    _data(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _machine(evaluate)

    mine = verbs.add_parser("mine", help="find hard negatives for a file of pairs")
    mine.add_argument("rows", type=Path, help="pairs, .jsonl or .jsonl.gz")
    mine.add_argument(
        "--teacher",
        required=True,
        help="sentence-transformers model, egemma:MODEL for a checkpoint by our own encoder, or "
        "FILE.safetensors of vectors",
    )
    mine.add_argument("--out", type=Path, required=True, help="the same rows with their negatives")
    mine.add_argument("--corpus", type=Path, help="more candidates, .jsonl of text and title")
    mine.add_argument("--per-query", type=int, default=1, metavar="N")
    mine.add_argument("--depth", type=int, default=100, help="ranks that are looked at")
    mine.add_argument("--skip", type=int, default=0, help="first ranks that are not taken")
    mine.add_argument(
        "--max-share-of-positive",
        type=float,
        default=0.95,
        metavar="S",
        help="leave out what scores above this share of the positive; 0 leaves nothing out",
    )
    mine.add_argument("--margin", type=float, help="by which a score must lie below the positive's")
    mine.add_argument("--max-score", type=float, help="leave out what scores above this cosine")
    mine.add_argument("--pick", choices=("top", "random"), default="top")
    mine.add_argument("--seed", type=int, default=0)
    mine.add_argument("--cache", type=Path, help="keep the teacher's vectors in this folder")
    mine.add_argument(
        "--symmetric", action="store_true", help="both sides are queries, as in sentence similarity"
    )
    mine.add_argument("--query-prompt", help="text in front of queries (default: the teacher's)")
    mine.add_argument("--document-prompt", help="text in front of documents (default: its own)")
    mine.add_argument("--query-prompt-name", help="a prompt of the teacher, by its name")
    mine.add_argument("--document-prompt-name", help="a prompt of the teacher, by its name")
    mine.add_argument("--device", help="where the teacher computes (default: its own choice)")
    mine.add_argument("--json", action="store_true", help="print JSON")

    soup = verbs.add_parser("soup", help="average checkpoints")
    soup.add_argument("models", type=Path, nargs="+", help="checkpoint folders")
    soup.add_argument("--out", type=Path, required=True, help="folder of the average")
    return parser


def _data(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--data", type=Path, help="folder of the data (default: what the recipe says)"
    )


def _machine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    verb.add_argument("--threads", type=int, help="of each process (default: torch's own choice)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    args = parser().parse_args(argv)
    # of the processes of one run, only the first prints
    out = sys.stderr if os.environ.get("RANK", "0") == "0" else io.StringIO()
    try:
        return _VERBS[args.verb](args)
    except EgemmaError as error:
        print(f"egemma-train: {error}", file=out)
        return 1
    except ImportError as error:
        print(f"egemma-train: {error.name} is not installed. pip install 'egemma[train]'", file=out)
        return 1
    except OSError as error:
        print(f"egemma-train: {error.strerror or error} ({error.filename or args.verb}).", file=out)
        return 1
    except KeyboardInterrupt:
        print(
            "egemma-train: stopped. The same command goes on from the last saved state.", file=out
        )
        return 130


def _run(args: argparse.Namespace) -> int:
    from egemma_train.console_output import progress, summary
    from egemma_train.ranks import join
    from egemma_train.recipe import read_recipe
    from egemma_train.runner import run_recipe

    _threads(args.threads)
    recipe = read_recipe(args.recipe, args.data)
    with join(args.device) as ranks, progress(ranks.first) as (on_step, on_message):
        results = run_recipe(
            recipe,
            args.out,
            ranks=ranks,
            shard=args.shard,
            on_step=on_step,
            on_message=on_message,
        )
    if ranks.first:
        print(summary(results))
        print(f"model: {args.out / 'model'}")
    return 0


def _toy(args: argparse.Namespace) -> int:
    from egemma_train.presets.toy import write_toy

    args.recipe, args.data, args.shard = write_toy(args.out), None, False
    args.out = args.out / "run"
    return _run(args)


def _check(args: argparse.Namespace) -> int:
    from egemma_train.data.batches import rates_of
    from egemma_train.data.dataset_files import read_dataset
    from egemma_train.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.data)
    read = {config.name: read_dataset(config, recipe.folder) for config in recipe.data}
    print(f"{'dataset':<24} {'task':<20} {'rows':>10} {'negatives':>10} {'left out':>9}")
    for name, dataset in read.items():
        print(
            f"{name:<24} {dataset.config.task:<20} {len(dataset.rows):>10,} "
            f"{sum(bool(row.negatives) for row in dataset.rows):>10,} "
            f"{sum(dataset.dropped.values()):>9,}"
        )
        for reason, count in dataset.dropped.items():
            print(f"{'':<24} {count:,} left out: {reason}")
    for stage in recipe.stages:
        print(f"\nstage {stage.name}: {stage.kind}, {stage.loop.steps:,} steps")
        if stage.batches is not None:
            chosen = [
                dataset
                for name, dataset in read.items()
                if stage.datasets is None or name in stage.datasets
            ]
            for name, rate in rates_of(chosen, stage.batches.sampling).items():
                pairs = rate * stage.loop.steps * stage.batches.batch_size
                print(
                    f"  {name:<24} {rate:>6.1%} of batches, {pairs / len(read[name].rows):.1f} "
                    "times through"
                )
    return 0


def _preset(args: argparse.Namespace) -> int:
    folder = resources.files("egemma_train") / "presets"
    names = sorted(
        path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml")
    )
    if args.name is None:
        print("\n".join(names))
        return 0
    if args.name not in names:
        raise ConfigError(f"no preset is named {args.name!r}; there are {names}.")
    print((folder / f"{args.name}.toml").read_text(encoding="utf-8"), end="")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_quant.qat import rounded
    from egemma_quant.schemes import scheme_named
    from egemma_train.evaluate import DevSets
    from egemma_train.ranks import join
    from egemma_train.recipe import read_recipe

    _threads(args.threads)
    scheme = None if args.scheme is None else scheme_named(args.scheme)
    recipe, checkpoint = read_recipe(args.recipe, args.data), open_checkpoint(args.model)
    if not recipe.dev:
        raise ConfigError(f"{args.recipe} has no table [dev.NAME]: there is nothing to score on.")
    with join(args.device) as ranks:
        encoder = load_encoder(checkpoint).to(ranks.device)
        dev = DevSets(recipe.dev, recipe.folder, checkpoint.tokenizer(), checkpoint.prompts)
        scores, after = dev.score(encoder), None
        if scheme is not None:
            with rounded(encoder, scheme):
                after = dev.score(encoder)
    if args.json:
        print(json.dumps(scores if after is None else {"float": scores, args.scheme: after}))
    elif after is None:
        print("\n".join(f"{name:<40} {value:.4f}" for name, value in scores.items()))
    else:
        print(f"{'':<40} {'float':>8} {args.scheme:>16} {'change':>8}")
        for name, value in scores.items():
            change = after[name] - value
            print(f"{name:<40} {value:>8.4f} {after[name]:>16.4f} {change:>+8.4f}")
    return 0


def _mine(args: argparse.Namespace) -> int:
    from egemma_train.teachers.mining import MiningConfig
    from egemma_train.teachers.mining_files import MineConfig, mine_file

    mining = MiningConfig(
        per_query=args.per_query,
        depth=args.depth,
        skip=args.skip,
        max_share_of_positive=args.max_share_of_positive or None,
        margin=args.margin,
        max_score=args.max_score,
        pick=args.pick,
        seed=args.seed,
    )
    report = mine_file(
        MineConfig(
            rows=args.rows,
            out=args.out,
            teacher=args.teacher,
            corpus=args.corpus,
            symmetric=args.symmetric,
            cache=args.cache,
            query_prompt=args.query_prompt,
            document_prompt=args.document_prompt,
            query_prompt_name=args.query_prompt_name,
            document_prompt_name=args.document_prompt_name,
            device=args.device,
            mining=mining,
        )
    )
    print(report.to_json() if args.json else report.to_text())
    return 0


def _soup(args: argparse.Namespace) -> int:
    from egemma_train.mixtures.soup import soup

    soup(args.models, args.out)
    print(f"{args.out}: the average of {len(args.models)} checkpoints")
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "toy": _toy,
    "check": _check,
    "preset": _preset,
    "evaluate": _evaluate,
    "mine": _mine,
    "soup": _soup,
}


def _threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(whole_number("--threads", count, 1))


if __name__ == "__main__":
    sys.exit(main())
