"""A stage that is run once per mixture of its datasets; the best runs are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import ConfigError
from egemma_train.build import Builder
from egemma_train.data.batches import rates_of
from egemma_train.mixtures.rates import TOLERANCE, Rates, RateSearch, Scored, distance
from egemma_train.mixtures.soup import soup
from egemma_train.recipe import Stage
from egemma_train.run_folder import Finished
from egemma_train.stage import DevFacts, OnStep, StageResult, train

Run = tuple[Rates, Finished]


def train_mixtures(
    builder: Builder, stage: Stage, folder: Path, before: Path | None, on_step: OnStep
) -> StageResult:
    """Train one run per mixture, average the best ones, and score the average.

    Args:
        folder: where the runs lie; those that are there go on.
        before: the model of the stage before; None for what the recipe starts from.
    """
    assert stage.mixtures is not None
    search = _search(builder, stage, folder)
    runs, dev = _trained(builder, stage, folder, before, on_step, search)
    best = _best(runs, search.best(stage.mixtures.best))
    model = folder / "model"
    if not model.exists():
        builder.ranks.of_first(lambda: soup([runs[index][1].model for index in best], model))
    with builder.objective(stage, model) as objective:
        scores = builder.ranks.agree(objective.evaluate())
    fewer = "" if len(best) == stage.mixtures.best else ", no more were unlike each other"
    return StageResult(
        stage=stage.name,
        model=str(model),
        scores=scores,
        step=stage.loop.steps,
        mixtures=[
            {
                "rates": rates,
                "scores": finished.scores,
                "in_soup": index in best,
                "model": str(finished.model),
            }
            for index, (rates, finished) in enumerate(runs)
        ],
        stopped=f"the average of {len(best)} of {len(runs)} runs{fewer}",
        seconds=sum(finished.seconds for _, finished in runs),
        tokens=sum(finished.tokens for _, finished in runs),
        dev=dev,
    )


def _search(builder: Builder, stage: Stage, folder: Path) -> RateSearch:
    """Return the search over mixtures, which begins with those that the recipe names."""
    assert stage.mixtures is not None
    datasets = builder.datasets(stage)
    own: list[Rates] = []
    if all(dataset.config.rate is not None for dataset in datasets):
        own = [rates_of(datasets, "rates")]
    return RateSearch(
        [dataset.name for dataset in datasets],
        folder / "mixtures.jsonl",
        seed=stage.batches.seed if stage.batches else 0,
        first=stage.mixtures.seeds or own,
        random=stage.mixtures.random,
        concentration=stage.mixtures.concentration,
    )


def _trained(
    builder: Builder,
    stage: Stage,
    folder: Path,
    before: Path | None,
    on_step: OnStep,
    search: RateSearch,
) -> tuple[list[Run], DevFacts]:
    """Train all mixtures, the known ones first, and record the scores of the new ones."""
    assert stage.mixtures is not None
    runs: list[Run] = []
    dev: DevFacts = {}
    for number in range(1, stage.mixtures.trials + 1):
        known = search.history()
        is_new = len(known) < number
        rates = builder.ranks.agree(search.propose()) if is_new else known[number - 1].rates
        shares = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        builder.on_message(f"  mixture {number} of {stage.mixtures.trials}: {shares}")
        place = folder / f"mixture-{number:02d}"
        finished, dev = train(builder, stage, place, before, on_step, rates)
        if "score" not in finished.scores:
            raise ConfigError(
                f"stage {stage.name!r} searches mixtures and has no dev set to score them on.",
                hint="Add a table [dev.NAME].",
            )
        if is_new and builder.ranks.first:
            search.record(rates, finished.scores["score"])
        builder.ranks.agree(None)
        runs.append((rates, finished))
    return runs, dev


def _best(runs: Sequence[Run], best: Sequence[Scored]) -> list[int]:
    """Return the numbers of the runs of the best mixtures, each unlike those before it.

    A dataset with a rate near 0 may never have been drawn, so that two runs have the same weights;
    only the better one counts.
    """
    chosen: dict[int, object] = {}  # the weights of each
    for scored in best:
        index = next(
            index
            for index, (rates, _) in enumerate(runs)
            if distance(rates, scored.rates) <= TOLERANCE
        )
        weights = open_checkpoint(runs[index][1].model).weight_hashes()
        if weights not in chosen.values():
            chosen[index] = weights
    return list(chosen)
