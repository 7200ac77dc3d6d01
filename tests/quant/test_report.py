"""The report's numbers against numpy and against models worked out by hand, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import InputError
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_quant import layer_report
from egemma_quant.cli import TEXTS, calibration_rows, main
from egemma_quant.qat import rounded_weights
from egemma_quant.report import measure
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import INT4, INT8, Q4_0, SCHEMES, Scheme, quantize
from tests.quant.test_qat import make_encoder
from tests.tiny import with_weights

MODEL = Path(__file__).resolve().parents[2] / "models" / "egemma-small"
OTHER_TEXTS = (
    "The bridge was closed in March because two of its cables had rusted through.",
    "How long does it take to boil an egg at high altitude?",
    "for name in sorted(os.listdir(folder)): print(name)",
    "Aspirin thins the blood and should not be taken before an operation.",
)
ROWS = [(2, 5, 9, 1), (2, 77, 130, 8, 8, 45, 1), (2, 1), tuple(range(3, 40))]


def embed(encoder: Encoder) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate(
            [
                encoder(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)).numpy()
                for row in ROWS
            ]
        ).astype(np.float64)


def test_matrix_errors_are_those_of_numpy() -> None:
    encoder = make_encoder()
    with torch.no_grad():
        # a group without energy has no relative error
        encoder.layers[0].mlp.up_proj.weight[3, :32] = 0
    for scheme in (INT4, INT8, Q4_0):
        report = measure(encoder, scheme, ROWS, model="m")
        cost = next(cost for cost in report.matrices if cost.name == "layers.0.mlp.up_proj.weight")
        weight = encoder.layers[0].mlp.up_proj.weight.detach()
        found = quantize(weight, scheme.feed_forward)
        exact, after = (
            weight.double().numpy().reshape(-1, 32),
            found.dequantize().double().numpy().reshape(-1, 32),
        )
        assert cost.error == pytest.approx(
            ((after - exact) ** 2).sum() / (exact**2).sum(), rel=1e-6
        )
        kept = (exact**2).sum(1) > 0
        assert cost.worst_group == pytest.approx(
            (((after - exact) ** 2).sum(1)[kept] / (exact**2).sum(1)[kept]).max(), rel=1e-6
        )
        # Clipped means further from its value than half a step.
        half = np.abs(found.scales.double().numpy().reshape(-1, 1)) / 2
        assert cost.clipped == pytest.approx(
            (np.abs(after - exact) > half * (1 + 1e-4)).mean(), abs=2e-4
        )
        assert (cost.bits, cost.group_size, cost.role) == (
            scheme.feed_forward.bits,
            32,
            "feed_forward",
        )


def test_cosines_are_those_of_the_two_models_at_every_width() -> None:
    encoder = make_encoder()
    report = measure(encoder, INT4, ROWS, model="m")
    exact, after = embed(encoder), embed(with_weights(encoder, quantize_encoder(encoder, INT4)))
    for width in report.widths:
        one, other = exact[:, : width.dim], after[:, : width.dim]
        cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert width.min_cosine == pytest.approx(cosines.min(), abs=1e-6)
        assert width.median_cosine == pytest.approx(np.median(cosines), abs=1e-6)
        assert width.min_cosine_activations != width.min_cosine
        assert width.min_cosine_activations > 0.9 * width.min_cosine
    assert [width.dim for width in report.widths] == [64, 32]
    assert [layer.layer for layer in report.layers] == ["embedding", "layer 0", "layer 1"]
    table = (
        quantize(encoder.embed_tokens.weight, INT4.embedding)
        .dequantize()[list(sum(ROWS, ()))]
        .double()
    )
    tokens = encoder.embed_tokens.weight.detach()[list(sum(ROWS, ()))].double()
    wanted = torch.cosine_similarity(table, tokens, dim=-1)
    assert report.layers[0].mean_cosine == pytest.approx(float(wanted.mean()), abs=1e-6)
    assert report.layers[0].min_cosine == pytest.approx(float(wanted.min()), abs=1e-6)


def test_the_error_of_a_layer_is_that_of_numpy_over_all_its_rounded_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_report, "ROWS_AT_ONCE", 7)  # the last part of a matrix is shorter
    encoder = make_encoder()
    with rounded_weights(encoder, INT4) as exact:
        errors = layer_report.weight_errors(encoder, exact)
    quantized = quantize_encoder(encoder, INT4)
    assert exact.keys() == quantized.keys()
    assert list(errors) == ["embedding", "layer 0", "layer 1", "dense head"]
    for layer, prefix in (("embedding", "embed_tokens."), ("layer 1", "layers.1.")):
        names = [name for name in quantized if name.startswith(prefix)]
        before = np.concatenate(
            [encoder.get_parameter(name).detach().double().flatten() for name in names]
        )
        after = np.concatenate([quantized[name].dequantize().double().flatten() for name in names])
        expected = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert errors[layer] == pytest.approx(expected, rel=1e-6)


def test_dev_scores_are_asked_of_the_float_and_of_the_rounded_model_and_the_encoder_stays_as_it_was() -> (
    None
):
    encoder = make_encoder()
    before = {name: weight.clone() for name, weight in encoder.named_parameters()}
    report = measure(
        encoder,
        INT4,
        ROWS,
        model="m",
        score=lambda seen: {"sum": float(seen.dense[0].weight.detach().abs().sum())},
    )
    rounded = quantize(before["dense.0.weight"], INT4.projection).dequantize()
    assert report.dev == {
        "sum": (float(before["dense.0.weight"].detach().abs().sum()), float(rounded.abs().sum()))
    }
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.named_parameters())
    text = report.to_text()
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "dev score" in text
    assert json.loads(report.to_json())["dev"]["sum"] == list(report.dev["sum"])
    with pytest.raises(InputError, match="0 texts"):
        measure(encoder, INT4, [], model="m")


def test_a_rounded_checkpoint_holds_the_dequantized_weights(tmp_path: Path) -> None:
    assert (
        main(["round", "--model", str(MODEL), "--scheme", "q4_0", "--out", str(tmp_path / "out")])
        == 0
    )
    found = load_encoder(open_checkpoint(tmp_path / "out"))
    for name, quantized in quantize_encoder(load_encoder(open_checkpoint(MODEL)), Q4_0).items():
        assert torch.equal(found.get_parameter(name), quantized.dequantize()), name


@pytest.mark.parametrize("more", [[], ["--equalize", "0.5"]], ids=["as it is", "equalised"])
def test_a_checkpoint_rounded_on_texts_is_rounded_to_itself_and_nearer_to_the_float_one(
    tmp_path: Path, more: list[str]
) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    asked = ["round", "--model", str(MODEL), "--scheme", "int4", "--out", str(out)]
    assert main([*asked, "--calibrate", str(texts), *more]) == 0
    found = load_encoder(open_checkpoint(out))
    for name, quantized in quantize_encoder(found, INT4).items():
        assert torch.equal(found.get_parameter(name), quantized.dequantize()), name
    encoder = load_encoder(open_checkpoint(MODEL))
    others = calibration_rows(open_checkpoint(MODEL), OTHER_TEXTS)
    exact, calibrated = encode_rows(encoder, others, 0), encode_rows(found, others, 0)
    with rounded_weights(encoder, INT4):
        plain = encode_rows(encoder, others, 0)
    assert (1 - (calibrated * exact).sum(1)).mean() < 0.9 * (1 - (plain * exact).sum(1)).mean()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_rounded_model_rounds_to_itself(scheme: Scheme) -> None:
    # Of 4 bits the largest code is 7 or -8, so amax / 7 or amax / 8 is the scale again, and leaves
    # no error to improve on.
    once = quantize_encoder(load_encoder(open_checkpoint(MODEL)), scheme)
    for name, quantized in once.items():
        assert torch.equal(
            quantize(quantized.dequantize(), quantized.format).dequantize(), quantized.dequantize()
        ), name


def test_the_command_reports_and_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\nanother text\n", encoding="utf-8")
    assert (
        main(
            ["report", "--model", str(MODEL), "--scheme", "mixed", "--texts", str(texts), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (
        found["scheme"],
        found["num_texts"],
        found["truncated"],
        found["hint"],
        found["dev"],
    ) == ("mixed", 2, 0, None, {})
    texts.write_text("one text\n" + "word " * 600 + "\n", encoding="utf-8")
    assert main(["report", "--model", str(MODEL), "--scheme", "int4", "--texts", str(texts)]) == 0
    assert "2 texts, 1 of them cut at the limit" in capsys.readouterr().out

    texts.write_text("one\n\ntwo\n", encoding="utf-8")
    absent, out = tmp_path / "absent", tmp_path / "out"
    out.mkdir()
    for arguments, message in (
        (
            ["report", "--model", str(MODEL), "--scheme", "int4", "--texts", str(texts)],
            "line 2 is blank",
        ),
        (
            ["report", "--model", str(MODEL), "--scheme", "int4", "--texts", str(absent)],
            "No such file",
        ),
        (
            ["report", "--model", str(MODEL), "--scheme", "int5"],
            "scheme='int5' must be one of ['int4', 'int8'",
        ),
        (["report", "--model", str(absent), "--scheme", "int4"], "no such folder"),
        (["round", "--model", str(MODEL), "--scheme", "int4", "--out", str(out)], "exists"),
        (
            ["round", "--model", "any", "--scheme", "int4", "--out", str(out), "--equalize", "0.5"],
            "Add --calibrate",
        ),
        (
            ["round", "--model", "any", "--scheme", "int4", "--out", str(out), "--equalize", "2"],
            "--equalize=2.0 must be a number above 0 and of at most 1",
        ),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out
