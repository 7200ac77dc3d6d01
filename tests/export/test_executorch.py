"""The .pte against the float encoder, and its weights against the codes that were made.

One lowering takes 5 to 10 s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("executorch.runtime")

from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Method, Runtime

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import Encoder
from egemma_export.executorch_graph import DelegateEncoder
from egemma_export.executorch_weights import Embedding
from egemma_export.read_executorch import read_pte_weights
from egemma_export.to_executorch import LoweringReport, write_pte
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import (
    INT4,
    INT4_BLOCK,
    INT4_CHANNEL,
    INT8,
    INT8_BLOCK,
    INT8_CHANNEL,
    INT8_PER_CHANNEL,
    MIXED,
    Scheme,
    WeightFormat,
    quantize,
)
from tests.tiny import with_weights

# A window of 4 on texts of up to 48 tokens, so that the sliding rule, its edges and empty windows
# all matter.
ONE_KEY_HEAD = EncoderConfig(
    vocab_size=200,
    width=64,
    ffn_width=96,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    query_scale=32**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=48,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 128), (128, 64)),
    dims=(64, 32),
)
TWO_KEY_HEADS = replace(ONE_KEY_HEAD, num_heads=4, num_kv_heads=2)

# tokens, padding on the left, padding on the right
CASES = [
    (1, 0, 0),
    (2, 0, 0),
    (5, 0, 0),
    (6, 0, 0),
    (20, 0, 0),
    (48, 0, 0),
    (20, 7, 0),
    (20, 0, 7),
    (48, 30, 0),
    (48, 0, 40),
    (48, 20, 20),
]


def make_encoder(config: EncoderConfig) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            # Large enough that GELU and softmax are far from linear; norms are 1 + weight.
            weight.normal_(
                0,
                0.3
                if weight.ndim == 1
                else 0.05
                if name.startswith("embed")
                else 1.5 * weight.shape[1] ** -0.5,
            )
    return encoder


def make_text(tokens: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 200, (1, tokens), generator=torch.Generator().manual_seed(tokens + left))
    mask = torch.ones(1, tokens, dtype=torch.int64)
    mask[:, :left] = 0
    mask[:, tokens - right :] = 0
    return torch.where(mask.bool(), ids, 0), mask


def load(path: Path) -> Method:
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    return method


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path, LoweringReport]:
    encoder, path = make_encoder(ONE_KEY_HEAD), tmp_path_factory.mktemp("float") / "model.pte"
    return encoder, path, write_pte(encoder, None, path)


@pytest.fixture(
    scope="module",
    params=[(INT4, ONE_KEY_HEAD), (MIXED, TWO_KEY_HEADS), (INT8_PER_CHANNEL, ONE_KEY_HEAD)],
    ids=lambda param: param[0].name,
)
def quantized_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Encoder, Scheme, Path]:
    scheme, config = request.param
    encoder, path = make_encoder(config), tmp_path_factory.mktemp(scheme.name) / "model.pte"
    write_pte(encoder, scheme, path)
    return encoder, scheme, path


def test_a_float_file_gives_the_encoders_vectors(
    float_file: tuple[Encoder, Path, LoweringReport],
) -> None:
    encoder, path, _ = float_file
    method = load(path)
    for case in CASES:
        ids, mask = make_text(*case)
        with torch.no_grad():
            expected = encoder(ids, mask)
        # Measured 5e-7: sums in another order. XNNPACK's erf GELU or a window off by one give 1e-4
        # and more.
        torch.testing.assert_close(
            method.execute([ids, mask])[0],
            expected,
            rtol=0,
            atol=5e-6,
            msg=lambda text, case=case: f"{case}: {text}",
        )


def test_xnnpack_takes_the_whole_encoder(float_file: tuple[Encoder, Path, LoweringReport]) -> None:
    _, path, report = float_file
    assert report.delegates == 1
    assert report.outside == {
        "aten.embedding.default": 1,
        "aten._to_copy.default": 1,
        "aten.slice_copy.Tensor": 1,
        "sym_size.int": 1,
        "getitem": 1,
    }
    assert report.file_bytes == path.stat().st_size


def test_a_quantized_file_gives_the_vectors_of_its_dequantized_weights(
    quantized_file: tuple[Encoder, Scheme, Path],
) -> None:
    encoder, scheme, path = quantized_file
    method, reference = load(path), with_weights(encoder, quantize_encoder(encoder, scheme))
    for case in CASES:
        ids, mask = make_text(*case)
        found = method.execute([ids, mask])[0]
        with torch.no_grad():
            expected = reference(ids, mask)
        assert torch.isfinite(found).all(), case
        torch.testing.assert_close(found.norm(), torch.tensor(1.0), rtol=0, atol=1e-5)
        # The weights are equal; what differs is that activations are rounded to 8 bits per token.
        assert torch.cosine_similarity(found, expected).item() > 0.998, case


def test_a_quantized_file_holds_exactly_the_codes_and_scales_that_were_made(
    quantized_file: tuple[Encoder, Scheme, Path],
) -> None:
    encoder, scheme, path = quantized_file
    made, read = quantize_encoder(encoder, scheme), read_pte_weights(path)
    assert read.keys() == made.keys()
    for name, weight in made.items():
        assert torch.equal(read[name].codes, weight.codes), name
        assert torch.equal(read[name].scales, weight.scales), name
        assert read[name].format == weight.format, name


def test_a_float_file_has_no_codes(float_file: tuple[Encoder, Path, LoweringReport]) -> None:
    assert read_pte_weights(float_file[1]) == {}


@pytest.mark.parametrize(
    "config",
    [
        ONE_KEY_HEAD,
        TWO_KEY_HEADS,
        replace(ONE_KEY_HEAD, num_kv_heads=3),
        replace(ONE_KEY_HEAD, dense=(), dims=(64,)),
    ],
    ids=["one-key-head", "two-key-heads", "own-key-heads", "no-dense"],
)
def test_the_graph_computes_what_the_encoder_does(config: EncoderConfig) -> None:
    encoder = make_encoder(config)
    graph = DelegateEncoder(encoder, dict(encoder.state_dict()), config.max_tokens)
    for case in CASES:
        ids, mask = make_text(*case)
        with torch.no_grad():
            torch.testing.assert_close(graph(ids, mask), encoder(ids, mask), rtol=0, atol=5e-6)


def test_the_graph_is_right_beyond_the_real_window() -> None:
    config = replace(ONE_KEY_HEAD, window=256, max_tokens=2048)
    encoder = make_encoder(config)
    graph = DelegateEncoder(encoder, dict(encoder.state_dict()), 2048)
    for tokens, left in ((257, 0), (258, 0), (600, 0), (2048, 0), (2048, 1700)):
        ids, mask = make_text(tokens, left, 0)
        with torch.no_grad():
            torch.testing.assert_close(graph(ids, mask), encoder(ids, mask), rtol=0, atol=5e-6)


def test_table_scales_that_float16_cannot_hold_stay_float32() -> None:
    encoder = make_encoder(ONE_KEY_HEAD)
    kept = DelegateEncoder(encoder, dict(quantize_encoder(encoder, INT4)), 48).embed_tokens.scales
    assert kept.dtype == torch.float16
    with torch.no_grad():
        # scales of 1e-8 and less: below float16's smallest step of 6e-8
        encoder.embed_tokens.weight.mul_(1e-6)
    quantized: dict[str, Any] = dict(quantize_encoder(encoder, INT4))
    kept = DelegateEncoder(encoder, quantized, 48).embed_tokens.scales
    assert kept.dtype == torch.float32
    assert torch.equal(kept, quantized["embed_tokens.weight"].scales)


def test_blockwise_8_bit_linears_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int8-per-channel"):
        write_pte(make_encoder(ONE_KEY_HEAD), INT8, tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "weight_format", [INT4_BLOCK, INT4_CHANNEL, INT8_BLOCK, INT8_CHANNEL], ids=str
)
def test_a_looked_up_row_is_exactly_code_times_scale(weight_format: WeightFormat) -> None:
    weight = quantize(make_encoder(ONE_KEY_HEAD).embed_tokens.weight, weight_format)
    ids, _ = make_text(20, 0, 0)
    program = to_edge_transform_and_lower(
        torch.export.export(Embedding(weight), (ids,))
    ).to_executorch()
    found = Runtime.get().load_program(program.buffer).load_method("forward").execute([ids])[0]
    assert torch.equal(found[0], weight.dequantize()[ids[0]])


def test_a_pooling_that_the_graph_does_not_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pooling='last'"):
        write_pte(make_encoder(replace(ONE_KEY_HEAD, pooling="last")), None, tmp_path / "model.pte")
