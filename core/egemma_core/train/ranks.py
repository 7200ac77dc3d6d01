"""The processes of one run, as torchrun starts them: each embeds its share of the batch, all see the whole loss.

    torchrun --nproc-per-node 2 -m egemma_core.train run recipe.toml --out runs/mine
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egemma_core.errors import ConfigError, EgemmaError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and where it computes."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of `total` rows.

        Raises:
            ConfigError: they do not divide evenly.
        """
        if total % self.count:
            raise ConfigError(f"a batch of {total} does not divide among {self.count} processes; choose a multiple.")
        each = total // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, mine: Tensor) -> Tensor:
        """(count, ...) the same-shaped tensors of all processes; a gradient reaches only this one's own."""
        if self.count == 1:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine.detach().contiguous())
        parts[self.rank] = mine
        return torch.stack(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, without a gradient."""
        total = value.detach().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every `.grad` by its sum over all processes, in one message per dtype."""
        if self.count == 1:
            return
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def agree(self, value: T) -> T:
        """The first process's value, on all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def of_first(self, work: Callable[[], T]) -> T:
        """What the first process's `work` gives, on all of them; the others do not call it. Its error is raised on all: none waits for it."""
        if self.count == 1:
            return work()
        found: tuple[T | None, EgemmaError | None] = (None, None)
        if self.first:
            try:
                found = (work(), None)
            except EgemmaError as error:
                found = (None, error)
        value, failed = self.agree(found)
        if failed is not None:
            raise failed
        return cast(T, value)


ALONE = Ranks()


@contextmanager
def join(device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started with this one, or this one alone.

    Args:
        device: "cpu" or "cuda"; None for a GPU where there is one.

    Raises:
        ConfigError: "cuda" without one.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device={device!r}: 'cpu' or 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU. Leave it out, or install a torch with CUDA.")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Ranks(device=place)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, place)
    finally:
        dist.destroy_process_group()
