"""A decoder-only Gemma 3, read from what transformers saves and written as what transformers
opens.
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

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import CheckpointError, ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.tokens import Tokenizer
from egemma_train.objectives.encoder_decoder import causal_hidden_states
from egemma_train.start.decoder import INDEX, HeadConfig, random_encoder, read_decoder, save_decoder
from tests.tiny import BOS, EOS, PAD, VOCAB

transformers = pytest.importorskip(
    "transformers", reason="it is what we compare with; pip install 'egemma[dev]'"
)

HEAD = HeadConfig(dims=(64, 32), max_tokens=48, seed=3)
CONFIG = EncoderConfig(
    vocab_size=VOCAB,
    width=64,
    ffn_width=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    query_scale=24**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL, SLIDING),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=48,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    pooling="mean",
    dense=((64, 256), (256, 64)),
    dims=(64, 32),
)
# longer than the window of 8
IDS = torch.randint(8, 200, (3, 30), generator=torch.Generator().manual_seed(0))


def reference_model() -> Any:
    """transformers' own causal Gemma 3, with norms and padding row moved away from where they
    start.
    """
    torch.manual_seed(1)
    model = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=list(CONFIG.layer_types),
            max_position_embeddings=64,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            attn_implementation="eager",
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.15)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "saved"
    reference_model().save_pretrained(folder)
    shutil.copyfile(tiny_spm, folder / "tokenizer.model")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The folder, to damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@torch.no_grad()
def test_what_transformers_saved_is_computed_as_transformers_computes_it(saved: Path) -> None:
    encoder, tokenizer_path, prompts = read_decoder(saved, HEAD)
    reference = transformers.Gemma3ForCausalLM.from_pretrained(
        saved, attn_implementation="eager"
    ).eval()
    theirs = reference(IDS, use_cache=False, output_hidden_states=True)
    hidden = causal_hidden_states(encoder, IDS)
    torch.testing.assert_close(hidden, theirs.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        hidden @ encoder.embed_tokens.weight.T, theirs.logits, atol=2e-4, rtol=1e-4
    )
    assert (
        encoder.hidden_states(IDS, torch.ones_like(IDS, dtype=torch.bool)) - hidden
    ).abs().max() > 0.1, "an encoder sees both sides"
    assert encoder.config == CONFIG  # the window of 8 became 4 to each side
    assert tokenizer_path == saved / "tokenizer.model"
    assert prompts is EMBEDDING_GEMMA
    assert all(
        weight.requires_grad and weight.dtype == torch.float32 for weight in encoder.parameters()
    )


@pytest.mark.parametrize(
    ("shard_size", "dtype"), [("60KB", torch.float32), ("5GB", torch.bfloat16)]
)
def test_shards_and_bfloat16_hold_the_same_model(
    saved: Path, tmp_path: Path, shard_size: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / "again"
    model = transformers.Gemma3ForCausalLM.from_pretrained(saved).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    shutil.copyfile(saved / "tokenizer.model", folder / "tokenizer.model")
    assert (
        (folder / INDEX).is_file()
        == (len(list(folder.glob("*.safetensors"))) > 1)
        == (dtype == torch.float32)
    )
    found = dict(read_decoder(folder, HEAD)[0].named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(found[name.removeprefix("model.")], weight.float()), name


def test_the_head_is_drawn_by_its_seed_alone(saved: Path) -> None:
    one, again, other = (
        read_decoder(
            saved, HeadConfig(dims=(64, 32), max_tokens=48, pooling="attention", seed=seed)
        )[0]
        for seed in (3, 3, 4)
    )
    heads = [name for name, _ in one.named_parameters() if name.startswith(("dense", "pooler"))]
    assert heads == [
        "pooler.query",
        "pooler.key.weight",
        "pooler.value.weight",
        "dense.0.weight",
        "dense.1.weight",
    ]
    for name, weight in one.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert torch.equal(weight, other.get_parameter(name)) == (name not in heads), name
    assert one.dense[0].weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert one.dense[1].weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_a_written_decoder_is_opened_by_transformers_and_by_us(
    tiny_spm: Path, tmp_path: Path
) -> None:
    encoder = random_encoder(CONFIG, 5)
    with torch.no_grad():
        encoder.norm.weight.normal_(0, 0.3)
    save_decoder(encoder, tiny_spm, tmp_path / "decoder")
    reference, found = transformers.Gemma3ForCausalLM.from_pretrained(
        tmp_path / "decoder", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.config.sliding_window == 8
    with torch.no_grad():
        ours = causal_hidden_states(encoder, IDS) @ encoder.embed_tokens.weight.T
        torch.testing.assert_close(
            ours, reference.eval()(IDS, use_cache=False).logits, atol=2e-4, rtol=1e-4
        )
    again = read_decoder(tmp_path / "decoder", HEAD)[0]
    assert all(
        torch.equal(again.get_parameter(name), weight)
        for name, weight in encoder.named_parameters()
        if not name.startswith("dense")
    )
    text = "The forwarder lost its oil pressure.\n\n  日本語"
    tokenizer = Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=128
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "decoder")(text)["input_ids"]
    assert tuple(theirs) == tokenizer.encode(text).ids[:-1]  # a decoder writes EOS itself
    with pytest.raises(CheckpointError, match="exists"):
        save_decoder(encoder, tiny_spm, tmp_path / "decoder")


def test_nothing_is_left_of_a_decoder_that_could_not_be_written(
    tiny_spm: Path, tmp_path: Path
) -> None:
    encoder = random_encoder(CONFIG, 5)
    with torch.no_grad():
        encoder.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        save_decoder(encoder, tiny_spm, tmp_path / "decoder")
    with pytest.raises(OSError, match="tokenizer"):
        save_decoder(
            random_encoder(CONFIG, 5), tmp_path / "no-tokenizer.model", tmp_path / "decoder"
        )
    assert list(tmp_path.iterdir()) == []


def test_chance_is_the_same_for_the_same_seed_and_keeps_the_size_of_vectors() -> None:
    one, again, other = (
        random_encoder(CONFIG, 1),
        random_encoder(CONFIG, 1),
        random_encoder(CONFIG, 2),
    )
    for name, weight in one.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert torch.equal(weight, other.get_parameter(name)) == ("norm" in name)
    assert one.embed_tokens.weight.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)
    assert one.layers[0].mlp.down_proj.weight.var().item() == pytest.approx(1 / 96, rel=0.05)
    assert isinstance(one, Encoder)


def test_the_prompts_are_those_of_the_committed_checkpoint() -> None:
    folder = Path(__file__).resolve().parents[2] / "models/egemma-small"
    published = json.loads(
        (folder / "config_sentence_transformers.json").read_text(encoding="utf-8")
    )["prompts"]
    assert list(EMBEDDING_GEMMA.by_name.items()) == list(published.items())
    assert EMBEDDING_GEMMA.document("Pumps") == "title: Pumps | text: "


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )

    return damage


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def shards(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Cut the file in two by hand, change something, and write the index."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {
            name: f"model-0000{1 + index % 2}-of-00002.safetensors"
            for index, name in enumerate(sorted(tensors))
        }
        for shard in set(places.values()):
            save_file(
                {name: tensors[name] for name in tensors if places[name] == shard}, folder / shard
            )
        change(folder, places)
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))

    return damage


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "bad json": (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
    "json list": (lambda folder: (folder / "config.json").write_text("[]"), "holds list"),
    "an encoder": (rewrite(use_bidirectional_attention=True), "encoder already"),
    "multimodal": (rewrite(model_type="gemma3", text_config={}), "text-only"),
    "another family": (rewrite(model_type="llama"), "model_type='llama'"),
    "score caps": (rewrite(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    "attention caps": (rewrite(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
    "bias": (rewrite(attention_bias=True), "attention_bias=True"),
    "activation": (rewrite(hidden_activation="silu"), "hidden_activation='silu'"),
    "scaled positions": (
        rewrite(
            rope_parameters={
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_theta": 1e4},
            }
        ),
        "rope_type='linear'",
    ),
    "scaled positions, old": (
        rewrite(
            rope_parameters=None,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"factor": 8.0},
        ),
        "rope_scaling",
    ),
    "scaled positions, both": (rewrite(rope_scaling={"factor": 8.0}), "rope_scaling"),
    "odd window": (rewrite(sliding_window=7), "sliding_window=7 is odd"),
    "quantized": (rewrite(quantization_config={"bits": 4}), "quantization_config"),
    "no positions": (rewrite(max_position_embeddings=...), "max_position_embeddings=None"),
    "eos of another tokenizer": (rewrite(eos_token_id=[7, 1]), "control ids"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), r"no tokenizer\.model"),
    "damaged tokenizer": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"x"),
        "not a readable SentencePiece",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-9]
        ),
        "not a readable safetensors",
    ),
    "missing": (
        with_tensors(lambda tensors: tensors.pop(NORM)),
        r"1 tensors are missing \['model.norm.weight'\]",
    ),
    "surplus": (
        with_tensors(
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}
            )
        ),
        "1 are not understood",
    ),
    "shape": (
        with_tensors(lambda tensors: tensors.update({NORM: torch.ones(32)})),
        r"shape \(32,\), the config says \(64,\)",
    ),
    "NaN": (with_tensors(lambda tensors: tensors[NORM].fill_(float("nan"))), "NaN"),
    "float16": (with_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].half()})), "F16"),
    "another output": (
        with_tensors(
            lambda tensors: tensors.update(
                {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
            )
        ),
        "differs from",
    ),
    "lost output": (rewrite(tie_word_embeddings=False), "output layer is lost"),
    "two homes": (lambda folder: (folder / INDEX).write_text("{}"), "only one can hold the model"),
    "no map": (shards(lambda folder, places: places.clear()), "weight_map"),
    "outside": (
        shards(lambda folder, places: places.update({NORM: "../model.safetensors"})),
        "weight_map",
    ),
    "lost shard": (
        shards(lambda folder, places: (folder / "model-00002-of-00002.safetensors").unlink()),
        "no model-00002",
    ),
    "other shard": (
        shards(lambda folder, places: places.pop(NORM)),
        r"disagree on \['model.norm.weight'\]",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_would_be_computed_wrongly_is_refused(copy: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        read_decoder(copy, HEAD)


@pytest.mark.parametrize(
    "damage",
    [
        # tied, and stored twice
        with_tensors(
            lambda tensors: tensors.update(
                {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
            )
        ),
        shards(lambda folder, places: None),
        rewrite(eos_token_id=[1, 106]),  # chat models
        # files of transformers 4
        rewrite(rope_parameters=None, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None),
        rewrite(use_bidirectional_attention=...),
    ],
    ids=["output stored", "shards by hand", "several eos", "old rope", "flag absent"],
)
def test_other_spellings_of_the_same_model_are_read(
    copy: Path, saved: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    found, wanted = read_decoder(copy, HEAD)[0], read_decoder(saved, HEAD)[0]
    assert found.config == wanted.config
    assert all(
        torch.equal(found.get_parameter(name), weight) for name, weight in wanted.named_parameters()
    )


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (HeadConfig(dims=(32,), max_tokens=48), "decoder's width, 64"),
        (HeadConfig(dims=(64,), max_tokens=65), "64 positions"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(saved: Path, head: HeadConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder(saved, head)
    with pytest.raises(ConfigError, match="max_tokens=2"):
        HeadConfig(dims=(64,), max_tokens=2)
