"""A saved folder gives back the same vectors, here and in sentence-transformers; what could not be
read back is not written.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from egemma_core.checkpoint.config import FULL, POOLINGS, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encode import encode_rows, pad
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
from egemma_train.start.decoder import random_encoder
from tests.tiny import BOS, EOS, PAD, VOCAB

PROMPTS = Prompts(
    by_name={
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "STS": "task: sentence similarity | query: ",
    }
)
CONFIG = EncoderConfig(
    vocab_size=VOCAB,
    width=32,
    ffn_width=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    query_scale=0.25,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=8,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=64,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    pooling="mean",
    dense=((32, 64), (64, 32)),
    dims=(32, 16),
)
TEXTS = [
    "how do I reset the pump?",
    "There is one river,\n\n   and it is blue.",
    "def f(x):\n    return x ** 2  # 12345",
    "Žluťoučký kůň 🐎 漢字",
    "",
]


def assert_sentence_transformers_agrees(folder: Path) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="pip install 'egemma[dev]'"
    )
    checkpoint = open_checkpoint(folder)
    encoder, tokenizer = load_encoder(checkpoint), checkpoint.tokenizer()
    reference = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    assert reference.max_seq_length == checkpoint.config.max_tokens
    for name, prompt in (
        ("query", checkpoint.prompts.query()),
        ("document", checkpoint.prompts.document()),
    ):
        rows = [tokenizer.encode(prompt + text).ids for text in TEXTS]
        theirs = [
            tuple(row)
            for row in reference.tokenizer([prompt + text for text in TEXTS])["input_ids"]
        ]
        assert theirs == rows
        with torch.no_grad():
            ours = encode_rows(encoder, rows, checkpoint.config.pad_id).numpy()
        # float32 on both sides, other order of the sums.
        np.testing.assert_allclose(reference.encode(TEXTS, prompt_name=name), ours, atol=2e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_gives_back_the_same_vectors(
    tiny_spm: Path, tmp_path: Path, dtype: torch.dtype, pooling: str
) -> None:
    encoder, folder = random_encoder(replace(CONFIG, pooling=pooling), 3), tmp_path / "model"
    save_checkpoint(encoder, tiny_spm, PROMPTS, folder, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == encoder.config
    assert checkpoint.prompts == PROMPTS
    assert checkpoint.tokenizer_path.read_bytes() == tiny_spm.read_bytes()
    batch = pad(
        [checkpoint.tokenizer().encode(PROMPTS.document() + text).ids for text in TEXTS], PAD
    )
    stored = encoder.to(dtype).float()  # what rounding to the stored dtype leaves
    assert torch.equal(load_encoder(checkpoint)(*batch), stored(*batch))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLINGS if pooling != "attention"])
def test_sentence_transformers_opens_a_saved_folder_and_agrees(
    tiny_spm: Path, tmp_path: Path, pooling: str
) -> None:
    save_checkpoint(
        random_encoder(replace(CONFIG, pooling=pooling), 3), tiny_spm, PROMPTS, tmp_path / "model"
    )
    assert_sentence_transformers_agrees(tmp_path / "model")


def test_sentence_transformers_refuses_attention_pooling_which_it_cannot_compute(
    tiny_spm: Path, tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="pip install 'egemma[dev]'"
    )
    save_checkpoint(
        random_encoder(replace(CONFIG, pooling="attention"), 3),
        tiny_spm,
        PROMPTS,
        tmp_path / "model",
    )
    with pytest.raises(ValueError, match="attention"):
        sentence_transformers.SentenceTransformer(
            str(tmp_path / "model"), device="cpu", local_files_only=True
        )
    # the learned query decides: these are not the mean's vectors under another name
    with torch.no_grad():
        attention = load_encoder(open_checkpoint(tmp_path / "model"))
        mean = Encoder(CONFIG)
        mean.load_state_dict(
            {
                name: weight
                for name, weight in attention.state_dict().items()
                if not name.startswith("pooler.")
            }
        )
        batch = pad([(BOS, 40, 50, 60, 70, 80, EOS)], PAD)
        assert (attention(*batch) - mean(*batch)).norm() > 0.01


def test_a_lost_or_surplus_pooling_weight_is_refused(tiny_spm: Path, tmp_path: Path) -> None:
    save_checkpoint(
        random_encoder(replace(CONFIG, pooling="attention"), 3),
        tiny_spm,
        PROMPTS,
        tmp_path / "attention",
    )
    save_checkpoint(random_encoder(CONFIG, 3), tiny_spm, PROMPTS, tmp_path / "mean")
    for folder, mode, count in (
        ("attention", "mean", "0 tensors are missing [] and 3 are not understood"),
        ("mean", "attention", "3 tensors are missing"),
    ):
        path = tmp_path / folder / "1_Pooling/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pooling_mode": mode}))
        with pytest.raises(CheckpointError) as refused:
            load_encoder(open_checkpoint(tmp_path / folder))
        assert count in str(refused.value)


def test_saving_refuses_what_could_not_be_read_back(tiny_spm: Path, tmp_path: Path) -> None:
    encoder = random_encoder(CONFIG, 3)
    with pytest.raises(ConfigError, match="float16"):
        save_checkpoint(encoder, tiny_spm, PROMPTS, tmp_path / "model", dtype=torch.float16)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        save_checkpoint(encoder, tiny_spm, PROMPTS, tmp_path / "there")
    with torch.no_grad():
        encoder.norm.weight[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        save_checkpoint(encoder, tiny_spm, PROMPTS, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
