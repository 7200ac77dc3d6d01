"""The grids of ggml, against the gguf package, which llama.cpp's authors write; and how a published
checkpoint is recognized.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import ConfigError
from egemma_quant.ggml import GgmlFormat, hint, published_grid
from egemma_quant.schemes import Q4_0, Q8_0, quantize

MODEL = Path(__file__).resolve().parents[2] / "models" / "egemma-small"


def blocks() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 96, generator=random) * 0.05
    weight[0] = 0
    weight[1] = 1e-30  # nothing is left of it in float16
    weight[2] = torch.randint(-8, 9, (96,), generator=random)  # ties of +8 and -8, and halves
    weight[3] *= 1e4
    weight[4] *= 1e-5  # scales among float16's subnormal numbers
    weight[5, ::2] = weight[5, 1::2].neg()  # largest twice, with both signs
    return weight


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_scales_and_values_are_those_of_gguf(bits: int) -> None:
    quants = pytest.importorskip("gguf.quants", reason="pip install 'egemma[dev]'")
    from gguf import GGMLQuantizationType

    kind = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}[bits]
    with np.errstate(all="ignore"):
        packed = quants.quantize(blocks().numpy(), kind)  # (rows, G * bytes of a block)
    wanted = quants.dequantize(packed, kind)
    found = quantize(blocks(), GgmlFormat(bits=bits))
    np.testing.assert_array_equal(found.dequantize().numpy(), wanted)
    raw = packed.reshape(300, 3, -1)
    np.testing.assert_array_equal(
        found.scales.numpy(), raw[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32)
    )
    payload = raw[:, :, 2:]
    codes = (
        payload.view(np.int8)
        if bits == 8
        else np.concatenate((payload & 15, payload >> 4), -1).astype(np.int8) - 8
    )
    kept = found.scales.numpy() != 0  # codes of a block of zeros mean nothing
    np.testing.assert_array_equal(found.codes.numpy().reshape(300, 3, 32)[kept], codes[kept])


def test_the_largest_value_decides_the_sign_of_a_q4_0_scale() -> None:
    # Largest magnitude +4 -> d = -1/2, and +4 is the code -8; -3.5 is the code 7; 0.25 / -0.5 + 8.5
    # = 8 -> 0; -0.25 gives 9 -> 1, not half to even.
    row = torch.zeros(1, 32)
    row[0, :5] = torch.tensor([4.0, -3.5, 0.25, -4.0, -0.25])
    found = quantize(row, GgmlFormat(bits=4))
    assert found.scales.tolist() == [[-0.5]]
    assert found.codes[0, :5].tolist() == [-8, 7, 0, 7, 1]  # -4 would be 8, which does not exist


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_on_the_grid_stays_as_it_is(bits: int) -> None:
    once = quantize(blocks(), GgmlFormat(bits=bits)).dequantize()
    assert torch.equal(quantize(once, GgmlFormat(bits=bits)).dequantize(), once)


def test_weights_beyond_float16_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match="beyond float16"):
        quantize(torch.full((1, 32), 1e7), GgmlFormat(bits=4))
    with pytest.raises(ConfigError, match="blocks of 32"):
        GgmlFormat(bits=4, group_size=64)


def test_the_table_of_q4_0_has_8_bits_as_in_ggmls_file() -> None:
    assert [
        Q4_0.format_of(role).bits
        for role in ("embedding", "attention", "feed_forward", "projection")
    ] == [8, 4, 4, 4]
    assert Q8_0.embedding == GgmlFormat(bits=8)


def test_a_published_checkpoint_is_known_by_its_names_and_another_scheme_gets_a_hint(
    tmp_path: Path,
) -> None:
    assert published_grid(open_checkpoint(MODEL)) is None
    assert hint(open_checkpoint(MODEL), "int4") is None
    named = tmp_path / "embeddinggemma-300m-qat-q8_0-unquantized"
    shutil.copytree(MODEL, named)
    assert published_grid(open_checkpoint(named)) == "q8_0"
    assert hint(open_checkpoint(named), "q8_0") is None
    assert "trained for q8_0, and int4 rounds it otherwise" in (
        hint(open_checkpoint(named), "int4") or ""
    )

    tuned = tmp_path / "my-model"
    shutil.copytree(MODEL, tuned)
    (tuned / "README.md").write_text(
        "# Mine\nBeside google/embeddinggemma-300m-qat-q4_0-unquantized.\n"
    )
    assert published_grid(open_checkpoint(tuned)) is None
    (tuned / "README.md").write_text(
        "---\nbase_model: google/embeddinggemma-300m-qat-q4_0-unquantized\n---\n# Mine\n"
    )
    assert published_grid(open_checkpoint(tuned)) == "q4_0"
