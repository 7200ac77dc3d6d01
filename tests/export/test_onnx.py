"""The ONNX graph computes what the encoder computes, and holds the integers that the quantizer
made.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the first import of onnxruntime

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import Encoder
from egemma_export.read_onnx import read_onnx_weights
from egemma_export.to_onnx import write_onnx
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import INT4, INT8, INT8_PER_CHANNEL, MIXED, Scheme, WeightFormat
from tests.tiny import with_weights

CONFIG = EncoderConfig(
    vocab_size=200,
    width=64,
    ffn_width=96,
    num_layers=3,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    query_scale=0.2,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL, SLIDING),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e2,
    max_tokens=64,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 128), (128, 64)),
    dims=(64, 32),
)
TWO_KV_HEADS = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=2)
ALL_SCHEMES = [INT4, INT8, INT8_PER_CHANNEL, MIXED]
# Activations are rounded to 8 bits, which turns these small random vectors by up to 1.6e-2 radians
# (cosine 0.99988 measured).
ROUNDED_ACTIVATIONS = 0.9995
# Float32 sums in another order; measured 2e-7.
FLOAT_SUMS = 1e-5
Vectors = NDArray[np.float32]


def tiny_encoder(config: EncoderConfig = CONFIG, seed: int = 0) -> Encoder:
    """Random, with norms and attention far from trivial, so that no part of the graph could be left
    out unseen.
    """
    torch.manual_seed(seed)
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.3)
    return encoder


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def embed(runtime: onnxruntime.InferenceSession, ids: Tensor, mask: Tensor) -> Vectors:
    return runtime.run(
        ["sentence_embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
    )[0]


def reference(encoder: Encoder, ids: Tensor, mask: Tensor) -> Vectors:
    with torch.no_grad():
        return encoder(ids, mask).numpy()


def texts(*lengths: int, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, CONFIG.vocab_size, (length,), generator=random) for length in lengths]


def padded(rows: list[Tensor], side: str, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask; padding holds id 199 and not 0, so that a leak shows."""
    width = tokens or max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 199), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, True
    return ids, mask


def cosines(one: Vectors, other: Vectors) -> Vectors:
    return (one * other).sum(-1)


@pytest.mark.parametrize("config", [CONFIG, TWO_KV_HEADS], ids=["one_kv_head", "two_kv_heads"])
def test_the_float_graph_equals_the_encoder_within_and_beyond_the_window(
    config: EncoderConfig, tmp_path: Path
) -> None:
    encoder = tiny_encoder(config)
    write_onnx(encoder, None, tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    for length in (1, 2, 5, 6, 17, 64):  # the window reaches 4 tokens to each side
        ids, mask = padded(texts(length, length), "right")
        np.testing.assert_allclose(
            embed(runtime, ids, mask), reference(encoder, ids, mask), atol=FLOAT_SUMS
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_float_graph_equals_the_encoder_on_ragged_batches(side: str, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    write_onnx(encoder, None, tmp_path / "model.onnx")
    ids, mask = padded(texts(1, 3, 30, 12), side)
    found = embed(session(tmp_path / "model.onnx"), ids, mask)
    np.testing.assert_allclose(found, reference(encoder, ids, mask), atol=FLOAT_SUMS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_bfloat16_encoder_is_written_in_float32(tmp_path: Path) -> None:
    encoder = tiny_encoder().bfloat16()
    write_onnx(encoder, None, tmp_path / "model.onnx")
    ids, mask = padded(texts(9), "right")
    found = embed(session(tmp_path / "model.onnx"), ids, mask)
    np.testing.assert_allclose(found, reference(encoder.float(), ids, mask), atol=FLOAT_SUMS)


@pytest.mark.parametrize("config", [CONFIG, TWO_KV_HEADS], ids=["one_kv_head", "two_kv_heads"])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_a_quantized_graph_is_near_the_encoder_with_the_same_weights(
    scheme: Scheme, config: EncoderConfig, tmp_path: Path
) -> None:
    encoder = tiny_encoder(config)
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    ids, mask = padded(texts(1, 3, 30, 12), "left")
    found = embed(session(tmp_path / "model.onnx"), ids, mask)
    wanted = reference(with_weights(encoder, quantize_encoder(encoder, scheme)), ids, mask)
    assert cosines(found, wanted).min() > ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_block_weights_are_exact_when_activations_are_not_rounded(
    scheme: Scheme, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    levels = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert levels
    for level in levels:
        level.i = 1  # float32 activations
    onnx.save(model, str(tmp_path / "float_activations.onnx"))
    ids, mask = padded(texts(1, 3, 30, 12), "right")
    found = embed(session(tmp_path / "float_activations.onnx"), ids, mask)
    wanted = reference(with_weights(encoder, quantize_encoder(encoder, scheme)), ids, mask)
    np.testing.assert_allclose(found, wanted, atol=FLOAT_SUMS)


@pytest.mark.parametrize("scheme", [MIXED, INT8_PER_CHANNEL], ids=lambda scheme: scheme.name)
def test_per_channel_weights_are_exact_under_the_same_rounding_of_each_token(
    scheme: Scheme, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    rounding = with_weights(encoder, quantize_encoder(encoder, scheme))
    for module in rounding.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_rounded_per_token(inputs[0]),))
    ids, mask = padded(texts(*range(1, 12)), "right")
    found = cosines(
        embed(session(tmp_path / "model.onnx"), ids, mask), reference(rounding, ids, mask)
    )
    # An activation on the edge between two codes may fall to either side; most texts have none.
    assert np.median(found) > 1 - 1e-6
    assert found.min() > 1 - 1e-4


def _rounded_per_token(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize("config", [CONFIG, TWO_KV_HEADS], ids=["one_kv_head", "two_kv_heads"])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_the_codes_and_scales_in_the_file_are_those_of_the_quantizer(
    scheme: Scheme, config: EncoderConfig, tmp_path: Path
) -> None:
    encoder = tiny_encoder(config)
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    found, wanted = read_onnx_weights(tmp_path / "model.onnx"), quantize_encoder(encoder, scheme)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name].codes, weight.codes), name
        assert torch.equal(found[name].scales, weight.scales), name
        assert found[name].format == weight.format, name


def test_a_damaged_code_is_seen_in_the_file(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    write_onnx(encoder, INT4, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    tensor = next(
        tensor
        for tensor in model.graph.initializer
        if tensor.name == "layers.1.self_attn.qkv.codes"
    )
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    found, wanted = read_onnx_weights(tmp_path / "model.onnx"), quantize_encoder(encoder, INT4)
    assert [name for name in wanted if not torch.equal(found[name].codes, wanted[name].codes)] == [
        "layers.1.self_attn.q_proj.weight"
    ]


def test_the_reader_refuses_files_of_other_writers(tmp_path: Path) -> None:
    onnx.save(onnx.ModelProto(ir_version=10), str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match=r"egemma\.rows"):
        read_onnx_weights(tmp_path / "model.onnx")


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_embedding_scales_that_leave_half_precision_are_kept_in_float32(
    factor: float, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.embed_tokens.weight.mul_(factor)
    write_onnx(encoder, INT4, tmp_path / "model.onnx")
    tensors = {
        tensor.name: tensor for tensor in onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    }
    half = tensors["embed_tokens.scales"].data_type == onnx.TensorProto.FLOAT16
    assert half == (factor == 1.0)
    wanted = quantize_encoder(encoder, INT4)["embed_tokens.weight"]
    assert torch.equal(
        read_onnx_weights(tmp_path / "model.onnx")["embed_tokens.weight"].scales, wanted.scales
    )
    ids, mask = padded(texts(9), "right")
    expected = reference(with_weights(encoder, quantize_encoder(encoder, INT4)), ids, mask)
    assert (
        cosines(embed(session(tmp_path / "model.onnx"), ids, mask), expected).min()
        > ROUNDED_ACTIVATIONS
    )


@pytest.mark.parametrize(
    "scheme", [None, *ALL_SCHEMES], ids=lambda scheme: scheme.name if scheme else "float32"
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_vector_does_not_depend_on_the_other_texts_of_its_batch(
    scheme: Scheme | None, side: str, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():  # an outlier as Gemma has them: one token with one huge channel
        encoder.embed_tokens.weight[7] *= 0.01
        encoder.embed_tokens.weight[7, 5] = 50
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    rows = [*texts(*range(1, 12)), torch.full((33,), 7)]
    together = embed(runtime, *padded(rows, side))
    alone = np.concatenate([embed(runtime, *padded([row], side)) for row in rows])
    differences = np.abs(together - alone).max(axis=1)
    # A sum in another order may push an activation over the edge between two codes, in few of the
    # texts. One scale for the whole batch moves every text (median 1.5e-2 measured).
    assert np.median(differences) < FLOAT_SUMS
    assert differences.max() < (1e-2 if scheme else FLOAT_SUMS)


@pytest.mark.parametrize(
    "scheme", [None, *ALL_SCHEMES], ids=lambda scheme: scheme.name if scheme else "float32"
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_that_hold_only_padding_give_no_nan(
    scheme: Scheme | None, side: str, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    row = texts(2)[0]
    found = embed(runtime, *padded([row], side, tokens=40))
    assert cosines(found, embed(runtime, *padded([row], side))).min() > (
        ROUNDED_ACTIVATIONS if scheme else 1 - 1e-6
    )


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_a_token_of_zeros_gives_no_nan(scheme: Scheme, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.embed_tokens.weight[9] = 0
    write_onnx(encoder, scheme, tmp_path / "model.onnx")
    ids, mask = padded([torch.tensor([4, 9, 5]), torch.tensor([9, 4])], "right")
    found = embed(session(tmp_path / "model.onnx"), ids, mask)
    wanted = reference(with_weights(encoder, quantize_encoder(encoder, scheme)), ids, mask)
    assert cosines(found, wanted).min() > ROUNDED_ACTIVATIONS


def test_more_tokens_than_the_model_reads_are_an_error(tmp_path: Path) -> None:
    write_onnx(tiny_encoder(), None, tmp_path / "model.onnx")
    with pytest.raises(Exception, match="RotaryEmbedding"):
        embed(session(tmp_path / "model.onnx"), *padded(texts(CONFIG.max_tokens + 1), "right"))


def test_a_mask_of_another_length_is_an_error(tmp_path: Path) -> None:
    write_onnx(tiny_encoder(), None, tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    with pytest.raises(Exception, match="Reshape"):
        embed(runtime, torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))


def test_other_poolings_and_group_sizes_without_a_kernel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pooling='last'"):
        write_onnx(
            tiny_encoder(dataclasses.replace(CONFIG, pooling="last")), None, tmp_path / "model.onnx"
        )
    odd = WeightFormat(bits=4, group_size=96)
    scheme = Scheme(name="odd", embedding=odd, attention=odd, feed_forward=odd, projection=odd)
    config = dataclasses.replace(CONFIG, width=96, dense=((96, 96),), dims=(96,))
    with pytest.raises(ExportError, match="group_size=96"):
        write_onnx(tiny_encoder(config), scheme, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "scheme", [None, INT4, MIXED], ids=lambda scheme: scheme.name if scheme else "float32"
)
def test_weights_in_a_second_file_change_nothing(scheme: Scheme | None, tmp_path: Path) -> None:
    # a table large enough to be moved
    encoder = tiny_encoder(dataclasses.replace(CONFIG, vocab_size=4000))
    write_onnx(encoder, scheme, tmp_path / "one.onnx")
    report = write_onnx(encoder, scheme, tmp_path / "two.onnx", weights_beside=True)
    assert report.files == ("two.onnx", "two.onnx.data")
    assert report.file_bytes == sum((tmp_path / name).stat().st_size for name in report.files)
    assert (tmp_path / "two.onnx.data").stat().st_size >= 4000 * 64 / 2
    ids, mask = padded(texts(1, 3, 30, 12), "right")
    one, two = (embed(session(tmp_path / name), ids, mask) for name in ("one.onnx", "two.onnx"))
    np.testing.assert_array_equal(one, two)
    if scheme is not None:
        found, wanted = read_onnx_weights(tmp_path / "two.onnx"), quantize_encoder(encoder, scheme)
        assert all(torch.equal(found[name].codes, weight.codes) for name, weight in wanted.items())


def test_the_report_counts_what_was_written(tmp_path: Path) -> None:
    lines: list[str] = []
    report = write_onnx(tiny_encoder(), INT4, tmp_path / "model.onnx", progress=lines.append)
    assert report.file_bytes == (tmp_path / "model.onnx").stat().st_size
    # qkv, o, gate_up, down of three layers, and the dense head
    assert report.nodes["MatMulNBits"] == 3 * 4 + 2
    assert report.nodes["GatherBlockQuantized"] == 1
    assert "layer 3 of 3" in lines


def test_the_integers_add_almost_nothing_to_the_file(tmp_path: Path) -> None:
    """4-bit per-channel weights take half a byte each in the file, although the runtime multiplies
    them as 8 bits.
    """
    encoder = tiny_encoder()
    mixed, int8 = (
        write_onnx(encoder, scheme, tmp_path / f"{scheme.name}.onnx").file_bytes
        for scheme in (MIXED, INT8_PER_CHANNEL)
    )
    halved = sum(
        weight.numel()
        for name, weight in encoder.named_parameters()
        if ".mlp." in name or name.startswith(("embed", "dense"))
    )
    assert int8 - mixed == pytest.approx(halved / 2, rel=0.05)
