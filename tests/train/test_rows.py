"""Training rows: what a row becomes, what is refused and where, what is left out and counted, and
that a split keeps equal texts together.
"""

import gzip
import hashlib
import json
import re

import pytest

from egemma_core.errors import ConfigError, InputError
from egemma_train.data.dataset_files import hold_out, read_dataset
from egemma_train.data.datasets import DatasetConfig, Row
from egemma_train.tables import read_table
from tests.conftest import SHARED_DATA

PAIR = {
    "query": "what is red?",
    "positive": "The apple is red.",
    "task": "question answering",
    "lang": "en",
}


def config(kind="pairs", name="toy", **table):
    whole = {"path": "toy.jsonl", "kind": kind, "task": "question answering", **table}
    return read_table(DatasetConfig, whole, f"[data.{name}]", name=name)


@pytest.fixture
def read(tmp_path):
    def write_and_read(lines, kind="pairs", **table):
        content = (
            lines
            if isinstance(lines, bytes)
            else b"".join(
                (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                for line in lines
            )
        )
        (tmp_path / "toy.jsonl").write_bytes(content)
        return read_dataset(config(kind, **table), tmp_path)

    return write_and_read


def labelled(*texts_of):
    return [
        {"text": f"{label} {number}", "label": label}
        for label, count in texts_of
        for number in range(count)
    ]


def test_a_row_of_pairs_keeps_its_negatives_and_titles(read):
    found = read(
        [
            PAIR,
            {**PAIR, "negative": "The sky is blue."},
            {
                **PAIR,
                "negative": ["Grass is green.", "Coal is black."],
                "title": "Fruit",
                "negative_title": ["Plants", None],
            },
            {**PAIR, "negative": None, "title": "", "extra": 3},
        ]
    )
    query, positive = PAIR["query"], PAIR["positive"]
    assert found.rows == (
        Row(query, positive),
        Row(query, positive, ("The sky is blue.",)),
        Row(query, positive, ("Grass is green.", "Coal is black."), "Fruit", ("Plants", None)),
        Row(query, positive),
    )
    assert found.dropped == {}
    assert not found.symmetric


def test_each_kind_of_row_becomes_a_pair(read):
    similar = read(
        [
            {"a": "A plane is taking off.", "b": "A plane starts.", "score": 4.25},
            {"a": "x", "b": "y", "score": 3.9},
            {"a": "z", "b": "z", "score": 5},
        ],
        "similarity",
    )
    assert (similar.rows, similar.dropped) == (
        (Row("A plane is taking off.", "A plane starts."),),
        {"score below 4": 1, "both sides equal": 1},
    )
    lower = read([{"a": "x", "b": "y", "score": 3.9}], "similarity", min_score=3.9)
    assert lower.rows == (Row("x", "y"),)
    translated = read(
        [
            {"a": "Guten Tag", "b": "Good day", "lang": "de"},
            {"a": "Radio", "b": "Radio", "lang": "de"},
        ],
        "translations",
    )
    assert (translated.rows, translated.dropped) == (
        (Row("Guten Tag", "Good day"),),
        {"both sides equal": 1},
    )
    named = read(
        [
            {"text": "where is my card", "label": "card_arrival"},
            {"text": "weather", "label": "weather"},
            {"text": "rain?", "label": "weather"},
        ],
        "labels",
    )
    assert (named.rows, named.dropped) == (
        (Row("where is my card", "card arrival"), Row("rain?", "weather")),
        {"both sides equal": 1},
    )
    assert (similar.symmetric, translated.symmetric, named.symmetric) == (True, True, False)


def test_two_sides_of_one_kind_share_a_prompt():
    assert config(task="sentence similarity").is_symmetric
    assert config("labels", positive="same").is_symmetric
    assert not config("translations", symmetric=False).is_symmetric
    assert config(symmetric=True).is_symmetric


def test_another_text_of_the_label_is_the_positive_and_one_of_another_label_the_negative(read):
    lines = labelled(("sport", 5), ("politics", 2), ("travel", 30))
    found = read(lines, "labels", positive="same")
    label_of = {line["text"]: line["label"] for line in lines}
    for row, line, label in zip(found.rows, lines, found.labels, strict=True):
        assert (row.query, label) == (line["text"], line["label"])
        assert row.positive != row.query
        assert label_of[row.positive] == label
        assert len(row.negatives) == 1
        assert label_of[row.negatives[0]] != label
    # a circle: everyone is once someone's partner
    assert {row.positive for row in found.rows} == set(label_of)
    again = read(lines[::-1], "labels", positive="same")
    assert set(again.rows) == set(found.rows)  # depends on the texts, not on their order
    assert len({row.negatives for row in found.rows}) > 10
    alphabet = sorted(label_of)
    # neighbours in the alphabet may be nearly equal
    assert (
        sum(alphabet.index(row.positive) - alphabet.index(row.query) == 1 for row in found.rows)
        < len(lines) / 2
    )


def test_a_text_of_two_labels_is_no_wrong_answer_to_either(read):
    lines = [
        *labelled(("sport", 3), ("travel", 3)),
        {"text": "both", "label": "sport"},
        {"text": "both", "label": "travel"},
    ]
    for row in read(lines, "labels", positive="same").rows:
        assert row.negatives != ("both",)


BAD = {  # content, line, what the message says
    "no JSON": ([PAIR, b"query: x"], 2, "not JSON"),
    "an empty line": ([PAIR, b"", PAIR], 2, "not JSON"),
    "no object": ([PAIR, PAIR, b'["a", "b"]'], 3, "list ['a', 'b']"),
    "a byte order mark": ([b"\xef\xbb\xbf" + json.dumps(PAIR).encode()], 1, "byte order mark"),
    "Latin-1": ([PAIR, b'{"query": "caf\xe9", "positive": "x"}'], 2, "byte 14 is 0xe9"),
    "a field twice": (
        [b'{"query": "a", "query": "b", "positive": "c"}'],
        1,
        "'query' is given twice",
    ),
    "a missing field": (
        [PAIR, {"query": "x", "document": "y"}],
        2,
        "no field 'positive', only ['query', 'document']",
    ),
    "a number": ([{**PAIR, "query": 3}], 1, "field 'query': found int 3"),
    "a null": ([{**PAIR, "positive": None}], 1, "field 'positive': found NoneType None"),
    "a blank text": (
        [PAIR, PAIR, PAIR, {**PAIR, "positive": " \n"}],
        4,
        "field 'positive': found str ' \\n'",
    ),
    "a lone surrogate": (
        [b'{"query": "ab\\ud83d", "positive": "x"}'],
        1,
        "field 'query' holds a lone surrogate U+D83D at character 2",
    ),
    "a list with a number": ([{**PAIR, "negative": ["x", 4]}], 1, "field 'negative': found int 4"),
    "a blank negative": ([{**PAIR, "negative": ""}], 1, "field 'negative': found str ''"),
    "a negative that is right": (
        [PAIR, {**PAIR, "negative": ["x", PAIR["positive"]]}],
        2,
        "field 'negative': equals the positive",
    ),
    "equal sides": (
        [PAIR, {**PAIR, "positive": PAIR["query"]}],
        2,
        "query and positive are both str 'what is red?'",
    ),
    "a misspelled field": (
        [PAIR, {**PAIR, "negatives": ["x"]}],
        2,
        "'negatives' is not read; is it 'negative'?",
    ),
    "titles for other negatives": (
        [{**PAIR, "negative": ["x", "y"], "title": "t", "negative_title": "u"}],
        1,
        "1 titles for 2 negatives",
    ),
    "a title on one side": ([{**PAIR, "negative": "x", "title": "t"}], 1, "look for titles"),
    "nested too deep": ([PAIR, b"[" * 200_000], 2, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_its_file_line_and_field(read, tmp_path, name):
    content, line, says = BAD[name]
    with pytest.raises(
        InputError,
        match=re.escape(f"{tmp_path / 'toy.jsonl'}, line {line}: ") + ".*" + re.escape(says),
    ):
        read(content)


@pytest.mark.parametrize(
    "score", [b"NaN", b"-0.1", b"5.1", b"Infinity", b'"4"', b"true", b"null", b"1" + b"0" * 400]
)
def test_a_score_that_is_none_is_refused(read, score):
    with pytest.raises(
        InputError, match=r"line 2: field 'score': found .*, want a number from 0 to 5"
    ):
        read(
            [{"a": "x", "b": "y", "score": 5}, b'{"a": "x", "b": "z", "score": ' + score + b"}"],
            "similarity",
        )


def test_a_symmetric_row_refuses_titles_and_its_own_query_as_negative_but_drops_equal_sides(read):
    with pytest.raises(InputError, match=r"line 1: field 'title'"):
        read([{**PAIR, "title": "t"}], task="sentence similarity")
    with pytest.raises(InputError, match=r"line 1: field 'negative': equals the query"):
        read([{**PAIR, "negative": PAIR["query"]}], task="sentence similarity")
    # a question is a wrong answer to itself
    assert len(read([{**PAIR, "negative": PAIR["query"]}]).rows) == 1
    assert read(
        [PAIR, {**PAIR, "positive": PAIR["query"]}], task="sentence similarity"
    ).dropped == {"both sides equal": 1}


def test_the_first_ten_bad_rows_are_named_and_all_are_counted(read, tmp_path):
    lines = [PAIR if number % 2 else {**PAIR, "query": ""} for number in range(2500)]
    with pytest.raises(InputError, match=r"first 10 of 1,250") as caught:
        read(lines)
    assert re.findall(r"line (\d+): field 'query'", str(caught.value)) == [
        str(1 + 2 * number) for number in range(10)
    ]


def test_a_filter_counts_what_it_leaves_out(read):
    lines = [
        PAIR,
        {**PAIR, "lang": "de"},
        {**PAIR, "task": "title-body"},
        {**PAIR, "lang": "fr", "query": 3},
    ]
    found = read(lines, languages=["en", "de"], only_task="question answering")
    assert (len(found.rows), found.dropped) == (2, {"other task": 1, "other language": 1})


@pytest.mark.parametrize(
    ("lines", "kind", "table", "says"),
    [
        ([PAIR], "pairs", {"languages": ["en", "eng"]}, "no row has lang 'eng'; there are ['en']"),
        (
            [{"query": "x", "positive": "y"}],
            "pairs",
            {"languages": ["en"]},
            "line 1: no field 'lang'",
        ),
        (
            [PAIR, PAIR],
            "pairs",
            {"only_task": "code"},
            "no row is left of 2; left out: {'other task': 2}",
        ),
        (
            [{"a": "x", "b": "y", "score": 0.9}],
            "similarity",
            {},
            "no row is left of 1; left out: {'score below 4': 1}",
        ),
        (b"", "pairs", {}, "an empty file"),
        (labelled(("sport", 3)), "labels", {}, "all 3 rows have the label 'sport'"),
        (
            labelled(("sport", 3), ("travel", 1)),
            "labels",
            {"positive": "same"},
            "toy.jsonl, line 4), so positive='same'",
        ),
    ],
)
def test_rows_that_make_no_dataset_are_refused(read, lines, kind, table, says):
    with pytest.raises(InputError, match=re.escape(says)):
        read(lines, kind, **table)


def test_a_damaged_archive_says_after_which_line(tmp_path):
    packed = gzip.compress(
        b"".join(
            json.dumps(
                {**PAIR, "query": f"{number} {hashlib.sha256(bytes([number % 256])).hexdigest()}"}
            ).encode()
            + b"\n"
            for number in range(2000)
        )
    )
    (tmp_path / "toy.jsonl.gz").write_bytes(packed)
    assert len(read_dataset(config(path="toy.jsonl.gz"), tmp_path).rows) == 2000
    (tmp_path / "toy.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"not readable after line [1-9]\d+ \("):
        read_dataset(config(path="toy.jsonl.gz"), tmp_path)
    (tmp_path / "toy.jsonl.gz").write_bytes(packed[:200] + b"\0\0\0\0" + packed[204:])
    with pytest.raises(InputError, match="not readable after line"):
        read_dataset(config(path="toy.jsonl.gz"), tmp_path)
    (tmp_path / "toy.jsonl.gz").write_bytes(json.dumps(PAIR).encode())
    with pytest.raises(InputError, match="not readable after line 0"):
        read_dataset(config(path="toy.jsonl.gz"), tmp_path)


def test_several_files_and_patterns_make_one_dataset(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        line = json.dumps({**PAIR, "query": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    assert [
        row.query for row in read_dataset(config(path=["*.jsonl", "c.jsonl.gz"]), tmp_path).rows
    ] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    with pytest.raises(InputError, match="named twice"):
        read_dataset(config(path=["*.jsonl", "a.jsonl"]), tmp_path)
    for absent in ("d.jsonl", "d*.jsonl", "."):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / absent))):
            read_dataset(config(path=absent), tmp_path)
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(InputError, match=r"d\.json is not a \.jsonl"):
        read_dataset(config(path="d.json"), tmp_path)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tasks": "x"}, "'tasks' is not known; did you mean 'task'?"),
        ({"colour": "x"}, "'colour' is not known; there are ['path'"),
        ({"path": 3}, "path=3 is int, not a list"),
        ({"path": []}, "a dataset needs a name, a path and a task"),
        ({"languages": []}, "Leave it out to keep all"),
        ({"limit": 2.5}, "limit=2.5 is float, not int"),
        ({"limit": True}, "limit=True is bool"),
        ({"limit": 0}, "limit=0 must be a whole number of at least 1"),
        ({"rate": -0.1}, "rate=-0.1"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rate": "0.1"}, "rate='0.1' is str, not float"),
        ({"symmetric": 1}, "symmetric=1 is int, not bool"),
        ({"kind": "pair"}, "kind='pair' must be one of ['pairs', 'labels'"),
        ({"min_score": 3}, "min_score=3.0 is for rows of kind 'similarity', these are 'pairs'"),
        ({"positive": "same"}, "positive='same' is for rows of kind 'labels'"),
        (
            {"kind": "labels", "positive": "other"},
            "positive='other' must be one of ['label', 'same']",
        ),
        (
            {"kind": "similarity", "min_score": 6},
            "min_score=6.0 must be a number of at least 0 and of at most 5",
        ),
        ({"kind": "translations", "only_task": "x"}, "only_task='x' is for rows of kind 'pairs'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(table, says):
    with pytest.raises(ConfigError, match=re.escape("[data.toy]") + ".*" + re.escape(says)):
        config(**table)


def test_a_missing_setting_is_named():
    with pytest.raises(
        ConfigError, match=r"\[data\.toy\]: path and task are missing; it has \['kind'\]"
    ):
        read_table(DatasetConfig, {"kind": "pairs"}, "[data.toy]", name="toy")


def test_a_limit_keeps_the_same_rows_whatever_their_order(read):
    lines = [{**PAIR, "query": f"q{number}"} for number in range(100)]
    found = read(lines, limit=30)
    assert (len(found.rows), found.dropped) == (30, {"limit": 70})
    assert set(read(lines[::-1], limit=30).rows) == set(found.rows)
    # not merely the file's beginning
    assert [row.query for row in found.rows] != [f"q{number}" for number in range(30)]
    assert set(read(lines, limit=10).rows) < set(found.rows)
    assert read(lines, limit=100).dropped == {}


def test_held_out_rows_share_no_positive_with_the_rest_and_are_those_of_the_hash(read):
    lines = [
        {**PAIR, "query": f"q{number}", "positive": f"p{number // 3}"} for number in range(600)
    ]
    found = read(lines)
    kept, held = hold_out(found, 4)
    wanted = [
        row
        for row in found.rows
        if int(hashlib.sha256(row.positive.encode()).hexdigest(), 16) % 4 == 0
    ]
    assert list(held.rows) == wanted
    assert set(kept.rows) | set(held.rows) == set(found.rows)
    assert not {row.positive for row in kept.rows} & {row.positive for row in held.rows}
    assert 100 < len(held.rows) < 200  # 150 expected, in threes: sigma 18
    assert (kept.dropped, held.dropped) == (
        {"held out": len(held.rows)},
        {"not held out": len(kept.rows)},
    )
    with pytest.raises(ConfigError, match=r"of 1 rows [01] would be held out"):
        hold_out(read([PAIR]), 4)
    with pytest.raises(ConfigError, match="one_in=1"):
        hold_out(found, 1)


def test_partners_by_label_stay_on_their_side_of_a_split(read):
    found = read(
        labelled(("sport", 40), ("travel", 40), ("rare", 2), ("rarer", 2)),
        "labels",
        positive="same",
    )
    kept, held = hold_out(found, 4)
    for part in (kept, held):
        texts = {row.query for row in part.rows}
        assert {row.positive for row in part.rows} <= texts
        assert {text for row in part.rows for text in row.negatives} <= texts | {
            "rare 0",
            "rare 1",
            "rarer 0",
            "rarer 1",
        }
    left_alone = [
        part.dropped.get("no other text of its label, or none of another", 0)
        for part in (kept, held)
    ]
    assert len(kept.rows) + len(held.rows) + sum(left_alone) == 84
    assert sum(left_alone) > 0


PUBLISHED_ROWS = {  # as the README beside the files counts them
    "afriqa": 6313,
    "cmrc2018": 1000,
    "codesearchnet-maxmin": 1836,
    "codetrans-java-cs": 9860,
    "concode": 1826,
    "cpp-docs": 10168,
    "jnli": 476,
    "jsquad": 4378,
    "klue-nli": 1000,
    "mbxp": 3734,
    "medquad": 14532,
    "nl2bash": 10829,
    "pycode": 29178,
    "scitldr": 3960,
    "squad-sentences": 11819,
    "tldr-commands": 98681,
    "tldr-pages": 5805,
}


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_every_file_of_real_pairs_is_read_whole(name):
    path = f"pairs/{name}.train.jsonl.gz"
    if not (SHARED_DATA / path).is_file():
        pytest.skip(f"{SHARED_DATA / path} is absent; set EGEMMA_DATA to the folder that holds it")
    found = read_dataset(config(path=path), SHARED_DATA)
    assert (len(found.rows), found.dropped) == (PUBLISHED_ROWS[name], {})


@pytest.mark.parametrize(
    ("path", "table", "rows"),
    [
        ("sts/jsts.train.jsonl.gz", {"kind": "similarity"}, 12422),
        ("bitext/msdocs.train.jsonl.gz", {"kind": "translations"}, 21403),
        ("classification/banking77.train.jsonl.gz", {"kind": "labels"}, 9942),
        ("classification/clinc150.train.jsonl.gz", {"kind": "labels", "positive": "same"}, 14894),
    ],
)
def test_real_rows_of_the_other_kinds_are_kept_or_counted(path, table, rows):
    if not (SHARED_DATA / path).is_file():
        pytest.skip(f"{SHARED_DATA / path} is absent; set EGEMMA_DATA to the folder that holds it")
    found = read_dataset(config(path=path, **table), SHARED_DATA)
    assert len(found.rows) + sum(found.dropped.values()) == rows
    assert set(found.dropped) <= {"score below 4", "both sides equal"}
