"""A checkpoint folder in the published sentence-transformers layout, read without torch.

    config.json                        architecture
    config_sentence_transformers.json  prompts
    sentence_bert_config.json          longest input
    modules.json                       Transformer, Pooling, Dense, Dense, Normalize
    1_Pooling/config.json
    2_Dense/ 3_Dense/                  config.json, model.safetensors
    model.safetensors                  tensors without a "model." prefix
    tokenizer.model                    SentencePiece

Whatever would make the vectors silently wrong is refused here.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egemma_core.checkpoint.config import EncoderConfig, read_transformer
from egemma_core.checkpoint.prompts import read_prompts
from egemma_core.checks import whole_number
from egemma_core.errors import CheckpointError, MissingDependencyError
from egemma_core.files import sha256_of
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer

# The widths EmbeddingGemma was trained for. Source: arXiv:2509.20354, section 2.2; the model card.
MATRYOSHKA_DIMS = (768, 512, 256, 128)
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
_PICKLES = ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
_COPY = "Copy it from the published checkpoint."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder says about its model. The weights stay on disk."""

    folder: Path
    source: str  # the path or hub id that was asked for
    revision: str | None  # commit of a hub id; None for a folder
    config: EncoderConfig
    prompts: Prompts
    dense_folders: tuple[Path, ...]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.tokenizer_path, self.config)

    def weight_files(self) -> tuple[Path, ...]:
        return (self.folder / WEIGHTS, *(folder / WEIGHTS for folder in self.dense_folders))

    def weight_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each weight file, by its path inside the folder."""
        return {
            path.relative_to(self.folder).as_posix(): sha256_of(path)
            for path in self.weight_files()
        }


def tokenizer_of(path: Path, config: EncoderConfig) -> Tokenizer:
    """Return the tokenizer of a model; see `Tokenizer` for what is refused."""
    return Tokenizer(
        path,
        bos_id=config.bos_id,
        eos_id=config.eos_id,
        pad_id=config.pad_id,
        vocab_size=config.vocab_size,
        max_tokens=config.max_tokens,
    )


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Read a folder, or fetch a hub id and read that.

    Args:
        model: a folder, or "owner/name" or "owner/name@revision" of the hub; a folder wins.
        revision: branch, tag or commit of a hub id; the commit it means is kept in the result.

    Raises:
        CheckpointError: nothing is there, or the model would not be computed correctly.
        MissingDependencyError: a hub id, and huggingface_hub is not installed.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{folder} is a folder, which has no revision {revision!r}.",
                hint="Leave --revision out, or give a hub id.",
            )
        return _read(folder.resolve(), source=str(model), revision=None)
    if not _HUB_ID.fullmatch(str(model)) or folder.exists():
        raise CheckpointError(
            f"{model}: no such folder, and not a hub id like google/embeddinggemma-300m."
        )
    name, _, pinned = str(model).partition("@")
    folder = _fetch(name, revision or pinned or None)
    return _read(folder, source=name, revision=folder.name)


def _fetch(name: str, revision: str | None) -> Path:
    """Download the files we read into the hub's cache.

    With HF_HUB_OFFLINE=1 only the cache is searched.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: reading from the hub needs huggingface_hub.",
            hint="pip install 'egemma[export]'",
        ) from error
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=["*.json", f"*{WEIGHTS}", TOKENIZER]
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        offline = (
            " HF_HUB_OFFLINE is set, so only the local cache was searched."
            if os.environ.get("HF_HUB_OFFLINE")
            else ""
        )
        raise CheckpointError(
            f"{name}@{revision or 'main'} could not be fetched: "
            f"{str(error).splitlines()[0]}.{offline}",
            hint="Gated models need `hf auth login` and their licence accepted on the hub; a "
            "downloaded folder works as well.",
        ) from error
    return Path(folder)


def _read(folder: Path, *, source: str, revision: str | None) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a checkpoint folder in the published layout."
        )
    if not (folder / WEIGHTS).is_file():
        pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
        if pickles:
            raise CheckpointError(
                f"{folder} has pickle weights {pickles}, which can run code when loaded.",
                hint=f"Save it again as {WEIGHTS}.",
            )
        shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
        found = f", but the shards {shards[:3]}" if shards else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}{found}.",
            hint="Merge them into one file." if shards else "Download the weights as well.",
        )
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER} (SentencePiece); tokenizer.json is not read.", hint=_COPY
        )

    fields = read_transformer(_json(folder / "config.json"))
    modules = _modules(folder)
    dense_folders = tuple(folder / path for kind, path in modules if kind == "Dense")
    dense = tuple(_dense(path) for path in dense_folders)
    sentence = _json(folder / "config_sentence_transformers.json")
    width = dense[-1][1]
    config = EncoderConfig(
        **fields,
        pooling=_pooling(folder / modules[1][1], fields["width"]),
        dense=dense,
        max_tokens=_max_tokens(folder),
        dims=_dims(sentence, width),
    )
    return Checkpoint(
        folder=folder,
        source=source,
        revision=revision,
        config=config,
        prompts=read_prompts(sentence),
        dense_folders=dense_folders,
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return the kind and path of each module, in the order in which EmbeddingGemma computes."""
    rows = _json(folder / "modules.json")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"type", "path"} <= row.keys() for row in rows
    ):
        raise CheckpointError(
            f"{folder / 'modules.json'} is not a list of modules with type and path.", hint=_COPY
        )
    modules = [(str(row["type"]).rsplit(".", 1)[-1], str(row["path"])) for row in rows]
    kinds = [kind for kind, _ in modules]
    listed = {path for _, path in modules}
    forgotten = sorted(path.name for path in folder.glob("*_Dense") if path.name not in listed)
    if forgotten or "Dense" not in kinds:
        raise CheckpointError(
            f"modules.json lists {kinds}, without {forgotten or 'any Dense module'}: vectors would "
            f"be {kinds[-2:]} of the backbone, in another space than EmbeddingGemma's.",
            hint=_COPY,
        )
    if kinds != ["Transformer", "Pooling", *["Dense"] * (len(kinds) - 3), "Normalize"]:
        raise CheckpointError(
            f"modules.json lists {kinds}; understood is Transformer, Pooling, Dense..., Normalize."
        )
    for _, path in modules:
        if path.startswith(("/", "\\")) or ".." in Path(path).parts:
            raise CheckpointError(f"modules.json points outside of the checkpoint: {path!r}.")
    if modules[0][1] not in ("", "."):
        raise CheckpointError(
            f"modules.json keeps the Transformer in {modules[0][1]!r}; the published layout has it "
            "in the folder itself."
        )
    return modules


def _pooling(folder: Path, width: int) -> str:
    config = _json(folder / "config.json")
    if config.get("include_prompt", True) is not True:
        raise CheckpointError(
            f"{folder}: include_prompt is false; EmbeddingGemma averages the prompt's tokens too."
        )
    found = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    if found != width:
        raise CheckpointError(f"{folder}: pools vectors of width {found}, the model's are {width}.")
    names = {"mean": "mean", "cls": "first", "lasttoken": "last", "attention": "attention"}
    flags = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "lasttoken",
    }
    mode = config.get("pooling_mode")
    if mode is None:
        active = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = flags.get(active[0], active[0]) if len(active) == 1 else active
    if not isinstance(mode, str) or mode not in names:
        raise CheckpointError(
            f"{folder}: pooling_mode is {mode!r}; understood is one of {sorted(names)}."
        )
    return names[mode]


def _dense(folder: Path) -> tuple[int, int]:
    config = _json(folder / "config.json")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the dense head is lost.", hint=_COPY)
    activation = str(config.get("activation_function", "")).rsplit(".", 1)[-1]
    bias, residual = config.get("bias"), config.get("use_residual", False)
    if activation != "Identity" or bias is not False or residual:
        raise CheckpointError(
            f"{folder}: bias={bias!r}, activation_function={config.get('activation_function')!r}, "
            f"use_residual={residual!r}; EmbeddingGemma's dense layers have no bias, no "
            "activation, no residual."
        )
    into, out = (
        whole_number(f"{folder}: {name}", config.get(name), 1, error=CheckpointError)
        for name in ("in_features", "out_features")
    )
    return into, out


def _max_tokens(folder: Path) -> int:
    bert = _json(folder / "sentence_bert_config.json")
    if bert.get("do_lower_case"):
        raise CheckpointError(
            f"{folder}: sentence_bert_config.json asks for lower case; EmbeddingGemma keeps it."
        )
    longest = whole_number(
        f"{folder}: max_position_embeddings",
        _json(folder / "config.json").get("max_position_embeddings"),
        3,
        error=CheckpointError,
    )
    limit = bert.get("max_seq_length") or longest
    return whole_number(f"{folder}: max_seq_length", limit, 3, longest, error=CheckpointError)


def _dims(sentence: dict[str, Any], width: int) -> tuple[int, ...]:
    """Return the trained widths.

    The published files do not list them: 768 is EmbeddingGemma's; others say `matryoshka_dims`.
    """
    dims = sentence.get(
        "matryoshka_dims", MATRYOSHKA_DIMS if width == MATRYOSHKA_DIMS[0] else [width]
    )
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        raise CheckpointError(
            f"matryoshka_dims={dims!r}: config_sentence_transformers.json must list whole numbers."
        )
    return tuple(dims)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.", hint=_COPY) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
