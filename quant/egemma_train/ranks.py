"""The processes of one run, as torchrun starts them: each embeds its share of the batch, all see
the whole loss.

torchrun --nproc-per-node 2 -m egemma_train run recipe.toml --out runs/mine
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egemma_core.errors import ConfigError, EgemmaError

if TYPE_CHECKING:
    from egemma_core.nn.encoder import Encoder

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and where it computes."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """Return this process's part of `total` rows.

        Raises:
            ConfigError: they do not divide evenly.
        """
        if total % self.count:
            raise ConfigError(
                f"A batch of {total} does not divide among {self.count} processes.",
                hint="Choose a multiple.",
            )
        each = total // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, mine: Tensor) -> Tensor:
        """Return (count, ...), the same-shaped tensors of all processes.

        A gradient reaches only this process's own.
        """
        if self.count == 1:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine.detach().contiguous())
        parts[self.rank] = mine
        return torch.stack(parts)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes, without a gradient."""
        total = value.detach().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def most(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        if self.count == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every `.grad` by its sum over all processes, in one message.

        Those of shards are sums already.
        """
        if self.count == 1:
            return
        gradients = [
            weight.grad for weight in parameters if weight.grad is not None and not is_shard(weight)
        ]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def agree(self, value: T) -> T:
        """Return the first process's value, on all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def of_first(self, work: Callable[[], T]) -> T:
        """Return what the first process's `work` gives, on all of them; the others do not call it.

        Its error is raised on all: none waits for it.
        """
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

    def shard(self, encoder: Encoder) -> None:
        """Keep only a share of every weight's rows in each process (FSDP2).

        Gradients and moments are divided likewise. A layer's weights are whole only while it
        computes, so every process must run the encoder equally often. A lone process keeps all.
        """
        if self.count == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in (*encoder.layers, encoder):
            # The outermost too: it would keep its weights whole behind a pass without gradients,
            # and not see the next step's.
            sharded = cast(FSDPModule, fully_shard(module, mesh=mesh, reshard_after_forward=True))
            sharded.set_gradient_divide_factor(1.0)  # the sum, where the default is the mean
            sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale all gradients so that together they are no longer than `limit`.

        Returns:
            How long they were.
        """
        found = [weight for weight in parameters if weight.grad is not None]
        kinds = [
            kind
            for kind in (
                [weight for weight in found if is_shard(weight)],
                [weight for weight in found if not is_shard(weight)],
            )
            if kind
        ]
        norms = [
            whole(
                nn.utils.get_total_norm([weight.grad for weight in kind if weight.grad is not None])
            )
            for kind in kinds
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, limit, norm)
        return float(norm)


ALONE = Ranks()


@contextmanager
def gathered(encoder: Encoder) -> Iterator[None]:
    """Make the encoder's parameters whole on every process while the block runs."""
    shards = []
    if any(map(is_shard, encoder.parameters())):
        from torch.distributed.fsdp import FSDPModule

        shards = [module for module in encoder.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


def is_shard(tensor: Tensor) -> bool:
    """Say whether this process holds only a share of a tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # a second of imports that a single process does not need
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole; every process must call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a whole tensor as `weight` is: on its device, and cut where that is a share."""
    if not is_shard(weight):
        return tensor.to(weight.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    return distribute_tensor(
        tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
    )


@contextmanager
def join(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one, if it did, for the block.

    Args:
        device: "cpu" or "cuda"; None for a GPU where there is one.

    Raises:
        ConfigError: "cuda" without one.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device={device!r} must be 'cpu' or 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda', but torch sees no GPU.",
            hint="Leave it out, or install a torch with CUDA.",
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    place = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        if kind == "cuda"
        else torch.device("cpu")
    )
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
