"""A recipe: what to start from, data, dev sets and stages, in one TOML file.

docs/training.md describes the format for users; egemma_train.runner runs a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from egemma_core.checkpoint.config import FULL, EncoderConfig
from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError
from egemma_quant.schemes import scheme_named
from egemma_train.data.batches import BatchConfig
from egemma_train.data.datasets import DatasetConfig
from egemma_train.data.texts import TextConfig
from egemma_train.evaluate import DevConfig
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import ContrastConfig
from egemma_train.objectives.encoder_decoder import CrossInit
from egemma_train.start.decoder import HeadConfig
from egemma_train.tables import check_keys, read_table
from egemma_train.teachers.space import Match

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["language-model", "denoise", "contrast"]
TEXT_FIELDS = ("query", "positive", "negative", "text", "a", "b")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model that starts from random weights; what is not set here is as in EmbeddingGemma."""

    # a SentencePiece model; None to make one of `pieces` from the recipe's texts
    tokenizer: str | None = None
    pieces: int | None = None
    width: int = 768
    ffn_width: int = 1152
    layers: int = 24
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 256
    window: int = 256  # tokens to each side, in sliding layers
    full_every: int = 6  # every so many layers see everything
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.pieces is None):
            raise ConfigError(
                f"tokenizer={self.tokenizer!r} and pieces={self.pieces!r}: give one, a file or how "
                "many pieces are to be made."
            )

    def config(self, vocab_size: int, dims: tuple[int, ...], pooling: str) -> EncoderConfig:
        """Return the config of an encoder of this shape."""
        kinds = tuple(
            "full_attention"
            if layer % self.full_every == self.full_every - 1
            else "sliding_attention"
            for layer in range(self.layers)
        )
        kinds = kinds if FULL in kinds else (*kinds[:-1], FULL)
        return EncoderConfig(
            vocab_size=vocab_size,
            width=self.width,
            ffn_width=self.ffn_width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            query_scale=self.head_dim**-0.5,
            norm_eps=1e-6,
            layer_types=kinds,
            window=self.window,
            rope_theta_full=1e6,
            rope_theta_sliding=1e4,
            max_tokens=self.max_tokens,
            bos_id=2,
            eos_id=1,
            pad_id=0,
            pooling=pooling,
            dense=((self.width, 4 * self.width), (4 * self.width, dims[0])),
            dims=dims,
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the first stage starts from: one of the three."""

    model: str | None = None  # an embedding checkpoint, folder or hub id
    decoder: str | None = None  # a decoder-only Gemma 3 folder
    shape: Shape | None = None  # random
    head: HeadConfig | None = None  # of a decoder or a random model

    def __post_init__(self) -> None:
        given = [name for name in ("model", "decoder", "shape") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"it has {given or 'none'} of model, decoder and shape; give one.")
        if (self.model is None) != (self.head is not None):
            raise ConfigError(
                "a [start.head] belongs to a decoder or a shape, which have none of their own; a "
                "model has one."
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Whose vectors are matched."""

    model: str  # as `open_teacher` takes it: folder, hub id, "egemma:MODEL", FILE.safetensors
    match: Match | None = None  # how widths are brought together; see TeacherSpace
    cache: str = "teacher-cache"  # folder for vectors, inside OUT unless absolute
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    document_prompt_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class MixturesConfig:
    """A stage that is run once per mixture of its datasets; the best runs are averaged."""

    trials: int  # runs
    random: int = 10  # of which so many with mixtures drawn at random, before Bayesian optimisation
    concentration: float = 1.0  # Dirichlet
    best: int = 3  # that go into the soup
    # mixtures to begin with; none for the datasets' own rates, or even ones
    seeds: tuple[dict[str, float], ...] = ()

    def __post_init__(self) -> None:
        whole_number("trials", self.trials, 1)
        whole_number("best", self.best, 1, self.trials, hint="It is at most trials.")
        whole_number("random", self.random, 0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a recipe: one run, or one per mixture of its datasets."""

    name: str
    kind: Kind
    loop: LoopConfig
    datasets: tuple[str, ...] | None = None  # None for all of [data]
    init: Literal["before", "start"] = "before"  # weights of the stage before, or of [start]
    texts: TextConfig | None = None  # language-model, denoise
    dev_one_in: int | None = None  # language-model, denoise: held-out share of the texts
    cross: CrossInit = "balanced"  # denoise
    cross_steps: int = 0
    batches: BatchConfig | None = None  # contrast
    loss: ContrastConfig = field(default_factory=ContrastConfig)
    teacher: TeacherConfig | None = None
    mixtures: MixturesConfig | None = None
    scheme: str | None = None  # quantization-aware: int4, int8, int8-per-channel, mixed
    activations: bool = False  # with `scheme`: round what goes into each product as well

    def __post_init__(self) -> None:
        if self.kind == "contrast" and self.batches is None:
            raise ConfigError("a contrast stage needs a table batches.")
        if self.kind != "contrast":
            wrong = [
                name
                for name in ("batches", "teacher", "mixtures", "scheme")
                if getattr(self, name) is not None
            ]
            if wrong or self.texts is None:
                raise ConfigError(f"a {self.kind} stage has texts, and no {wrong or 'more'}.")
        if self.activations and self.scheme is None:
            raise ConfigError(
                "activations=true without a scheme rounds nothing.", hint="Name a scheme as well."
            )
        if self.scheme is not None:
            scheme_named(self.scheme)
        if self.dev_one_in is not None:
            whole_number("dev_one_in", self.dev_one_in, 2)
        if self.activations and self.loss.compile:
            raise ConfigError(
                "activations=true with compile=true: the rounding of activations is not in what is "
                "compiled.",
                hint="Leave one of them out.",
            )
        if self.scheme is not None and self.loss.precision != "float32":
            raise ConfigError(
                f"scheme={self.scheme!r} with precision={self.loss.precision!r}: bfloat16 would "
                "round the weights once more, and what is trained would not be what ships.",
                hint="Leave precision at float32 in this stage.",
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run is made of."""

    name: str
    start: Start
    data: tuple[DatasetConfig, ...]
    dev: tuple[DevConfig, ...]
    stages: tuple[Stage, ...]
    folder: Path  # what paths of data and dev start from


def read_recipe(path: Path, data: Path | None = None) -> Recipe:
    """Read a recipe from its file.

    Args:
        data: the folder that holds the data; None for what the file says, starting from where the
            file is.

    Raises:
        ConfigError: the file cannot be read, or a table in it cannot work; names table and key.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: this is not a readable TOML file ({error}).") from error
    try:
        return recipe_of(tree, path.stem, path.parent, data)
    except ConfigError as error:
        raise error.within(str(path)) from error


def recipe_of(tree: Mapping[str, Any], name: str, beside: Path, data: Path | None) -> Recipe:
    """Return the recipe that a parsed file holds; see `read_recipe`."""
    _check_tree(tree)
    start = dict(tree["start"])
    given: dict[str, Any] = {"head": None, "shape": None}
    for key, kind in (("head", HeadConfig), ("shape", Shape)):
        if key in start:
            given[key] = read_table(kind, start.pop(key), f"[start.{key}]")
    datasets = tuple(
        read_table(DatasetConfig, table, f"[data.{key}]", name=key)
        for key, table in tree["data"].items()
    )
    stages = tuple(
        _stage(table, f"[[stages]] {index}") for index, table in enumerate(tree["stages"], start=1)
    )
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"The stages are named {names}; give each its own name.")
    for stage in stages:
        unknown = set(stage.datasets or ()) - {dataset.name for dataset in datasets}
        if unknown:
            raise ConfigError(
                f"stage {stage.name!r}: no [data] table is named {sorted(unknown)}; there are "
                f"{[dataset.name for dataset in datasets]}."
            )
    return Recipe(
        name=name,
        start=read_table(Start, start, "[start]", **given),
        data=datasets,
        stages=stages,
        dev=tuple(
            read_table(DevConfig, table, f"[dev.{key}]", name=key)
            for key, table in tree.get("dev", {}).items()
        ),
        folder=data if data is not None else beside / tree.get("folder", "."),
    )


def _check_tree(tree: Mapping[str, Any]) -> None:
    """Refuse a file without the tables that a recipe has."""
    check_keys(tree, ("folder", "start", "data", "dev", "stages"), "the recipe")
    for key, kind in (("start", dict), ("data", dict), ("stages", list)):
        if not isinstance(tree.get(key), kind) or not tree[key]:
            needed = "tables [[stages]]" if key == "stages" else f"a table [{key}]"
            raise ConfigError(f"it needs {needed}.")
    if not isinstance(tree.get("dev", {}), dict):
        raise ConfigError("[dev] is not a table.")
    if not isinstance(tree.get("folder", ""), str):
        raise ConfigError(
            f"folder={tree['folder']!r} is {type(tree['folder']).__name__}, not the path of a "
            "folder."
        )


def _stage(table: Any, where: str) -> Stage:
    """Return the stage that a table describes, with the tables inside it."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is not a table.")
    where = f"{where} ({table.get('name', 'without a name')})"
    kinds: dict[str, type[Any]] = {
        "loop": LoopConfig,
        "texts": TextConfig,
        "batches": BatchConfig,
        "loss": ContrastConfig,
        "teacher": TeacherConfig,
        "mixtures": MixturesConfig,
    }
    rest = dict(table)
    if "loop" not in rest:
        raise ConfigError(f"{where}: it needs a table loop with its steps.")
    inner = {
        key: read_table(kind, rest.pop(key), f"{where} {key}")
        for key, kind in kinds.items()
        if key in rest
    }
    return read_table(Stage, rest, where, **inner)
