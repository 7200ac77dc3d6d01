"""The loop of every stage: an objective, AdamW, states on disk from which a killed run goes on
exactly, a log, early stopping.

RUN/run.json        what was asked for: the whole configuration, and the versions it ran on
RUN/log.jsonl       a line per `log_every` steps and per evaluation
RUN/curves.png      the log, drawn
RUN/checkpoints/    states; see egemma_train.checkpoints
RUN/model/          the result, a checkpoint folder in the published layout
RUN/result.json     which step it is of, its scores, how long it took
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from egemma_core.errors import ConfigError, EgemmaError
from egemma_train import checkpoints
from egemma_train.ranks import ALONE, Ranks, is_shard

Schedule = Literal["cosine", "linear", "constant"]
FINAL_SHARE = 0.01  # of the peak learning rate, at the end of a cosine or linear schedule


class DivergedError(EgemmaError):
    """The loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """What one step computed."""

    losses: dict[str, float]  # "loss" is what was differentiated; the rest are its parts
    tokens: int  # of the global batch
    source: str  # the dataset or task that the batch came from


class Objective(Protocol):
    """What a run trains."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that may be trained, float32, by name."""

    def backward(self, step: int) -> Outcome:
        """Add the gradient of that step's loss to `.grad`, which is None before.

        A pure function of the weights and `step`, so that a run can go on from any state. A
        parameter whose `.grad` stays None is not moved.
        """

    def evaluate(self) -> dict[str, float]:
        """Dev scores, higher is better, "score" among them; empty without a dev set."""

    def save(self, folder: Path) -> None:
        """A checkpoint in the published layout; `folder` does not exist yet.

        The first process calls it; of shards all do, and the first writes.
        """


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how fast, and how often something is written."""

    steps: int
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 0  # linear, from 0
    schedule: Schedule = "cosine"  # after the warm-up, down to a hundredth of the peak
    weight_decay: float = 0.01  # on matrices that multiply; norms and the embedding table have none
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0
    log_every: int = 10  # steps
    save_every: int = 200  # steps between states on disk
    evaluate_every: int | None = None  # steps between evaluations; None for the last step alone
    # evaluations without a better score after which the run stops, and the best state is the
    # result; None: the last is
    patience: int | None = None
    keep: int = 2  # newest states that stay on disk, beside the best one

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        positive = {
            name: getattr(self, name)
            for name in (
                "steps",
                "log_every",
                "save_every",
                "evaluate_every",
                "patience",
                "keep",
                "learning_rate",
                "max_gradient_norm",
            )
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r}: must be positive.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: it must end before steps={self.steps}."
            )
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule={self.schedule!r}: one of {get_args(Schedule)}.")
        if (
            self.weight_decay < 0
            or len(self.betas) != 2
            or not all(0 <= beta < 1 for beta in self.betas)
        ):
            raise ConfigError(
                f"weight_decay={self.weight_decay}, betas={self.betas}: not negative; two numbers "
                "from 0 to below 1."
            )
        if self.patience is not None and self.evaluate_every is None:
            raise ConfigError(
                f"patience={self.patience} counts evaluations: set evaluate_every as well."
            )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run came to."""

    model: Path  # checkpoint folder
    step: int  # of the model
    last_step: int  # that was trained
    stopped: str  # why it ended there
    scores: dict[str, float]  # of the model on the dev sets
    tokens: int
    seconds: float  # of training, evaluations and states on disk included, over all sessions


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Said after every step."""

    step: int
    steps: int
    outcome: Outcome
    seconds_left: float
    tokens_per_second: float
    scores: dict[str, float] | None  # where this step was evaluated


Tell = Callable[[Progress], None]


def run(
    objective: Objective,
    config: LoopConfig,
    folder: Path,
    described: Mapping[str, Any] | None = None,
    *,
    ranks: Ranks = ALONE,
    tell: Tell = lambda progress: None,
    draw: Callable[[Path, Path], None] | None = None,
) -> Finished:
    """Train until `config.steps` or until the dev score stops rising.

    A run that was killed goes on from its last state in `folder`, to the same weights as one that
    was not (same machine, same thread count, nothing compiled); a finished one is returned as it
    stands.

    Args:
        described: all that decides what is trained, as plain values; another run's folder is
            refused.
        ranks: all processes call this with the same arguments; the first one writes.
        draw: makes the second file, a picture, of the first, the log, with every state; see
            egemma_train.curves.

    Raises:
        DivergedError: the loss is NaN or infinite; the last good state stays in `folder`.
        ConfigError: `folder` holds a run with other settings.
        CheckpointError: the newest state cannot be read.
    """
    described = {**(described or {}), "loop": asdict(config)}
    finished = ranks.of_first(lambda: _open(folder, described, objective))
    if finished is not None:
        return Finished(**{**finished, "model": folder / "model"})
    states = folder / "checkpoints"
    parameters = objective.parameters()
    optimizer = make_optimizer(parameters, config)
    found = ranks.agree(checkpoints.steps_in(states) if ranks.first else None)
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "scores": {},
        "best": None,
        "since_best": 0,
        "log_bytes": 0,
    }
    if found:
        state |= checkpoints.restore(
            checkpoints.step_folder(states, found[-1]), parameters, optimizer
        )
    log = folder / "log.jsonl"
    if ranks.first and log.exists():
        os.truncate(log, state["log_bytes"])
    before, started, first_step, first_tokens = (
        state["seconds"],
        time.monotonic(),
        state["step"],
        state["tokens"],
    )
    while state["step"] < config.steps and not _hopeless(state, config):
        step = state["step"]
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        outcome = objective.backward(step)
        norm = ranks.clip(parameters.values(), config.max_gradient_norm)
        if not (math.isfinite(outcome.losses["loss"]) and math.isfinite(norm)):
            good = (
                f"the state of step {max(checkpoints.steps_in(states), default=0)} in {states} is "
                "intact"
                if checkpoints.steps_in(states)
                else "no state was saved yet"
            )
            raise DivergedError(
                f"step {step} ({outcome.source}): loss={outcome.losses['loss']}, gradient "
                f"norm={norm}; {good}. "
                f"Lower learning_rate={config.learning_rate}, or look at that dataset's rows."
            )
        optimizer.step()
        state["step"], state["tokens"] = step + 1, state["tokens"] + outcome.tokens
        last = state["step"] == config.steps
        due = last or (
            config.evaluate_every is not None and state["step"] % config.evaluate_every == 0
        )
        scores = ranks.agree(objective.evaluate()) if due else None
        state["seconds"] = before + time.monotonic() - started
        better = bool(
            scores and (state["best"] is None or scores["score"] > state["best"]["score"])
        )
        if scores:
            state["scores"] = scores
            state["best"], state["since_best"] = (
                ({"step": state["step"], **scores}, 0)
                if better
                else (state["best"], state["since_best"] + 1)
            )
        if ranks.first:
            if state["step"] % config.log_every == 0 or last:
                _log(
                    log,
                    step=state["step"],
                    source=outcome.source,
                    **{key: round(value, 5) for key, value in outcome.losses.items()},
                    gradient_norm=round(norm, 4),
                    learning_rate=rate,
                    tokens=state["tokens"],
                    seconds=round(state["seconds"], 2),
                )
            if scores:
                _log(log, step=state["step"], dev=scores)
            done = state["step"] - first_step
            tell(
                Progress(
                    step=state["step"],
                    steps=config.steps,
                    outcome=outcome,
                    scores=scores,
                    seconds_left=(state["seconds"] - before)
                    / done
                    * (config.steps - state["step"]),
                    tokens_per_second=(state["tokens"] - first_tokens)
                    / max(1e-9, state["seconds"] - before),
                )
            )
        if (
            last
            or _hopeless(state, config)
            or state["step"] % config.save_every == 0
            or (better and config.patience is not None)
        ):
            _save(objective, parameters, optimizer, config, states, log, state, ranks)
            # from then on there is a line of a step
            if draw is not None and ranks.first and (last or state["step"] >= config.log_every):
                draw(log, folder / "curves.png")
    return _finish(folder, config, state, ranks)


def _hopeless(state: Mapping[str, Any], config: LoopConfig) -> bool:
    return config.patience is not None and state["since_best"] >= config.patience


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> torch.optim.AdamW:
    """AdamW; only matrices that multiply are decayed."""
    # the fused kernel takes no shards together with whole ones
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in parameters.items():
        decay = config.weight_decay if weight.ndim == 2 and "embed_tokens" not in name else 0.0
        groups.setdefault((decay, is_shard(weight)), []).append(weight)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for (decay, _), group in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def learning_rate(step: int, config: LoopConfig) -> float:
    """Of the step with that number, from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        config.schedule
    ]
    return config.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * left)


def _open(
    folder: Path, described: Mapping[str, Any], objective: Objective
) -> dict[str, Any] | None:
    """Make or check the run's folder; the result if it is finished."""
    described = json.loads(json.dumps(described, default=str))
    path = folder / "run.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))["asked"]
        if theirs != described:
            raise ConfigError(
                f"{folder} holds a run with other settings: "
                f"{'; '.join(_differences(theirs, described)[:5])}. Use them, or another folder."
            )
        result = folder / "result.json"
        checkpoints.clean(folder / "checkpoints")
        return json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    # that one is what a kill left of run.json
    if folder.exists() and any(found.name != f".{path.name}" for found in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: weight.numel() for name, weight in objective.parameters().items()}
    facts = {
        "asked": described,
        "parameters": sum(sizes.values()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    _write(path, facts)
    return None


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]


def _save(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    states: Path,
    log: Path,
    state: dict[str, Any],
    ranks: Ranks,
) -> None:
    sharded = any(map(is_shard, parameters.values()))
    folder = checkpoints.step_folder(states, state["step"])
    scratch = folder.with_name(f".new-{folder.name}")
    if ranks.first:
        states.mkdir(exist_ok=True)
    if ranks.first or sharded:
        objective.save(scratch)
        moments = checkpoints.moments_of(parameters, optimizer)
    if ranks.first:
        if log.exists():
            checkpoints.to_disk(log)  # before a state that counts its bytes
            checkpoints.to_disk(log.parent)
            state["log_bytes"] = log.stat().st_size
        checkpoints.add_training_state(scratch, parameters, optimizer, moments, state)
        checkpoints.publish(scratch, folder)
        kept = {
            *checkpoints.steps_in(states)[-config.keep :],
            state["best"]["step"]
            if state["best"] and config.patience is not None
            else state["step"],
        }
        for step in set(checkpoints.steps_in(states)) - kept:
            checkpoints.forget(checkpoints.step_folder(states, step))
    ranks.agree(None)  # nobody runs ahead of the file


def _finish(folder: Path, config: LoopConfig, state: dict[str, Any], ranks: Ranks) -> Finished:
    best = (
        state["best"]
        if config.patience is not None and state["best"]
        else {"step": state["step"], **state["scores"]}
    )
    stopped = (
        f"no better score in {config.patience} evaluations"
        if _hopeless(state, config)
        else "all steps were trained"
    )
    result = Finished(
        model=folder / "model",
        step=best["step"],
        last_step=state["step"],
        stopped=stopped,
        tokens=state["tokens"],
        scores={name: value for name, value in best.items() if name != "step"},
        seconds=round(state["seconds"], 2),
    )
    if ranks.first:
        scratch = folder / ".model"
        for leftover in (scratch, result.model):
            shutil.rmtree(leftover, ignore_errors=True)  # of a kill between here and result.json
        shutil.copytree(
            checkpoints.step_folder(folder / "checkpoints", result.step),
            scratch,
            ignore=shutil.ignore_patterns(checkpoints.TRAINING),
        )
        checkpoints.publish(scratch, result.model)
        _write(folder / "result.json", {**asdict(result), "model": "model"})
    ranks.agree(None)
    return result


def _write(path: Path, content: Any) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    checkpoints.to_disk(scratch)
    os.replace(scratch, path)
    checkpoints.to_disk(path.parent)


def _log(path: Path, **fields: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")
