"""A recipe: data, dev sets and stages in one TOML file, run in order from one command, each stage on the model of the one before.

    OUT/recipe.json          the whole recipe as it was read
    OUT/1-adaptation/        a run folder per stage (egemma_core.train.loop)
    OUT/model/               the last stage's model
    OUT/report.json          every stage's result

The format is described for users in docs/training.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from egemma_core.checkpoint import open_checkpoint
from egemma_core.config import FULL, EncoderConfig
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.encoder_decoder import CrossInit
from egemma_core.nn.load import load_encoder
from egemma_core.prompts import EMBEDDING_GEMMA, Prompts
from egemma_core.tokens import Tokenizer
from egemma_core.train.batches import BatchConfig, Batches, BatchesAhead, rates_of
from egemma_core.train.checkpoints import publish
from egemma_core.train.contrast import Contrast, ContrastConfig, Matching, Through
from egemma_core.train.curves import draw
from egemma_core.train.decoder import HeadConfig, random_encoder, read_decoder
from egemma_core.train.denoise import DenoisingObjective, LanguageModelObjective
from egemma_core.train.evaluate import DevConfig, DevSets
from egemma_core.train.loop import Finished, LoopConfig, Objective, Tell, run
from egemma_core.train.ranks import ALONE, Ranks
from egemma_core.train.rates import TOLERANCE, Rates, RateSearch, distance
from egemma_core.train.rows import Dataset, DatasetConfig, read_dataset
from egemma_core.train.soup import soup
from egemma_core.train.tables import check_keys, read_table
from egemma_core.train.teacher import Match, TeacherSpace, open_teacher
from egemma_core.train.teacher_cache import CachedTeacher
from egemma_core.train.texts import TextConfig, hold_out_texts, read_texts
from egemma_core.train.vocabulary import train_vocabulary

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["language-model", "denoise", "contrast"]
ThroughOf = Callable[[str, bool], Through]   # scheme, whether activations are rounded too
TEXT_FIELDS = ("query", "positive", "negative", "text", "a", "b")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model that starts from nothing. What is not said here is as in EmbeddingGemma."""

    tokenizer: str | None = None            # a SentencePiece model; None to make one of `pieces` from the recipe's texts
    pieces: int | None = None
    width: int = 768
    ffn_width: int = 1152
    layers: int = 24
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 256
    window: int = 256                       # tokens to each side, in sliding layers
    full_every: int = 6                     # every so many layers see everything
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.pieces is None):
            raise ConfigError(f"tokenizer={self.tokenizer!r}, pieces={self.pieces!r}: give one, a file or how many pieces are to be made.")

    def config(self, vocab_size: int, dims: tuple[int, ...], pooling: str) -> EncoderConfig:
        kinds = tuple("full_attention" if layer % self.full_every == self.full_every - 1 else "sliding_attention" for layer in range(self.layers))
        kinds = kinds if FULL in kinds else (*kinds[:-1], FULL)
        return EncoderConfig(vocab_size=vocab_size, width=self.width, ffn_width=self.ffn_width, num_layers=self.layers, num_heads=self.heads,
                             num_kv_heads=self.kv_heads, head_dim=self.head_dim, query_scale=self.head_dim**-0.5, norm_eps=1e-6, layer_types=kinds,
                             window=self.window, rope_theta_full=1e6, rope_theta_sliding=1e4, max_tokens=self.max_tokens, bos_id=2, eos_id=1, pad_id=0,
                             pooling=pooling, dense=((self.width, 4 * self.width), (4 * self.width, dims[0])), dims=dims)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the first stage starts from: one of the three."""

    model: str | None = None      # an embedding checkpoint, folder or hub id
    decoder: str | None = None    # a decoder-only Gemma 3 folder
    shape: Shape | None = None    # random
    head: HeadConfig | None = None   # of a decoder or a random model

    def __post_init__(self) -> None:
        given = [name for name in ("model", "decoder", "shape") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"it has {given or 'none'} of model, decoder and shape; give one.")
        if (self.model is None) != (self.head is not None):
            raise ConfigError("a [start.head] belongs to a decoder or a shape, which have none of their own; a model has one.")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Whose vectors are matched."""

    model: str                            # as `open_teacher` takes it: folder, hub id, "egemma:MODEL", FILE.safetensors
    match: Match | None = None            # how widths are brought together; see TeacherSpace
    cache: str = "teacher-cache"          # folder for vectors, inside OUT unless absolute
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    document_prompt_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class MixturesConfig:
    """A stage that is run once per mixture of its datasets; the best runs are averaged."""

    trials: int                          # runs
    random: int = 10                     # of which so many with mixtures drawn at random, before Bayesian optimisation
    concentration: float = 1.0           # Dirichlet
    best: int = 3                        # that go into the soup
    seeds: tuple[dict[str, float], ...] = ()   # mixtures to begin with; none for the datasets' own rates, or even ones

    def __post_init__(self) -> None:
        if not (1 <= self.best <= self.trials and self.random >= 0):
            raise ConfigError(f"trials={self.trials}, best={self.best}, random={self.random}: best lies from 1 to trials, random is not negative.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run, or one per mixture."""

    name: str
    kind: Kind
    loop: LoopConfig
    datasets: tuple[str, ...] | None = None        # None for all of [data]
    init: Literal["before", "start"] = "before"    # weights of the stage before, or of [start]
    texts: TextConfig | None = None                # language-model, denoise
    dev_one_in: int | None = None                  # language-model, denoise: held-out share of the texts
    cross: CrossInit = "balanced"                  # denoise
    cross_steps: int = 0
    batches: BatchConfig | None = None             # contrast
    loss: ContrastConfig = field(default_factory=ContrastConfig)
    teacher: TeacherConfig | None = None
    mixtures: MixturesConfig | None = None
    scheme: str | None = None                      # quantization-aware: int4, int8, int8-per-channel, mixed
    activations: bool = False                      # with `scheme`: round what goes into each product as well

    def __post_init__(self) -> None:
        if self.kind == "contrast" and self.batches is None:
            raise ConfigError("a contrast stage needs a table batches.")
        if self.kind != "contrast":
            wrong = [name for name in ("batches", "teacher", "mixtures", "scheme") if getattr(self, name) is not None]
            if wrong or self.texts is None:
                raise ConfigError(f"a {self.kind} stage has texts, and no {wrong or 'more'}.")
        if self.activations and self.scheme is None:
            raise ConfigError("activations=true without a scheme.")
        if self.scheme is not None and self.loss.precision != "float32":
            raise ConfigError(f"scheme={self.scheme!r} with precision={self.loss.precision!r}: bfloat16 would round the weights once more, and what is trained would not be "
                              "what ships. Leave precision at float32 in this stage.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    start: Start
    data: tuple[DatasetConfig, ...]
    dev: tuple[DevConfig, ...]
    stages: tuple[Stage, ...]
    folder: Path                                   # what paths of data and dev start from


@dataclass(frozen=True, kw_only=True)
class StageResult:
    stage: str
    model: str
    scores: dict[str, float]
    step: int
    stopped: str
    seconds: float
    tokens: int
    mixtures: list[dict[str, Any]] = field(default_factory=list)   # rates and score of each run
    dev: dict[str, dict[str, int]] = field(default_factory=dict)   # how many queries and documents of each dev set were used, of how many


def read_recipe(path: Path, data: Path | None = None) -> Recipe:
    """
    Args:
        data: the folder that holds the data; None for what the file says, starting from where the file is.

    Raises:
        ConfigError: the file cannot be read, or a table in it cannot work; names table and key.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file ({error}).") from error
    try:
        return recipe_of(tree, path.stem, path.parent, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def recipe_of(tree: Mapping[str, Any], name: str, beside: Path, data: Path | None) -> Recipe:
    """A recipe from a parsed file; see `read_recipe`."""
    check_keys(tree, ("folder", "start", "data", "dev", "stages"), "the recipe")
    for key, kind in (("start", dict), ("data", dict), ("stages", list)):
        if not isinstance(tree.get(key), kind) or not tree[key]:
            raise ConfigError(f"it needs {'tables [[stages]]' if key == 'stages' else f'a table [{key}]'}.")
    for key in ("data", "dev"):
        tables = tree.get(key, {})
        wrong = [f"{key}.{name}" for name, table in tables.items() if not isinstance(table, dict)] if isinstance(tables, dict) else [key]
        if wrong:
            raise ConfigError(f"[{wrong[0]}]: not a table.")
    if not isinstance(tree.get("folder", ""), str):
        raise ConfigError(f"folder={tree['folder']!r} is {type(tree['folder']).__name__}, not the path of a folder.")
    start = dict(tree["start"])
    head = {"head": read_table(HeadConfig, start.pop("head"), "[start.head]")} if "head" in start else {}
    shape = {"shape": read_table(Shape, start.pop("shape"), "[start.shape]")} if "shape" in start else {}
    datasets = tuple(DatasetConfig.of(key, table) for key, table in tree["data"].items())
    stages = tuple(_stage(table, f"[[stages]] {index}") for index, table in enumerate(tree["stages"], start=1))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages are named {names}: give each its own name.")
    for stage in stages:
        unknown = set(stage.datasets or ()) - {dataset.name for dataset in datasets}
        if unknown:
            raise ConfigError(f"stage {stage.name!r}: no [data] table is named {sorted(unknown)}; there are {[dataset.name for dataset in datasets]}.")
    return Recipe(name=name, start=_start(start, {**head, **shape}), data=datasets, stages=stages,
                  dev=tuple(read_table(DevConfig, table, f"[dev.{key}]", name=key) for key, table in tree.get("dev", {}).items()),
                  folder=data if data is not None else beside / tree.get("folder", "."))


def _start(table: dict[str, Any], given: dict[str, Any]) -> Start:
    return read_table(Start, table, "[start]", **{"head": None, "shape": None, **given})


def _stage(table: Any, where: str) -> Stage:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: not a table.")
    where = f"{where} ({table.get('name', 'without a name')})"
    kinds: dict[str, type[Any]] = {"loop": LoopConfig, "texts": TextConfig, "batches": BatchConfig, "loss": ContrastConfig, "teacher": TeacherConfig,
                                   "mixtures": MixturesConfig}
    rest = dict(table)
    if "loop" not in rest:
        raise ConfigError(f"{where}: it needs a table loop with its steps.")
    inner = {key: read_table(kind, rest.pop(key), f"{where} {key}") for key, kind in kinds.items() if key in rest}
    return read_table(Stage, rest, where, **inner)


class Runner:
    """Runs a recipe, stage by stage. Run again after it was killed, it goes on where it was.

    Args:
        through_of: makes quantization-aware contexts of a scheme's name; `egemma_quant` brings it. None refuses such stages.
        shard: divide encoder, gradient and moments among the processes in contrast stages; in the others each has all of them.
        tell: hears of every step.
        say: hears of every stage, once.
    """

    def __init__(self, recipe: Recipe, out: Path, *, ranks: Ranks = ALONE, shard: bool = False, through_of: ThroughOf | None = None,
                 tell: Tell = lambda progress: None, say: Callable[[str], None] = lambda line: None) -> None:
        if shard and ranks.count == 1:
            raise ConfigError("--shard divides a model among processes, and there is one. Start several with torchrun --nproc-per-node N, or leave it out.")
        wanting = [stage.name for stage in recipe.stages if stage.scheme is not None]
        if wanting and through_of is None:
            raise ConfigError(f"stage {wanting[0]!r} is quantization-aware: run the recipe with egemma-train, which brings egemma_quant.")
        self.recipe, self.out, self.ranks, self.shard, self.through_of, self.tell, self.say = recipe, out, ranks, shard, through_of, tell, say
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
            self.say(f"{number} of {len(self.recipe.stages)}: {stage.name}{', whole in each process' if self.shard and stage.kind != 'contrast' else ''}")
            before = None if stage.init == "start" else model
            result = self._mixtures(stage, folder, before) if stage.mixtures else self._once(stage, folder, before)
            model = Path(result.model)
            results.append(result)
        assert model is not None
        if self.ranks.first:
            scratch = self.out / ".model"
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(model, scratch)
            shutil.rmtree(self.out / "model", ignore_errors=True)
            publish(scratch, self.out / "model")
            _write(self.out / "report.json", {"recipe": self.recipe.name, "stages": [asdict(result) for result in results]})
        self.ranks.agree(None)
        return results

    def _keep_recipe(self) -> None:
        path, asked = self.out / "recipe.json", json.loads(json.dumps(asdict(self.recipe), default=str))
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != asked:
                raise ConfigError(f"{self.out} holds a run of another recipe, or of this one before it was changed. Give another --out, or remove that folder.")
        elif any(not found.name.startswith(".") for found in self.out.iterdir()):
            raise ConfigError(f"{self.out} is not empty and holds no run. Give another --out.")
        else:
            _write(path, asked)

    def _once(self, stage: Stage, folder: Path, before: Path | None) -> StageResult:
        finished = self._train(stage, folder, before, None)
        return StageResult(stage=stage.name, model=str(finished.model), scores=finished.scores, step=finished.step, stopped=finished.stopped, seconds=finished.seconds,
                           tokens=finished.tokens, dev=self._dev if stage.kind == "contrast" else {})

    def _mixtures(self, stage: Stage, folder: Path, before: Path | None) -> StageResult:
        """One run per mixture, the best ones averaged, and the average scored beside them."""
        assert stage.mixtures is not None
        datasets = self._datasets(stage)
        names = [dataset.name for dataset in datasets]
        own = [rates_of(datasets, "rates")] if all(dataset.config.rate is not None for dataset in datasets) else []
        search = RateSearch(names, folder / "mixtures.jsonl", seed=stage.batches.seed if stage.batches else 0, first=stage.mixtures.seeds or own,
                            random=stage.mixtures.random, concentration=stage.mixtures.concentration)
        runs: list[tuple[Rates, Finished]] = []
        while len(runs) < stage.mixtures.trials:
            done = search.history()
            rates = done[len(runs)].rates if len(runs) < len(done) else self.ranks.agree(search.propose())
            self.say(f"  mixture {len(runs) + 1} of {stage.mixtures.trials}: {', '.join(f'{name} {rate:.2f}' for name, rate in rates.items())}")
            finished = self._train(stage, folder / f"mixture-{len(runs) + 1:02d}", before, rates)
            if "score" not in finished.scores:
                raise ConfigError(f"stage {stage.name!r} searches mixtures and has no dev set to score them on. Add a table [dev.NAME].")
            if len(runs) >= len(done) and self.ranks.first:
                search.tell(rates, finished.scores["score"])
            self.ranks.agree(None)
            runs.append((rates, finished))
        best: list[int] = []
        for scored in search.best(stage.mixtures.best):   # each mixture unlike those before it
            index = next(index for index, (rates, _) in enumerate(runs) if distance(rates, scored.rates) <= TOLERANCE)
            if all(_weights(runs[index][1].model) != _weights(runs[other][1].model) for other in best):   # a dataset with a rate near 0 may never have been drawn
                best.append(index)
        if not (folder / "model").exists():
            self.ranks.of_first(lambda: soup([runs[index][1].model for index in best], folder / "model"))
        encoder, tokenizer_path, prompts = self._load(folder / "model")
        scores = self.ranks.agree(self._contrast(stage, encoder, tokenizer_path, prompts, None).evaluate())
        mixtures = [{"rates": rates, "scores": finished.scores, "in_soup": index in best, "model": str(finished.model)} for index, (rates, finished) in enumerate(runs)]
        return StageResult(stage=stage.name, model=str(folder / "model"), scores=scores, step=stage.loop.steps, mixtures=mixtures,
                           stopped=f"the average of {len(best)} of {len(runs)} runs{'' if len(best) == stage.mixtures.best else ', no more were unlike each other'}", seconds=sum(run.seconds for _, run in runs), tokens=sum(run.tokens for _, run in runs), dev=self._dev)

    def _train(self, stage: Stage, folder: Path, before: Path | None, rates: Rates | None) -> Finished:
        encoder, tokenizer_path, prompts = self._load(before)
        described = {"stage": json.loads(json.dumps(asdict(stage), default=str)), "before": None if before is None else str(before.relative_to(self.out)), "rates": rates}
        described["stage"].pop("loop")
        if stage.kind == "contrast":
            objective: Objective = self._contrast(stage, encoder, tokenizer_path, prompts, rates)
            with cast(BatchesAhead, cast(Contrast, objective).batches):
                return run(objective, stage.loop, folder, described, ranks=self.ranks, tell=self.tell, draw=draw)
        return run(self._texts_objective(stage, encoder, tokenizer_path, prompts), stage.loop, folder, described, ranks=self.ranks, tell=self.tell, draw=draw)

    def _texts_objective(self, stage: Stage, encoder: Encoder, tokenizer_path: Path, prompts: Prompts) -> Objective:
        assert stage.texts is not None
        texts = self._texts(stage)
        dev: list[str] = []
        if stage.dev_one_in is not None:
            texts, dev = hold_out_texts(texts, stage.dev_one_in)
        if stage.kind == "language-model":
            return LanguageModelObjective(encoder, texts, stage.texts, tokenizer_path=tokenizer_path, dev=dev, ranks=self.ranks)
        return DenoisingObjective(encoder, texts, stage.texts, tokenizer_path=tokenizer_path, prompts=prompts, dev=dev, cross=stage.cross, cross_steps=stage.cross_steps,
                                  ranks=self.ranks)

    def _contrast(self, stage: Stage, encoder: Encoder, tokenizer_path: Path, prompts: Prompts, rates: Rates | None) -> Contrast:
        assert stage.batches is not None
        datasets, config = self._datasets(stage), stage.batches
        if rates is not None:
            datasets = [replace(dataset, config=replace(dataset.config, rate=rates[dataset.name])) for dataset in datasets]
            config = replace(config, sampling="rates")
        if self.shard:
            self.ranks.shard(encoder)
        tokenizer = tokenizer_of(tokenizer_path, encoder.config)
        dev = DevSets(self.recipe.dev, self.recipe.folder, tokenizer, prompts, precision=stage.loss.precision) if self.recipe.dev else None
        self._dev = dev.described() if dev is not None else {}
        options: dict[str, Any] = {} if stage.scheme is None or self.through_of is None else {"through": self.through_of(stage.scheme, stage.activations)}
        return Contrast(encoder, BatchesAhead(Batches(datasets, tokenizer, prompts, config)), stage.loss, tokenizer_path=tokenizer_path, prompts=prompts, dev=dev,
                        matching=self._matching(stage.teacher, encoder, datasets), ranks=self.ranks, **options)

    def _matching(self, config: TeacherConfig | None, encoder: Encoder, datasets: Sequence[Dataset]) -> Matching | None:
        if config is None:
            return None
        teacher = CachedTeacher(open_teacher(config.model, query_prompt=config.query_prompt, document_prompt=config.document_prompt,
                                             query_prompt_name=config.query_prompt_name, document_prompt_name=config.document_prompt_name,
                                             device=self.ranks.device.type), self.out / config.cache)
        for dataset in datasets if self.ranks.first else ():
            documents = [text for row in dataset.rows for text in (_titled(row.title, row.positive), *map(_titled, row.negative_titles or [None] * len(row.negatives), row.negatives))]
            teacher.fill("query", [row.query for row in dataset.rows] + (documents if dataset.symmetric else []))
            if not dataset.symmetric:
                teacher.fill("document", documents)
        self.ranks.agree(None)
        return Matching(teacher, TeacherSpace(encoder.config.dims[0], teacher.dim, config.match).to(self.ranks.device))

    def _load(self, model: Path | None) -> tuple[Encoder, Path, Prompts]:
        """The encoder to train, float32 on the run's device, the tokenizer's file and the prompts."""
        start = self.recipe.start
        if model is not None and not (model / "modules.json").is_file():   # what a language-model stage wrote: a decoder
            if start.head is None:
                raise ConfigError(f"{model} is a decoder, and [start] has no head to put behind it.")
            encoder, path, prompts = read_decoder(model, start.head)
        elif model is not None or start.model is not None:
            checkpoint = open_checkpoint(str(model or start.model))
            encoder, path, prompts = load_encoder(checkpoint), checkpoint.tokenizer_path, checkpoint.prompts
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
        return random_encoder(shape.config(vocab_size, head.dims, head.pooling), head.seed), path, EMBEDDING_GEMMA

    def _datasets(self, stage: Stage) -> list[Dataset]:
        return [self._dataset(config) for config in self.recipe.data if stage.datasets is None or config.name in stage.datasets]

    def _dataset(self, config: DatasetConfig) -> Dataset:
        if config.name not in self._read:
            self._read[config.name] = found = read_dataset(config, self.recipe.folder)
            for reason, count in found.dropped.items():
                self.say(f"  {config.name}: {count:,} rows left out: {reason}")
        return self._read[config.name]

    def _texts(self, stage: Stage | None) -> list[str]:
        wanted = [config for config in self.recipe.data if stage is None or stage.datasets is None or config.name in stage.datasets]
        paths = [path for config in wanted for pattern in config.path for path in sorted(self.recipe.folder.glob(pattern))]
        if not paths:
            raise ConfigError(f"no file matches {[pattern for config in wanted for pattern in config.path]} in {self.recipe.folder}.")
        return read_texts(paths, TEXT_FIELDS)


def _weights(model: Path) -> dict[str, str]:
    return dict(open_checkpoint(model).weight_hashes())


def tokenizer_of(path: Path, config: EncoderConfig) -> Tokenizer:
    return Tokenizer(path, bos_id=config.bos_id, eos_id=config.eos_id, pad_id=config.pad_id, vocab_size=config.vocab_size, max_tokens=config.max_tokens)


def pieces_in(path: Path) -> int:
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()).get_piece_size())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable SentencePiece model ({error}).") from error


def _titled(title: str | None, text: str) -> str:
    return f"{title}\n{text}" if title else text


def _write(path: Path, content: Any) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
