"""Chunks: none longer than the model reads, nothing lost, and an edit stays where it was made."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egemma.chunks import Chunk, Heading, split_text
from egemma_core.errors import ConfigError, InputError, TokenLimitError
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from tests.tiny import PROMPTS

PROMPT = Prompts(by_name=PROMPTS).document
WORDS = [
    "the",
    "pump",
    "loses",
    "its",
    "oil",
    "when",
    "a",
    "motor",
    "is",
    "warm",
    "and",
    "nobody",
    "answered",
    "so",
    "she",
    "wrote",
    "letter",
    "instead",
    "of",
    "bread",
    "flour",
    "water",
    "salt",
]


def count_words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def tiny(tiny_spm: Path) -> Callable[[str], int]:
    tokenizer = Tokenizer(tiny_spm, bos_id=2, eos_id=1, pad_id=0, vocab_size=4096, max_tokens=128)
    return lambda text: tokenizer.encode(text, overflow="truncate").num_tokens


def sentences(number: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [
        " ".join(chance.choices(WORDS, k=chance.randint(4, 14))).capitalize() + "."
        for _ in range(number)
    ]


def paragraphs(number: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [
        " ".join(sentences(chance.randint(2, 6), seed * 1000 + place)) for place in range(number)
    ]


def assert_tiles(text: str, chunks: list[Chunk]) -> None:
    if not text:
        assert chunks == []
        return
    assert (chunks[0].start, chunks[-1].stop) == (0, len(text))
    assert all(chunk.text == text[chunk.start : chunk.stop] for chunk in chunks)
    for before, after in pairwise(chunks):
        assert before.start < after.start <= before.stop < after.stop


LONG = {
    "prose": "\n\n".join(paragraphs(60)),
    "one line without blanks": "x" * 1_000_000,
    "random letters": "".join(
        random.Random(1).choices("abcdefghijklmnopqrstuvwxyzABCDEFG0123456789+/", k=50_000)
    ),
    "japanese": "日本語の短い文です。水と油は混ざらない！そうですか？" * 400,
    "han without sentences": "".join(
        random.Random(2).choices([chr(0x4E00 + place) for place in range(2000)], k=20_000)
    ),
    "emoji": "👩‍👩‍👧👍🏽🇩🇪é" * 2000,
    "thai": "ปั๊มสูญเสียน้ำมัน" * 1000,
    "blanks": "word" + " " * 100_000 + "word",
    "newlines": "\n" * 50_000,
    "dots": "." * 100_000,
    "words without sentences": " ".join(random.Random(3).choices(WORDS, k=20_000)),
    "code": "\n\n".join(
        f"def function_{place}(a, b):\n    if a > b:\n        return a - b\n    return {place}"
        for place in range(400)
    ),
    "control tokens": "<bos><eos><pad>\u2581" * 5000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("overlap", [0, 16])
def test_no_chunk_is_longer_than_the_model_reads_and_nothing_is_lost(
    tiny: Callable[[str], int], name: str, overlap: int
) -> None:
    text = LONG[name] if name != "one line without blanks" or overlap else LONG[name][:100_000]
    chunks = split_text(
        text,
        title="Manual",
        count_tokens=tiny,
        max_tokens=128,
        overlap_tokens=overlap,
        prompt=PROMPT,
    )
    assert_tiles(text, chunks)
    counted = [tiny(PROMPT(chunk.title) + chunk.text) for chunk in chunks]
    assert max(counted) <= 128
    assert statistics.mean(counted) > 64  # and they are not crumbs


def test_the_real_tokenizer_reads_every_chunk_whole(gemma_tokenizer: Path) -> None:
    tokenizer = Tokenizer(
        gemma_tokenizer, bos_id=2, eos_id=1, pad_id=0, vocab_size=262144, max_tokens=2048
    )

    def count(text: str) -> int:
        return tokenizer.encode(text, overflow="truncate").num_tokens

    text = "\n\n".join(LONG[name][:20_000] for name in LONG)
    chunks = split_text(
        text, title="Manual", count_tokens=count, max_tokens=256, overlap_tokens=32, prompt=PROMPT
    )
    assert_tiles(text, chunks)
    assert max(count(PROMPT(chunk.title) + chunk.text) for chunk in chunks) <= 256


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from("\n\r\t  .!?。#a")
        ),
        max_size=2000,
    ),
    max_tokens=st.integers(64, 128),
    overlap=st.integers(0, 10),
    cuts=st.sets(st.integers(0, 1999), max_size=6),
)
def test_any_text_is_tiled_within_the_limit(
    tiny: Callable[[str], int], text: str, max_tokens: int, overlap: int, cuts: set[int]
) -> None:
    headings = [
        Heading(offset=at, level=1 + at % 3, title=text[at : at + 30])
        for at in sorted(cuts)
        if at < len(text)
    ]
    chunks = split_text(
        text,
        title=None,
        count_tokens=tiny,
        max_tokens=max_tokens,
        overlap_tokens=overlap,
        headings=headings,
        prompt=PROMPT,
    )
    assert_tiles(text, chunks)
    assert all(tiny(PROMPT(chunk.title) + chunk.text) <= max_tokens for chunk in chunks)


def test_a_tokenizer_whose_counts_do_not_add_up_cannot_break_the_limit() -> None:
    # joined text costs more than its parts, which no estimate from the parts foresees
    def count(text: str) -> int:
        return len(text) + (len(text) // 40) ** 2

    text = " ".join(paragraphs(20))
    chunks = split_text(text, title=None, count_tokens=count, max_tokens=200, overlap_tokens=90)
    assert any(after.start < before.stop for before, after in pairwise(chunks))
    assert_tiles(text, chunks)
    assert all(count(chunk.text) <= 200 for chunk in chunks)


def test_a_short_text_is_one_chunk_and_an_empty_one_none(tiny: Callable[[str], int]) -> None:
    text = "How do I reset my password?"
    assert split_text(text, title="Help", count_tokens=tiny, max_tokens=128, prompt=PROMPT) == [
        Chunk(start=0, stop=len(text), title="Help", text=text)
    ]
    assert split_text("", title="Help", count_tokens=tiny, max_tokens=128, prompt=PROMPT) == []


def test_chunks_end_where_the_text_pauses() -> None:
    text = "\n\n".join(" ".join(sentences(3, place)) for place in range(80))
    chunks = split_text(text, title=None, count_tokens=count_words, max_tokens=120)
    assert all(chunk.text.endswith("\n\n") for chunk in chunks[:-1])
    one_paragraph = " ".join(sentences(200))
    assert all(
        chunk.text.endswith(". ")
        for chunk in split_text(
            one_paragraph, title=None, count_tokens=count_words, max_tokens=120
        )[:-1]
    )
    chance = random.Random(4)
    japanese = "".join(
        "".join(chance.choices("水油土火風空海山川は混ざらない", k=chance.randint(5, 25))) + "。"
        for _ in range(300)
    )
    assert all(
        chunk.text.endswith("。")
        for chunk in split_text(japanese, title=None, count_tokens=len, max_tokens=100)[:-1]
    )
    lines = "\n".join(f"value_{place} = {place}" for place in range(500))
    assert all(
        chunk.text.endswith("\n")
        for chunk in split_text(lines, title=None, count_tokens=count_words, max_tokens=60)[:-1]
    )
    functions = "\n\n".join(
        f"def f{place}():\n    first = 1\n\n    return first" for place in range(100)
    )
    assert all(
        chunk.text.endswith("first\n\n")
        for chunk in split_text(functions, title=None, count_tokens=count_words, max_tokens=40)[:-1]
    )


def test_what_a_reader_sees_as_one_character_is_not_parted() -> None:
    family = "👨\u200d👩\u200d👦"
    chunks = split_text(family * 500, title=None, count_tokens=len, max_tokens=100)
    assert all(
        chunk.text.startswith("👨\u200d👩") and chunk.text.endswith("👦") for chunk in chunks
    )
    accents = split_text("e\u0301" * 500, title=None, count_tokens=len, max_tokens=60)
    assert all(chunk.text[0] == "e" for chunk in accents)


def test_chunks_follow_headings_and_carry_their_path() -> None:
    text = "Before.\nGuide\nIntro text.\nInstall\nLinux\nUse apt.\nMac\nUse brew.\nEnd\nBye."
    levels = {"Guide": 1, "Install": 2, "Linux": 3, "Mac": 3, "End": 1}
    headings = [
        Heading(offset=text.index(title), level=level, title=title)
        for title, level in levels.items()
    ]
    chunks = split_text(
        text,
        title="Handbook",
        count_tokens=count_words,
        max_tokens=100,
        overlap_tokens=10,
        headings=headings,
    )
    assert [(chunk.title, chunk.text) for chunk in chunks] == [
        ("Handbook", "Before.\n"),
        ("Handbook > Guide", "Guide\nIntro text.\n"),
        # a heading alone joins what follows it
        ("Handbook > Guide > Install > Linux", "Install\nLinux\nUse apt.\n"),
        ("Handbook > Guide > Install > Mac", "Mac\nUse brew.\n"),
        ("Handbook > End", "End\nBye."),
    ]
    titled = split_text(
        text, title="Guide", count_tokens=count_words, max_tokens=100, headings=headings[:1]
    )
    assert [chunk.title for chunk in titled] == ["Guide", "Guide"]  # not "Guide > Guide"


def test_overlap_repeats_whole_sentences_within_a_section_only() -> None:
    first, second = " ".join(sentences(60, 1)), " ".join(sentences(60, 2))
    text = f"{first}\n\n{second}"
    heading = Heading(offset=text.index(second), level=1, title="Second")
    chunks = split_text(
        text,
        title=None,
        count_tokens=count_words,
        max_tokens=100,
        overlap_tokens=20,
        headings=[heading],
    )
    assert_tiles(text, chunks)
    starts_section = {0, heading.offset}
    for before, after in pairwise(chunks):
        repeated = text[after.start : before.stop]
        if after.start in starts_section:
            assert repeated == ""
        else:
            assert 0 < count_words(repeated) <= 20
            assert text[: after.start].endswith(". ")
    greedy = split_text(
        first, title=None, count_tokens=count_words, max_tokens=100, overlap_tokens=60
    )
    # an overlap longer than the chunk before does not start before that chunk
    assert_tiles(first, greedy)


@pytest.mark.parametrize("title", ["word " * 300, "x" * 5000, "日" * 3000])
def test_a_long_title_leaves_room_for_text(tiny: Callable[[str], int], title: str) -> None:
    text = "\n\n".join(paragraphs(5))
    heading = Heading(offset=5, level=1, title=title)
    for headings in ([], [heading]):
        chunks = split_text(
            text, title=title, count_tokens=tiny, max_tokens=128, headings=headings, prompt=PROMPT
        )
        assert_tiles(text, chunks)
        for chunk in chunks:
            assert chunk.title
            assert tiny(PROMPT(chunk.title)) - tiny(PROMPT(None)) <= 128 // 4
            assert tiny(PROMPT(chunk.title) + chunk.text) <= 128


def changed_chunks(before: str, after: str, overlap: int) -> int:
    settings = {
        "title": None,
        "count_tokens": count_words,
        "max_tokens": 150,
        "overlap_tokens": overlap,
    }
    known = {chunk.text for chunk in split_text(before, **settings)}  # type: ignore[arg-type]
    return sum(chunk.text not in known for chunk in split_text(after, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("overlap", "most"), [(0, 1), (15, 2)])
def test_editing_one_paragraph_changes_one_or_two_chunks_of_a_hundred(
    overlap: int, most: int
) -> None:
    chance = random.Random(5)
    whole = paragraphs(200)
    text = "\n\n".join(whole)
    chunks = len(
        split_text(
            text, title=None, count_tokens=count_words, max_tokens=150, overlap_tokens=overlap
        )
    )
    assert chunks > 50
    edits: dict[str, list[int]] = {
        "word": [],
        "sentence": [],
        "rewrite": [],
        "insert": [],
        "delete": [],
    }
    for _ in range(20):
        place = chance.randrange(len(whole))
        paragraph = whole[place]
        new = {
            "word": [paragraph.replace(" ", " really ", 1)],
            "sentence": [f"{paragraph} Another sentence was added."],
            "rewrite": [
                "All of this was written anew by somebody else, " + paragraph[: len(paragraph) // 2]
            ],
            "insert": ["A paragraph of its own stands here now. It has two sentences.", paragraph],
            "delete": [],
        }
        for kind, replacement in new.items():
            edits[kind].append(
                changed_chunks(
                    text, "\n\n".join([*whole[:place], *replacement, *whole[place + 1 :]]), overlap
                )
            )
    for kind in ("word", "sentence", "rewrite"):
        assert statistics.median(edits[kind]) <= most, edits
    assert all(statistics.median(counts) <= most + 1 for counts in edits.values()), edits
    # never all that follow
    assert max(max(counts) for counts in edits.values()) <= chunks // 3, edits


def test_an_edit_in_a_line_without_sentences_stays_local() -> None:
    chance = random.Random(6)
    for text in (LONG["words without sentences"][:40_000], LONG["random letters"][:40_000]):
        counts = []
        for _ in range(10):
            place = chance.randrange(len(text))
            settings = {
                "title": None,
                "count_tokens": lambda part: len(part) // 2,
                "max_tokens": 150,
            }
            known = {chunk.text for chunk in split_text(text, **settings)}  # type: ignore[arg-type]
            counts.append(
                sum(
                    chunk.text not in known
                    for chunk in split_text(f"{text[:place]}QQ{text[place:]}", **settings)
                )
            )  # type: ignore[arg-type]
        assert statistics.median(counts) <= 3, counts


def test_an_edit_under_one_heading_touches_no_chunk_of_another() -> None:
    parts = [" ".join(sentences(40, place)) for place in range(5)]

    def chunks(parts: list[str]) -> list[Chunk]:
        text, headings = "", []
        for number, part in enumerate(parts):
            headings.append(Heading(offset=len(text), level=1, title=f"Part {number}"))
            text += f"# Part {number}\n\n{part}\n\n"
        return split_text(
            text,
            title="Book",
            count_tokens=count_words,
            max_tokens=100,
            overlap_tokens=20,
            headings=headings,
        )

    known = {(chunk.title, chunk.text) for chunk in chunks(parts)}
    edited = chunks([*parts[:2], "Wholly new. " + parts[2][300:], *parts[3:]])
    assert {chunk.title for chunk in edited if (chunk.title, chunk.text) not in known} == {
        "Book > Part 2"
    }


def test_work_grows_with_the_text_and_no_faster() -> None:
    for text in (
        "\n\n".join(paragraphs(100)),
        "x" * 40_000,
        "日本語。" * 8000,
        " " * 40_000,
        "a\n" * 20_000,
    ):
        read = []
        for times in (1, 4):
            seen = [0, 0]

            def count(part: str, seen: list[int] = seen) -> int:
                seen[0] += 1
                seen[1] += len(part)
                return (len(part) + 3) // 4

            split_text(
                text * times,
                title="T",
                count_tokens=count,
                max_tokens=200,
                overlap_tokens=20,
                prompt=PROMPT,
            )
            read.append(seen)
        assert read[1][0] <= 4.5 * read[0][0] + 100
        assert read[1][1] <= 4.5 * read[0][1]
        # one unit is not counted whole first
        assert read[1][1] <= 3 * 4 * len(text) * (1 if text.count("x") < 40_000 else 0.85)


def test_blanks_at_the_end_of_a_section_join_what_is_before_them() -> None:
    for length in range(1, 1500):
        line = LONG["words without sentences"][:length].strip() + "\n" * 64
        chunks = split_text(
            line + "Next",
            title=None,
            count_tokens=len,
            max_tokens=200,
            headings=[Heading(offset=len(line), level=1, title="Next")],
        )
        assert all(chunk.text.strip() for chunk in chunks)


def test_deeply_nested_headings_with_long_titles_stay_cheap() -> None:
    title = "long " * 1000
    text = "".join(f"{title}\nbody {place}\n" for place in range(120))
    offsets = range(0, len(text), len(text) // 120)
    headings = [
        Heading(offset=at, level=level, title=title) for level, at in enumerate(offsets, start=1)
    ]
    counted = []

    def count(part: str) -> int:
        counted.append(len(part))
        return len(part) // 4

    chunks = split_text(
        text, title="T", count_tokens=count, max_tokens=400, headings=headings, prompt=PROMPT
    )
    assert_tiles(text, chunks)
    assert sum(counted) < 60 * len(text)  # 7,500 times as much without a bound on each title


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 9}, "Raise max_tokens"),
        ({"max_tokens": 100, "overlap_tokens": 90}, "Raise max_tokens"),
        ({"max_tokens": 100.0}, "whole number"),
        ({"max_tokens": 100, "overlap_tokens": -1}, "whole number"),
        ({"max_tokens": True}, "whole number"),
    ],
)
def test_settings_that_leave_no_room_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_text("text", title=None, count_tokens=count_words, **settings)


def test_headings_out_of_order_are_refused() -> None:
    for offsets in ([5, 3], [3, 3], [-1], [9]):
        with pytest.raises(InputError, match="must rise"):
            split_text(
                "12345678",
                title=None,
                count_tokens=len,
                max_tokens=100,
                headings=[Heading(offset=at, level=1, title="t") for at in offsets],
            )


def test_a_character_longer_than_a_chunk_is_told() -> None:
    with pytest.raises(TokenLimitError, match=r"U\+65E5"):
        split_text("日本", title=None, count_tokens=lambda text: 500 * len(text), max_tokens=100)
