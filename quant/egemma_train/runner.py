"""A recipe, run stage by stage.

OUT/recipe.json          the whole recipe as it was read
OUT/1-adaptation/        a run folder per stage (egemma_train.run_folder)
OUT/model/               the last stage's model
OUT/report.json          every stage's result
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from egemma_core.errors import ConfigError
from egemma_core.files import publish_folder, write_json
from egemma_train.build import Builder
from egemma_train.loop import Progress
from egemma_train.mixtures.stage import train_mixtures
from egemma_train.ranks import ALONE, Ranks
from egemma_train.recipe import Recipe
from egemma_train.stage import StageResult, train_stage


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    ranks: Ranks = ALONE,
    shard: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_message: Callable[[str], None] = lambda line: None,
) -> list[StageResult]:
    """Run all stages of a recipe, and return their results. The last model lies in OUT/model.

    A run that was killed goes on where it was when it is started again.

    Args:
        shard: divide encoder, gradient and moments among the processes in contrast stages; in the
            others each has all of them.
        on_step: called after every step.
        on_message: called with a line at the start of every stage.

    Raises:
        ConfigError: `out` holds another run, or `shard` is set for one process.
        EgemmaError: a stage failed; earlier stages stay as they are.
    """
    if shard and ranks.count == 1:
        raise ConfigError(
            "--shard divides a model among processes, and there is one.",
            hint="Start several with torchrun --nproc-per-node N, or leave it out.",
        )
    out.mkdir(parents=True, exist_ok=True)
    ranks.of_first(lambda: _claim(out, recipe))
    builder = Builder(recipe, out, ranks=ranks, shard=shard, on_message=on_message)
    results: list[StageResult] = []
    model: Path | None = None
    for number, stage in enumerate(recipe.stages, start=1):
        note = ", whole in each process" if shard and stage.kind != "contrast" else ""
        on_message(f"{number} of {len(recipe.stages)}: {stage.name}{note}")
        train = train_mixtures if stage.mixtures else train_stage
        before = None if stage.init == "start" else model
        result = train(builder, stage, out / f"{number}-{stage.name}", before, on_step)
        model = Path(result.model)
        results.append(result)
    assert model is not None
    if ranks.first:
        _publish(out, recipe, model, results)
    ranks.agree(None)
    return results


def _claim(out: Path, recipe: Recipe) -> None:
    """Write the recipe into the folder of a new run, or check that the folder holds its run."""
    path, asked = out / "recipe.json", json.loads(json.dumps(asdict(recipe), default=str))
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != asked:
            raise ConfigError(
                f"{out} holds a run of another recipe, or of this one before it was changed.",
                hint="Give another --out, or remove that folder.",
            )
    elif any(not found.name.startswith(".") for found in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no run.", hint="Give another --out.")
    else:
        write_json(path, asked)


def _publish(out: Path, recipe: Recipe, model: Path, results: list[StageResult]) -> None:
    """Copy the last model to OUT/model, and write the report after it."""
    scratch = out / ".model"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(model, scratch)
    shutil.rmtree(out / "model", ignore_errors=True)
    publish_folder(scratch, out / "model")
    report = {"recipe": recipe.name, "stages": [asdict(result) for result in results]}
    write_json(out / "report.json", report)
