"""Denoising takes out what its tasks say, loses nothing, and is drawn as the mixture says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from egemma_core.errors import ConfigError, InputError
from egemma_core.tokens import Tokenizer
from egemma_train.objectives.ul2 import TASKS, SpecialTokens, denoise, draw_spans, restore
from tests.tiny import BOS, EOS, MAX_TOKENS, PAD, VOCAB

SPECIAL = SpecialTokens(
    tasks=(900, 901, 902, 903, 904), sentinels=tuple(range(905, 1005)), eos_id=1
)


@given(
    st.lists(st.integers(10, 800), min_size=4, max_size=300),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 0, 1, 2, 3, 4]),
)
def test_source_and_target_together_are_the_text(
    ids: list[int], seed: int, task: int | None
) -> None:
    example = denoise(ids, SPECIAL, np.random.default_rng(seed), task)
    assert restore(example, SPECIAL) == tuple(ids)
    assert task in (None, example.task)
    assert example.source[0] == SPECIAL.tasks[example.task]
    assert (example.source[-1], example.target[-1]) == (1, 1)
    sentinels = [token for token in example.source if token in SPECIAL.sentinels]
    assert (
        sentinels
        == [token for token in example.target if token in SPECIAL.sentinels]
        == list(SPECIAL.sentinels[: len(sentinels)])
    )
    assert len(example.target) - len(sentinels) - 1 == min(
        len(ids) - 1, max(1, round(len(ids) * TASKS[example.task].rate))
    )


@pytest.mark.parametrize(("task", "spans"), [(0, 13), (1, 11), (2, 1), (3, 4), (4, 1)])
def test_spans_have_the_mean_length_of_their_task(task: int, spans: int) -> None:
    """256 tokens: 38 / 3, 128 / 12, 38 / 32, 128 / 32 spans, and one."""
    example = denoise(list(range(10, 266)), SPECIAL, np.random.default_rng(0), task)
    assert sum(token in SPECIAL.sentinels for token in example.source) == spans


def test_the_last_task_takes_the_end() -> None:
    example = denoise(list(range(10, 30)), SPECIAL, np.random.default_rng(0), 4)
    assert example.source == (904, *range(10, 15), 905, 1)
    assert example.target == (905, *range(15, 30), 1)


def test_every_placement_of_spans_is_as_likely() -> None:
    """5 tokens, 2 taken out in 2 spans, kept first: kept parts 1 + 2 or 2 + 1, taken parts 1
    + 1.
    """
    draw = np.random.default_rng(1)
    seen = Counter(
        "".join("x" if out else "." for out in draw_spans(5, 2, 2, draw)) for _ in range(4000)
    )
    assert set(seen) == {".x..x", "..x.x"}
    assert abs(seen[".x..x"] - 2000) < 200


def test_tasks_are_drawn_one_to_four() -> None:
    draw = np.random.default_rng(2)
    seen = Counter(denoise(list(range(10, 50)), SPECIAL, draw).task for _ in range(8000))
    for task, weight in enumerate((1, 1, 1, 1, 4)):
        assert abs(seen[task] - 1000 * weight) < 200, seen


def test_the_same_draw_gives_the_same_example() -> None:
    ids = list(range(10, 100))
    assert denoise(ids, SPECIAL, np.random.default_rng(7)) == denoise(
        ids, SPECIAL, np.random.default_rng(7)
    )
    assert denoise(ids, SPECIAL, np.random.default_rng(7)) != denoise(
        ids, SPECIAL, np.random.default_rng(8)
    )


def test_what_cannot_be_denoised_is_refused() -> None:
    with pytest.raises(InputError, match="fewer than 4"):
        denoise([10, 11, 12], SPECIAL, np.random.default_rng(0))
    with pytest.raises(InputError, match="sentinel"):
        denoise([10, 11, 12, 905], SPECIAL, np.random.default_rng(0))


def test_special_tokens_are_the_vocabularys_unused_pieces(tiny_spm: Path) -> None:
    tokenizer = Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=MAX_TOKENS
    )
    special = SpecialTokens.of(tokenizer)
    assert tokenizer.encode("<unused0><unused4><unused5>").ids[1:-1] == (
        special.tasks[0],
        special.tasks[4],
        special.sentinels[0],
    )
    assert special.sentinels == tuple(tokenizer.spare_ids()[5:])
    tokenizer.spare_ids = lambda: [7, 8, 9, 10, 11]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="at least one for a span"):
        SpecialTokens.of(tokenizer)


def test_gemmas_vocabulary_has_thousands_to_spare(gemma_tokenizer: Path) -> None:
    tokenizer = Tokenizer(
        gemma_tokenizer, bos_id=2, eos_id=1, pad_id=0, vocab_size=262144, max_tokens=2048
    )
    special = SpecialTokens.of(tokenizer)
    assert (len(special.tasks), len(special.sentinels)) == (5, 100)
    assert special.tasks[0] == 6  # <unused0>, shared/data/README.md
    assert len(tokenizer.spare_ids()) == 6242
