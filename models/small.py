"""The small models that our experiments train: their data, their dev sets, their shape, and how
they start.

English and code only: 8,000 pieces hold no second language well. Left out are the sets under C-UDA.
A dev set's queries and documents are in no training pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import Dataset, DatasetConfig
from egemma_train.evaluate import DevConfig
from egemma_train.start.vocabulary import initialize, token_vectors

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "../shared/data"
BUILTIN = ROOT / "models/egemma-small"  # whose vocabulary is used
QUESTION, SEARCH, CODE = "question answering", "search result", "code retrieval"
ENGLISH = {"tldr-commands": ("en",)}  # the others are
PAIRS = {  # file to the task of its queries
    "squad-sentences": QUESTION,
    "medquad": QUESTION,
    "cpp-docs": SEARCH,
    "scitldr": SEARCH,
    "tldr-commands": CODE,
    "tldr-pages": SEARCH,
    "nl2bash": CODE,
    "pycode": CODE,
    "mbxp": CODE,
}
DATASETS = tuple(
    DatasetConfig(
        name=name,
        path=(f"pairs/{name}.train.jsonl.gz",),
        kind="pairs",
        task=task,
        languages=ENGLISH.get(name),
    )
    for name, task in PAIRS.items()
) + tuple(
    DatasetConfig(
        name=name,
        path=(f"classification/{name}.train.jsonl.gz",),
        kind="labels",
        task="classification",
    )
    for name in ("clinc150", "banking77")
)
DEV = {  # folder to the task of its queries
    "retrieval/squad-dev": QUESTION,
    "retrieval/medquad-test": QUESTION,
    "retrieval/cranfield": SEARCH,
    "code/nl2bash-test": CODE,
    "code/tldr-test": CODE,
    "code/pycode-test": CODE,
    "code/mbxp-test/python": CODE,
}


def dev_sets(
    max_queries: int, max_tokens: int, names: Sequence[str] = tuple(DEV), dim: int | None = None
) -> tuple[DevConfig, ...]:
    return tuple(
        DevConfig(
            name=name.split("/")[1],
            path=name,
            kind="retrieval",
            task=DEV[name],
            max_queries=max_queries,
            max_tokens=max_tokens,
            dim=dim,
        )
        for name in names
    )


def datasets(data: Path, names: Sequence[str] | None = None) -> list[Dataset]:
    return [
        read_dataset(config, data) for config in DATASETS if names is None or config.name in names
    ]


def shape(
    width: int,
    layers: int,
    ffn_width: int,
    dims: tuple[int, ...],
    head_dim: int = 64,
    max_tokens: int = 512,
) -> EncoderConfig:
    """A model with the built-in one's vocabulary, one full layer in three, and as many query heads
    as fill the width.
    """
    kinds = tuple(FULL if layer % 3 == 2 or layers < 3 else SLIDING for layer in range(layers))
    return EncoderConfig(
        vocab_size=8000,
        width=width,
        ffn_width=ffn_width,
        num_layers=layers,
        num_heads=width // head_dim,
        num_kv_heads=1,
        head_dim=head_dim,
        query_scale=head_dim**-0.5,
        norm_eps=1e-6,
        layer_types=kinds,
        window=64,
        rope_theta_full=1e6,
        rope_theta_sliding=1e4,
        max_tokens=max_tokens,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        pooling="mean",
        dense=((width, 2 * width), (2 * width, width)),
        dims=dims,
    )


def tokenizer_and_prompts() -> tuple[Path, Tokenizer, Prompts]:
    checkpoint = open_checkpoint(BUILTIN)
    return checkpoint.tokenizer_path, checkpoint.tokenizer(), checkpoint.prompts


def start_vectors(
    sets: Sequence[Dataset], tokenizer: Tokenizer, config: EncoderConfig, path: Path, seed: int = 0
) -> Tensor:
    """(V, D) token vectors from how often tokens stand near each other in the training texts; made
    once and kept at `path`.
    """
    if not path.exists():
        texts = sorted({f"{row.query}\n{row.positive}" for dataset in sets for row in dataset.rows})
        made = token_vectors(
            [tokenizer.encode(text, overflow="truncate").ids for text in texts],
            config.vocab_size,
            config.width,
            seed=seed,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        torch.save(made, scratch)
        scratch.replace(path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def started(config: EncoderConfig, sets: Sequence[Dataset], work: Path, seed: int) -> Encoder:
    """An encoder with the built-in model's vocabulary, whose token vectors are `start_vectors`,
    kept in `work`.
    """
    _, tokenizer, _ = tokenizer_and_prompts()
    vectors = start_vectors(sets, tokenizer, config, work / f"token-vectors-{config.width}.pt")
    encoder = Encoder(config)
    initialize(encoder, vectors, seed)
    return encoder
