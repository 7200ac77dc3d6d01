"""A soup: the average of the weights of several finetuning runs, one run for each mixture of the
data.

Source: arXiv:2509.20354, section 2.3 ("unweighted averaging"); Wortsman et al. 2022,
arXiv:2203.05482.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from egemma_core.checkpoint.folder import Checkpoint, open_checkpoint
from egemma_core.checks import number
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.files import publish_folder, sha256_of, write_json
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint

RECORD = "soup.json"  # inside the new folder: what went in


def soup(folders: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> None:
    """Write the average of some checkpoints as a checkpoint of its own, whole or not at all.

    Sums are float64, the result is float32, whatever the ingredients' dtypes. About three float32
    models are held in memory at once.

    Args:
        folders: checkpoints in the published layout, of one architecture, tokenizer and set of
            prompts.
        out: does not exist yet. Beside the model it gets `soup.json`: each ingredient's path, share
            and weight hashes.
        weights: how much of each goes in, in the order of `folders`; divided by their sum. None for
            equal shares, as in the report.

    Raises:
        CheckpointError: a folder cannot be read, two do not fit together, or `out` exists.
        ConfigError: no folders, two with the very same weights, or weights that are no shares.
    """
    if not folders:
        raise ConfigError("A soup needs at least one checkpoint folder.")
    if out.exists():
        raise CheckpointError(f"{out} exists.", hint="Remove it, or save to another folder.")
    weights = _shares(weights, len(folders))
    checkpoints = [open_checkpoint(folder) for folder in folders]
    for other in checkpoints[1:]:
        _check_fit(checkpoints[0], other)
    hashes = [checkpoint.weight_hashes() for checkpoint in checkpoints]
    for index, found in enumerate(hashes):
        if found in hashes[:index]:
            raise ConfigError(
                f"{folders[hashes.index(found)]} and {folders[index]} hold the very same weights.",
                hint="Name each run once.",
            )

    total: dict[str, torch.Tensor] = {}
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        for name, values in load_encoder(checkpoint).named_parameters():
            part = values.double() * weight
            total[name] = total[name].add_(part) if name in total else part
    with torch.device("meta"):
        encoder = Encoder(checkpoints[0].config)
    encoder.load_state_dict(
        {name: (total.pop(name) / sum(weights)).float() for name in list(total)},
        strict=True,
        assign=True,
    )

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch, out.name)
        save_checkpoint(encoder, checkpoints[0].tokenizer_path, checkpoints[0].prompts, made)
        record = [
            {"folder": str(folder), "share": weight / sum(weights), "weights": found}
            for folder, weight, found in zip(folders, weights, hashes, strict=True)
        ]
        write_json(made / RECORD, {"ingredients": record})
        publish_folder(made, out)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights, each a positive number; equal ones for None."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights={list(weights)} must be {count} numbers, one for each folder.")
    return [number(f"weights[{place}]", weight, above=0) for place, weight in enumerate(weights)]


def _check_fit(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse to average two models in which a number stands for different things."""
    mine, theirs = asdict(first.config), asdict(other.config)
    differs = [
        f"{name} is {mine[name]!r} and {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    ]
    prompts = dict(first.prompts.by_name), dict(other.prompts.by_name)
    differs += [
        f"the prompt {name!r} is {prompts[0].get(name)!r} and {prompts[1].get(name)!r}"
        for name in sorted({*prompts[0], *prompts[1]})
        if prompts[0].get(name) != prompts[1].get(name)
    ]
    tokenizers = [sha256_of(checkpoint.tokenizer_path) for checkpoint in (first, other)]
    if tokenizers[0] != tokenizers[1]:
        differs.append(
            f"tokenizer.model has SHA-256 {tokenizers[0][:12]}... and {tokenizers[1][:12]}..."
        )
    if differs:
        raise CheckpointError(
            f"{first.folder} and {other.folder} cannot be averaged: {'; '.join(differs)}.",
            hint="Take runs that started from one checkpoint.",
        )
