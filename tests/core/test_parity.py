"""The float encoder against transformers + sentence-transformers, on folders that those libraries
wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.encoder import Encoder, RMSNorm, rotary_tables, rotate
from egemma_core.nn.load import load_encoder
from models.make_checkpoint import load_reference, load_reference_model, write_checkpoint

pytest.importorskip(
    "sentence_transformers", reason="the parity reference; pip install 'egemma[dev]'"
)

# Unit vectors of 768 float32 channels, sums in another order. Measured: 3e-7 (tiny), 1e-6 (full
# size).
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> tuple[Encoder, Any]:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", tiny_spm)
    return load_encoder(open_checkpoint(folder)), load_reference(folder)


def compare(encoder: Encoder, reference: Any, lengths: list[int], side: str = "right") -> float:
    """Largest difference of any channel, for one batch of random texts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, part] = torch.randint(3, encoder.config.vocab_size, (length,), generator=generator)
        mask[row, part] = 1
    with torch.no_grad():
        ours = encoder(ids, mask)
    assert torch.isfinite(ours).all()
    return float((ours - reference(ids, mask)).abs().max())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 9, 40, 96])
def test_a_single_text_has_the_reference_vector(tiny: tuple[Encoder, Any], length: int) -> None:
    assert compare(*tiny, [length]) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_has_the_reference_vectors(tiny: tuple[Encoder, Any], side: str) -> None:
    assert compare(*tiny, [1, 2, 7, 30], side) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_that_are_all_padding_give_no_nan_and_move_nothing(
    tiny: tuple[Encoder, Any], side: str
) -> None:
    # 3 real tokens among 90: most rows of the sliding layers see padding only. transformers gives
    # NaN or not depending on its release, so the short text alone is the reference.
    encoder, reference = tiny
    ids, mask = torch.full((1, 90), 7), torch.zeros(1, 90, dtype=torch.int64)
    part = slice(0, 3) if side == "right" else slice(87, 90)
    ids[0, part] = torch.tensor([2, 50, 1])
    mask[0, part] = 1
    with torch.no_grad():
        padded = encoder(ids, mask)
    assert torch.isfinite(padded).all()
    alone = reference(torch.tensor([[2, 50, 1]]), torch.ones(1, 3))
    assert float((padded - alone).abs().max()) <= TOLERANCE


def test_several_key_value_heads_have_the_reference_vector(tmp_path: Path, tiny_spm: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "grouped", "tiny", tiny_spm, num_attention_heads=6, num_key_value_heads=2
    )
    assert (
        compare(load_encoder(open_checkpoint(folder)), load_reference(folder), [5, 33]) <= TOLERANCE
    )


def test_bfloat16_weights_stay_near_the_float_vectors(tmp_path: Path, tiny_spm: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "tiny", tiny_spm)
    checkpoint = open_checkpoint(folder)
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wide = load_encoder(checkpoint)(ids, torch.ones_like(ids))
        narrow = load_encoder(checkpoint, torch.bfloat16)(ids, torch.ones_like(ids))
    assert narrow.dtype == torch.float32
    assert float((wide * narrow).sum(-1).min()) > 0.995
    assert not torch.equal(wide, narrow)


def test_every_gradient_is_the_references(tmp_path: Path, tiny_spm: Path) -> None:
    """Norms and rotations are differentiated by hand."""
    folder = write_checkpoint(tmp_path / "m", "tiny", tiny_spm)
    encoder, model = (
        load_encoder(open_checkpoint(folder)).requires_grad_(),
        load_reference_model(folder),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, encoder.config.vocab_size, (4, 30), generator=generator)
    mask = torch.arange(30)[None, :] < torch.tensor([30, 17, 2, 1])[:, None]
    outer = torch.randn(4, encoder.config.dims[0], generator=generator)
    (encoder(ids, mask) * outer).sum().backward()
    (
        model.forward({"input_ids": ids, "attention_mask": mask.long()})["sentence_embedding"]
        * outer
    ).sum().backward()
    theirs = dict(model[0].auto_model.named_parameters())
    theirs |= {
        f"dense.{index}.weight": model[2 + index].linear.weight
        for index in range(len(encoder.dense))
    }
    ours = dict(encoder.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        scale = float(theirs[name].grad.abs().max())
        assert scale > 0, name
        assert float((weight.grad - theirs[name].grad).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_keep_little_for_the_way_back(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 7, 16).to(dtype).requires_grad_()
    tables = rotary_tables(7, 16, 1e4, torch.zeros(1))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        RMSNorm(16, 1e-6)(x)
        assert len(kept) == 3
        assert {(tuple(tensor.shape), tensor.dtype) for tensor in kept} == {
            ((2, 3, 7, 16), dtype),
            ((2, 3, 7, 1), torch.float32),
            ((16,), torch.float32),
        }
        kept.clear()
        rotate(x, tables)
    assert {tuple(tensor.shape) for tensor in kept} == {(7, 16)}


@pytest.mark.full_size
@pytest.mark.timeout(1800)
def test_the_full_size_has_the_reference_vectors(full_size_checkpoint: Path) -> None:
    encoder, reference = (
        load_encoder(open_checkpoint(full_size_checkpoint)),
        load_reference(full_size_checkpoint),
    )
    worst = {
        str(lengths): compare(encoder, reference, lengths)
        for lengths in ([1], [2], [256], [257], [258], [600], [2048], [3, 258, 600], [2, 31, 300])
    }
    print(
        "\nlargest difference of unit vectors:",
        {key: f"{value:.1e}" for key, value in worst.items()},
    )
    assert max(worst.values()) <= TOLERANCE
