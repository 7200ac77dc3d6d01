"""How long a run trains, how fast, and how often something is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant"]


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
        for name in ("steps", "log_every", "save_every", "keep"):
            whole_number(name, getattr(self, name), 1)
        for name in ("evaluate_every", "patience"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        number("learning_rate", self.learning_rate, above=0)
        number("max_gradient_norm", self.max_gradient_norm, above=0)
        number("weight_decay", self.weight_decay, 0)
        one_of("schedule", self.schedule, get_args(Schedule))
        whole_number("warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} must end before the run does, at "
                f"steps={self.steps}."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} must be two numbers from 0 to below 1.")
        if self.patience is not None and self.evaluate_every is None:
            raise ConfigError(
                f"patience={self.patience} counts evaluations, and there are none before the end.",
                hint="Set evaluate_every as well.",
            )
