"""Runs a recipe, stage by stage.

OUT/recipe.json          the whole recipe as it was read
OUT/1-adaptation/        a run folder per stage (egemma_train.loop)
OUT/model/               the last stage's model
OUT/report.json          every stage's result
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from egemma_core.checkpoint import open_checkpoint
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.prompts import EMBEDDING_GEMMA, Prompts
from egemma_core.tokens import tokenizer_of
from egemma_train.checkpoints import publish
from egemma_train.curves import draw
from egemma_train.data.batches import Batches, BatchesAhead, rates_of
from egemma_train.data.rows import Dataset, DatasetConfig, read_dataset
from egemma_train.data.texts import hold_out_texts, read_texts
from egemma_train.evaluate import DevSets
from egemma_train.loop import Finished, Objective, Tell, run
from egemma_train.mixtures.rates import TOLERANCE, Rates, RateSearch, distance
from egemma_train.mixtures.soup import soup
from egemma_train.objectives.contrast import Contrast, Matching
from egemma_train.objectives.denoise import DenoisingObjective, LanguageModelObjective
from egemma_train.ranks import ALONE, Ranks
from egemma_train.recipe import TEXT_FIELDS, Recipe, Stage, TeacherConfig, ThroughOf
from egemma_train.start.decoder import random_encoder, read_decoder
from egemma_train.start.vocabulary import train_vocabulary
from egemma_train.teachers.teacher import TeacherSpace, open_teacher
from egemma_train.teachers.teacher_cache import CachedTeacher


@dataclass(frozen=True, kw_only=True)
class StageResult:
    stage: str
    model: str
    scores: dict[str, float]
    step: int
    stopped: str
    seconds: float
    tokens: int
    mixtures: list[dict[str, Any]] = field(default_factory=list)  # rates and score of each run
    # how many queries and documents of each dev set were used, of how many
    dev: dict[str, dict[str, int]] = field(default_factory=dict)


class Runner:
    """Runs a recipe, stage by stage. Run again after it was killed, it goes on where it was.

    Args:
        through_of: makes quantization-aware contexts of a scheme's name; `egemma_quant` brings it.
            None refuses such stages.
        shard: divide encoder, gradient and moments among the processes in contrast stages; in the
            others each has all of them.
        tell: hears of every step.
        say: hears of every stage, once.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        ranks: Ranks = ALONE,
        shard: bool = False,
        through_of: ThroughOf | None = None,
        tell: Tell = lambda progress: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if shard and ranks.count == 1:
            raise ConfigError(
                "--shard divides a model among processes, and there is one. Start several with "
                "torchrun --nproc-per-node N, or leave it out."
            )
        wanting = [stage.name for stage in recipe.stages if stage.scheme is not None]
        if wanting and through_of is None:
            raise ConfigError(
                f"stage {wanting[0]!r} is quantization-aware: run the recipe with egemma-train, "
                "which brings egemma_quant."
            )
        self.recipe, self.out, self.ranks, self.shard, self.through_of, self.tell, self.say = (
            recipe,
            out,
            ranks,
            shard,
            through_of,
            tell,
            say,
        )
        self._read: dict[str, Dataset] = {}
        self._dev: dict[str, dict[str, int]] = {}

    def run(self) -> list[StageResult]:
        """Every stage's result. The last model lies in OUT/model.

        Raises:
            EgemmaError: what a stage raises; earlier stages stay as they are.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.ranks.of_first(self._keep_recipe)
        results: list[StageResult] = []
        model: Path | None = None
        for number, stage in enumerate(self.recipe.stages, start=1):
            folder = self.out / f"{number}-{stage.name}"
            whole = self.shard and stage.kind != "contrast"
            note = ", whole in each process" if whole else ""
            self.say(f"{number} of {len(self.recipe.stages)}: {stage.name}{note}")
            before = None if stage.init == "start" else model
            result = (
                self._mixtures(stage, folder, before)
                if stage.mixtures
                else self._once(stage, folder, before)
            )
            model = Path(result.model)
            results.append(result)
        assert model is not None
        if self.ranks.first:
            scratch = self.out / ".model"
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(model, scratch)
            shutil.rmtree(self.out / "model", ignore_errors=True)
            publish(scratch, self.out / "model")
            _write(
                self.out / "report.json",
                {"recipe": self.recipe.name, "stages": [asdict(result) for result in results]},
            )
        self.ranks.agree(None)
        return results

    def _keep_recipe(self) -> None:
        path, asked = (
            self.out / "recipe.json",
            json.loads(json.dumps(asdict(self.recipe), default=str)),
        )
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != asked:
                raise ConfigError(
                    f"{self.out} holds a run of another recipe, or of this one before it was "
                    "changed. Give another --out, or remove that folder."
                )
        elif any(not found.name.startswith(".") for found in self.out.iterdir()):
            raise ConfigError(f"{self.out} is not empty and holds no run. Give another --out.")
        else:
            _write(path, asked)

    def _once(self, stage: Stage, folder: Path, before: Path | None) -> StageResult:
        finished = self._train(stage, folder, before, None)
        return StageResult(
            stage=stage.name,
            model=str(finished.model),
            scores=finished.scores,
            step=finished.step,
            stopped=finished.stopped,
            seconds=finished.seconds,
            tokens=finished.tokens,
            dev=self._dev if stage.kind == "contrast" else {},
        )

    def _mixtures(self, stage: Stage, folder: Path, before: Path | None) -> StageResult:
        """One run per mixture, the best ones averaged, and the average scored beside them."""
        assert stage.mixtures is not None
        datasets = self._datasets(stage)
        names = [dataset.name for dataset in datasets]
        own = (
            [rates_of(datasets, "rates")]
            if all(dataset.config.rate is not None for dataset in datasets)
            else []
        )
        search = RateSearch(
            names,
            folder / "mixtures.jsonl",
            seed=stage.batches.seed if stage.batches else 0,
            first=stage.mixtures.seeds or own,
            random=stage.mixtures.random,
            concentration=stage.mixtures.concentration,
        )
        runs: list[tuple[Rates, Finished]] = []
        while len(runs) < stage.mixtures.trials:
            done = search.history()
            rates = (
                done[len(runs)].rates
                if len(runs) < len(done)
                else self.ranks.agree(search.propose())
            )
            self.say(
                f"  mixture {len(runs) + 1} of {stage.mixtures.trials}: "
                f"{', '.join(f'{name} {rate:.2f}' for name, rate in rates.items())}"
            )
            finished = self._train(stage, folder / f"mixture-{len(runs) + 1:02d}", before, rates)
            if "score" not in finished.scores:
                raise ConfigError(
                    f"stage {stage.name!r} searches mixtures and has no dev set to score them on. "
                    "Add a table [dev.NAME]."
                )
            if len(runs) >= len(done) and self.ranks.first:
                search.tell(rates, finished.scores["score"])
            self.ranks.agree(None)
            runs.append((rates, finished))
        best: list[int] = []
        for scored in search.best(stage.mixtures.best):  # each mixture unlike those before it
            index = next(
                index
                for index, (rates, _) in enumerate(runs)
                if distance(rates, scored.rates) <= TOLERANCE
            )
            # a dataset with a rate near 0 may never have been drawn
            if all(
                _weights(runs[index][1].model) != _weights(runs[other][1].model) for other in best
            ):
                best.append(index)
        if not (folder / "model").exists():
            self.ranks.of_first(
                lambda: soup([runs[index][1].model for index in best], folder / "model")
            )
        encoder, tokenizer_path, prompts = self._load(folder / "model")
        scores = self.ranks.agree(
            self._contrast(stage, encoder, tokenizer_path, prompts, None).evaluate()
        )
        mixtures = [
            {
                "rates": rates,
                "scores": finished.scores,
                "in_soup": index in best,
                "model": str(finished.model),
            }
            for index, (rates, finished) in enumerate(runs)
        ]
        return StageResult(
            stage=stage.name,
            model=str(folder / "model"),
            scores=scores,
            step=stage.loop.steps,
            mixtures=mixtures,
            stopped=f"the average of {len(best)} of {len(runs)} "
            f"runs{'' if len(best) == stage.mixtures.best else ', no more were unlike each other'}",
            seconds=sum(run.seconds for _, run in runs),
            tokens=sum(run.tokens for _, run in runs),
            dev=self._dev,
        )

    def _train(
        self, stage: Stage, folder: Path, before: Path | None, rates: Rates | None
    ) -> Finished:
        encoder, tokenizer_path, prompts = self._load(before)
        described = {
            "stage": json.loads(json.dumps(asdict(stage), default=str)),
            "before": None if before is None else str(before.relative_to(self.out)),
            "rates": rates,
        }
        described["stage"].pop("loop")
        if stage.kind == "contrast":
            objective: Objective = self._contrast(stage, encoder, tokenizer_path, prompts, rates)
            with cast(BatchesAhead, cast(Contrast, objective).batches):
                return run(
                    objective,
                    stage.loop,
                    folder,
                    described,
                    ranks=self.ranks,
                    tell=self.tell,
                    draw=draw,
                )
        return run(
            self._texts_objective(stage, encoder, tokenizer_path, prompts),
            stage.loop,
            folder,
            described,
            ranks=self.ranks,
            tell=self.tell,
            draw=draw,
        )

    def _texts_objective(
        self, stage: Stage, encoder: Encoder, tokenizer_path: Path, prompts: Prompts
    ) -> Objective:
        assert stage.texts is not None
        texts = self._texts(stage)
        dev: list[str] = []
        if stage.dev_one_in is not None:
            texts, dev = hold_out_texts(texts, stage.dev_one_in)
        if stage.kind == "language-model":
            return LanguageModelObjective(
                encoder,
                texts,
                stage.texts,
                tokenizer_path=tokenizer_path,
                dev=dev,
                ranks=self.ranks,
            )
        return DenoisingObjective(
            encoder,
            texts,
            stage.texts,
            tokenizer_path=tokenizer_path,
            prompts=prompts,
            dev=dev,
            cross=stage.cross,
            cross_steps=stage.cross_steps,
            ranks=self.ranks,
        )

    def _contrast(
        self,
        stage: Stage,
        encoder: Encoder,
        tokenizer_path: Path,
        prompts: Prompts,
        rates: Rates | None,
    ) -> Contrast:
        assert stage.batches is not None
        datasets, config = self._datasets(stage), stage.batches
        if rates is not None:
            datasets = [
                replace(dataset, config=replace(dataset.config, rate=rates[dataset.name]))
                for dataset in datasets
            ]
            config = replace(config, sampling="rates")
        if self.shard:
            self.ranks.shard(encoder)
        tokenizer = tokenizer_of(tokenizer_path, encoder.config)
        dev = (
            DevSets(
                self.recipe.dev,
                self.recipe.folder,
                tokenizer,
                prompts,
                precision=stage.loss.precision,
            )
            if self.recipe.dev
            else None
        )
        self._dev = dev.described() if dev is not None else {}
        options: dict[str, Any] = (
            {}
            if stage.scheme is None or self.through_of is None
            else {"through": self.through_of(stage.scheme, stage.activations)}
        )
        return Contrast(
            encoder,
            BatchesAhead(Batches(datasets, tokenizer, prompts, config)),
            stage.loss,
            tokenizer_path=tokenizer_path,
            prompts=prompts,
            dev=dev,
            matching=self._matching(stage.teacher, encoder, datasets),
            ranks=self.ranks,
            **options,
        )

    def _matching(
        self, config: TeacherConfig | None, encoder: Encoder, datasets: Sequence[Dataset]
    ) -> Matching | None:
        if config is None:
            return None
        teacher = CachedTeacher(
            open_teacher(
                config.model,
                query_prompt=config.query_prompt,
                document_prompt=config.document_prompt,
                query_prompt_name=config.query_prompt_name,
                document_prompt_name=config.document_prompt_name,
                device=self.ranks.device.type,
            ),
            self.out / config.cache,
        )
        for dataset in datasets if self.ranks.first else ():
            documents = [
                text
                for row in dataset.rows
                for text in (
                    _titled(row.title, row.positive),
                    *map(
                        _titled, row.negative_titles or [None] * len(row.negatives), row.negatives
                    ),
                )
            ]
            teacher.fill(
                "query",
                [row.query for row in dataset.rows] + (documents if dataset.symmetric else []),
            )
            if not dataset.symmetric:
                teacher.fill("document", documents)
        self.ranks.agree(None)
        return Matching(
            teacher,
            TeacherSpace(encoder.config.dims[0], teacher.dim, config.match).to(self.ranks.device),
        )

    def _load(self, model: Path | None) -> tuple[Encoder, Path, Prompts]:
        """The encoder to train, float32 on the run's device, the tokenizer's file and the
        prompts.
        """
        start = self.recipe.start
        # what a language-model stage wrote: a decoder
        if model is not None and not (model / "modules.json").is_file():
            if start.head is None:
                raise ConfigError(
                    f"{model} is a decoder, and [start] has no head to put behind it."
                )
            encoder, path, prompts = read_decoder(model, start.head)
        elif model is not None or start.model is not None:
            checkpoint = open_checkpoint(str(model or start.model))
            encoder, path, prompts = (
                load_encoder(checkpoint),
                checkpoint.tokenizer_path,
                checkpoint.prompts,
            )
        elif start.decoder is not None:
            assert start.head is not None
            encoder, path, prompts = read_decoder(Path(start.decoder), start.head)
        else:
            encoder, path, prompts = self._random()
        return encoder.requires_grad_().to(self.ranks.device), path, prompts

    def _random(self) -> tuple[Encoder, Path, Prompts]:
        shape, head = self.recipe.start.shape, self.recipe.start.head
        assert shape is not None
        assert head is not None
        path = self.out / "tokenizer.model"
        if shape.tokenizer is not None:
            path = Path(shape.tokenizer)
        elif not path.exists() and self.ranks.first:
            assert shape.pieces is not None
            scratch = path.with_name(".tokenizer.model")
            train_vocabulary(self._texts(None), shape.pieces, scratch, spare=200)
            scratch.rename(path)
        self.ranks.agree(None)
        vocab_size = pieces_in(path)
        return (
            random_encoder(shape.config(vocab_size, head.dims, head.pooling), head.seed),
            path,
            EMBEDDING_GEMMA,
        )

    def _datasets(self, stage: Stage) -> list[Dataset]:
        return [
            self._dataset(config)
            for config in self.recipe.data
            if stage.datasets is None or config.name in stage.datasets
        ]

    def _dataset(self, config: DatasetConfig) -> Dataset:
        if config.name not in self._read:
            self._read[config.name] = found = read_dataset(config, self.recipe.folder)
            for reason, count in found.dropped.items():
                self.say(f"  {config.name}: {count:,} rows left out: {reason}")
        return self._read[config.name]

    def _texts(self, stage: Stage | None) -> list[str]:
        wanted = [
            config
            for config in self.recipe.data
            if stage is None or stage.datasets is None or config.name in stage.datasets
        ]
        paths = [
            path
            for config in wanted
            for pattern in config.path
            for path in sorted(self.recipe.folder.glob(pattern))
        ]
        if not paths:
            raise ConfigError(
                f"no file matches {[pattern for config in wanted for pattern in config.path]} in "
                f"{self.recipe.folder}."
            )
        return read_texts(paths, TEXT_FIELDS)


def _weights(model: Path) -> dict[str, str]:
    return dict(open_checkpoint(model).weight_hashes())


def pieces_in(path: Path) -> int:
    import sentencepiece

    try:
        return int(
            sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()).get_piece_size()
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable SentencePiece model ({error}).") from error


def _titled(title: str | None, text: str) -> str:
    return f"{title}\n{text}" if title else text


def _write(path: Path, content: Any) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
