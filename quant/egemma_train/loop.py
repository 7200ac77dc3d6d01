"""The loop of every stage: an objective, AdamW, states on disk from which a killed run goes on
exactly, a log, early stopping.

What a run leaves in its folder is described in egemma_train.run_folder.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from egemma_core.errors import EgemmaError
from egemma_core.files import flush, publish_folder
from egemma_train import checkpoints
from egemma_train.loop_config import LoopConfig
from egemma_train.optimizer import learning_rate, make_optimizer
from egemma_train.ranks import ALONE, Ranks, is_shard
from egemma_train.run_folder import Finished, add_to_log, finish, open_run


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
        """Return all that may be trained, float32, by name."""

    def backward(self, step: int) -> Outcome:
        """Add the gradient of that step's loss to `.grad`, which is None before.

        A pure function of the weights and `step`, so that a run can go on from any state. A
        parameter whose `.grad` stays None is not moved.
        """

    def evaluate(self) -> dict[str, float]:
        """Return dev scores, higher is better, "score" among them; empty without a dev set."""

    def save(self, folder: Path) -> None:
        """Write a checkpoint in the published layout; `folder` does not exist yet.

        The first process calls it; of shards all do, and the first writes.
        """


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is after a step."""

    step: int
    steps: int
    outcome: Outcome
    seconds_left: float
    tokens_per_second: float
    scores: dict[str, float] | None  # where this step was evaluated


def run(
    objective: Objective,
    config: LoopConfig,
    folder: Path,
    described: Mapping[str, Any] | None = None,
    *,
    ranks: Ranks = ALONE,
    on_step: Callable[[Progress], None] = lambda progress: None,
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
        on_step: called by the first process after every step.
        draw: makes the second file, a picture, of the first, the log, with every state; see
            egemma_train.curves.

    Raises:
        DivergedError: the loss is NaN or infinite; the last good state stays in `folder`.
        ConfigError: `folder` holds a run with other settings.
        CheckpointError: the newest state cannot be read.
    """
    asked = {**(described or {}), "loop": asdict(config)}
    finished = ranks.of_first(lambda: open_run(folder, asked, objective.parameters()))
    if finished is not None:
        return finished
    trained = _Run(objective, config, folder, ranks)
    clock = _Clock(trained.state)
    while trained.state["step"] < config.steps and not trained.has_given_up:
        outcome, rate, norm = trained.step()
        scores, is_better = trained.evaluate()
        trained.state["seconds"] = clock.seconds()
        if scores:
            trained.keep_score(scores, is_better)
        if ranks.first:
            trained.log(outcome, rate, norm, scores)
            on_step(clock.progress(trained.state, config, outcome, scores))
        if trained.is_state_due(is_better):
            trained.save()
            # from then on there is a line of a step
            drawable = trained.is_last or trained.state["step"] >= config.log_every
            if draw is not None and ranks.first and drawable:
                draw(trained.log_path, folder / "curves.png")
    return trained.finish()


class _Clock:
    """The seconds of a run over all sessions, and how fast this session is."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._before, self._started = state["seconds"], time.monotonic()
        self._first_step, self._first_tokens = state["step"], state["tokens"]

    def seconds(self) -> float:
        return float(self._before + time.monotonic() - self._started)

    def progress(
        self,
        state: Mapping[str, Any],
        config: LoopConfig,
        outcome: Outcome,
        scores: dict[str, float] | None,
    ) -> Progress:
        spent = state["seconds"] - self._before
        done = state["step"] - self._first_step
        return Progress(
            step=state["step"],
            steps=config.steps,
            outcome=outcome,
            scores=scores,
            seconds_left=spent / done * (config.steps - state["step"]),
            tokens_per_second=(state["tokens"] - self._first_tokens) / max(1e-9, spent),
        )


class _Run:
    """A run between its last state on disk and its end."""

    def __init__(
        self, objective: Objective, config: LoopConfig, folder: Path, ranks: Ranks
    ) -> None:
        self.objective, self.config, self.folder, self.ranks = objective, config, folder, ranks
        self.parameters = objective.parameters()
        self.optimizer = make_optimizer(self.parameters, config)
        self.log_path, self.states = folder / "log.jsonl", folder / "checkpoints"
        self.state: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "seconds": 0.0,
            "scores": {},
            "best": None,
            "since_best": 0,
            "log_bytes": 0,
        }
        found = ranks.agree(checkpoints.steps_in(self.states) if ranks.first else None)
        if found:
            newest = checkpoints.step_folder(self.states, found[-1])
            self.state |= checkpoints.restore(newest, self.parameters, self.optimizer)
        if ranks.first and self.log_path.exists():
            os.truncate(self.log_path, self.state["log_bytes"])

    @property
    def has_given_up(self) -> bool:
        """Say whether the dev score has not risen for as long as the run is patient."""
        patience = self.config.patience
        return patience is not None and self.state["since_best"] >= patience

    @property
    def is_last(self) -> bool:
        """Say whether the last of all steps was trained."""
        return bool(self.state["step"] == self.config.steps)

    def is_state_due(self, is_better: bool) -> bool:
        """Say whether a state is to be written after this step."""
        return (
            self.is_last
            or self.has_given_up
            or self.state["step"] % self.config.save_every == 0
            or (is_better and self.config.patience is not None)
        )

    def step(self) -> tuple[Outcome, float, float]:
        """Train one step; return what it computed, its learning rate and its gradient's norm.

        Raises:
            DivergedError: the loss or the norm is no number.
        """
        step = self.state["step"]
        rate = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        outcome = self.objective.backward(step)
        norm = self.ranks.clip(self.parameters.values(), self.config.max_gradient_norm)
        if not (math.isfinite(outcome.losses["loss"]) and math.isfinite(norm)):
            raise self._diverged(outcome, norm)
        self.optimizer.step()
        self.state["step"], self.state["tokens"] = step + 1, self.state["tokens"] + outcome.tokens
        return outcome, rate, norm

    def _diverged(self, outcome: Outcome, norm: float) -> DivergedError:
        steps = checkpoints.steps_in(self.states)
        kept = f"the state of step {max(steps)} in {self.states} is intact" if steps else ""
        return DivergedError(
            f"step {self.state['step']} ({outcome.source}): loss={outcome.losses['loss']}, "
            f"gradient norm={norm}; {kept or 'no state was saved yet'}.",
            hint=f"Lower learning_rate={self.config.learning_rate}, or look at the dataset's rows.",
        )

    def evaluate(self) -> tuple[dict[str, float] | None, bool]:
        """Return the dev scores where they are due, and whether they are the best so far."""
        every = self.config.evaluate_every
        if not (self.is_last or (every is not None and self.state["step"] % every == 0)):
            return None, False
        scores = self.ranks.agree(self.objective.evaluate())
        best = self.state["best"]
        return scores, bool(scores and (best is None or scores["score"] > best["score"]))

    def keep_score(self, scores: dict[str, float], is_better: bool) -> None:
        """Put dev scores into the state."""
        self.state["scores"] = scores
        if is_better:
            self.state["best"] = {"step": self.state["step"], **scores}
        self.state["since_best"] = 0 if is_better else self.state["since_best"] + 1

    def log(
        self, outcome: Outcome, rate: float, norm: float, scores: dict[str, float] | None
    ) -> None:
        """Add the lines of a step and of its evaluation to the log, where they are due."""
        state = self.state
        if state["step"] % self.config.log_every == 0 or self.is_last:
            add_to_log(
                self.log_path,
                step=state["step"],
                source=outcome.source,
                **{key: round(value, 5) for key, value in outcome.losses.items()},
                gradient_norm=round(norm, 4),
                learning_rate=rate,
                tokens=state["tokens"],
                seconds=round(state["seconds"], 2),
            )
        if scores:
            add_to_log(self.log_path, step=state["step"], dev=scores)

    def save(self) -> None:
        """Write the state of this step, and remove those that are no longer kept."""
        step, first = self.state["step"], self.ranks.first
        is_sharded = any(map(is_shard, self.parameters.values()))
        folder = checkpoints.step_folder(self.states, step)
        scratch = folder.with_name(f".new-{folder.name}")
        if first:
            self.states.mkdir(exist_ok=True)
        if first or is_sharded:
            self.objective.save(scratch)
            moments = checkpoints.moments_of(self.parameters, self.optimizer)
        if first:
            if self.log_path.exists():
                flush(self.log_path)  # before a state that counts its bytes
                flush(self.log_path.parent)
                self.state["log_bytes"] = self.log_path.stat().st_size
            checkpoints.add_training_state(
                scratch, self.parameters, self.optimizer, moments, self.state
            )
            publish_folder(scratch, folder)
            best = self.state["best"]
            is_best_kept = best is not None and self.config.patience is not None
            kept = {
                *checkpoints.steps_in(self.states)[-self.config.keep :],
                best["step"] if is_best_kept else step,
            }
            for old in set(checkpoints.steps_in(self.states)) - kept:
                checkpoints.forget(checkpoints.step_folder(self.states, old))
        self.ranks.agree(None)  # nobody runs ahead of the file

    def finish(self) -> Finished:
        """Write the result, and return it."""
        state, patience = self.state, self.config.patience
        best = {"step": state["step"], **state["scores"]}
        if patience is not None and state["best"]:
            best = state["best"]
        result = Finished(
            model=self.folder / "model",
            step=best["step"],
            last_step=state["step"],
            stopped=f"no better score in {patience} evaluations"
            if self.has_given_up
            else "all steps were trained",
            tokens=state["tokens"],
            scores={name: value for name, value in best.items() if name != "step"},
            seconds=round(state["seconds"], 2),
        )
        if self.ranks.first:
            finish(self.folder, result)
        self.ranks.agree(None)
        return result
