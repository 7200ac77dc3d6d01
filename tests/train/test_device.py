"""Every stage on a device that is not the CPU: nothing is computed there from tensors that stayed
here, and the numbers are the same.

No GPU is needed. `Away` is a tensor that says it is on another device ("meta", the only one that
every build of torch accepts) and refuses, as a GPU does, what also takes a tensor of the CPU;
numbers without dimensions and the indices of lookups are let through, as there. What this cannot
show: kernels, speed, autocast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.tokens import Tokenizer
from egemma_quant.schemes import INT4, MIXED, Q4_0
from egemma_train import checkpoints
from egemma_train.evaluate import DevConfig, DevSets
from egemma_train.loop import Objective
from egemma_train.objectives.contrast import Contrast, ContrastConfig
from egemma_train.ranks import Ranks
from tests.tiny import BOS, EOS, PAD, VOCAB
from tests.train.test_contrast import LOSS, matching
from tests.train.test_contrast import objective as contrast
from tests.train.test_denoise import TEXTS, denoising, language_model

AWAY = torch.device("meta")
TAKES_BOTH = ("copy_", "_to_copy", "index", "index_put", "index_put_")


class Away(Tensor):
    """Holds a tensor of the CPU, which does the arithmetic."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=AWAY,
        )  # type: ignore[attr-defined]
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    here = [
        tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Away) and tensor.ndim
    ]
    if away and here and func.overloadpacket.__name__ not in TAKES_BOTH:
        raise RuntimeError(f"{func}: tensors of {here} are on the CPU, others on {AWAY}")
    asked = kwargs.get("device")
    goes_away = bool(away) if asked is None else torch.device(asked) == AWAY
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made = func(*tree_map(held, args), **tree_map(held, kwargs))
    # what is changed in place stays the same object
    known = {id(tensor.held): tensor for tensor in away}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Away(value) if goes_away else value

    return tree_map(wrapped, made)


def held(value: Any) -> Any:
    return value.held if isinstance(value, Away) else value


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tensor, autocast = torch.tensor, torch.autocast

    # torch.tensor asks no mode for a tensor on "meta"
    def made_there(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    def autocast_where_it_exists(
        device_type: str, *args: Any, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == AWAY.type else autocast(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", made_there)
    monkeypatch.setattr(torch, "autocast", autocast_where_it_exists)
    with OtherDevice():
        yield


def gradients(objective: Objective) -> tuple[dict[str, float], dict[str, Tensor]]:
    losses = objective.backward(1).losses
    return losses, {
        name: weight.grad.cpu()
        for name, weight in objective.parameters().items()
        if weight.grad is not None
    }


def compare(make: Callable[[], Any], move: Callable[[Any], None]) -> None:
    """Loss and gradients there are those here; attention takes another way through torch, so not to
    the last bit.
    """
    losses, wanted = gradients(make())
    objective = make()
    move(objective)
    assert all(isinstance(weight, Away) for weight in objective.parameters().values())
    moved_losses, found = gradients(objective)
    assert moved_losses == pytest.approx(losses, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=1e-6,
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def move_contrast(objective: Contrast) -> None:
    objective.encoder.to(AWAY)
    objective.ranks = Ranks(device=AWAY)
    if objective.matching is not None:
        objective.matching.space.to(AWAY)


def move_texts(objective: Any) -> None:
    getattr(objective, "model", objective.encoder).to(AWAY)
    objective.ranks = Ranks(device=AWAY)


def test_the_other_device_refuses_what_stayed_here_and_computes_the_rest(
    other_device: None,
) -> None:
    there = torch.arange(3.0).to(AWAY)
    assert isinstance(there, Away)
    assert isinstance(torch.ones(3, device=AWAY), Away)
    assert isinstance(nn.Linear(3, 2).to(AWAY)(there), Away)
    # a number may come from anywhere
    assert (there * torch.tensor(2.0)).cpu().tolist() == [0, 2, 4]
    with pytest.raises(RuntimeError, match="on the CPU"):
        _ = there + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.where(torch.ones(3, dtype=torch.bool), there, there)


@pytest.mark.parametrize(
    "config",
    [
        LOSS,
        replace(LOSS, share_negatives=True, recompute=True),
        replace(LOSS, literal_mask=True, spread_out=0.0),
        replace(LOSS, matching=1.0),
    ],
)
def test_contrast(tiny_spm: Path, other_device: None, config: ContrastConfig) -> None:
    compare(
        lambda: contrast(tiny_spm, config, matching=matching() if config.matching else None),
        move_contrast,
    )


@pytest.mark.parametrize("scheme", [INT4, MIXED, Q4_0], ids=lambda scheme: scheme.name)
def test_quantization_aware_contrast(tiny_spm: Path, other_device: None, scheme: Any) -> None:
    compare(
        lambda: contrast(tiny_spm, LOSS, scheme=scheme, activations=True),
        move_contrast,
    )


def test_denoising_and_the_language_model(tiny_spm: Path, other_device: None) -> None:
    for make in (
        lambda: denoising(tiny_spm),
        lambda: denoising(tiny_spm, cross="fresh", cross_steps=5),
        lambda: language_model(tiny_spm),
    ):
        compare(make, move_texts)


def test_scores(tiny_spm: Path, tmp_path: Path, other_device: None) -> None:
    rows = [
        json.dumps({"query": text, "positive": other})
        for text, other in zip(TEXTS[:8], TEXTS[8:16], strict=True)
    ]
    (tmp_path / "dev.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = DevConfig(
        name="mine", path="dev.jsonl", kind="pairs", task="search result", max_tokens=48
    )
    dev = DevSets(
        (config,),
        tmp_path,
        Tokenizer(tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=64),
        EMBEDDING_GEMMA,
    )
    here, there = contrast(tiny_spm), contrast(tiny_spm)
    move_contrast(there)
    assert dev.score(there.encoder) == dev.score(here.encoder)


def test_a_state_is_saved_from_there_and_put_back_there(
    tiny_spm: Path, tmp_path: Path, other_device: None
) -> None:
    objectives = [contrast(tiny_spm), contrast(tiny_spm)]
    optimizers = []
    for objective in objectives:
        move_contrast(objective)
        parameters = objective.parameters()
        optimizers.append(torch.optim.AdamW(parameters.values(), lr=0.01, foreach=False))
    gradients(objectives[0])
    optimizers[0].step()
    objectives[0].save(tmp_path / "state")
    checkpoints.add_training_state(
        tmp_path / "state",
        objectives[0].parameters(),
        optimizers[0],
        checkpoints.moments_of(objectives[0].parameters(), optimizers[0]),
        {"step": 1},
    )
    assert checkpoints.restore(tmp_path / "state", objectives[1].parameters(), optimizers[1]) == {
        "step": 1
    }
    for (name, one), other in zip(
        objectives[0].parameters().items(), objectives[1].parameters().values(), strict=True
    ):
        assert torch.equal(one.detach().cpu(), other.detach().cpu()), name
        assert all(
            isinstance(optimizers[1].state[other][kind], Away) for kind in ("exp_avg", "exp_avg_sq")
        ), name
