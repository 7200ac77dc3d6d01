"""The optimizer of every stage, and its learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from egemma_train.loop_config import LoopConfig
from egemma_train.ranks import is_shard

FINAL_SHARE = 0.01  # of the peak learning rate, at the end of a cosine or linear schedule


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters; only matrices that multiply are decayed."""
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
    """Return the learning rate of a step, from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        config.schedule
    ]
    return config.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * left)
