"""States of a run on disk: a checkpoint folder in the published layout, and beside it what training
needs to go on exactly.

    checkpoints/step-00000200/              opens in transformers, sentence-transformers and
                                            egemma-export
    checkpoints/step-00000200/training/     optimizer.safetensors, extra.safetensors, state.json

A folder appears by one rename after all its bytes are on disk (egemma_core.files.publish_folder):
after a kill or a power cut there is the old state or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from egemma_core.errors import CheckpointError
from egemma_train.ranks import cut_like, whole

T = TypeVar("T")
TRAINING = "training"
_STEP = re.compile(r"step-(\d{8})")


def steps_in(folder: Path) -> list[int]:
    """Return the steps whose state lies in `folder`, rising."""
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for match in found if match is not None)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the state of a step."""
    return folder / f"step-{step:08d}"


def moments_of(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the optimizer's moments, whole, by kind and parameter.

    Where weights are shards, every process must call it.
    """
    return {
        f"{kind}.{name}": whole(value.detach()).cpu().contiguous()
        for name, weight in parameters.items()
        for kind, value in optimizer.state.get(weight, {}).items()
        if isinstance(value, Tensor) and value.ndim
    }


def add_training_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write `training/` into a checkpoint folder.

    It holds the moments, the parameters that the published layout has no place for, and `state`.
    """
    place = folder / TRAINING
    place.mkdir()
    save_file(dict(moments), place / "optimizer.safetensors")
    published = _published(folder, _names)
    save_file(
        {
            name: weight.detach().cpu().contiguous()
            for name, weight in parameters.items()
            if name not in published
        },
        place / "extra.safetensors",
    )
    # one that was never moved has none
    steps = {
        name: int(optimizer.state[weight]["step"])
        for name, weight in parameters.items()
        if weight in optimizer.state
    }
    (place / "state.json").write_text(
        json.dumps({**state, "moment_steps": steps}, indent=1) + "\n", encoding="utf-8"
    )


@torch.no_grad()
def restore(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights and moments back; returns the `state` that was saved with them.

    Raises:
        CheckpointError: a file is missing, damaged, or does not have these parameters.
    """
    place = folder / TRAINING
    try:
        state: dict[str, Any] = json.loads((place / "state.json").read_text(encoding="utf-8"))
        weights = _read(place / "extra.safetensors") | _published(folder, _read)
        moments = _read(place / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is not a whole state of a run ({error}).",
            hint="Remove it to go on from the one before.",
        ) from error
    if set(weights) != set(parameters):
        raise CheckpointError(
            f"{folder} has other parameters than this run: "
            f"{sorted(set(weights) ^ set(parameters))[:3]}.",
            hint="Use another run folder.",
        )
    steps = state.pop("moment_steps")
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, moment in moments.items():
        kind, _, name = key.partition(".")
        by_name.setdefault(name, {})[kind] = moment
    for name, weight in parameters.items():
        if weights[name].shape != weight.shape or weights[name].dtype != weight.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(weights[name].shape)} {weights[name].dtype}, this "
                f"run's is {tuple(weight.shape)} {weight.dtype}."
            )
        weight.copy_(cut_like(weights[name], weight))
        if name in steps:
            # fused AdamW keeps it beside the weight
            counter = torch.tensor(float(steps[name]), device=weight.device)
            optimizer.state[weight] = {
                "step": counter,
                **{kind: cut_like(moment, weight) for kind, moment in by_name[name].items()},
            }
    return state


def forget(folder: Path) -> None:
    """Delete a state, by name first, so that a kill does not leave half of one under it."""
    scratch = folder.with_name(f".old-{folder.name}")
    os.rename(folder, scratch)
    shutil.rmtree(scratch)


def clean(folder: Path) -> None:
    """Remove what a kill left unfinished."""
    for path in folder.glob(".*"):
        shutil.rmtree(path)


def _published(folder: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    """Return what `read` gives of a folder's weights, by the encoder's parameter names."""
    found = read(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else {}
    dense = sorted(folder.glob("*_Dense"), key=lambda path: int(path.name.partition("_")[0]))
    return found | {
        f"dense.{index}.weight": read(path / "model.safetensors")["linear.weight"]
        for index, path in enumerate(dense)
    }


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


def _names(path: Path) -> dict[str, None]:
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys())
