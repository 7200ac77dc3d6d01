"""One export, whole: what it writes is what was proven, and what is not proven is not written."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from egemma_core import bundle as bundle_module
from egemma_core.bundle import read_bundle
from egemma_core.checkpoint import folder as checkpoint_module
from egemma_core.checkpoint.config import FULL
from egemma_core.errors import BundleError, CheckpointError, ConfigError, ExportError
from egemma_core.nn.encoder import Encoder
from egemma_export import bundle_folder, pipeline
from egemma_export.cli import main
from egemma_export.mistakes import MISTAKES, mistaken_vectors
from egemma_export.pipeline import ExportConfig, export
from egemma_export.targets import TARGETS
from models.make_checkpoint import load_reference, write_checkpoint

pytest.importorskip(
    "sentence_transformers", reason="it writes the checkpoints; pip install 'egemma[dev]'"
)
pytestmark = pytest.mark.timeout(300)

BUILTIN = Path(__file__).resolve().parents[2] / "models" / "egemma-small"
# A random three-layer model is not trained for any rounding; the bounds of trained weights do not
# apply to it.
LOOSE = {"min_cosine_float": 0.5, "min_cosine_quantized": 0.9}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published") / "tiny-gemma", "tiny", tiny_spm)


def run(checkpoint: Path, out: Path, target: str, **changes: Any) -> pipeline.ExportReport:
    return export(ExportConfig(target=target, model=str(checkpoint), out=out, **(LOOSE | changes)))


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, pipeline.ExportReport]]:
    """A target's bundle and report; each is made once, because lowering takes seconds."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, tuple[Path, pipeline.ExportReport]] = {}

    def get(target: str) -> tuple[Path, pipeline.ExportReport]:
        if target not in made:
            made[target] = folder / target, run(checkpoint, folder / target, target)
            assert sorted(path.name for path in folder.iterdir()) == sorted(made), (
                "no scratch folder is left"
            )
        return made[target]

    return get


Exported = Callable[[str], tuple[Path, pipeline.ExportReport]]


@pytest.mark.parametrize("target", [name for name in TARGETS if not name.startswith("ios")])
def test_every_target_gives_a_verified_bundle(exported: Exported, target: str) -> None:
    folder, report = exported(target)
    manifest = read_bundle(folder).manifest
    assert manifest.target == target
    assert manifest.source["model"] == "tiny-gemma"
    assert manifest.dims == (96,)
    assert manifest.tokenizer["max_tokens"] == 96
    assert manifest.verification["measured"]["passed"] is True
    assert report.worst_cosine_quantized > 0.98
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*manifest.files, "manifest.json"]
    )
    golden = read_bundle(folder).golden()
    assert golden["measured"]["cases"]
    assert {case["name"] for case in golden["cases"]} >= {
        "empty",
        "cjk",
        "code",
        "emoji",
        "past the window",
        "cut at the limit",
    }


WITHOUT_TORCH = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "executorch", "torchao", "onnx", "safetensors", "transformers", "huggingface_hub", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from egemma.cli import main
sys.exit(main(["verify", sys.argv[1], "--json"]))
"""


@pytest.mark.parametrize("target", ["android-int4", "onnx-int4"])
def test_a_bundle_keeps_its_bounds_where_nothing_but_the_base_install_can_be_imported(
    exported: Exported, target: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(exported(target)[0])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["passed"] is True


def test_golden_texts_go_past_the_window_and_past_the_limit(exported: Exported) -> None:
    cases = {case["name"]: case for case in read_bundle(exported("onnx-fp32")[0]).golden()["cases"]}
    assert len(cases["past the window"]["ids"]) > 2 * 4 + 1
    cut = cases["cut at the limit"]
    assert cut["truncated"]
    assert len(cut["ids"]) == 96 < cut["num_tokens"]
    assert cut["ids"][-1] == 1


def test_the_same_scheme_has_one_fingerprint_whatever_the_runtime(exported: Exported) -> None:
    prints = {
        target: read_bundle(exported(target)[0]).manifest.fingerprint
        for target in ("android-int4", "onnx-int4", "onnx-int8")
    }
    assert prints["android-int4"] == prints["onnx-int4"] != prints["onnx-int8"]


def causal(encoder: Encoder) -> None:
    """A graph cannot be made causal by its config; every token seeing only itself is the nearest
    slip that can.
    """
    encoder.config = dataclasses.replace(
        encoder.config, layer_types=(encoder.config.layer_types[0],) * 3, window=0
    )


BUGS: dict[str, Callable[[Encoder], Any]] = {
    "window doubled": lambda e: setattr(e, "config", dataclasses.replace(e.config, window=8)),
    "window halved": lambda e: setattr(e, "config", dataclasses.replace(e.config, window=2)),
    "no context": causal,
    "all layers full": lambda e: setattr(
        e, "config", dataclasses.replace(e.config, layer_types=(FULL,) * 3)
    ),
    "rotary bases swapped": lambda e: setattr(
        e, "config", dataclasses.replace(e.config, rope_theta_full=1e4, rope_theta_sliding=1e6)
    ),
    "a norm weight lost": lambda e: e.layers[1].post_feedforward_layernorm.weight.zero_(),
    "a layer lost": lambda e: e.layers[2].mlp.down_proj.weight.zero_(),
    "a dense layer replaced": lambda e: e.dense[0].weight.copy_(
        torch.randn_like(e.dense[0].weight) * 0.05
    ),
}


@pytest.mark.parametrize("target", ["onnx-fp32"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_graph_that_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, bug: str
) -> None:
    honest = pipeline._write_model

    def planted(encoder: Encoder, *rest: Any) -> dict[str, Any]:
        import copy

        wrong = copy.deepcopy(encoder)
        with torch.no_grad():
            BUGS[bug](wrong)
        return honest(wrong, *rest)

    monkeypatch.setattr(pipeline, "_write_model", planted)
    with pytest.raises(ExportError, match="failed its verification"):
        export(ExportConfig(target=target, model=str(checkpoint), out=tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "mistake", [name for name in MISTAKES if name not in ("causal attention", "no dense head")]
)
def test_a_rounded_file_with_a_mistake_is_not_taken_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    # In a trained model a doubled window moves a vector by no more than int4 does (cosine 0.9993):
    # no bound on the cosine could see it. (The graph has no place for the two others: it is not
    # causal by construction, and has the width of the dense head.)
    honest = pipeline._write_model
    monkeypatch.setattr(
        pipeline, "_write_model", lambda encoder, *rest: honest(MISTAKES[mistake](encoder), *rest)
    )
    with pytest.raises(ExportError, match=f"computes like a model with {mistake}"):
        export(ExportConfig(target="onnx-int4", model=str(BUILTIN), out=tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


def test_the_mistakes_are_other_models_and_leave_the_right_one_alone(checkpoint: Path) -> None:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_export.golden import golden_texts, reference_vectors

    opened = open_checkpoint(checkpoint)
    encoder, texts = load_encoder(opened), golden_texts(opened.tokenizer(), opened.prompts)
    right = reference_vectors(encoder, texts)
    found = mistaken_vectors(encoder, texts, right)
    assert found.keys() == MISTAKES.keys()
    after = reference_vectors(encoder, texts)
    assert all(np.array_equal(right[name], after[name]) for name in right)
    for vectors in found.values():
        assert max(np.linalg.norm(vectors[name] - right[name]) for name in vectors) > 0.01
    # What transformers itself computes when it is told to be causal.
    ids = torch.tensor([next(text.tokens.ids for text in texts if text.name == "titled document")])
    model = load_reference(checkpoint, use_bidirectional_attention=False)
    assert (
        np.abs(
            model(ids, torch.ones_like(ids))[0].numpy()
            - found["causal attention"]["titled document"]
        ).max()
        < 2e-5
    )


def test_a_failed_export_says_which_layer_lost_what(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        run(checkpoint, tmp_path / "b", "onnx-int4", min_cosine_float=0.99999)
    text = str(caught.value)
    for word in ("embedding", "layer 0", "layer 2", "dense head", "0.99999", "--min-cosine-float"):
        assert word in text, text
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_bundle_that_was_there(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "b", "onnx-fp32")
    with pytest.raises(ExportError):
        run(checkpoint, tmp_path / "b", "onnx-int4", replace=True, min_cosine_float=0.99999)
    assert read_bundle(tmp_path / "b").manifest.target == "onnx-fp32"
    with pytest.raises(BundleError, match="--force"):
        run(checkpoint, tmp_path / "b", "onnx-fp32")


def test_each_weight_and_each_file_of_the_bundle_is_read_once_for_its_hash(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    honest = checkpoint_module.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path)
        return honest(path)

    monkeypatch.setattr(checkpoint_module, "sha256_of", counted)
    monkeypatch.setattr(bundle_module, "sha256_of", counted)
    monkeypatch.setattr(bundle_folder, "sha256_of", counted)
    run(checkpoint, tmp_path / "b", "onnx-fp32")
    weights = [path.relative_to(checkpoint) for path in hashed if path.is_relative_to(checkpoint)]
    assert sorted(path.as_posix() for path in weights) == [
        "2_Dense/model.safetensors",
        "3_Dense/model.safetensors",
        "model.safetensors",
    ]
    # golden.json is two files: before and after the measurement that it holds.
    ours = [path.name for path in hashed if not path.is_relative_to(checkpoint)]
    assert sorted(ours) == [
        "golden.json",
        "golden.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.model",
    ]
    for path in (tmp_path / "b").iterdir():
        if path.name != "manifest.json":
            entry = read_bundle(tmp_path / "b").manifest.files[path.name]
            assert entry == {"bytes": path.stat().st_size, "sha256": honest(path)}


def test_each_golden_text_goes_once_through_the_float_and_once_through_the_rounded_model(
    checkpoint: Path,
) -> None:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_export.golden import golden_texts, reference_vectors
    from egemma_export.mistakes import CASES
    from egemma_export.observe import observe, observe_rounded
    from egemma_quant.schemes import INT4

    opened = open_checkpoint(checkpoint)
    encoder, texts = load_encoder(opened), golden_texts(opened.tokenizer(), opened.prompts)
    separately = reference_vectors(encoder, texts)
    seen: list[int] = []
    encoder.embed_tokens.register_forward_hook(
        lambda _module, ids, _rows: seen.append(ids[0].numel())
    )
    exact = observe(encoder, texts)
    assert sorted(seen) == sorted(len(text.tokens.ids) for text in texts)
    assert all(np.array_equal(exact.vectors[name], separately[name]) for name in separately)
    seen.clear()
    rounded = observe_rounded(encoder, INT4, texts, exact)
    # no mistake can be tried without running its two texts
    assert len(seen) == len(texts) + len(MISTAKES) * len(CASES)
    assert [loss.layer for loss in rounded.layers] == [
        "embedding",
        *(f"layer {number}" for number in range(3)),
        "dense head",
    ]
    after = reference_vectors(encoder, texts)  # the float weights are back
    assert all(np.array_equal(after[name], separately[name]) for name in separately)


def test_the_bundle_answers_as_the_float_model_through_the_sdk(
    checkpoint: Path, exported: Exported
) -> None:
    from egemma import Embedder
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder

    opened = open_checkpoint(checkpoint)
    encoder, tokenizer = load_encoder(opened), opened.tokenizer()
    with Embedder.open(exported("onnx-fp32")[0], threads=1) as embedder:
        texts = ["short", "a longer text about gardens and rain " * 3, ""]
        found = embedder.embed_documents(texts)
        for row, text in enumerate(texts):
            ids = torch.tensor([tokenizer.encode("title: none | text: " + text).ids])
            assert (
                np.abs(encoder(ids, torch.ones_like(ids))[0].numpy() - found.vectors[row]).max()
                < 1e-5
            )
        assert not np.allclose(embedder.embed_query("short").vector, found.vectors[0], atol=1e-3), (
            "the prompts differ"
        )


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="android-int4"):
        ExportConfig(target="tflite", model="m", out=tmp_path)
    with pytest.raises(ConfigError, match="min_cosine_float=2 must be a number of at least -1"):
        ExportConfig(target="onnx-fp32", model="m", out=tmp_path, min_cosine_float=2)
    with pytest.raises(CheckpointError, match="no such folder"):
        export(ExportConfig(target="onnx-fp32", model=str(tmp_path / "absent"), out=tmp_path / "b"))


# The command line


def test_list_targets_says_what_is_done_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-targets"]) == 0
    text = capsys.readouterr().out
    for name in TARGETS:
        assert name in text
    assert "instead: int8 per channel: XNNPACK has no int8 kernel" in text
    assert main(["--list-targets", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(TARGETS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "tflite", "--model", "x"], "target='tflite' must be one of ['android-int4'"),
        (["--target", "onnx-fp32", "--model", "no/such/folder"], "no such folder"),
        (["--target", "onnx-fp32", "--model", "/etc/hostname"], "no such folder"),
    ],
)
def test_mistakes_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("egemma-export: ")
    assert error.count("\n") == 1


def test_missing_arguments_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--target", "onnx-fp32"])
    assert caught.value.code == 2


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "egemma_export",
        "--target",
        "onnx-int4",
        "--model",
        str(checkpoint),
        "--out",
        str(out),
        "--min-cosine-float",
        "0.5",
        "--min-cosine-quantized",
        "0.9",
        *more,
    ]


def test_the_command_prints_one_json_document(checkpoint: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(checkpoint, tmp_path / "b", "--json"), capture_output=True, text=True, check=True
    )
    report = json.loads(ended.stdout)
    assert report["target"] == "onnx-int4"
    assert report["latency_ms"]
    assert report["layers"][0]["layer"] == "embedding"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    child = subprocess.Popen(command(checkpoint, tmp_path / "b"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(sent)
    _, error = child.communicate(timeout=60)
    assert not (tmp_path / "b").exists()
    if sent == signal.SIGINT:
        # A shell sees 130 either way. Python ends itself by the signal, after our own exit code,
        # where the interrupt hit an exec() of a string, as libraries run while they are imported.
        assert child.returncode in (130, -signal.SIGINT), error
        assert error.strip().endswith("egemma-export: stopped; nothing was written.")
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    ended = subprocess.run(
        command(checkpoint, tmp_path / "b"),
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("egemma-export: ")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
