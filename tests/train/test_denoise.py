"""Stage 0: its batches are what the seed says, its gradient is that of plain cross-entropy however
it is cut, and it learns.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import ConfigError, InputError
from egemma_core.nn.encode import pad
from egemma_core.nn.load import load_encoder
from egemma_core.tokens import Tokenizer
from egemma_train.data.texts import TextConfig, Texts, hold_out_texts, read_texts, window
from egemma_train.loop import run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.denoise import DenoisingObjective, in_chunks
from egemma_train.objectives.language_model import LanguageModelObjective
from egemma_train.objectives.ul2 import TASKS, Denoised, restore
from egemma_train.ranks import Ranks
from egemma_train.start.decoder import HeadConfig, random_encoder, read_decoder
from tests.tiny import BOS, EOS, PAD, VOCAB

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
NOUNS, VERBS = (
    ("pump", "hose", "motor", "letter", "cat", "roof"),
    ("leaks", "sleeps", "stops", "answers", "turns"),
)
TEXTS = [
    f"The {noun} {verb} when the {other} is {state}."
    for noun in NOUNS
    for verb in VERBS
    for other in NOUNS
    for state in ("warm", "old")
]
LONG = " ".join(TEXTS[:20])
SMALL = TextConfig(batch_size=16, max_tokens=32, chunk_tokens=200, seed=5)


def denoising(tiny_spm: Path, config: TextConfig = SMALL, **changes: Any) -> DenoisingObjective:
    given = {
        "texts": [*TEXTS, LONG],
        "tokenizer_path": tiny_spm,
        "prompts": EMBEDDING_GEMMA,
        **changes,
    }
    return DenoisingObjective(random_encoder(CONFIG, 1), config=config, **given)


def language_model(
    tiny_spm: Path, config: TextConfig = SMALL, **changes: Any
) -> LanguageModelObjective:
    return LanguageModelObjective(
        random_encoder(CONFIG, 1), [*TEXTS, LONG], config, tokenizer_path=tiny_spm, **changes
    )


def gradients(
    objective: DenoisingObjective | LanguageModelObjective, step: int
) -> tuple[float, dict[str, Tensor]]:
    for weight in objective.parameters().values():
        weight.grad = None
    loss = objective.backward(step).losses["loss"]
    return loss, {
        name: weight.grad.clone()
        for name, weight in objective.parameters().items()
        if weight.grad is not None
    }


def plain_nats(objective: DenoisingObjective, examples: list[Denoised]) -> Tensor:
    """All at once, padded by hand, every score in memory, torch's own cross-entropy; summed."""
    source, mask = pad([example.source for example in examples], PAD)
    written, _ = pad([(BOS, *example.target[:-1]) for example in examples], PAD)
    wanted = torch.full_like(written, -100)
    for index, example in enumerate(examples):
        wanted[index, : len(example.target)] = torch.tensor(example.target)
    return F.cross_entropy(
        objective.model(source, mask, written).flatten(0, 1), wanted.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("chunk_tokens", [1, 200, 10**6])
def test_the_gradient_is_that_of_plain_cross_entropy_however_the_batch_is_cut(
    tiny_spm: Path, chunk_tokens: int
) -> None:
    objective = denoising(tiny_spm, replace(SMALL, chunk_tokens=chunk_tokens))
    examples = objective.examples(3)
    assert (
        len(in_chunks(examples, chunk_tokens))
        == {1: 16, 200: len(in_chunks(examples, 200)), 10**6: 1}[chunk_tokens]
    )
    loss, found = gradients(objective, 3)
    named = {
        name: weight
        for name, weight in objective.parameters().items()
        if not name.startswith("dense")
    }
    plain = plain_nats(objective, examples) / sum(len(example.target) for example in examples)
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    assert found.keys() == named.keys()  # the head learns nothing here
    for (name, weight), wanted in zip(
        named.items(), torch.autograd.grad(plain, list(named.values())), strict=True
    ):
        torch.testing.assert_close(
            found[name], wanted, atol=1e-6, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert weight.requires_grad


def test_chunks_hold_every_example_once_and_no_more_tokens_than_allowed(tiny_spm: Path) -> None:
    examples = denoising(tiny_spm, replace(SMALL, batch_size=64)).examples(0)
    chunks = in_chunks(examples, 300)
    assert sorted(map(id, examples)) == sorted(id(example) for chunk in chunks for example in chunk)
    sizes = [
        len(chunk) * (max(len(e.source) for e in chunk) + max(len(e.target) for e in chunk))
        for chunk in chunks
    ]
    assert max(sizes) <= 300
    assert sum(sizes) < 1.35 * sum(len(e.source) + len(e.target) for e in examples), (
        "too much padding"
    )
    assert in_chunks([], 300) == []


@dataclass(frozen=True)
class Share(Ranks):
    """One of two processes, before it speaks with the other."""

    count: int = 2

    def sum(self, value: Tensor) -> Tensor:
        return value

    def sum_gradients(self, parameters: object) -> None: ...


@pytest.mark.parametrize("make", [denoising, language_model])
def test_the_gradients_of_two_processes_add_up_to_that_of_one(tiny_spm: Path, make: Any) -> None:
    (loss, whole), *parts = [
        gradients(make(tiny_spm, **ranks), 2)
        for ranks in ({}, {"ranks": Share(rank=0)}, {"ranks": Share(rank=1)})
    ]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(
            parts[0][1][name] + parts[1][1][name], gradient, atol=1e-6, rtol=1e-3
        )


def test_a_step_is_a_pure_function_of_seed_and_step(tiny_spm: Path) -> None:
    one, two = denoising(tiny_spm), denoising(tiny_spm)
    later = [one.examples(step) for step in range(40)]
    assert two.examples(37) == later[37]
    assert two.examples(2) == later[2]
    assert gradients(one, 7)[0] == gradients(two, 7)[0] == gradients(one, 7)[0]
    assert denoising(tiny_spm, replace(SMALL, seed=6)).examples(2) != later[2]
    assert later[0] != later[1]
    assert (
        language_model(tiny_spm).rows(5)
        == language_model(tiny_spm).rows(5)
        != language_model(tiny_spm).rows(6)
    )


def test_every_text_is_seen_once_before_one_is_seen_twice(tiny_spm: Path) -> None:
    tokenizer = Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=10**6
    )
    texts = Texts(TEXTS[:50], tokenizer, TextConfig(batch_size=15), 4)
    # three passes; batches reach over their borders
    drawn = [row for step in range(10) for row in texts.at(step)]
    passes = [drawn[:50], drawn[50:100], drawn[100:]]
    assert all(
        Counter(one) == Counter(tokenizer.encode(text).ids[1:-1] for text in TEXTS[:50])
        for one in passes
    )
    assert passes[0] != passes[1] != passes[2]
    # in any order
    assert [row for step in (9, 3) for row in texts.at(step)] == [*drawn[135:], *drawn[45:60]]


def test_examples_are_windows_of_the_texts_and_neither_side_is_too_long(tiny_spm: Path) -> None:
    objective = denoising(tiny_spm, replace(SMALL, max_tokens=12))
    tokenizer = objective.texts.tokenizer
    whole = [tokenizer.encode(text).ids[1:-1] for text in [*TEXTS, LONG]]
    windows = {row[start : start + 10] for row in whole for start in range(max(1, len(row) - 9))}
    seen = [example for step in range(30) for example in objective.examples(step)]
    assert {restore(example, objective.special) for example in seen} <= windows
    assert max(max(len(example.source), len(example.target)) for example in seen) <= 12
    assert {example.task for example in seen} == set(range(5))


def test_a_window_lies_anywhere_in_a_long_text() -> None:
    draw = np.random.default_rng(0)
    seen = Counter(window((0, 1, 2, 3, 4), 3, draw) for _ in range(3000))
    assert set(seen) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert all(abs(count - 1000) < 120 for count in seen.values())
    assert window((0, 1, 2), 3, draw) == (0, 1, 2)


def test_fresh_cross_attention_is_trained_alone_at_first(tiny_spm: Path) -> None:
    objective = denoising(tiny_spm, cross="fresh", cross_steps=2)
    everything = {name for name in objective.parameters() if not name.startswith("dense")}
    crossing = {name for name in everything if "cross_attn" in name}
    assert 0 < len(crossing) < len(everything)
    assert [set(gradients(objective, step)[1]) for step in (0, 1, 2)] == [
        crossing,
        crossing,
        everything,
    ]
    frozen, free = gradients(objective, 1)[1], gradients(denoising(tiny_spm, cross="fresh"), 1)[1]
    for name in crossing:
        torch.testing.assert_close(frozen[name], free[name])
    # cannot be computed
    objective.encoder.embed_tokens.weight.data = torch.full_like(
        objective.encoder.embed_tokens.weight, 0.0
    )[:, :5]
    with pytest.raises(RuntimeError):
        objective.backward(0)
    assert all(weight.requires_grad for weight in objective.parameters().values())
    for settings in (
        {"cross": "balanced", "cross_steps": 1},
        {"cross": "fresh", "cross_steps": -1},
    ):
        with pytest.raises(ConfigError, match="cross_steps"):
            denoising(tiny_spm, **settings)


def test_the_dev_score_is_the_mean_over_tokens_of_texts_damaged_once_and_for_all(
    tiny_spm: Path,
) -> None:
    objective = denoising(tiny_spm, dev=[*TEXTS[:16], "a"])
    assert Counter(example.task for example in objective.dev) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 8}
    scores = objective.evaluate()
    assert scores == denoising(tiny_spm, dev=TEXTS[:16]).evaluate()
    with torch.no_grad():
        assert scores["score"] == pytest.approx(
            -plain_nats(objective, objective.dev).item()
            / sum(len(e.target) for e in objective.dev),
            rel=1e-5,
        )
        for index, task in enumerate(TASKS):
            own = [example for example in objective.dev if example.task == index]
            assert scores[task.name] == pytest.approx(
                -plain_nats(objective, own).item() / sum(len(e.target) for e in own), rel=1e-5
            )
    assert denoising(tiny_spm).evaluate() == language_model(tiny_spm).evaluate() == {}


def test_a_language_models_loss_is_transformers_own(tiny_spm: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="it is what we compare with; pip install 'egemma[dev]'"
    )
    config = replace(SMALL, batch_size=3, chunk_tokens=40)
    objective = language_model(tiny_spm, config, dev=TEXTS[:3])
    objective.save(tmp_path / "decoder")
    reference = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "decoder").eval()

    def theirs(rows: list[tuple[int, ...]]) -> Tensor:
        ids, mask = pad([(BOS, *row) for row in rows], PAD)
        return reference(
            ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100), use_cache=False
        ).loss  # type: ignore[no-any-return]

    rows = objective.rows(4)
    assert any(row[-1] == EOS for row in rows)
    loss, found = gradients(objective, 4)
    wanted = theirs(rows)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert (
        found.keys()
        == objective.parameters().keys()
        == {name for name, _ in reference.named_parameters()}
    )
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        assert objective.evaluate()["score"] == pytest.approx(
            -theirs([(*row, EOS) for row in map(encode(tiny_spm), TEXTS[:3])]).item(), rel=1e-5
        )


def encode(tiny_spm: Path) -> Any:
    tokenizer = Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=10**6
    )
    return lambda text: tokenizer.encode(text).ids[1:-1]


def test_rows_of_a_language_model_end_with_eos_where_their_text_does(tiny_spm: Path) -> None:
    objective = language_model(tiny_spm, replace(SMALL, max_tokens=12))
    whole = {(*encode(tiny_spm)(text), EOS) for text in [*TEXTS, LONG]}
    for row in (row for step in range(20) for row in objective.rows(step)):
        assert len(row) == 12
        assert any(
            row == text[-12:] if row[-1] == EOS else str(row)[1:-1] in str(text) for text in whole
        )


def test_bfloat16_computes_nearly_the_same(tiny_spm: Path) -> None:
    for make in (denoising, language_model):
        exact, rough = (
            make(tiny_spm).backward(0).losses["loss"],
            make(tiny_spm, replace(SMALL, precision="bfloat16")).backward(0).losses["loss"],
        )
        assert rough == pytest.approx(exact, rel=0.01)
        assert rough != exact


def test_all_of_stage_0_learns_and_hands_its_encoder_on(tiny_spm: Path, tmp_path: Path) -> None:
    """A language model from chance, its folder read as a decoder, denoised, saved as an encoder.

    Guessing among 512 pieces costs ln 512 = 6.2.
    """
    kept, dev = hold_out_texts(TEXTS, 8)
    speech = LanguageModelObjective(
        random_encoder(CONFIG, 1),
        kept,
        replace(SMALL, chunk_tokens=2000),
        tokenizer_path=tiny_spm,
        dev=dev,
    )
    loop = LoopConfig(steps=40, learning_rate=1e-2, log_every=5, save_every=1000)
    written = run(speech, loop, tmp_path / "speech")
    assert written.scores["score"] > -2.0
    encoder, path, prompts = read_decoder(written.model, HeadConfig(dims=(32, 16), max_tokens=64))
    objective = DenoisingObjective(
        encoder,
        kept,
        replace(SMALL, chunk_tokens=2000),
        tokenizer_path=path,
        prompts=prompts,
        dev=dev,
    )
    before = objective.evaluate()
    finished = run(objective, loop, tmp_path / "denoised")
    assert finished.scores["score"] > before["score"] + 1
    assert finished.scores["suffix"] < finished.scores["short"], (
        "most of a text is harder to write than a word of it"
    )
    again = load_encoder(open_checkpoint(finished.model))
    ids, mask = pad([(BOS, *encode(tiny_spm)(text), EOS) for text in TEXTS[:3]], PAD)
    with torch.no_grad():
        torch.testing.assert_close(again(ids, mask), encoder(ids, mask))
    assert open_checkpoint(finished.model).prompts == EMBEDDING_GEMMA


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "make",
    [lambda path: denoising(path, cross="fresh", cross_steps=5), language_model],
    ids=["denoising", "language model"],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_spm: Path, tmp_path: Path, make: Any
) -> None:
    """Killed in the warm-up, and again after it: states of both kinds."""
    loop = LoopConfig(steps=8, learning_rate=1e-2, save_every=2)
    straight = make(tiny_spm)
    run(straight, loop, tmp_path / "straight")
    for last in (3, 7):
        broken = make(tiny_spm)
        backward = broken.backward

        def fail(step: int, last: int = last, backward: Any = backward) -> Any:
            if step == last:
                raise KilledError
            return backward(step)

        broken.backward = fail
        with pytest.raises(KilledError):
            run(broken, loop, tmp_path / "broken")
    resumed = make(tiny_spm)
    run(resumed, loop, tmp_path / "broken")
    for name, weight in straight.parameters().items():
        assert torch.equal(weight, resumed.parameters()[name]), name


def test_texts_that_cannot_be_used_are_counted_or_refused(tiny_spm: Path) -> None:
    objective = denoising(tiny_spm, texts=[*TEXTS, "", "a", "ab"])
    assert (len(objective.texts.texts), objective.texts.too_short) == (len(TEXTS), 3)
    for name in ("<unused0>", "<unused5>"):  # the first task, the only sentinel
        with pytest.raises(InputError, match=f"text 1 holds {name}.*'so {name} it is'"):
            denoising(tiny_spm, texts=[TEXTS[0], f"so {name} it is"])
        with pytest.raises(InputError, match="text 0"):
            denoising(tiny_spm, dev=[f"so {name} it is"])
    # no piece of this vocabulary
    assert (
        len(denoising(tiny_spm, texts=[*TEXTS, "so <unused77> it is"]).texts.texts)
        == len(TEXTS) + 1
    )
    with pytest.raises(ConfigError, match=r"batch_size=16, but there are 2 texts \(1 more"):
        denoising(tiny_spm, texts=[*TEXTS[:2], "a"])
    with pytest.raises(ConfigError, match="max_tokens=65 is more than the 64"):
        language_model(tiny_spm, replace(SMALL, max_tokens=65))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"max_tokens": 5},
        {"chunk_tokens": 0},
        {"seed": -1},
        {"batch_size": 2.0},
        {"precision": "float16"},
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        TextConfig(**change)


def test_texts_are_read_once_each_from_all_fields_that_are_named(tmp_path: Path) -> None:
    rows = [
        {"query": "one", "positive": "two", "negative": ["three", "one"], "lang": "en"},
        {"text": "four\nlines"},
        {"query": "two", "positive": "five"},
    ]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    packed.write_bytes(
        gzip.compress(json.dumps({"text": "sechs", "query": "four\nlines"}).encode())
    )
    assert read_texts([plain, packed], ("text", "query", "positive", "negative")) == [
        "one",
        "two",
        "three",
        "four\nlines",
        "five",
        "sechs",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', r"line 2: field 'text': found"),
        ('{"text": " "}', "line 2: field 'text'"),
        ('{"text": []}', "line 2: field 'text'"),
        ('{"text": ["good", null]}', "line 2: field 'text'"),
        ('{"title": "x"}', r"line 2: none of the fields \['text', 'query'\], only \['title'\]"),
        ('{"text"', "line 2: not JSON"),
        ("[]", "line 2: found"),
        (r'{"text": "\ud800"}', "line 2: field 'text'.*surrogate"),
    ],
)
def test_a_row_that_is_no_text_is_named_by_file_line_and_field(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"texts\.jsonl, " + message):
        read_texts([path], ("text", "query"))


def test_files_that_are_no_files_of_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        read_texts([tmp_path / "absent.jsonl"], ("text",))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        read_texts([tmp_path / "empty.jsonl"], ("text",))
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 100)[:-12])
    with pytest.raises(InputError, match="damaged"):
        read_texts([tmp_path / "damaged.jsonl.gz"], ("text",))
    with pytest.raises(ConfigError, match="at least one of each"):
        read_texts([], ("text",))


def test_held_out_texts_are_the_same_in_every_run_and_no_others_move_when_one_is_added() -> None:
    kept, held = hold_out_texts(TEXTS, 8)
    assert sorted([*kept, *held]) == sorted(TEXTS)
    assert 25 <= len(held) <= 65  # an eighth of 360 is 45
    more_kept, more_held = hold_out_texts(["new", *TEXTS], 8)
    assert (
        [text for text in more_kept if text != "new"],
        [text for text in more_held if text != "new"],
    ) == (kept, held)
