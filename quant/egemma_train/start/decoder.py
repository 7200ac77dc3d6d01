"""Where an encoder's weights come from before it learns to embed: a decoder-only Gemma 3, or
random numbers. And such a decoder as a folder.

The report's three inits: "decoder-only" is `read_decoder` alone (the weights as they are, masks
bidirectional), "encoder-decoder" is the same after denoising (`egemma_train.objectives.denoise`),
"random" is `random_encoder`.

Source: arXiv:2509.20354 sections 2.1 and 4.1; the folder is what transformers' Gemma3ForCausalLM
saves.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from egemma_core.checkpoint.config import EncoderConfig, read_transformer
from egemma_core.checkpoint.folder import TOKENIZER, WEIGHTS, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.checks import whole_number
from egemma_core.errors import BundleError, CheckpointError, ConfigError
from egemma_core.files import publish_folder
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.hf_tokenizer import tokenizer_json
from egemma_core.nn.load import read_tensors
from egemma_core.nn.save import transformer_json
from egemma_core.prompts import Prompts

INDEX = "model.safetensors.index.json"
PREFIX, TABLE, OUTPUT = "model.", "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What an embedding model has behind the layers of a decoder, and how far it reads."""

    pooling: str = "mean"  # see egemma_core.checkpoint.config.POOLINGS
    dims: tuple[int, ...]  # trained widths, falling; the first is the decoder's own width D
    max_tokens: int = 2048  # BOS and EOS included; no more than the decoder's positions
    seed: int = 0  # of the two linear layers D -> 4 D -> D, and of attention pooling

    def __post_init__(self) -> None:
        whole_number("max_tokens", self.max_tokens, 3)  # BOS, a token and EOS


def read_decoder(folder: Path, head: HeadConfig) -> tuple[Encoder, Path, Prompts]:
    """Return the layers of a decoder-only Gemma 3 as an `Encoder` with a new head.

    The head is "randomly initialised linear projections". Nothing is adapted: the weights are the
    decoder's, the masks are the encoder's. A window of 512 tokens back becomes 256 to each side.

    Args:
        folder: config.json, model.safetensors or shards with an index, tokenizer.model. Float32 or
            bfloat16; float32 comes out.

    Returns:
        The encoder, trainable; the path of tokenizer.model; EmbeddingGemma's prompts, since a
        decoder has none.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or describes what this would compute
            wrongly; the text says what was found.
        ConfigError: the head does not fit the decoder.
    """
    fields = _decoder_fields(folder)
    width, longest = fields["width"], fields.pop("longest")
    if head.max_tokens > longest:
        raise ConfigError(
            f"max_tokens={head.max_tokens}, but {folder} has {longest} positions.",
            hint="Lower max_tokens.",
        )
    if head.dims[:1] != (width,):
        raise ConfigError(f"The first of dims={head.dims} must be the decoder's width, {width}.")
    config = EncoderConfig(
        **fields,
        pooling=head.pooling,
        dense=((width, 4 * width), (4 * width, width)),
        max_tokens=head.max_tokens,
        dims=head.dims,
    )
    tokenizer_path = _checked_tokenizer(folder, config)

    with torch.device("meta"):
        encoder = Encoder(config)
    backbone = {
        name: weight
        for name, weight in encoder.named_parameters()
        if not name.startswith(("dense.", "pooler."))
    }
    found = _decoder_tensors(
        folder, {name: tuple(weight.shape) for name, weight in backbone.items()}
    )
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        _draw(
            encoder,
            torch.Generator().manual_seed(head.seed),
            {name for name, _ in encoder.named_parameters()} - backbone.keys(),
        )
        for name, tensor in found.items():
            encoder.get_parameter(name).copy_(tensor)
    return encoder, tokenizer_path, EMBEDDING_GEMMA


def random_encoder(config: EncoderConfig, seed: int) -> Encoder:
    """Return an encoder with random weights, the same for the same seed.

    Matrices are normal with variance 1/inputs, so that each keeps the size of what it gets at any
    width (Gemma's 0.02 suits its own width); token vectors have variance 1/D, which the factor
    sqrt(D) makes 1; norms multiply by one.
    """
    encoder = Encoder(config)
    with torch.no_grad():
        _draw(
            encoder,
            torch.Generator().manual_seed(seed),
            {name for name, _ in encoder.named_parameters()},
        )
    return encoder


def save_decoder(encoder: Encoder, tokenizer_path: Path, folder: Path) -> None:
    """Write the encoder's layers as a decoder-only Gemma 3, whole or not at all.

    Transformers' Gemma3ForCausalLM and `read_decoder` open it. The pooler and the dense head stay
    behind. float32; tokenizer.json puts BOS in front of a text and, as a decoder wants, nothing
    behind.

    Raises:
        CheckpointError: `folder` exists, or a weight is not finite.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists.", hint="Remove it, or save to another folder.")
    weights = {
        PREFIX + name: weight.detach().to("cpu", torch.float32).contiguous()
        for name, weight in encoder.named_parameters()
        if not name.startswith(("dense.", "pooler."))
    }
    _require_finite(folder, weights)
    config = {
        **transformer_json(encoder.config, "float32"),
        "architectures": ["Gemma3ForCausalLM"],
        "use_bidirectional_attention": False,
        "use_cache": True,
    }
    tokenizer = tokenizer_json(tokenizer_path)
    template = tokenizer["post_processor"]
    for key in ("single", "pair"):
        template[key] = template[key][:-1]  # EOS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": encoder.config.max_tokens,
        "clean_up_tokenization_spaces": False,
    }

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(tokenizer_path, temporary / TOKENIZER)
        for name, content in (
            ("config.json", config),
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", settings),
        ):
            (temporary / name).write_text(
                json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        temporary.chmod(0o755)
        (temporary / WEIGHTS).chmod(0o644)
        publish_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw(encoder: Encoder, random: torch.Generator, names: set[str]) -> None:
    """Fill these parameters with random numbers, drawn in the order of the encoder."""
    for name, weight in encoder.named_parameters():
        if name not in names:
            continue
        if "norm" in name:
            weight.zero_()
        else:  # a matrix, or the query of attention pooling
            nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5, generator=random)


def _decoder_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of `EncoderConfig` that the decoder's config.json decides.

    Beside them stands "longest", its number of positions.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a checkpoint folder as transformers saves it."
        )
    config = _json(folder / "config.json")
    model_type = config.get("model_type")
    if "text_config" in config:
        raise CheckpointError(
            f"{folder}: model_type={model_type!r} is a model of texts and images.",
            hint="Take a text-only one (gemma3_text, such as Gemma 3 270M or 1B); the larger ones "
            "also scale their positions, which is not understood.",
        )
    if config.get("use_bidirectional_attention"):
        raise CheckpointError(
            f"{folder}: use_bidirectional_attention is true: this is an encoder already.",
            hint="Start from it as from a checkpoint, without adaptation.",
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder}: quantization_config is {config['quantization_config']!r}; only float "
            "weights can be trained."
        )
    window = config.get("sliding_window")
    if isinstance(window, int) and window % 2:
        raise CheckpointError(
            f"{folder}: sliding_window={window} is odd; half of it to each side must be a whole "
            "number."
        )
    if config.get("rope_parameters") is not None and config.get("rope_scaling") is not None:
        raise CheckpointError(
            f"{folder}: rope_scaling={config['rope_scaling']!r} beside rope_parameters; scaled "
            "positions are not understood."
        )
    eos = config.get("eos_token_id")
    # chat models add ids that end a turn; the first is the tokenizer's own, which is checked below
    if isinstance(eos, list) and eos:
        config = {**config, "eos_token_id": eos[0]}
    positions = config.get("max_position_embeddings")
    name = f"{folder}/config.json: max_position_embeddings"
    longest = whole_number(name, positions, 1, error=CheckpointError)
    return {**read_transformer({**config, "use_bidirectional_attention": True}), "longest": longest}


def _checked_tokenizer(folder: Path, config: EncoderConfig) -> Path:
    """Return the path of the decoder's tokenizer, which fits its config."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER} (SentencePiece).",
            hint="Copy it from the published checkpoint; tokenizer.json is not read.",
        )
    try:
        tokenizer_of(path, config)
    except BundleError as error:
        raise CheckpointError(error.found, hint=error.hint) from error
    return path


def _decoder_tensors(folder: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of these names and shapes, without prefix, float32.

    The output must be the table of tokens.
    """
    found = _stored_tensors(folder)
    output = found.pop(OUTPUT, None)
    names = {PREFIX + name for name in wanted}
    missing, surplus = sorted(names - found.keys()), sorted(found.keys() - names)
    if missing or surplus:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing {missing[:3]} and {len(surplus)} are "
            f"not understood {surplus[:3]}. "
            "Gemma3ForCausalLM's names are like model.layers.0.mlp.up_proj.weight."
        )
    for name, shape in wanted.items():
        if found[PREFIX + name].shape != shape:
            raise CheckpointError(
                f"{folder}: {PREFIX + name} has shape {tuple(found[PREFIX + name].shape)}, the "
                f"config says {shape}."
            )
    _require_finite(folder, found)
    if output is None and _json(folder / "config.json").get("tie_word_embeddings") is False:
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is false, and there is no {OUTPUT}: the output layer "
            "is lost."
        )
    if output is not None and not torch.equal(output, found[TABLE]):
        raise CheckpointError(
            f"{folder}: {OUTPUT} differs from {TABLE}; Gemma 3 has one table for input and output."
        )
    return {name: found[PREFIX + name] for name in wanted}


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of model.safetensors, or of the shards that the index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} has {WEIGHTS} and {INDEX}, and only one can hold the model.",
            hint="Remove the other.",
        )
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS, torch.float32)
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}.",
            hint="Download the weights as well; pickle weights (.bin, .pt) are not read.",
        )
    places = _json(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) and name == Path(name).name for name in places.values())
    ):
        raise CheckpointError(
            f"{index}: weight_map must map names of tensors to files of this folder."
        )
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder} has no {shard}, which {INDEX} names.", hint="Fetch it again."
            )
        tensors = read_tensors(folder / shard, torch.float32)
        listed = {name for name, place in places.items() if place == shard}
        if tensors.keys() != listed:
            raise CheckpointError(
                f"{folder / shard} and {INDEX} disagree on {sorted(tensors.keys() ^ listed)[:3]}; "
                "they are of different downloads."
            )
        found |= tensors
    return found


def _require_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that hold NaN or infinite values."""
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise CheckpointError(
            f"{folder}: {damaged[:3]} hold NaN or infinite values; the file is damaged or training "
            "diverged."
        )


def _json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object.")
    return content
