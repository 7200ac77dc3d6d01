"""A soup is the plain average of its ingredients, says what went in, and refuses what does not fit
together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import egemma_train.mixtures.soup
from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.files import sha256_of
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
from egemma_train.mixtures.soup import RECORD, soup
from tests.tiny import BOS, EOS, PAD, PROMPTS, VOCAB

CONFIG = EncoderConfig(
    vocab_size=VOCAB,
    width=16,
    ffn_width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    query_scale=8**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=64,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    pooling="mean",
    dense=((16, 24), (24, 16)),
    dims=(16, 8),
)
WEIGHTS = ("model.safetensors", "2_Dense/model.safetensors", "3_Dense/model.safetensors")
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, tiny_spm: Path) -> Run:
    def save(
        name: str,
        seed: int,
        *,
        config: EncoderConfig = CONFIG,
        prompts: dict[str, str] = PROMPTS,
        tokenizer: Path = tiny_spm,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        torch.manual_seed(seed)
        save_checkpoint(
            Encoder(config), tokenizer, Prompts(by_name=prompts), tmp_path / name, dtype=dtype
        )
        return tmp_path / name

    return save


def tensors(folder: Path) -> dict[str, Any]:
    return {
        f"{file}:{name}": array
        for file in WEIGHTS
        for name, array in load_file(folder / file).items()
    }


def test_a_soup_is_numpys_mean_of_every_tensor(run: Run, tmp_path: Path) -> None:
    folders = [run(f"run{seed}", seed) for seed in range(3)]
    soup(folders, tmp_path / "soup")
    parts, made = [tensors(folder) for folder in folders], tensors(tmp_path / "soup")
    assert made.keys() == parts[0].keys()
    assert len(made) > 20
    for name, found in made.items():
        expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0).astype(
            np.float32
        )
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert not np.array_equal(
        made["model.safetensors:embed_tokens.weight"],
        parts[0]["model.safetensors:embed_tokens.weight"],
    )
    ids, mask = torch.tensor([[2, 7, 9, 1]]), torch.ones(1, 4, dtype=torch.bool)
    assert load_encoder(open_checkpoint(tmp_path / "soup"))(
        ids, mask
    ).norm().item() == pytest.approx(1, abs=1e-6)


def test_shares_are_divided_by_their_sum(run: Run, tmp_path: Path) -> None:
    folders = [run(f"run{seed}", seed) for seed in range(2)]
    soup(folders, tmp_path / "soup", weights=[3, 1])
    one, two, made = (
        tensors(folder)["model.safetensors:embed_tokens.weight"].astype(np.float64)
        for folder in (*folders, tmp_path / "soup")
    )
    np.testing.assert_allclose(made, 0.75 * one + 0.25 * two, rtol=1e-6, atol=1e-7)
    assert [
        entry["share"]
        for entry in json.loads((tmp_path / "soup" / RECORD).read_text())["ingredients"]
    ] == [0.75, 0.25]
    for weights, message in (
        ([1.0], r"weights=\[1\.0\] must be 2 numbers"),
        ([1.0, 0.0], r"weights\[1\]=0\.0 must be a number above 0"),
        ([1.0, -1.0], r"weights\[1\]=-1\.0 must be a number above 0"),
        ([1.0, float("nan")], r"weights\[1\]=nan must be a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            soup(folders, tmp_path / "other", weights=weights)


def test_a_soup_of_one_is_the_same_to_the_last_bit(run: Run, tmp_path: Path) -> None:
    folder = run("run", 0)
    soup([folder], tmp_path / "soup")
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / "soup" / path).read_bytes() == (folder / path).read_bytes(), path


def test_halves_of_bfloat16_weights_are_kept_in_float32(run: Run, tmp_path: Path) -> None:
    folders = [run(f"run{seed}", seed, dtype=torch.bfloat16) for seed in range(2)]
    soup(folders, tmp_path / "soup")
    one, two, made = (
        load_encoder(open_checkpoint(folder)).embed_tokens.weight
        for folder in (*folders, tmp_path / "soup")
    )
    assert torch.equal(made, ((one.double() + two.double()) / 2).float())
    assert not torch.equal(made, made.bfloat16().float())


def test_the_record_names_every_ingredient_and_its_weights(run: Run, tmp_path: Path) -> None:
    folders = [run(f"run{seed}", seed) for seed in range(2)]
    soup(folders, tmp_path / "soup")
    ingredients = json.loads((tmp_path / "soup" / RECORD).read_text())["ingredients"]
    assert ingredients == [
        {
            "folder": str(folder),
            "share": 0.5,
            "weights": {file: sha256_of(folder / file) for file in WEIGHTS},
        }
        for folder in folders
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"run0", "run1", "soup"}


def test_runs_that_differ_in_shape_prompts_or_tokenizer_are_refused_with_what_differs(
    run: Run, tmp_path: Path, tiny_spm: Path
) -> None:
    first, out = run("first", 0), tmp_path / "soup"
    # A SentencePiece model of the same pieces, with one more byte: an unknown protobuf field (15,
    # varint, 0).
    longer = tmp_path / "longer.model"
    longer.write_bytes(tiny_spm.read_bytes() + b"\x78\x00")
    refused = {
        "wider": ({"config": replace(CONFIG, ffn_width=12)}, "ffn_width is 8 and 12"),
        "window": ({"config": replace(CONFIG, window=8)}, "window is 4 and 8"),
        "prompt": (
            {"prompts": PROMPTS | {"query": "query: "}},
            "the prompt 'query' is 'task: search result | query: ' and 'query: '",
        ),
        "lacks": (
            {"prompts": {name: PROMPTS[name] for name in ("query", "document")}},
            "the prompt 'STS' is .* and None",
        ),
        "pieces": ({"tokenizer": longer}, "tokenizer.model has SHA-256"),
    }
    for name, (changes, message) in refused.items():
        other = run(name, 1, **changes)
        with pytest.raises(CheckpointError, match=message):
            soup([first, other], out)
        assert not out.exists()


def test_a_run_counts_once_and_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    first, again = run("first", 0), run("again", 0)
    with pytest.raises(ConfigError, match=r"first and .*again hold the very same weights"):
        soup([first, again], tmp_path / "soup")
    with pytest.raises(CheckpointError, match="exists"):
        soup([first], again)
    with pytest.raises(ConfigError, match="at least one"):
        soup([], tmp_path / "soup")


def test_a_soup_that_fails_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("first", 0)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(egemma_train.mixtures.soup, "publish_folder", full)
    with pytest.raises(OSError, match="No space"):
        soup([first], tmp_path / "soup")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
