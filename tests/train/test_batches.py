"""Batches: the same for a seed and step wherever one starts, every row once an epoch, datasets by
their rates, prompts in front, cuts counted.
"""

import math
import re
import threading
from collections import Counter

import pytest
import sentencepiece

from egemma_core.errors import ConfigError, PromptError
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_train.data.batches import BatchConfig, Batches, BatchesAhead, rates_of
from egemma_train.data.datasets import Dataset, DatasetConfig, Row
from tests.tiny import BOS, EOS, MAX_TOKENS, PAD, PROMPTS, VOCAB


@pytest.fixture(scope="module")
def tokenizer(tiny_spm):
    return Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=MAX_TOKENS
    )


def dataset(name="toy", rows=40, task="question answering", make=None, **table):
    make = make or (lambda number: Row(f"{name} Question {number}", f"{name} answer {number}"))
    return Dataset(
        DatasetConfig(name=name, path=("x.jsonl",), kind="pairs", task=task, **table),
        tuple(make(number) for number in range(rows)),
        {},
    )


@pytest.fixture
def batches(tokenizer):
    def make(*datasets, batch_size=8, **settings):
        settings = {"max_query_tokens": 64, "max_document_tokens": 64, **settings}
        return Batches(
            datasets or (dataset(),),
            tokenizer,
            Prompts(by_name=PROMPTS),
            BatchConfig(batch_size=batch_size, **settings),
        )

    return make


def four(**table):
    return [
        dataset(name, rows, **table) for name, rows in (("a", 20), ("b", 33), ("c", 64), ("d", 100))
    ]


def test_a_batch_depends_on_seed_and_step_and_on_nothing_before(batches):
    settings = {"default_task_share": 0.5, "lower_case_share": 0.5}
    straight = batches(*four(), **settings)
    wanted = [straight.at(step) for step in range(60)]
    assert [batches(*four(), **settings).at(step) for step in range(40, 60)] == wanted[40:]
    shuffled = batches(*four(), **settings)
    assert [shuffled.at(step) for step in (59, 3, 30, 59)] == [
        wanted[step] for step in (59, 3, 30, 59)
    ]
    assert [batches(*four(), seed=1, **settings).at(step) for step in range(60)] != wanted


def test_resuming_late_counts_the_batches_of_earlier_steps(batches):
    sets = [dataset("a", 16), dataset("b", 24)]  # epochs of 2 and 3 batches
    straight = batches(*sets)
    taken: Counter[str] = Counter()
    drawn: dict[str, list[set[str]]] = {"a": [], "b": []}
    for step in range(9000):  # more than two of the blocks that counts are kept for
        index, earlier = straight._turn(step)
        name = sets[index].name
        assert earlier == taken[name]
        taken[name] += 1
        if step >= 8980:
            drawn[name].append(set(batches(*sets).at(step).query_texts))
    # of any two or three batches in a row, those of one epoch meet no row twice
    for name, length in (("a", 2), ("b", 3)):
        starts = [
            start
            for start in range(len(drawn[name]))
            if (taken[name] - len(drawn[name]) + start) % length == 0
        ]
        epochs = [
            drawn[name][start : start + length]
            for start in starts
            if start + length <= len(drawn[name])
        ]
        assert epochs
        assert all(len(set().union(*epoch)) == 8 * length for epoch in epochs)


def test_an_epoch_sees_every_row_once_and_fills_its_last_batch_from_itself(batches):
    made = batches(dataset(rows=20), batch_size=8)  # 3 batches: 8 + 8 + 4 new ones
    orders = []
    for epoch in range(4):
        rows = [made.at(3 * epoch + number).query_texts for number in range(3)]
        assert all(len(set(batch)) == 8 for batch in rows)  # never twice in one batch
        assert not set(rows[0]) & set(rows[1])
        assert len(set().union(*rows)) == 20
        assert len(set(rows[2]) - set(rows[0]) - set(rows[1])) == 4
        orders.append(rows)
    assert len({str(order) for order in orders}) == 4
    assert made.at(0).query_texts == orders[0][0]  # also when going back
    exact = batches(dataset(rows=16))
    assert len({*exact.at(0).query_texts, *exact.at(1).query_texts}) == 16


def test_a_datasets_order_does_not_depend_on_its_neighbours(batches):
    alone, beside = batches(dataset("a", 24)), batches(dataset("a", 24), dataset("b", 24))
    among = [batch for batch in map(beside.at, range(20)) if batch.dataset == "a"]
    assert [batch.query_texts for batch in among] == [
        alone.at(number).query_texts for number in range(len(among))
    ]


def test_the_shares_are_those_worked_out_by_hand():
    sets = [
        dataset("a", 100, group="qa"),
        dataset("b", 400, group="qa"),
        dataset("c", 50, task="code retrieval"),
        dataset("d", 9, "sentence similarity", rate=1.0),
    ]
    # Three groups: 1/3 each; in "qa" the roots are 10 and 20.
    assert rates_of(sets, "even") == pytest.approx({"a": 1 / 9, "b": 2 / 9, "c": 1 / 3, "d": 1 / 3})
    assert rates_of(sets, "size") == pytest.approx(
        {"a": 100 / 559, "b": 400 / 559, "c": 50 / 559, "d": 9 / 559}
    )
    with pytest.raises(ConfigError, match="'a', 'b', 'c' has no rate"):
        rates_of(sets, "rates")
    assert rates_of(
        [dataset("a", rate=3), dataset("b", rate=1), dataset("c", rate=0)], "rates"
    ) == {"a": 0.75, "b": 0.25, "c": 0}
    with pytest.raises(ConfigError, match="all rates are 0"):
        rates_of([dataset("a", rate=0)], "rates")


@pytest.mark.parametrize("seed", range(3))
def test_after_any_number_of_steps_every_dataset_has_had_its_share(batches, seed):
    rates = {"never": 0.0, "a": 0.07, "b": 0.5, "c": 0.13, "d": 0.3, "nor this": 0.0}
    made = batches(
        *(dataset(name, rate=rate) for name, rate in rates.items()), sampling="rates", seed=seed
    )
    taken: Counter[str] = Counter()
    for step in range(5000):
        taken[made.datasets[made._turn(step)[0]].name] += 1
        assert all(abs(taken[name] - rate * (step + 1)) < 4 for name, rate in rates.items())
    assert "never" not in taken
    assert "nor this" not in taken


def test_datasets_without_a_rate_are_not_drawn_even_where_the_others_sum_to_less_than_one_by_rounding(
    batches,
):
    made = batches(
        *(dataset(f"{number}", rate=1.0) for number in range(6)),
        dataset("never", rate=0.0),
        sampling="rates",
    )
    assert sum([1 / 6] * 6) < 1
    assert made._ends[-2:].tolist() == [1.0, 1.0]  # "never" has no part of [0, 1)


def test_seeds_differ_in_which_dataset_comes_when(batches):
    turns = {tuple(batches(*four(), seed=seed)._turns(0, 20).tolist()) for seed in range(5)}
    assert len(turns) == 5


def test_the_prompt_of_its_role_stands_in_front_of_every_text(batches, tokenizer, tiny_spm):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_spm))

    def wanted(prompt, texts):
        return [(BOS, *pieces.encode(prompt + text), EOS) for text in texts]

    batch = batches(
        dataset(make=lambda n: Row(f"Pump {n}?", f"oil {n}", (f"water {n}",))), hard_negatives=True
    ).at(3)
    assert batch.queries == wanted("task: question answering | query: ", batch.query_texts)
    assert batch.positives == wanted("title: none | text: ", batch.positive_texts)
    assert batch.negatives == wanted("title: none | text: ", batch.negative_texts)
    assert not batch.symmetric
    assert [text.split()[1] for text in batch.positive_texts] == [
        text[5:-1] for text in batch.query_texts
    ]
    symmetric = batches(
        dataset(
            task="sentence similarity", make=lambda n: Row(f"Pump {n}", f"oil {n}", (f"water {n}",))
        ),
        hard_negatives=True,
    ).at(3)
    prompt = "task: sentence similarity | query: "
    assert symmetric.symmetric
    assert (symmetric.queries, symmetric.positives, symmetric.negatives) == tuple(
        wanted(prompt, texts)
        for texts in (symmetric.query_texts, symmetric.positive_texts, symmetric.negative_texts)
    )


def test_a_title_goes_into_the_prompt_and_in_front_of_the_text(batches, tokenizer):
    batch = batches(
        dataset(
            make=lambda n: Row(
                f"q {n}",
                f"oil {n}",
                (f"water {n}", f"flour {n}"),
                f"Title {n}" if n % 2 else None,
                (f"Wrong {n}", None),
            )
        ),
        hard_negatives=True,
        batch_size=40,
    ).at(0)
    decoded = [tokenizer.decode(row) for row in batch.positives + batch.negatives]
    expected = set()
    for n in range(40):
        expected.add(
            f"title: Title {n} | text: oil {n}" if n % 2 else f"title: none | text: oil {n}"
        )
    assert set(decoded[:40]) == expected
    for text, raw in zip(decoded, batch.positive_texts + batch.negative_texts, strict=True):
        title, body = re.fullmatch(r"title: (.*) \| text: (.*)", text).groups()
        assert raw == (body if title == "none" else f"{title}\n{body}")
        assert ("water" in body) == ("Wrong" in title)  # each negative has its own title


def test_one_of_several_hard_negatives_is_drawn_and_rows_without_one_are_marked(batches):
    rows = dataset(
        make=lambda n: Row(f"q {n}", f"p {n}", tuple(f"n {n} {k}" for k in range(n % 4)))
    )
    made = batches(rows, hard_negatives=True, batch_size=40)
    seen = set()
    for step in range(30):
        batch = made.at(step)
        assert batch.has_negative == [int(text.split()[1]) % 4 > 0 for text in batch.query_texts]
        assert len(batch.negatives) == len(batch.negative_texts) == sum(batch.has_negative) == 30
        owners = [
            text.split()[1]
            for text, has in zip(batch.query_texts, batch.has_negative, strict=True)
            if has
        ]
        assert [text.split()[1] for text in batch.negative_texts] == owners
        seen |= set(batch.negative_texts)
    # each is drawn sooner or later: (2/3)^30 against
    assert seen == {f"n {n} {k}" for n in range(40) for k in range(n % 4)}
    plain = batches(rows, batch_size=40).at(0)
    assert (plain.negatives, plain.negative_texts, any(plain.has_negative)) == ([], [], False)


def test_the_default_prompt_takes_its_share_of_batches_but_never_of_symmetric_ones(
    batches, tokenizer
):
    def prompts_of(made, steps=400):
        return [
            {tokenizer.decode(row).split(" | ")[0] for row in made.at(step).queries}
            for step in range(steps)
        ]

    found = prompts_of(batches(dataset(), default_task_share=0.25))
    assert all(len(prompts) == 1 for prompts in found)
    share = sum(prompts == {"task: search result"} for prompts in found) / len(found)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(found))
    assert prompts_of(batches(dataset()), 50) == [{"task: question answering"}] * 50
    assert (
        prompts_of(batches(dataset(task="sentence similarity"), default_task_share=1.0), 50)
        == [{"task: sentence similarity"}] * 50
    )


def test_some_queries_are_read_in_lower_case_and_their_texts_kept_as_they_are(batches, tokenizer):
    made, count, lowered = batches(dataset(), lower_case_share=0.25), 0, 0
    for step in range(200):
        batch = made.at(step)
        assert all("Question" in text for text in batch.query_texts)
        for row, text in zip(batch.queries, batch.query_texts, strict=True):
            read = tokenizer.decode(row).removeprefix("task: question answering | query: ")
            assert read in (text, text.lower())
            count, lowered = count + 1, lowered + (read != text)
    assert abs(lowered / count - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    symmetric = batches(dataset(task="sentence similarity"), lower_case_share=1.0).at(0)
    assert all("Question" in tokenizer.decode(row) for row in symmetric.queries)


def test_long_texts_are_cut_with_eos_last_and_counted(batches, tokenizer):
    long = "water pump " * 50
    batch = batches(
        dataset(
            make=lambda n: Row(
                f"q {n} {long if n < 3 else ''}",
                f"p {n} {long if n < 5 else ''}",
                (f"n {n} {long if n < 7 else ''}",),
            )
        ),
        batch_size=40,
        hard_negatives=True,
        max_query_tokens=30,
        max_document_tokens=40,
    ).at(0)
    assert batch.truncated == 3 + 5 + 7
    for rows, limit, how_many in (
        (batch.queries, 30, 3),
        (batch.positives, 40, 5),
        (batch.negatives, 40, 7),
    ):
        assert sum(len(row) == limit for row in rows) >= how_many
        assert max(map(len, rows)) == limit
        assert all(row[0] == BOS and row[-1] == EOS for row in rows)
    # the texts themselves are whole
    text = next(text for text in batch.positive_texts if long in text)
    assert (
        batch.positives[batch.positive_texts.index(text)][:-1]
        == tokenizer.encode("title: none | text: " + text, overflow="truncate").ids[:39]
    )


def test_both_sides_of_a_symmetric_set_are_as_long_as_queries(batches):
    batch = batches(
        dataset(
            task="sentence similarity",
            make=lambda n: Row(f"q {n} " + "water " * 60, f"p {n} " + "water " * 60),
        ),
        max_query_tokens=30,
    ).at(0)
    assert {len(row) for row in batch.queries + batch.positives} == {30}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 1}, "batch_size=1 must be a whole number of at least 2"),
        ({"batch_size": 8.0}, "batch_size=8.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": -1}, "seed=-1"),
        ({"max_query_tokens": 2}, "max_query_tokens=2"),
        ({"sampling": "uneven"}, "sampling='uneven'"),
        ({"hard_negatives": 1}, "hard_negatives=1"),
        (
            {"default_task_share": 1.5},
            "default_task_share=1.5 must be a number of at least 0 and of at most 1",
        ),
        ({"lower_case_share": float("nan")}, "lower_case_share=nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        BatchConfig(**{"batch_size": 8, **settings})


def test_datasets_that_cannot_be_drawn_from_are_refused(batches, tokenizer):
    with pytest.raises(ConfigError, match="no dataset to train on"):
        Batches([], tokenizer, Prompts(by_name=PROMPTS), BatchConfig(batch_size=8))
    with pytest.raises(
        ConfigError, match="'a' has 20 rows, 'b' has 33 rows, fewer than batch_size=64"
    ):
        batches(*four(), batch_size=64)
    with pytest.raises(ConfigError, match="Two datasets are named toy"):
        batches(dataset(), dataset())
    with pytest.raises(PromptError, match="small talk"):
        batches(dataset(task="small talk"))
    with pytest.raises(ConfigError, match="steps count from 0"):
        batches().at(-1)
    titled = dataset(make=lambda n: Row("q", "p", (), "t" if n == 39 else None))
    with pytest.raises(PromptError, match="no place for a title"):
        Batches(
            [titled],
            tokenizer,
            Prompts(by_name={**PROMPTS, "document": "passage: "}),
            BatchConfig(batch_size=8, max_query_tokens=64, max_document_tokens=64),
        )


def test_a_limit_that_leaves_no_room_beside_the_prompt_is_refused(batches, tokenizer):
    needed = tokenizer.encode("title: none | text: ").num_tokens + 1
    with pytest.raises(
        ConfigError, match=f"max_document_tokens={needed - 1} must lie from {needed}"
    ):
        batches(max_document_tokens=needed - 1)
    batches(max_document_tokens=needed)
    # the default prompt needs room only where it is used
    brief = Prompts(by_name={**PROMPTS, "brief": "q: "})
    tight = {
        "batch_size": 8,
        "max_query_tokens": tokenizer.encode(brief.query()).num_tokens,
        "max_document_tokens": 64,
    }
    Batches([dataset(task="brief")], tokenizer, brief, BatchConfig(**tight))
    with pytest.raises(ConfigError, match=r"'task: search result \| query: ' and one token"):
        Batches(
            [dataset(task="brief")], tokenizer, brief, BatchConfig(**tight, default_task_share=0.1)
        )
    with pytest.raises(
        ConfigError, match=f"max_query_tokens={MAX_TOKENS + 1} .* the model's {MAX_TOKENS}"
    ):
        batches(max_query_tokens=MAX_TOKENS + 1)


def test_batches_made_ahead_are_the_same_batches(batches):
    plain = batches(*four(), lower_case_share=0.5)
    with BatchesAhead(batches(*four(), lower_case_share=0.5)) as ahead:
        for step in (0, 1, 2, 7, 8, 3, 3, 4):
            assert ahead.at(step) == plain.at(step)


def test_a_batch_is_made_while_the_step_computes():
    begun = [threading.Event() for _ in range(3)]

    class Slow:
        def at(self, step):
            begun[step].set()
            return step

    with BatchesAhead(Slow()) as ahead:
        assert ahead.at(0) == 0
        assert begun[1].wait(5)  # nobody has asked for step 1 yet
        assert not begun[2].is_set()
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
        assert len(threads) == 1
    assert not threads[0].is_alive()


def test_an_error_in_a_batch_made_ahead_reaches_the_caller_at_its_step():
    class Broken:
        def at(self, step):
            if step == 2:
                raise ConfigError("broken at 2")
            return step

    with BatchesAhead(Broken()) as ahead:
        assert (ahead.at(0), ahead.at(1)) == (0, 1)
        for _ in range(2):
            with pytest.raises(ConfigError, match="broken at 2"):
                ahead.at(2)
        assert ahead.at(3) == 3
