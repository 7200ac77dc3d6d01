"""Training: the loss, what a batch holds, the loop, and that a saved folder gives back the same vectors."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.builtin_quality import demo
from egemma_core.checkpoint import open_checkpoint
from egemma_core.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import CheckpointError, ConfigError, InputError, ShapeError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_core.train.data import Batches, Pair, PairSet, false_negatives, hold_out, pad, read_pairs, tokenize
from egemma_core.train.loop import DivergedError, TrainConfig, encode_rows, learning_rate, recall, train
from egemma_core.train.loss import contrastive_loss, matryoshka_loss
from egemma_core.train.vocabulary import FILLER, initialize, token_vectors, train_vocabulary

MODEL = Path(__file__).parents[2] / "models/egemma-small"
PROMPTS = Prompts(
    by_name={
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "STS": "task: sentence similarity | query: ",
    }
)
COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
THINGS = ("apple", "river", "house", "engine", "garden", "window", "letter", "mountain")
# The question names the thing by another word than the answer does, so equal words alone do not find it.
OTHER_WORDS = ("fruit", "stream", "home", "motor", "flowers", "glass", "mail", "peak")
PAIRS = [
    Pair(f"what is the {colour} {other}?", f"There is one {thing}, and it is {colour}.", f"There is one {thing}, and it is old.")
    for colour in COLOURS
    for thing, other in zip(THINGS, OTHER_WORDS, strict=True)
]
TINY = EncoderConfig(
    vocab_size=400,
    width=64,
    ffn_width=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    query_scale=0.25,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=64,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 96), (96, 64)),
    dims=(64, 32),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = [text for pair in PAIRS for text in (PROMPTS.query() + pair.query, PROMPTS.document() + pair.positive)]
    train_vocabulary(texts * 4, TINY.vocab_size, path)
    made = Tokenizer(path, bos_id=2, eos_id=1, pad_id=0, vocab_size=TINY.vocab_size, max_tokens=TINY.max_tokens)
    made.path = path
    return made


@pytest.fixture
def encoder():
    encoder = Encoder(TINY)
    initialize(
        encoder, torch.nn.functional.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(3)), dim=-1), seed=1
    )
    return encoder.eval()


def batches(tokenizer, **changes):
    settings = {"batch_size": 16, "max_tokens": 48, "hard_negatives": 8, "seed": 5, **changes}
    return Batches([PairSet("toy", "question answering", tuple(PAIRS))], tokenizer, PROMPTS, **settings)


def test_the_loss_is_the_value_worked_out_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])  # two positives, one hard negative
    unmasked = torch.zeros(2, 3, dtype=torch.bool)
    # Cosines / 0.5: row 0 is (2, 0, 1.2), row 1 is (0, 2, 1.6); each row's loss is log(sum of exp) minus its own positive.
    first = math.log(math.exp(2) + math.exp(0) + math.exp(1.2)) - 2
    second = math.log(math.exp(0) + math.exp(2) + math.exp(1.6)) - 2
    assert contrastive_loss(queries, documents, unmasked, 0.5).item() == pytest.approx((first + second) / 2, abs=1e-6)
    # Masking the hard negative for query 1 leaves log(e^0 + e^2) - 2 there.
    masked = torch.tensor([[False, False, False], [False, False, True]])
    second = math.log(math.exp(0) + math.exp(2)) - 2
    assert contrastive_loss(queries, documents, masked, 0.5).item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_the_matryoshka_loss_sums_the_widths_at_unit_length():
    queries = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    documents = torch.tensor([[0.8, 0.6], [-1.0, 0.0]])
    masked = torch.zeros(2, 2, dtype=torch.bool)
    # At width 1 every vector is +1 or -1 after normalizing: scores are (1, -1) for both queries, and query 1 wants the second.
    narrow = (math.log(math.exp(1) + math.exp(-1)) - 1 + math.log(math.exp(1) + math.exp(-1)) + 1) / 2
    wide = contrastive_loss(queries, documents, masked, 1.0).item()
    assert matryoshka_loss(queries, documents, masked, 1.0, (2, 1)).item() == pytest.approx(wide + narrow, abs=1e-6)


def test_the_loss_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ShapeError, match="M >= B"):
        contrastive_loss(torch.ones(3, 2), torch.ones(2, 2), torch.zeros(3, 2, dtype=torch.bool), 0.05)


def test_right_answers_of_other_rows_are_masked_and_the_own_positive_is_not():
    pairs = [Pair("a", "x", "n"), Pair("a", "y", "x"), Pair("b", "x"), Pair("c", "z", "q")]
    # Documents: x(a) y(a) x(b) z(c), then the negatives n x q.
    assert false_negatives(pairs).int().tolist() == [
        [0, 1, 1, 0, 0, 1, 0],  # y answers the same question; x is its positive again, also where another row calls it wrong
        [1, 0, 0, 0, 0, 0, 0],  # row 1 says itself that x is wrong, but x is row 0's answer to the same question
        [1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_batch_depends_only_on_its_seed_and_step_and_carries_prompts(tokenizer):
    first, again = batches(tokenizer).at(7), batches(tokenizer).at(7)
    assert (first.queries, first.documents) == (again.queries, again.documents)
    assert first.queries != batches(tokenizer).at(8).queries
    assert len(first.queries) == 16
    assert len(first.documents) == 16 + 8
    assert first.masked.shape == (16, 24)
    assert {tokenizer.decode(row).split(": ")[0] for row in first.queries} == {"task"}
    assert {tokenizer.decode(row)[:19] for row in first.documents} == {"title: none | text:"}
    assert all(row[0] == 2 and row[-1] == 1 for row in [*first.queries, *first.documents])


def test_a_set_smaller_than_a_batch_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="toy"):
        batches(tokenizer, batch_size=65)


def test_held_out_positives_are_not_trained_on():
    kept, held = hold_out(PairSet("toy", "question answering", tuple(PAIRS)), one_in=4)
    assert len(kept.pairs) + len(held) == len(PAIRS)
    assert 4 <= len(held) <= 32
    assert not {pair.positive for pair in kept.pairs} & {pair.positive for pair in held}


def test_pairs_are_read_by_kind_and_language(tmp_path):
    path = tmp_path / "toy.train.jsonl.gz"
    rows = [
        {"query": "q", "positive": "p", "negative": "n", "task": "title-body", "lang": "en"},
        {"query": "r", "positive": "s", "task": "search result", "lang": "en"},
        {"query": "f", "positive": "g", "task": "search result", "lang": "fr"},
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert read_pairs(path, ["en"]) == [
        PairSet("toy", "search result", (Pair("r", "s"),)),
        PairSet("toy", "title-body", (Pair("q", "p", "n"),)),
    ]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=r"toy\.train"):
        read_pairs(path)


def test_rows_come_back_in_their_order_whatever_their_length(tokenizer, encoder):
    rows = tokenize(tokenizer, PROMPTS.document(), ["a red apple in the garden", "red", "one mountain", "a"], 48)
    alone = torch.cat([encoder(*pad([row], 0)) for row in rows])
    # Other lengths of padding change the order of float32 sums, nothing else.
    torch.testing.assert_close(encode_rows(encoder, rows, 0, texts_per_chunk=3), alone, atol=1e-5, rtol=0)


def test_tokens_of_similar_use_start_near_each_other_and_frequent_ones_mean_little():
    # 4 and 5 stand in the same places, 6 never does; 3 is half of all tokens.
    rows = [[3, 7, token, 3, 8, 3] for token in (4, 5)] * 20 + [[3, 9, 6, 3, 10, 3]] * 20
    vectors = token_vectors(rows, vocab_size=12, width=8 + FILLER, rare=0.1)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12))
    meaning = vectors[:, :-FILLER]
    alike = torch.nn.functional.cosine_similarity(meaning[4], meaning[5], dim=0)
    unlike = torch.nn.functional.cosine_similarity(meaning[4], meaning[6], dim=0)
    assert alike > 0.9 > unlike
    # Token 3 keeps rare / (rare + frequency) = 0.1 / (0.1 + 0.5) of its length.
    assert meaning[3].norm().item() == pytest.approx(0.1 / 0.6, abs=1e-4)


def test_an_initialized_encoder_starts_as_the_mean_of_its_tokens_meanings():
    encoder = Encoder(TINY)
    rows = torch.nn.functional.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    initialize(encoder, rows, seed=0)
    for layer in encoder.layers:
        layer.post_attention_layernorm.weight.data.fill_(-1.0)  # the blocks say nothing
        layer.post_feedforward_layernorm.weight.data.fill_(-1.0)
    ids = torch.tensor([[2, 30, 40, 50, 1]])
    meaning = rows[ids[0]].mean(0)
    meaning[-FILLER:] = 0.0
    # The head turns forth and back; all rows have the same length, so the norms only leave out the filler.
    wanted = torch.nn.functional.normalize(meaning, dim=0)
    torch.testing.assert_close(encoder(ids, torch.ones(1, 5, dtype=torch.bool))[0], wanted, atol=1e-5, rtol=0)


def test_thirty_steps_teach_the_toy_what_its_words_mean(tokenizer, encoder, tmp_path):
    before = recall(encoder, tokenizer, PROMPTS, PAIRS, max_tokens=48, at=(1,))[1]
    train(
        encoder,
        batches(tokenizer),
        TrainConfig(steps=30, warmup_steps=3, learning_rate=2e-3, log_every=10, save_every=15),
        tmp_path,
        PAIRS,
    )
    after = recall(encoder, tokenizer, PROMPTS, PAIRS, max_tokens=48, at=(1,))[1]
    assert before < 0.2
    assert after > 0.5  # 0.86 where this was written
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30]
    assert [line["step"] for line in lines if "dev_recall@1" in line] == [15, 30]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tokenizer, tmp_path, monkeypatch):
    config = TrainConfig(steps=8, warmup_steps=2, save_every=4, bfloat16=False)

    def fresh():
        encoder = Encoder(TINY)
        initialize(
            encoder, torch.nn.functional.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(3)), dim=-1), seed=1
        )
        return encoder

    whole = train(fresh(), batches(tokenizer), config, tmp_path / "whole")
    stopping = batches(tokenizer)
    at = stopping.at

    def stop(step):
        if step == 6:
            raise KeyboardInterrupt
        return at(step)

    monkeypatch.setattr(stopping, "at", stop)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), stopping, config, tmp_path / "stopped")
    resumed = train(fresh(), batches(tokenizer), config, tmp_path / "stopped")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(fresh(), batches(tokenizer), TrainConfig(steps=8, warmup_steps=2, learning_rate=1.0), tmp_path / "stopped")


def test_a_loss_that_is_no_number_stops_the_run(tokenizer, encoder, tmp_path):
    with torch.no_grad():
        encoder.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="step 0"):
        train(encoder, batches(tokenizer), TrainConfig(steps=2, warmup_steps=0), tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(step, config) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.505)  # the cosine is 0 half-way: 0.01 + 0.99 / 2
    assert learning_rate(110, config) == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_gives_back_the_same_vectors(tokenizer, encoder, tmp_path, dtype):
    folder = tmp_path / "model"
    save_checkpoint(encoder, tokenizer.path, PROMPTS, folder, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == TINY
    assert checkpoint.prompts == PROMPTS
    rows = tokenize(checkpoint.tokenizer(), PROMPTS.document(), ["a red apple", "the garden by the river"], 48)
    assert rows == tokenize(tokenizer, PROMPTS.document(), ["a red apple", "the garden by the river"], 48)
    stored = encoder.to(dtype).float()  # what rounding to the stored dtype leaves
    assert torch.equal(load_encoder(checkpoint)(*pad(rows, 0)), stored(*pad(rows, 0)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_refuses_what_could_not_be_read_back(tokenizer, encoder, tmp_path):
    with pytest.raises(ConfigError, match="float16"):
        save_checkpoint(encoder, tokenizer.path, PROMPTS, tmp_path / "model", dtype=torch.float16)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        save_checkpoint(encoder, tokenizer.path, PROMPTS, tmp_path / "there")
    with torch.no_grad():
        encoder.norm.weight[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        save_checkpoint(encoder, tokenizer.path, PROMPTS, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


TEXTS = [
    "what is the red fruit?",
    "There is one river,\n\n   and it is blue.",
    "def f(x):\n    return x ** 2  # 12345",
    "Žluťoučký kůň 🐎 漢字",
    "",
]


def assert_sentence_transformers_agrees(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    checkpoint = open_checkpoint(folder)
    encoder = load_encoder(checkpoint)
    reference = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    assert reference.max_seq_length == checkpoint.config.max_tokens
    for name, prompt in (("query", checkpoint.prompts.query()), ("document", checkpoint.prompts.document())):
        rows = tokenize(checkpoint.tokenizer(), prompt, TEXTS, checkpoint.config.max_tokens)
        theirs = [tuple(row) for row in reference.tokenizer([prompt + text for text in TEXTS])["input_ids"]]
        assert theirs == rows
        with torch.no_grad():
            ours = encode_rows(encoder, rows, checkpoint.config.pad_id).numpy()
        # float32 on both sides, other order of the sums.
        np.testing.assert_allclose(reference.encode(TEXTS, prompt_name=name), ours, atol=2e-6)


def test_sentence_transformers_opens_a_saved_folder_and_agrees(tokenizer, encoder, tmp_path):
    save_checkpoint(encoder, tokenizer.path, PROMPTS, tmp_path / "model")
    assert_sentence_transformers_agrees(tmp_path / "model")


def test_sentence_transformers_agrees_on_the_built_in_model():
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL} was not made: python benchmarks/train_builtin.py")
    assert_sentence_transformers_agrees(MODEL)


def test_the_built_in_model_finds_what_the_demo_asks_for():
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL} was not made: python benchmarks/train_builtin.py")
    checkpoint = open_checkpoint(MODEL)
    first = {row["query"]: row["hits"][0][0] for row in demo(load_encoder(checkpoint), checkpoint)}
    assert first == {
        "what are the symptoms of diabetes?": "med-diabetes",
        "find files larger than 100 MB": "shell-find-size",
        "how do I undo my last commit": "git-undo",
        "split a list into chunks of equal size": "py-chunks",
        "when should I plant tomatoes in the garden": "garden-tomato",
        "why is the sky blue?": "phys-sky",
        "my suitcase did not arrive at the airport": "travel-luggage",
    }
