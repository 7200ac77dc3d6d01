"""`egemma-train`: parse, build a config, call one function, print."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egemma_core.errors import ConfigError, EgemmaError

if TYPE_CHECKING:  # at run time it would import torch for --help
    from egemma_train.loop import Progress
    from egemma_train.recipe import ThroughOf
    from egemma_train.runner import StageResult


def parser() -> argparse.ArgumentParser:
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
    run.add_argument("--data", type=Path, help="folder of the data (default: what the recipe says)")
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
    check.add_argument("recipe", type=Path)
    check.add_argument("--data", type=Path)

    preset = verbs.add_parser("preset", help="print a recipe to start from")
    preset.add_argument("name", nargs="?", help="which one; without it, their names")

    evaluate = verbs.add_parser("evaluate", help="score a model on a recipe's dev sets")
    evaluate.add_argument("recipe", type=Path)
    evaluate.add_argument("--model", required=True, help="checkpoint folder or hub id")
    evaluate.add_argument("--data", type=Path)
    evaluate.add_argument("--json", action="store_true")
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
    mine.add_argument("--query-prompt")
    mine.add_argument("--document-prompt")
    mine.add_argument("--query-prompt-name")
    mine.add_argument("--document-prompt-name")
    mine.add_argument("--device")
    mine.add_argument("--json", action="store_true")

    soup = verbs.add_parser("soup", help="average checkpoints")
    soup.add_argument("models", type=Path, nargs="+")
    soup.add_argument("--out", type=Path, required=True)
    return parser


def _machine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    verb.add_argument("--threads", type=int, help="of each process (default: torch's own choice)")


def main(argv: Sequence[str] | None = None, through_of: ThroughOf | None = None) -> int:
    """
    Args:
        through_of: makes quantization-aware training contexts; see egemma_train.recipe.
    """
    args = parser().parse_args(argv)
    # of the processes of one run, the first speaks
    said = sys.stderr if os.environ.get("RANK", "0") == "0" else io.StringIO()
    try:
        return _VERBS[args.verb](args, through_of)
    except EgemmaError as error:
        print(f"egemma-train: {error}", file=said)
        return 1
    except ImportError as error:
        print(
            f"egemma-train: {error.name} is not installed: pip install 'egemma[train]'.", file=said
        )
        return 1
    except OSError as error:
        print(
            f"egemma-train: {error.strerror or error} ({error.filename or args.verb}).", file=said
        )
        return 1
    except KeyboardInterrupt:
        print(
            "egemma-train: stopped. The same command goes on from the last saved state.", file=said
        )
        return 130


def _run(args: argparse.Namespace, through_of: ThroughOf | None) -> int:
    from egemma_train.ranks import join
    from egemma_train.recipe import read_recipe
    from egemma_train.runner import Runner

    _threads(args.threads)
    recipe = read_recipe(args.recipe, args.data)
    with join(args.device) as ranks, _progress(ranks.first) as (tell, say):
        results = Runner(
            recipe,
            args.out,
            ranks=ranks,
            shard=args.shard,
            through_of=through_of,
            tell=tell,
            say=say,
        ).run()
    if ranks.first:
        print(summary(results))
        print(f"model: {args.out / 'model'}")
    return 0


def _toy(args: argparse.Namespace, through_of: ThroughOf | None) -> int:
    from egemma_train.presets.toy import write_toy

    args.recipe, args.data, args.shard = write_toy(args.out), None, False
    args.out = args.out / "run"
    return _run(args, through_of)


def _check(args: argparse.Namespace, _through_of: ThroughOf | None) -> int:
    from egemma_train.data.batches import rates_of
    from egemma_train.data.rows import read_dataset
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


def _preset(args: argparse.Namespace, _through_of: ThroughOf | None) -> int:
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


def _evaluate(args: argparse.Namespace, _through_of: ThroughOf | None) -> int:
    from egemma_core.checkpoint import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_train.evaluate import DevSets
    from egemma_train.ranks import join
    from egemma_train.recipe import read_recipe

    _threads(args.threads)
    recipe, checkpoint = read_recipe(args.recipe, args.data), open_checkpoint(args.model)
    if not recipe.dev:
        raise ConfigError(f"{args.recipe} has no table [dev.NAME]: there is nothing to score on.")
    with join(args.device) as ranks:
        scores = DevSets(
            recipe.dev, recipe.folder, checkpoint.tokenizer(), checkpoint.prompts
        ).score(load_encoder(checkpoint).to(ranks.device))
    print(
        json.dumps(scores)
        if args.json
        else "\n".join(f"{name:<40} {value:.4f}" for name, value in scores.items())
    )
    return 0


def _mine(args: argparse.Namespace, _through_of: ThroughOf | None) -> int:
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


def _soup(args: argparse.Namespace, _through_of: ThroughOf | None) -> int:
    from egemma_train.mixtures.soup import soup

    soup(args.models, args.out)
    print(f"{args.out}: the average of {len(args.models)} checkpoints")
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace, Any], int]] = {
    "run": _run,
    "toy": _toy,
    "check": _check,
    "preset": _preset,
    "evaluate": _evaluate,
    "mine": _mine,
    "soup": _soup,
}


def summary(results: Sequence[StageResult]) -> str:
    """A line per stage, and per mixture of it."""
    lines = [f"{'stage':<28} {'score':>8} {'step':>8} {'tokens':>12} {'seconds':>9}  ended"]
    for result in results:
        for number, mixture in enumerate(result.mixtures, start=1):
            rates = ", ".join(f"{name} {rate:.2f}" for name, rate in mixture["rates"].items())
            lines.append(
                f"  mixture {number:<18} {mixture['scores']['score']:>8.4f}  "
                f"{'in the soup: ' if mixture['in_soup'] else ''}{rates}"
            )
        score = f"{result.scores['score']:>8.4f}" if "score" in result.scores else f"{'':>8}"
        lines.append(
            f"{result.stage:<28} {score} {result.step:>8,} {result.tokens:>12,} "
            f"{result.seconds:>9.1f}  {result.stopped}"
        )
    return "\n".join(lines)


def _threads(count: int | None) -> None:
    import torch

    if count is not None:
        if count < 1:
            raise ConfigError(f"--threads {count}: at least 1.")
        torch.set_num_threads(count)


@contextmanager
def _progress(shown: bool) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """A bar with the time left on a terminal; elsewhere a line per tenth of a stage, and per
    evaluation.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=0,
        disable=not (shown and on_terminal),
        leave=False,
        bar_format="{n}/{total} {bar:24} {desc}",
    ) as bar:

        def tell(progress: Progress) -> None:
            text = (
                f"{progress.outcome.source}: loss {progress.outcome.losses['loss']:.3f}, "
                f"{progress.tokens_per_second:,.0f} tokens/s, "
                f"{_duration(progress.seconds_left)} left"
            )
            scored = progress.scores is not None and "score" in progress.scores
            if on_terminal:
                bar.total, bar.n = progress.steps, progress.step
                bar.set_description_str(text)
            elif scored or progress.step % max(1, progress.steps // 10) == 0:
                score = (
                    f", dev {progress.scores['score']:.4f}"
                    if scored and progress.scores is not None
                    else ""
                )
                print(
                    f"  step {progress.step} of {progress.steps}: {text}{score}",
                    file=sys.stderr,
                    flush=True,
                )

        def say(line: str) -> None:
            if shown:
                tqdm.write(line, file=sys.stderr)

        yield tell, say


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )


if __name__ == "__main__":
    sys.exit(main())
