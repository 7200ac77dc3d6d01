"""The folder of a run, and what stands in it beside the states.

RUN/run.json        what was asked for: the whole configuration, and the versions it ran on
RUN/log.jsonl       a line per `log_every` steps and per evaluation
RUN/curves.png      the log, drawn
RUN/checkpoints/    states; see egemma_train.checkpoints
RUN/model/          the result, a checkpoint folder in the published layout
RUN/result.json     which step it is of, its scores, how long it took
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from egemma_core.errors import ConfigError
from egemma_core.files import publish_folder, write_json
from egemma_train import checkpoints


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a run."""

    model: Path  # checkpoint folder
    step: int  # of the model
    last_step: int  # that was trained
    stopped: str  # why it ended there
    scores: dict[str, float]  # of the model on the dev sets
    tokens: int
    seconds: float  # of training, evaluations and states on disk included, over all sessions


def open_run(
    folder: Path, described: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
) -> Finished | None:
    """Make the folder of a run, or check that it is this run's.

    Args:
        described: all that decides what is trained, as plain values.

    Returns:
        The result of a run that is finished; else None.

    Raises:
        ConfigError: the folder holds a run with other settings, or something else.
    """
    asked = json.loads(json.dumps(described, default=str))
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["asked"]
        if before != asked:
            raise ConfigError(
                f"{folder} holds a run with other settings: "
                f"{'; '.join(_differences(before, asked)[:5])}.",
                hint="Use them, or another folder.",
            )
        checkpoints.clean(folder / "checkpoints")
        result = folder / "result.json"
        if not result.exists():
            return None
        found = json.loads(result.read_text(encoding="utf-8"))
        return Finished(**{**found, "model": folder / "model"})
    # a hidden one is what a kill left of run.json
    if folder.exists() and any(
        not found.name.startswith(f".{path.name}") for found in folder.iterdir()
    ):
        raise ConfigError(f"{folder} is not empty and holds no run.", hint="Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "asked": asked,
        "parameters": sum(weight.numel() for weight in parameters.values()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(path, facts)
    return None


def finish(folder: Path, result: Finished) -> None:
    """Copy the state of the result's step to RUN/model, and write RUN/result.json after it."""
    scratch = folder / ".model"
    for leftover in (scratch, result.model):
        shutil.rmtree(leftover, ignore_errors=True)  # of a kill between here and result.json
    shutil.copytree(
        checkpoints.step_folder(folder / "checkpoints", result.step),
        scratch,
        ignore=shutil.ignore_patterns(checkpoints.TRAINING),
    )
    publish_folder(scratch, result.model)
    write_json(folder / "result.json", {**asdict(result), "model": "model"})


def add_to_log(path: Path, **fields: Any) -> None:
    """Append one line to a run's log; the next state flushes it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return what differs between two settings, one line for each leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]
