"""What quantization-aware training computed with is what stands in the finished files, to the last bit, after real optimizer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("executorch.runtime")

from egemma_export.read_executorch import read_pte_weights
from egemma_export.read_onnx import read_onnx_weights
from egemma_export.to_executorch import write_pte
from egemma_export.to_onnx import write_onnx
from egemma_quant.qat import QatEncoder
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Scheme
from tests.export.test_executorch import ONE_KEY_HEAD, make_encoder


def trained(scheme: Scheme) -> QatEncoder:
    """Three steps of Adam on random texts, from a fresh encoder."""
    qat = QatEncoder(make_encoder(ONE_KEY_HEAD), scheme)
    before = {name: weight.clone() for name, weight in qat.weights().items()}
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(3, 200, (8, 16), generator=random)
        vectors = qat(ids, torch.ones_like(ids, dtype=torch.bool))
        optimizer.zero_grad()
        (vectors @ vectors.T).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in qat.weights().items() if weight.ndim == 2)
    return qat


@pytest.mark.parametrize("scheme", [INT4, INT8_PER_CHANNEL, MIXED], ids=lambda scheme: scheme.name)
def test_the_trained_weights_are_those_in_the_pte(tmp_path: Path, scheme: Scheme) -> None:
    qat = trained(scheme)
    write_pte(qat.encoder, scheme, tmp_path / "model.pte")
    check(qat, {name: read.dequantize() for name, read in read_pte_weights(tmp_path / "model.pte").items()})


@pytest.mark.parametrize("scheme", [INT4, INT8, MIXED], ids=lambda scheme: scheme.name)
def test_the_trained_weights_are_those_in_the_onnx_file(tmp_path: Path, scheme: Scheme) -> None:
    qat = trained(scheme)
    write_onnx(qat.encoder, scheme, tmp_path / "model.onnx")
    check(qat, {name: read.dequantize() for name, read in read_onnx_weights(tmp_path / "model.onnx").items()})


def check(qat: QatEncoder, shipped: dict[str, torch.Tensor]) -> None:
    weights = qat.weights()
    assert shipped.keys() == {name for name, weight in weights.items() if weight.ndim == 2}, "the embedding table and the dense head included"
    for name, weight in shipped.items():
        assert torch.equal(weights[name], weight), name
