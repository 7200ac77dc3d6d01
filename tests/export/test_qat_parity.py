"""What quantization-aware training computed with is what stands in the finished files, to the last
bit, after real optimizer steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("executorch.runtime")

from egemma_core.errors import ExportError
from egemma_core.nn.encoder import Encoder
from egemma_export.read_executorch import read_pte_weights
from egemma_export.read_onnx import read_onnx_weights
from egemma_export.to_executorch import write_pte
from egemma_export.to_onnx import write_onnx
from egemma_quant.qat import rounded
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Q4_0, Q8_0, Scheme, quantize
from tests.export.test_executorch import ONE_KEY_HEAD, make_encoder


def trained(scheme: Scheme) -> tuple[Encoder, dict[str, torch.Tensor]]:
    """An encoder after three steps of Adam on random texts, and the weights with which a fourth
    forward pass computes.
    """
    encoder = make_encoder(ONE_KEY_HEAD)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(0)
    before = computed_with(encoder, scheme)
    for _ in range(3):
        ids = torch.randint(3, 200, (8, 16), generator=random)
        optimizer.zero_grad()
        with rounded(encoder, scheme):
            vectors = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
            (vectors @ vectors.T).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = computed_with(encoder, scheme)
    assert all(not torch.equal(weight, before[name]) for name, weight in after.items())
    return encoder, after


def computed_with(encoder: Encoder, scheme: Scheme) -> dict[str, torch.Tensor]:
    with rounded(encoder, scheme):
        return {
            name: weight.detach().clone()
            for name, weight in encoder.named_parameters()
            if weight.ndim == 2
        }


@pytest.mark.parametrize("scheme", [INT4, INT8_PER_CHANNEL, MIXED], ids=lambda scheme: scheme.name)
def test_the_trained_weights_are_those_in_the_pte(tmp_path: Path, scheme: Scheme) -> None:
    encoder, weights = trained(scheme)
    write_pte(encoder, scheme, tmp_path / "model.pte")
    check(
        weights,
        {
            name: read.dequantize()
            for name, read in read_pte_weights(tmp_path / "model.pte").items()
        },
    )


@pytest.mark.parametrize("scheme", [INT4, INT8, MIXED, Q4_0, Q8_0], ids=lambda scheme: scheme.name)
def test_the_trained_weights_are_those_in_the_onnx_file(tmp_path: Path, scheme: Scheme) -> None:
    encoder, weights = trained(scheme)
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    check(
        weights,
        {
            name: read.dequantize()
            for name, read in read_onnx_weights(tmp_path / "model.onnx").items()
        },
    )


def test_onnx_runtime_computes_with_ggmls_negative_scales(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    encoder, weights = trained(Q4_0)
    assert all(
        (quantize(weight, Q4_0.format_of("attention")).scales < 0).float().mean() > 0.3
        for weight in weights.values()
    )
    write_onnx(encoder, Q4_0, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    ids = torch.randint(3, 200, (8, 16), generator=torch.Generator().manual_seed(1))
    vectors = torch.from_numpy(
        session.run(
            None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        )[0]
    )
    with torch.no_grad(), rounded(encoder, Q4_0):
        wanted = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    # What differs is that activations are rounded to 8 bits, as for int4: a scale taken as positive
    # turns products around.
    assert torch.cosine_similarity(vectors, wanted).min() > 0.998


@pytest.mark.parametrize("scheme", [Q4_0, Q8_0], ids=lambda scheme: scheme.name)
def test_executorch_refuses_ggmls_scales(tmp_path: Path, scheme: Scheme) -> None:
    with pytest.raises(ExportError, match="refuses negative ones"):
        write_pte(make_encoder(ONE_KEY_HEAD), scheme, tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


def check(weights: dict[str, torch.Tensor], shipped: dict[str, torch.Tensor]) -> None:
    assert shipped.keys() == weights.keys(), "the embedding table and the dense head included"
    for name, weight in shipped.items():
        assert torch.equal(weights[name], weight), name
