"""What a checkpoint folder must say, and that everything which would be computed wrongly is
refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from egemma_core.checkpoint.config import FULL, SLIDING
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import CheckpointError
from egemma_core.nn.load import load_encoder
from models.make_checkpoint import PROMPTS, write_checkpoint

pytest.importorskip(
    "sentence_transformers", reason="it writes the folders; pip install 'egemma[dev]'"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published"), "tiny", tiny_spm)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    body = json.loads(path.read_text())
    path.write_text(json.dumps(change(body) or body))


def set_to(**values: Any) -> Callable[[Any], None]:
    return lambda body: body.update(values)


def test_everything_is_read_from_the_files(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    assert (config.width, config.ffn_width, config.num_layers, config.head_dim) == (96, 128, 3, 32)
    assert config.layer_types == (SLIDING, SLIDING, FULL)
    assert config.window == 4, "sliding_window 8 is 4 to each side"
    assert (config.rope_theta_full, config.rope_theta_sliding) == (1e6, 1e4)
    assert config.query_scale == pytest.approx(32**-0.5)
    assert config.dense == ((96, 384), (384, 96))
    assert config.dims == (96,)
    assert config.max_tokens == 96
    assert dict(checkpoint.prompts.by_name) == PROMPTS


def test_the_older_spelling_of_the_config_means_the_same(folder: Path) -> None:
    newer = open_checkpoint(folder).config

    def older(body: dict[str, Any]) -> None:
        del body["rope_parameters"], body["layer_types"]
        body.update(rope_theta=1e6, rope_local_base_freq=1e4, _sliding_window_pattern=3)

    edit(folder / "config.json", older)
    edit(
        folder / "1_Pooling/config.json",
        lambda body: {
            "word_embedding_dimension": 96,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_cls_token": False,
        },
    )
    edit(
        folder / "sentence_bert_config.json",
        lambda body: {"max_seq_length": 80, "do_lower_case": False},
    )
    config = open_checkpoint(folder).config
    assert config.max_tokens == 80
    assert config.layer_types == newer.layer_types
    assert (config.rope_theta_full, config.rope_theta_sliding, config.pooling) == (1e6, 1e4, "mean")


def test_a_width_of_768_has_the_trained_dims_of_the_report(folder: Path) -> None:
    edit(folder / "3_Dense/config.json", set_to(out_features=768))
    assert open_checkpoint(folder).config.dims == (768, 512, 256, 128)
    edit(folder / "config_sentence_transformers.json", set_to(matryoshka_dims=[768, 64]))
    assert open_checkpoint(folder).config.dims == (768, 64)


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "another architecture": ("config.json", set_to(model_type="bert"), "model_type='bert'"),
    "a causal model": ("config.json", set_to(use_bidirectional_attention=False), "adapted"),
    "no word on causality": (
        "config.json",
        lambda body: body.pop("use_bidirectional_attention") and None,
        "adapted",
    ),
    "the halved window of a re-save": ("config.json", set_to(sliding_window=257), "512"),
    "another activation": ("config.json", set_to(hidden_activation="relu"), "relu"),
    "biases": ("config.json", set_to(attention_bias=True), "attention_bias"),
    "soft-capped scores": ("config.json", set_to(attn_logit_softcapping=50.0), "softcapping"),
    "a missing rotary base": (
        "config.json",
        set_to(rope_parameters={FULL: {"rope_theta": 1e6}}),
        "rotary",
    ),
    "scaled positions": (
        "config.json",
        set_to(
            rope_parameters={
                FULL: {"rope_theta": 1e6, "rope_type": "linear"},
                SLIDING: {"rope_theta": 1e4},
            }
        ),
        "linear",
    ),
    "a number that is text": ("config.json", set_to(hidden_size="96"), "hidden_size='96'"),
    "too few layer types": ("config.json", set_to(layer_types=[FULL]), "layer_types"),
    "dense modules that modules.json forgot": (
        "modules.json",
        lambda rows: [row for row in rows if "Dense" not in row["type"]],
        "2_Dense",
    ),
    "one dense module forgotten": (
        "modules.json",
        lambda rows: [row for row in rows if row["path"] != "3_Dense"],
        "3_Dense",
    ),
    "modules in another order": (
        "modules.json",
        lambda rows: [rows[0], *rows[2:4], rows[1], rows[4]],
        "Transformer, Pooling, Dense",
    ),
    "a module outside of the folder": (
        "modules.json",
        lambda rows: [rows[0], {**rows[1], "path": "../1_Pooling"}, *rows[2:]],
        "outside",
    ),
    "a dense activation": (
        "2_Dense/config.json",
        set_to(activation_function="torch.nn.modules.activation.Tanh"),
        "Tanh",
    ),
    "a dense bias": ("2_Dense/config.json", set_to(bias=True), "bias=True"),
    "another pooling": ("1_Pooling/config.json", set_to(pooling_mode="max"), "max"),
    "pooling without the prompt": (
        "1_Pooling/config.json",
        set_to(include_prompt=False),
        "include_prompt",
    ),
    "no prompts": ("config_sentence_transformers.json", set_to(prompts={}), "query"),
    "only a query prompt": (
        "config_sentence_transformers.json",
        set_to(prompts={"query": "q: "}),
        "document",
    ),
    "lower case": ("sentence_bert_config.json", set_to(do_lower_case=True), "lower case"),
    "a longer input than positions": (
        "sentence_bert_config.json",
        set_to(max_seq_length=4096),
        "4096",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_wrongly_is_refused(folder: Path, case: str) -> None:
    name, change, told = REFUSED[case]
    edit(folder / name, change)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "modules.json",
        "model.safetensors",
        "tokenizer.model",
        "2_Dense/model.safetensors",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(
        CheckpointError, match=Path(name).parent.name if name.startswith("2") else Path(name).name
    ):
        open_checkpoint(folder)


def test_pickle_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(folder)


def test_a_path_that_is_nothing_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere" / "deep")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "file")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a missing tensor": (
        lambda w: w.pop("layers.1.mlp.up_proj.weight"),
        "layers.1.mlp.up_proj.weight",
    ),
    "a surplus tensor": (lambda w: w.update({"lm_head.weight": torch.zeros(2)}), "lm_head.weight"),
    "another shape": (lambda w: w.update({"norm.weight": torch.zeros(7)}), "norm.weight has shape"),
    "NaN": (lambda w: w["norm.weight"].fill_(float("nan")), "NaN"),
    "float16": (lambda w: w.update({"norm.weight": w["norm.weight"].half()}), "F16"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(folder: Path, case: str) -> None:
    change, told = WEIGHTS[case]
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=told):
        load_encoder(open_checkpoint(folder))


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        load_encoder(open_checkpoint(folder))


def test_float16_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="overflow"):
        load_encoder(open_checkpoint(folder), torch.float16)


def test_another_models_tokenizer_is_refused(folder: Path, gemma_tokenizer: Path) -> None:
    shutil.copyfile(gemma_tokenizer, folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="another model"):
        open_checkpoint(folder).tokenizer()


def test_a_hub_id_is_read_from_the_cache_when_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("someone/tiny", f"someone/tiny@{commit}"):
        checkpoint = open_checkpoint(name)
        assert (checkpoint.source, checkpoint.revision) == ("someone/tiny", commit)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        open_checkpoint("someone/absent")
