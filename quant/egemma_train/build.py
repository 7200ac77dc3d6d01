"""A stage of a recipe as objects: the encoder that it starts from, its data and its objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from egemma_core.checkpoint.folder import open_checkpoint, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_quant.schemes import scheme_named
from egemma_train.data.batches import Batches, BatchesAhead
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import Dataset, DatasetConfig, with_title
from egemma_train.data.texts import hold_out_texts, read_texts
from egemma_train.evaluate import DevSets
from egemma_train.loop import Objective
from egemma_train.mixtures.rates import Rates
from egemma_train.objectives.contrast import Contrast, Matching
from egemma_train.objectives.denoise import DenoisingObjective
from egemma_train.objectives.language_model import LanguageModelObjective
from egemma_train.ranks import Ranks
from egemma_train.recipe import TEXT_FIELDS, Recipe, Stage, TeacherConfig
from egemma_train.start.decoder import random_encoder, read_decoder
from egemma_train.start.vocabulary import train_vocabulary
from egemma_train.teachers.sources import open_teacher
from egemma_train.teachers.space import TeacherSpace
from egemma_train.teachers.teacher_cache import CachedTeacher

SPARE_PIECES = 200  # <unusedN> pieces of a vocabulary of our own, for denoising


class Loaded(NamedTuple):
    """An encoder, the file of its tokenizer, and its prompts."""

    encoder: Encoder
    tokenizer_path: Path
    prompts: Prompts

    def tokenizer(self) -> Tokenizer:
        """Return the encoder's tokenizer."""
        return tokenizer_of(self.tokenizer_path, self.encoder.config)


class Builder:
    """Builds what the stages of one run train. Datasets are read once.

    Args:
        out: the folder of the run.
        shard: divide the encoder among the processes in contrast stages.
        on_message: called with each line that a user should read.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        ranks: Ranks,
        shard: bool,
        on_message: Callable[[str], None],
    ) -> None:
        self.recipe, self.out = recipe, out
        self.ranks, self.shard, self.on_message = ranks, shard, on_message
        self._read: dict[str, Dataset] = {}

    def load(self, model: Path | None) -> Loaded:
        """Return the encoder to train, float32 on the run's device.

        Args:
            model: the folder of the model before; None for what the recipe starts from.
        """
        loaded = self._start() if model is None else self._before(model)
        return loaded._replace(encoder=loaded.encoder.requires_grad_().to(self.ranks.device))

    def datasets(self, stage: Stage) -> list[Dataset]:
        """Return the datasets of a stage, with all their rows."""
        return [self._dataset(config) for config in self._configs(stage)]

    @contextmanager
    def objective(
        self, stage: Stage, model: Path | None, rates: Rates | None = None
    ) -> Iterator[Objective]:
        """Give the objective of a stage, whose batches are made ahead until the block ends.

        Args:
            model: the folder of the model before; None for what the recipe starts from.
            rates: the mixture of the datasets; None for what the stage says.
        """
        loaded = self.load(model)
        if stage.kind == "contrast":
            with self._contrast(stage, loaded, rates) as contrast:
                yield contrast
        else:
            yield self._over_texts(stage, loaded)

    @contextmanager
    def _contrast(self, stage: Stage, loaded: Loaded, rates: Rates | None) -> Iterator[Contrast]:
        assert stage.batches is not None
        datasets, config = self.datasets(stage), stage.batches
        if rates is not None:
            datasets = [
                replace(dataset, config=replace(dataset.config, rate=rates[dataset.name]))
                for dataset in datasets
            ]
            config = replace(config, sampling="rates")
        if self.shard:
            self.ranks.shard(loaded.encoder)
        batches = Batches(datasets, loaded.tokenizer(), loaded.prompts, config)
        with BatchesAhead(batches) as ahead:
            yield Contrast(
                loaded.encoder,
                ahead,
                stage.loss,
                tokenizer_path=loaded.tokenizer_path,
                prompts=loaded.prompts,
                dev=self._dev_sets(stage, loaded),
                matching=self._matching(stage.teacher, loaded.encoder, datasets),
                scheme=None if stage.scheme is None else scheme_named(stage.scheme),
                activations=stage.activations,
                ranks=self.ranks,
            )

    def _over_texts(self, stage: Stage, loaded: Loaded) -> Objective:
        assert stage.texts is not None
        texts = self._texts(self._configs(stage))
        dev: list[str] = []
        if stage.dev_one_in is not None:
            texts, dev = hold_out_texts(texts, stage.dev_one_in)
        if stage.kind == "language-model":
            return LanguageModelObjective(
                loaded.encoder,
                texts,
                stage.texts,
                tokenizer_path=loaded.tokenizer_path,
                dev=dev,
                ranks=self.ranks,
            )
        return DenoisingObjective(
            loaded.encoder,
            texts,
            stage.texts,
            tokenizer_path=loaded.tokenizer_path,
            prompts=loaded.prompts,
            dev=dev,
            cross=stage.cross,
            cross_steps=stage.cross_steps,
            ranks=self.ranks,
        )

    def _dev_sets(self, stage: Stage, loaded: Loaded) -> DevSets | None:
        if not self.recipe.dev:
            return None
        return DevSets(
            self.recipe.dev,
            self.recipe.folder,
            loaded.tokenizer(),
            loaded.prompts,
            precision=stage.loss.precision,
        )

    def _matching(
        self, config: TeacherConfig | None, encoder: Encoder, datasets: Sequence[Dataset]
    ) -> Matching | None:
        """Return a stage's teacher, once it has embedded all texts that the stage will ask for."""
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
            queries, documents = [row.query for row in dataset.rows], _documents(dataset)
            if dataset.symmetric:
                teacher.fill("query", queries + documents)
            else:
                teacher.fill("query", queries)
                teacher.fill("document", documents)
        self.ranks.agree(None)
        space = TeacherSpace(encoder.config.dims[0], teacher.dim, config.match)
        return Matching(teacher, space.to(self.ranks.device))

    def _before(self, model: Path) -> Loaded:
        """Return the model that the stage before wrote."""
        if (model / "modules.json").is_file():
            return _checkpoint(str(model))
        # a language-model stage writes a decoder
        if self.recipe.start.head is None:
            raise ConfigError(f"{model} is a decoder, and [start] has no head to put behind it.")
        return Loaded(*read_decoder(model, self.recipe.start.head))

    def _start(self) -> Loaded:
        """Return the model that the recipe starts from."""
        start = self.recipe.start
        if start.model is not None:
            return _checkpoint(start.model)
        assert start.head is not None
        if start.decoder is not None:
            return Loaded(*read_decoder(Path(start.decoder), start.head))
        assert start.shape is not None
        if start.shape.tokenizer is not None:
            path = Path(start.shape.tokenizer)
        else:
            path = self._own_tokenizer(start.shape.pieces)
        config = start.shape.config(pieces_in(path), start.head.dims, start.head.pooling)
        return Loaded(random_encoder(config, start.head.seed), path, EMBEDDING_GEMMA)

    def _own_tokenizer(self, pieces: int | None) -> Path:
        """Return the vocabulary that is made of all texts of the recipe, once."""
        assert pieces is not None
        path = self.out / "tokenizer.model"
        if self.ranks.first and not path.exists():
            train_vocabulary(self._texts(self.recipe.data), pieces, path, spare=SPARE_PIECES)
        self.ranks.agree(None)
        return path

    def _configs(self, stage: Stage) -> list[DatasetConfig]:
        return [
            config
            for config in self.recipe.data
            if stage.datasets is None or config.name in stage.datasets
        ]

    def _dataset(self, config: DatasetConfig) -> Dataset:
        if config.name not in self._read:
            self._read[config.name] = found = read_dataset(config, self.recipe.folder)
            for reason, count in found.dropped.items():
                self.on_message(f"  {config.name}: {count:,} rows left out: {reason}")
        return self._read[config.name]

    def _texts(self, configs: Sequence[DatasetConfig]) -> list[str]:
        patterns = [pattern for config in configs for pattern in config.path]
        folder = self.recipe.folder
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        if not paths:
            raise ConfigError(f"no file matches {patterns} in {folder}.")
        return read_texts(paths, TEXT_FIELDS)


def pieces_in(path: Path) -> int:
    """Return how many pieces a SentencePiece model has.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        return int(model.get_piece_size())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable SentencePiece model ({error}).") from error


def _checkpoint(model: str) -> Loaded:
    checkpoint = open_checkpoint(model)
    return Loaded(load_encoder(checkpoint), checkpoint.tokenizer_path, checkpoint.prompts)


def _documents(dataset: Dataset) -> list[str]:
    """Return the positives and negatives of a dataset, as a teacher reads them."""
    found = []
    for row in dataset.rows:
        found.append(with_title(row.title, row.positive))
        titles = row.negative_titles or [None] * len(row.negatives)
        found += map(with_title, titles, row.negatives)
    return found
