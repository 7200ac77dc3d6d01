"""Mining: every filter by hand on a circle, the ranking against NumPy, the whole against
sentence-transformers, and the file that comes out.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egemma_core.errors import ConfigError, InputError
from egemma_train.data.dataset_files import read_dataset
from egemma_train.data.datasets import DatasetConfig, Row
from egemma_train.teachers.mining import NO_CANDIDATE, Document, MiningConfig, mine, rank
from egemma_train.teachers.mining_files import MineConfig, mine_file, read_corpus
from egemma_train.teachers.teacher import Embedded, Role
from tests.conftest import SHARED_DATA

MODEL = Path(__file__).parents[2] / "models/egemma-small"
OFF = MiningConfig(max_share_of_positive=None)


class TableTeacher:
    """Vectors of texts from a table; a text that ends in "!" is one that it had to cut."""

    name, dim = "table", 2

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = {text: np.asarray(vector, np.float32) for text, vector in vectors.items()}
        self.dim = len(next(iter(vectors.values())))
        self.asked: list[tuple[Role, tuple[str, ...]]] = []

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        self.asked.append((role, tuple(texts)))
        return Embedded(
            np.stack([self.vectors[text] for text in texts]),
            np.array([text.endswith("!") for text in texts]),
        )

    def identity(self, role: Role) -> str:
        return role

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "dim": self.dim}


def at(cosine: float) -> tuple[float, float]:
    """The unit vector with that cosine to the query at (1, 0)."""
    return cosine, math.sqrt(1 - cosine * cosine)


# One query at (1, 0) whose positive scores 0.80; the other documents score as they are called.
SCORES = ("95", "79", "77", "70", "60", "10")
CIRCLE = {"q": (1.0, 0.0), "right": at(0.8), **{name: at(int(name) / 100) for name in SCORES}}
CORPUS = [Document(None, name) for name in SCORES]


@pytest.mark.parametrize(
    ("changes", "wanted", "removed"),
    [
        ({}, ["95", "79", "77"], {}),
        ({"skip": 2}, ["77", "70", "60"], {"skip": 2}),
        # above 0.76
        ({"max_share_of_positive": 0.95}, ["70", "60", "10"], {"max_share_of_positive": 3}),
        # above 0.776
        ({"max_share_of_positive": 0.97}, ["77", "70", "60"], {"max_share_of_positive": 2}),
        ({"margin": 0.15}, ["60", "10"], {"margin": 4}),  # above 0.65
        ({"max_score": 0.9}, ["79", "77", "70"], {"max_score": 1}),
        (
            {"skip": 1, "max_share_of_positive": 0.99, "max_score": 0.75, "depth": 4},
            ["70"],
            {"skip": 1, "max_share_of_positive": 0, "max_score": 2},
        ),
        ({"depth": 3}, ["95", "79", "77"], {}),
    ],
)
def test_each_filter_by_hand(
    changes: dict[str, Any], wanted: list[str], removed: dict[str, int]
) -> None:
    config = MiningConfig(**{"per_query": 3, "max_share_of_positive": None, **changes})
    (negatives,), report = mine([Row("q", "right")], TableTeacher(CIRCLE), config, CORPUS)
    assert [document.text for document in negatives] == wanted
    assert report.removed == removed
    assert report.examined == min(config.depth, 6)
    assert (report.rows_with, report.positive_first, report.candidates) == (
        {len(wanted): 1},
        0.0,
        7,
    )
    assert report.mean_positive_score == pytest.approx(0.8)
    assert report.mean_negative_score == pytest.approx(sum(map(int, wanted)) / 100 / len(wanted))
    assert report.right_answers == (1 if config.depth > 1 else 0)


def test_the_share_of_a_negative_score_lies_below_it() -> None:
    """A positive at -0.5: 95 % of it, -0.475, would let in what is higher; 5 % of its size below it
    is -0.525.
    """
    table = {"q": (1.0, 0.0), "p": at(-0.5), "above": at(-0.51), "below": at(-0.53)}
    (negatives,), _ = mine(
        [Row("q", "p")],
        TableTeacher(table),
        MiningConfig(per_query=2),
        [Document(None, "above"), Document(None, "below")],
    )
    assert negatives == (Document(None, "below"),)


def test_no_right_answer_is_mined_also_where_blanks_differ_or_another_row_has_the_query() -> None:
    table = {
        "q": (1.0, 0.0),
        " q ": (1.0, 0.0),
        "p1": at(0.5),
        "p2": at(0.9),
        "p2\n": at(0.9),
        "n": at(0.3),
        "other": (0.0, 1.0),
    }
    rows = [Row("q", "p1"), Row(" q ", "p2"), Row("other", "n")]
    corpus = [Document(None, "p2\n"), Document(None, "q"), Document("a title", "p1")]
    teacher = TableTeacher({**table, "a title\np1": at(0.6)})
    negatives, report = mine(
        rows, teacher, MiningConfig(per_query=3, max_share_of_positive=None), corpus
    )
    assert negatives[:2] == [(Document(None, "n"),)] * 2
    assert teacher.asked == [
        ("query", ("q", "other")),
        ("document", ("p1", "p2", "n", "p2\n", "q", "a title\np1")),
    ]
    assert (report.queries, report.rows) == (2, 3)
    # Own and shared positives, in both spellings and under a title, and the query itself; and for
    # "other" its own.
    assert report.right_answers == 5 + 1


def test_the_lowest_positive_of_a_query_sets_the_limits_of_all_its_rows() -> None:
    table = {"q": (1.0, 0.0), "high": at(0.9), "low": at(0.5), "45": at(0.45), "60": at(0.60)}
    negatives, _ = mine(
        [Row("q", "high"), Row("q", "low")],
        TableTeacher(table),
        MiningConfig(),
        [Document(None, "60"), Document(None, "45")],
    )
    assert negatives == [(Document(None, "45"),)] * 2


def test_rows_for_which_nothing_passes_get_nothing_and_all_of_them_is_an_error() -> None:
    table = {**CIRCLE, "r": (0.0, 1.0), "s": at(0.05)}
    negatives, _ = mine([Row("q", "right"), Row("r", "s")], TableTeacher(table), MiningConfig())
    assert negatives == [(Document(None, "s"),), (Document(None, "right"),)]
    assert mine(
        [Row("q", "right"), Row("r", "s")], TableTeacher(table), MiningConfig(max_score=0.1)
    )[1].rows_with == {0: 1, 1: 1}
    with pytest.raises(
        ConfigError,
        match=r"no query got a negative: 2 candidates were examined, and removed \{.*'margin': 2",
    ):
        mine(
            [Row("q", "right"), Row("r", "s")],
            TableTeacher(table),
            MiningConfig(max_share_of_positive=None, margin=1.9),
        )
    with pytest.raises(InputError, match="no rows"):
        mine([], TableTeacher(table), MiningConfig())


def test_a_teacher_that_cannot_tell_texts_apart_is_named_as_the_cause() -> None:
    table = dict.fromkeys(["q", "p", "r", "s"], at(0.5))
    with pytest.raises(
        ConfigError,
        match=r"Positives score 1\.000 on average, examined candidates 1\.000: if these are alike",
    ):
        mine([Row("q", "p"), Row("r", "s")], TableTeacher(table), MiningConfig())
    with pytest.raises(ConfigError, match="the 1 candidates are right answers to all queries"):
        mine([Row("q", "p"), Row("r", "p")], TableTeacher(table), MiningConfig())


def test_symmetric_sets_embed_both_sides_as_queries_and_cut_texts_are_counted() -> None:
    table = {"q": (1.0, 0.0), "p!": at(0.9), "r!": (0.0, 1.0), "s!": at(0.2)}
    rows = [Row("q", "p!"), Row("r!", "s!")]
    teacher = TableTeacher(table)
    _, report = mine(rows, teacher, OFF, symmetric=True)
    assert {role for role, _ in teacher.asked} == {"query"}
    assert report.truncated == {"queries": 1, "documents": 2}


def test_random_negatives_depend_on_seed_and_query_and_stay_among_those_that_passed() -> None:
    draw = np.random.default_rng(0)
    names = [f"d{i}" for i in range(200)]
    table = {
        name: vector / np.linalg.norm(vector)
        for name in [*names, *(f"q{i}" for i in range(30))]
        for vector in [draw.standard_normal(16)]
    }
    rows = [Row(f"q{i}", f"d{i}") for i in range(30)]
    corpus = [Document(None, name) for name in names]
    config = MiningConfig(
        per_query=3, skip=5, depth=25, max_share_of_positive=None, pick="random", seed=1
    )
    found, _ = mine(rows, TableTeacher(table), config, corpus)
    allowed, _ = mine(
        rows,
        TableTeacher(table),
        MiningConfig(per_query=20, skip=5, depth=25, max_share_of_positive=None),
        corpus,
    )
    top, _ = mine(
        rows,
        TableTeacher(table),
        MiningConfig(per_query=3, skip=5, depth=25, max_share_of_positive=None),
        corpus,
    )
    positions = [[allowed[i].index(document) for document in found[i]] for i in range(30)]
    assert all(row == sorted(set(row)) for row in positions)
    assert set(itertools.chain(*positions)) >= set(range(18))  # 90 draws of 20 ranks
    assert found != top
    again, _ = mine(rows[::-1], TableTeacher(table), config, corpus)
    assert again[::-1] == found
    assert (
        mine(
            rows,
            TableTeacher(table),
            MiningConfig(
                per_query=3, skip=5, depth=25, max_share_of_positive=None, pick="random", seed=2
            ),
            corpus,
        )[0]
        != found
    )


def unit(count: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("query_block", "candidate_block", "depth"),
    [(1024, 16384, 7), (3, 5, 7), (4, 2, 7), (1, 1, 1), (7, 50, 60)],
)
def test_the_ranking_is_that_of_all_scores_whatever_the_blocks(
    query_block: int, candidate_block: int, depth: int
) -> None:
    queries, documents = unit(10, 8, 0), unit(50, 8, 1)
    left_out = np.array(
        sorted(
            {(int(q), int(d)) for q, d in np.random.default_rng(2).integers(0, (10, 50), (80, 2))}
        )
    )
    scores, indices = rank(queries, documents, left_out, depth, query_block, candidate_block)
    everything = queries.astype(np.float64) @ documents.T.astype(np.float64)
    for query in range(10):
        allowed = [
            document
            for document in np.argsort(-everything[query])
            if (query, document) not in set(map(tuple, left_out))
        ][:depth]
        count = len(allowed)
        assert indices[query, :count].tolist() == allowed
        np.testing.assert_allclose(scores[query, :count], everything[query, allowed], atol=1e-6)
        assert (indices[query, count:] == NO_CANDIDATE).all()
        assert np.isneginf(scores[query, count:]).all()
    assert (np.isneginf(scores).any()) == (depth == 60)


def test_of_equal_scores_the_earlier_document_comes_first() -> None:
    documents = np.tile(unit(1, 4, 0), (6, 1))
    _, indices = rank(unit(2, 4, 1), documents, np.zeros((0, 2), np.int64), 6, 2, 4)
    assert indices.tolist() == [list(range(6))] * 2


# ---- against sentence-transformers


class FakeDataset:
    """As much of `datasets.Dataset` as mine_hard_negatives uses, where that library is not
    installed.
    """

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]]) -> FakeDataset:
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def to_pandas(self) -> Any:
        import pandas as pd

        return pd.DataFrame(self.columns)


class FakeModel:
    """What mine_hard_negatives asks a SentenceTransformer for, with the vectors of a table."""

    device = "cpu"

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        from sentence_transformers.util import cos_sim, pairwise_cos_sim

        self.vectors, self.similarity, self.similarity_pairwise = vectors, cos_sim, pairwise_cos_sim

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        return np.stack([self.vectors[text] for text in texts])

    encode_document = encode_query


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"max_share_of_positive": 0.95}, {"relative_margin": 0.05}),
        ({"margin": 0.1}, {"absolute_margin": 0.1}),
        ({"max_score": 0.3}, {"max_score": 0.3}),
        (
            {"max_share_of_positive": 0.9, "margin": 0.05, "max_score": 0.6},
            {"relative_margin": 0.1, "absolute_margin": 0.05, "max_score": 0.6},
        ),
    ],
)
def test_negatives_are_those_of_sentence_transformers_where_the_settings_coincide(
    ours: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs skips ranks after filtering, ours before, so nothing is skipped; both look at all
    ranks.
    """
    from sentence_transformers.util import hard_negatives

    monkeypatch.setattr(hard_negatives, "is_datasets_available", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(Dataset=FakeDataset))  # type: ignore[arg-type]
    documents, queries = unit(60, 8, 3), unit(40, 8, 4)
    documents[:40] = documents[:40] + 0.8 * queries  # positives that are near
    table = {
        **{f"q{i}": queries[i] for i in range(40)},
        **{f"d{i}": documents[i] / np.linalg.norm(documents[i]) for i in range(60)},
    }
    # queries with several positives
    pairs = [(f"q{i}", f"d{i}") for i in range(40)] + [("q0", "d41"), ("q0", "d7"), ("q5", "d6")]
    corpus = [f"d{i}" for i in range(60)]
    mined = hard_negatives.mine_hard_negatives(
        FakeDataset({"query": [q for q, _ in pairs], "positive": [p for _, p in pairs]}),
        FakeModel(table),
        corpus=corpus,
        num_negatives=3,  # type: ignore[arg-type]
        range_max=57,
        output_format="labeled-list",
        output_scores=True,
        verbose=False,
        **theirs,
    )
    expected: dict[str, list[str]] = {}
    for query, texts, scores in zip(
        mined["query"], mined["positive"], mined[mined.column_names[2]], strict=True
    ):
        right = {p for q, p in pairs if q == query}
        expected.setdefault(
            query,
            [
                text
                for text, score in zip(texts, scores, strict=True)
                if text not in right and math.isfinite(score)
            ],
        )
    config = MiningConfig(**{"per_query": 3, "depth": 60, "max_share_of_positive": None, **ours})
    negatives, _ = mine(
        [Row(q, p) for q, p in pairs],
        TableTeacher(table),
        config,
        [Document(None, text) for text in corpus],
    )
    got = {
        q: [document.text for document in found]
        for (q, _), found in zip(pairs, negatives, strict=True)
    }
    full = {query for query, found in got.items() if len(found) == 3}
    assert len(full) > 25
    assert {query: expected.get(query) for query in full} == {query: got[query] for query in full}


# ---- files


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


PAIRS = [
    {
        "query": "how do I grease a pump",
        "positive": "Water pumps should be greased twice a year.",
        "lang": "en",
        "note": {"page": 3},
        "negative": "old",
    },
    {"query": "a bread recipe", "positive": "Flour, water, salt\u2028and patience.", "lang": "en"},
    {
        "query": "forgotten password",
        "positive": "Open the settings and choose a new password.",
        "lang": "en",
    },
]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("per_query", [1, 2])
def test_the_written_file_keeps_all_fields_and_is_read_as_training_rows(
    tmp_path: Path, name: str, per_query: int
) -> None:
    rows = write(tmp_path / "rows.jsonl.gz", PAIRS)
    config = MineConfig(
        rows=rows,
        out=tmp_path / "new" / name,
        teacher=f"egemma:{MODEL}",
        cache=tmp_path / "cache",
        mining=MiningConfig(per_query=per_query, max_share_of_positive=None),
    )
    report = mine_file(config)
    assert report.rows_with == {per_query: 3}
    raw = config.out.read_bytes()
    written = [
        json.loads(line)
        for line in (gzip.decompress(raw) if name.endswith(".gz") else raw)
        .decode()
        .split("\n")[:-1]
    ]
    assert [{**row, "negative": None} for row in written] == [
        {**row, "negative": None} for row in PAIRS
    ]
    read = read_dataset(
        DatasetConfig(name="x", path=(name,), kind="pairs", task="search result"), config.out.parent
    ).rows
    positives = {row["positive"] for row in PAIRS}
    for row in read:
        assert len(row.negatives) == per_query
        assert set(row.negatives) <= positives - {row.positive}
    assert [path.name for path in config.out.parent.iterdir()] == [name]
    assert not name.endswith(".gz") or raw[4:8] == bytes(4)  # no time of writing in it
    with pytest.raises(ConfigError, match="exists"):
        mine_file(config)
    config.out.unlink()
    mine_file(config)
    assert config.out.read_bytes() == raw


def test_titles_go_with_their_negatives(tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows.jsonl", [{**PAIRS[0], "title": "Pumps", "negative": None}, *PAIRS[1:]]
    )
    corpus = write(
        tmp_path / "corpus.jsonl.gz",
        [
            {"id": "1", "title": "Hoses", "text": "Grease the pump and its hose."},
            {"text": "A loaf of bread."},
        ],
    )
    for per_query, out in ((1, "one.jsonl"), (4, "four.jsonl")):
        mine_file(
            MineConfig(
                rows=rows,
                corpus=corpus,
                out=tmp_path / out,
                teacher=f"egemma:{MODEL}",
                mining=MiningConfig(per_query=per_query, max_share_of_positive=None),
            )
        )
        read = read_dataset(
            DatasetConfig(name="x", path=(out,), kind="pairs", task="search result"), tmp_path
        ).rows
        titles = {PAIRS[0]["positive"]: "Pumps", "Grease the pump and its hose.": "Hoses"}
        assert any(title for row in read for title in row.negative_titles)
        for row in read:
            assert len(row.negatives) == per_query
            assert list(row.negative_titles or [None] * per_query) == [
                titles.get(text) for text in row.negatives
            ]


def test_rows_without_a_negative_have_no_such_field(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    scores = sorted(
        score
        for example in mine_file(
            MineConfig(rows=rows, out=tmp_path / "all.jsonl", teacher=f"egemma:{MODEL}", mining=OFF)
        ).examples
        for score in example.negative_scores
    )
    report = mine_file(
        MineConfig(
            rows=rows,
            out=tmp_path / "out.jsonl",
            teacher=f"egemma:{MODEL}",
            mining=MiningConfig(
                max_share_of_positive=None, max_score=(scores[0] + scores[1]) / 2, depth=1
            ),
        )
    )
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert report.rows_with == {0: 2, 1: 1}
    assert sorted("negative" in row for row in written) == [False, False, True]
    assert all(row.get("negative") != "old" for row in written)


def test_symmetric_rows_that_are_equal_on_both_sides_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    rows = write(tmp_path / "rows.jsonl", [*PAIRS, {"query": "same", "positive": "same"}])
    report = mine_file(
        MineConfig(
            rows=rows,
            out=tmp_path / "out.jsonl",
            teacher=f"egemma:{MODEL}",
            symmetric=True,
            mining=OFF,
        )
    )
    assert sum(report.dropped.values()) == 1
    assert len((tmp_path / "out.jsonl").read_text().strip().split("\n")) == 3
    assert "rows left out: 1" in report.to_text()
    with pytest.raises(InputError, match="line 4"):
        mine_file(MineConfig(rows=rows, out=tmp_path / "none.jsonl", teacher=f"egemma:{MODEL}"))
    assert not (tmp_path / "none.jsonl").exists()


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    report = mine_file(
        MineConfig(
            rows=write(tmp_path / "rows.jsonl", PAIRS),
            out=tmp_path / "out.jsonl",
            teacher=f"egemma:{MODEL}",
            mining=OFF,
        )
    )
    parsed = json.loads(report.to_json())
    assert (parsed["rows"], parsed["candidates"], parsed["examined"], parsed["rows_with"]) == (
        3,
        3,
        6,
        {"1": 3},
    )
    assert parsed["teacher"]["query_prompt"] == "task: search result | query: "
    assert {example["query"] for example in parsed["examples"]} == {row["query"] for row in PAIRS}
    text = report.to_text()
    for words in (
        "3 rows, 3 queries, 3 candidates",
        "3 rows got 1",
        f"{report.positive_first:.1%} of the queries",
        "Flour, water, salt and patience.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ""}', "line 2"),
        ('{"title": "a"}', "line 2"),
        ('["a"]', "line 2"),
        ('{"text": "a", "title": 3}', "line 2"),
        ('{"text": ', "line 2: not JSON"),
    ],
)
def test_a_bad_line_of_a_corpus_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_corpus(path)
    with pytest.raises(InputError, match="not readable"):
        read_corpus(tmp_path / "absent.jsonl.gz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_query": 0}, "per_query"),
        ({"skip": 100}, "skip"),
        ({"depth": 3, "skip": 2, "per_query": 2}, "per_query ranks"),
        ({"max_share_of_positive": 1.2}, "max_share_of_positive"),
        ({"max_share_of_positive": float("nan")}, "max_share_of_positive"),
        ({"margin": -0.1}, "margin"),
        ({"max_score": 2.0}, "max_score"),
        ({"pick": "best"}, "pick"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MiningConfig(**settings)


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows\.parquet"):
        MineConfig(rows=Path("rows.parquet"), out=Path("out.jsonl"), teacher="t")


def test_on_real_pairs_negatives_are_near_and_never_right(tmp_path: Path) -> None:
    source = SHARED_DATA / "pairs/nl2bash.train.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is absent; set EGEMMA_DATA to the folder that holds pairs/")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in itertools.islice(file, 300)]
    report = mine_file(
        MineConfig(
            rows=write(tmp_path / "rows.jsonl", pairs),
            out=tmp_path / "out.jsonl",
            teacher=f"egemma:{MODEL}",
        )
    )
    written = [
        json.loads(line)
        for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair["query"], set()).add(pair["positive"])
    assert report.rows_with[1] > 250
    assert all(row.get("negative") not in answers[row["query"]] for row in written)
    assert report.mean_negative_score > 0.4  # of random pairs it is about 0.2
    assert report.mean_negative_score < report.mean_positive_score
