"""Compiled layers compute what they computed before, in every kind of stage; what cannot be
compiled says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from egemma_core.errors import ConfigError, MissingDependencyError
from egemma_core.nn.compiled import is_compiled
from egemma_quant.qat import rounded
from egemma_quant.schemes import INT4
from egemma_train import compiled
from egemma_train.compiled import compile_layers
from egemma_train.data.texts import TextConfig
from egemma_train.loop import Objective
from egemma_train.start.decoder import random_encoder
from tests.train.test_contrast import CONFIG, LOSS
from tests.train.test_contrast import objective as contrast
from tests.train.test_denoise import SMALL, denoising, language_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _graphs() -> Iterator[None]:
    """Each test compiles anew, and leaves torch's settings as they were."""
    import torch._dynamo

    torch.compiler.reset()
    with torch._dynamo.config.patch(
        recompile_limit=torch._dynamo.config.recompile_limit,
        fail_on_recompile_limit_hit=torch._dynamo.config.fail_on_recompile_limit_hit,
    ):
        yield
    torch.compiler.reset()


def gradients(objective: Objective, step: int) -> tuple[float, dict[str, Tensor]]:
    for weight in objective.parameters().values():
        weight.grad = None
    loss = objective.backward(step).losses["loss"]
    return loss, {
        name: weight.grad.clone()
        for name, weight in objective.parameters().items()
        if weight.grad is not None
    }


def compare(plain: Objective, fast: Objective, steps: int) -> None:
    for step in range(steps):
        (loss, wanted), (fast_loss, found) = gradients(plain, step), gradients(fast, step)
        assert fast_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                found[name],
                gradient,
                atol=1e-6,
                rtol=1e-3,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.timeout(600)
def test_compiled_layers_give_the_gradients_of_plain_ones_also_of_rounded_weights(
    tiny_spm: Path,
) -> None:
    """Chunks of one text and of several, first without gradients (recompute); the rounded weights
    are read anew each time.
    """
    config = replace(LOSS, recompute=True, chunk_tokens=60)
    plain, fast = (
        contrast(
            tiny_spm,
            replace(config, compile=compile),
            scheme=INT4,
        )
        for compile in (False, True)
    )
    assert is_compiled(fast.encoder)
    assert not is_compiled(plain.encoder)
    compare(plain, fast, 1)
    for objective in (plain, fast):
        with torch.no_grad():
            for weight in objective.parameters().values():
                weight.mul_(1.5)
    compare(plain, fast, 1)


@pytest.mark.timeout(600)
def test_the_text_stages_are_compiled_too(tiny_spm: Path) -> None:
    short: TextConfig = replace(SMALL, chunk_tokens=10**6)  # one chunk, one graph
    fast = denoising(tiny_spm, replace(short, compile=True))
    assert is_compiled(fast.model.decoder)
    compare(denoising(tiny_spm, short), fast, 1)
    assert is_compiled(language_model(tiny_spm, replace(short, compile=True)).encoder)


def test_too_many_graphs_are_an_error_and_not_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    encoder = random_encoder(CONFIG, 0)
    compile_layers(encoder.layers, CPU)
    with torch.no_grad():
        encoder(torch.full((2, 5), 7), torch.ones(2, 5))
        with pytest.raises(Exception, match="recompile_limit"):
            encoder(torch.full((1, 5), 7), torch.ones(1, 5))


def test_no_compiler_and_what_does_not_go_together_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = random_encoder(CONFIG, 0)
    with pytest.raises(MissingDependencyError, match="Triton"):
        compile_layers(encoder.layers, torch.device("cuda"))
    compile_layers(encoder.layers, CPU)
    with (
        pytest.raises(ConfigError, match="compiled encoder"),
        rounded(encoder, INT4, activations=True),
    ):
        pass
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    for cached in (cpp_builder.get_cpp_compiler, getattr(cpp_builder, "cpp_compiler_search", None)):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"g\+\+"):
        compile_layers(encoder.layers, CPU)
