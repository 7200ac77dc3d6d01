"""One stage of a recipe, trained in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from egemma_train.build import Builder
from egemma_train.curves import draw
from egemma_train.loop import Progress, run
from egemma_train.mixtures.rates import Rates
from egemma_train.objectives.contrast import Contrast
from egemma_train.recipe import Stage
from egemma_train.run_folder import Finished

DevFacts = dict[str, dict[str, int]]  # how much of each dev set was used; see DevSets.described
OnStep = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage."""

    stage: str
    model: str
    scores: dict[str, float]
    step: int
    stopped: str
    seconds: float
    tokens: int
    mixtures: list[dict[str, Any]] = field(default_factory=list)  # rates and score of each run
    # how many queries and documents of each dev set were used, of how many
    dev: DevFacts = field(default_factory=dict)


def train_stage(
    builder: Builder, stage: Stage, folder: Path, before: Path | None, on_step: OnStep
) -> StageResult:
    """Train a stage once.

    Args:
        folder: where the run lies; one that is there goes on.
        before: the model of the stage before; None for what the recipe starts from.
    """
    finished, dev = train(builder, stage, folder, before, on_step)
    return StageResult(
        stage=stage.name,
        model=str(finished.model),
        scores=finished.scores,
        step=finished.step,
        stopped=finished.stopped,
        seconds=finished.seconds,
        tokens=finished.tokens,
        dev=dev,
    )


def train(
    builder: Builder,
    stage: Stage,
    folder: Path,
    before: Path | None,
    on_step: OnStep,
    rates: Rates | None = None,
) -> tuple[Finished, DevFacts]:
    """Train a stage with one mixture of its datasets; return the result and what was scored on.

    Args:
        rates: the mixture; None for what the stage says.
    """
    settings = json.loads(json.dumps(asdict(stage), default=str))
    settings.pop("loop")  # the loop describes it by itself
    described = {
        "stage": settings,
        "before": None if before is None else str(before.relative_to(builder.out)),
        "rates": rates,
    }
    with builder.objective(stage, before, rates) as objective:
        finished = run(
            objective,
            stage.loop,
            folder,
            described,
            ranks=builder.ranks,
            on_step=on_step,
            draw=draw,
        )
        dev = objective.dev if isinstance(objective, Contrast) else None
        return finished, {} if dev is None else dev.described()
