"""Token ids: the published golden values with the real tokenizer, and the accounting of what was
cut.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from egemma_core.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    InputError,
    TokenLimitError,
)
from egemma_core.tokens import Tokenizer

# Source: QuixiAI/embeddinggemma.c testdata/goldens-tokens.json (MIT), ids of the published
# EmbeddingGemma tokenizer.
GOLDEN = {
    "": [2, 1],
    "a": [2, 236746, 1],
    "Hello, world!": [2, 9259, 236764, 1902, 236888, 1],
    "clustering: memory systems for artificial agents": [
        2,
        178509,
        236787,
        6571,
        3797,
        573,
        16477,
        11362,
        1,
    ],
    "classification: I feel wonderful today": [2, 59137, 236787, 564, 2597, 10455, 3124, 1],
    "search_query: what powers the cell": [
        2,
        2305,
        236779,
        3278,
        236787,
        1144,
        13361,
        506,
        2145,
        1,
    ],
    "search_document: Café naïveté — résumé 日本語のテキスト 🎉": [
        2,
        2305,
        236779,
        7565,
        236787,
        62367,
        104214,
        8959,
        236859,
        2192,
        118515,
        33375,
        238582,
        236945,
        95830,
        204906,
        1,
    ],
}


@pytest.fixture(scope="module")
def gemma(gemma_tokenizer: Path) -> Tokenizer:
    return Tokenizer(
        gemma_tokenizer, bos_id=2, eos_id=1, pad_id=0, vocab_size=262144, max_tokens=2048
    )


@pytest.fixture(scope="module")
def tiny(tiny_spm: Path) -> Tokenizer:
    return Tokenizer(tiny_spm, bos_id=2, eos_id=1, pad_id=0, vocab_size=4096, max_tokens=64)


@pytest.mark.parametrize("text", GOLDEN)
def test_the_real_tokenizer_gives_the_published_ids(gemma: Tokenizer, text: str) -> None:
    assert list(gemma.encode(text).ids) == GOLDEN[text]


def test_control_tokens_written_in_a_text_stay_text(gemma: Tokenizer) -> None:
    ids = gemma.encode("<bos> and <eos> and <pad>").ids
    assert ids[0] == 2
    assert ids[-1] == 1
    assert not {0, 1, 2} & set(ids[1:-1])


def test_bos_and_eos_frame_every_text(tiny: Tokenizer) -> None:
    for text in ("", "a", "two words", "\n\n", "日本"):
        ids = tiny.encode(text).ids
        assert (ids[0], ids[-1]) == (2, 1)
        assert tiny.decode(ids) == text


def test_a_nul_character_survives(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a\0b").ids) == "a\0b"


def test_a_text_at_the_limit_is_whole(tiny: Tokenizer) -> None:
    text = "日" * 100
    whole = Tokenizer.encode(tiny, text, overflow="truncate")
    per_character = (whole.num_tokens - 2) / 100
    fitting = tiny.encode("日" * int(62 / per_character))
    assert not fitting.truncated
    assert fitting.num_tokens == len(fitting.ids) <= 64


def test_a_longer_text_is_refused_by_default_with_both_numbers(tiny: Tokenizer) -> None:
    with pytest.raises(TokenLimitError, match=r"has \d{3,} tokens, the limit is 64"):
        tiny.encode("日" * 100)


def test_truncation_keeps_eos_last_and_is_told(tiny: Tokenizer) -> None:
    tokens = tiny.encode("日" * 100, overflow="truncate")
    assert tokens.truncated
    assert len(tokens.ids) == 64
    assert tokens.ids[-1] == 1
    assert tokens.num_tokens > 64
    shorter = tiny.encode("日" * 100, overflow="truncate", max_tokens=10)
    assert len(shorter.ids) == 10
    assert shorter.ids[-1] == 1


def test_a_lone_surrogate_is_refused_with_its_place(tiny: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+D800 at character 2"):
        tiny.encode("ab\ud800")


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_what_is_not_a_str_is_refused(tiny: Tokenizer, text: object) -> None:
    with pytest.raises(InputError, match=type(text).__name__):
        tiny.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [2, 0, 65, 10.0])
def test_impossible_limits_are_refused(tiny: Tokenizer, limit: int) -> None:
    with pytest.raises(ConfigError, match="from 3 to 64"):
        tiny.encode("a", max_tokens=limit)


def test_an_unknown_overflow_policy_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="overflow='wrap'"):
        tiny.encode("a", overflow="wrap")  # type: ignore[arg-type]


def test_a_tokenizer_that_disagrees_with_the_config_is_refused(
    tiny_spm: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        Tokenizer(tiny_spm, bos_id=1, eos_id=2, pad_id=0, vocab_size=4096, max_tokens=64)
    with pytest.raises(CheckpointError, match="10 rows"):
        Tokenizer(tiny_spm, bos_id=2, eos_id=1, pad_id=0, vocab_size=10, max_tokens=64)
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(BundleError, match="not a readable SentencePiece model"):
        Tokenizer(
            tmp_path / "t.model", bos_id=2, eos_id=1, pad_id=0, vocab_size=4096, max_tokens=64
        )


def test_a_megabyte_is_counted_and_cut(tiny: Tokenizer) -> None:
    tokens = tiny.encode("long text " * 100_000, overflow="truncate")
    assert tokens.truncated
    assert len(tokens.ids) == 64
    assert tokens.num_tokens > 100_000
