"""Dev scores against values worked out by hand, sentence-transformers' evaluators, SciPy, and the
benchmark's own older measure.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ConfigError, DimensionError, InputError, PromptError
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_train.data.dataset_files import hold_out, read_dataset
from egemma_train.data.datasets import DatasetConfig
from egemma_train.data.dev_files import read_retrieval, read_similarity
from egemma_train.evaluate import DevConfig, DevSets
from egemma_train.metrics import best_hits, judge, paired_difference, rank_products, t_interval
from egemma_train.tables import read_table
from tests.conftest import SHARED_DATA
from tests.tiny import BOS, CORPUS, EOS, PAD, PROMPTS, VOCAB

CONFIG = EncoderConfig(
    vocab_size=VOCAB,
    width=16,
    ffn_width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    query_scale=8**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=64,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    pooling="mean",
    dense=((16, 24), (24, 16)),
    dims=(16, 8),
)
TEXTS = [line for line in CORPUS.splitlines() if line]
RETRIEVAL = DevConfig(name="set", kind="retrieval", path="set")
Table = Sequence[Mapping[str, Any]]


def write(path: Path, rows: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG)


@pytest.fixture
def make(tiny_spm: Path, tmp_path: Path) -> Callable[..., DevSets]:
    tokenizer = Tokenizer(
        tiny_spm, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=CONFIG.max_tokens
    )
    return lambda *configs, **settings: DevSets(
        configs, tmp_path, tokenizer, Prompts(by_name=PROMPTS), **settings
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 queries (the words of a document out of order), 15 documents, one to three right ones
    each, of degrees 1 to 3; one query without any.
    """
    draw = np.random.default_rng(0)
    write(
        tmp_path / "set" / "queries.jsonl.gz",
        [
            {"id": f"q{n}", "text": " ".join(draw.permutation(TEXTS[n].split()).tolist())}
            for n in range(13)
        ],
    )
    write(
        tmp_path / "set" / "corpus.jsonl.gz",
        [
            {"id": f"d{n:02}", "text": text, **({"title": f"Part {n}"} if n % 3 == 0 else {})}
            for n, text in enumerate(TEXTS)
        ],
    )
    judged = [
        {"q": f"q{n}", "d": f"d{document:02}", "rel": int(draw.integers(1, 4))}
        for n in range(12)
        for document in sorted({n, *draw.choice(len(TEXTS), n % 3, replace=False).tolist()})
    ]
    write(
        tmp_path / "set" / "qrels.jsonl.gz",
        [*judged, {"q": "q0", "d": "d05", "rel": 0}, {"q": "q12", "d": "d05", "rel": 0}],
    )
    return tmp_path / "set"


def test_ndcg_recall_and_accuracy_by_hand() -> None:
    # Ten hits 0, 1, ..., 9. Right: 1 (degree 3), 4 (degree 1), and 11 (degree 2), which was not
    # found.
    found = judge(np.arange(10)[None], [{1: 3.0, 4: 1.0, 11: 2.0}])
    gain = 3 / math.log2(3) + 1 / math.log2(6)
    most = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"][0] == pytest.approx(gain / most, abs=1e-12)
    assert found["recall@10"][0] == pytest.approx(2 / 3)
    assert found["accuracy@1"][0] == 0
    assert judge(np.arange(10)[None], [{0: 1.0}]) == {
        "ndcg@10": [1.0],
        "recall@10": [1.0],
        "accuracy@1": [1.0],
    }
    # Twelve right documents of which ten are found: nDCG@10 is 1, because no ranking has more.
    assert judge(np.arange(10)[None], [dict.fromkeys(range(12), 1.0)])["ndcg@10"] == [1.0]


def test_documents_of_equal_score_rank_in_their_order() -> None:
    scores = np.zeros((2, 40), np.float32)
    scores[1, [30, 35]] = 1
    assert best_hits(scores).tolist() == [list(range(10)), [30, 35, *range(8)]]
    assert best_hits(scores[:, :4]).tolist() == [[0, 1, 2, 3]] * 2


class Ready:
    """A sentence-transformers model that has its vectors already."""

    similarity_fn_name = "cosine"
    model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_: None})()

    def __init__(self, queries: np.ndarray, documents: np.ndarray) -> None:
        self.queries, self.documents = torch.from_numpy(queries), torch.from_numpy(documents)

    def encode_query(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        return self.queries[[int(text) for text in texts]]

    def encode_document(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        return self.documents[[int(text) for text in texts]]

    def similarity(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one @ other.T


def test_retrieval_is_that_of_sentence_transformers_evaluator() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    draw = np.random.default_rng(1)
    # Few distinct small whole numbers, so that many scores are exactly equal, at the tenth place as
    # well.
    queries, documents = (
        draw.integers(-1, 2, (count, 4)).astype(np.float32) for count in (50, 300)
    )
    right = [
        {int(document): 1.0 for document in draw.choice(300, draw.integers(1, 15), replace=False)}
        for _ in range(50)
    ]
    theirs = InformationRetrievalEvaluator(
        {f"{n}": f"{n}" for n in range(50)},
        {f"{n:03}": f"{n}" for n in range(300)},
        {f"{n}": {f"{document:03}" for document in found} for n, found in enumerate(right)},
        write_csv=False,
    )
    expected = theirs(Ready(queries, documents))  # type: ignore[arg-type]
    scores = queries @ documents.T
    assert (np.sort(scores, axis=1)[:, -10] == np.sort(scores, axis=1)[:, -11]).sum() > 10
    ours = {name: values.mean() for name, values in judge(best_hits(scores), right).items()}
    assert 0.01 < ours["ndcg@10"] < 0.5
    for name, value in ours.items():
        assert value == pytest.approx(expected[f"cosine_{name}"], abs=1e-12), name


def test_a_retrieval_set_is_scored_as_its_vectors_one_by_one_say(
    encoder: Encoder, make: Callable[..., DevSets], folder: Path
) -> None:
    """Each text alone through the encoder, its prompt written out, ranked by plain sorting."""
    sets = make(RETRIEVAL, chunk_tokens=100)

    def vector(text: str) -> torch.Tensor:
        ids = torch.tensor([sets.tokenizer.encode(text).ids])
        with torch.no_grad():
            return encoder(ids, torch.ones_like(ids).bool())[0]

    documents = [
        vector(f"title: {f'Part {n}' if n % 3 == 0 else 'none'} | text: {text}")
        for n, text in enumerate(TEXTS)
    ]
    ids = [f"d{n:02}" for n in range(len(TEXTS))]
    rows = {
        name: [
            json.loads(line)
            for line in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes())
            .decode()
            .splitlines()
        ]
        for name in ("queries", "qrels")
    }
    expected = []
    for query in rows["queries"][:12]:
        degrees = {
            row["d"]: row["rel"] for row in rows["qrels"] if row["q"] == query["id"] and row["rel"]
        }
        mine = vector("task: search result | query: " + query["text"])
        ranking = sorted(ids, key=lambda document: -float(mine @ documents[ids.index(document)]))
        gain, most = (
            sum(degree / math.log2(rank + 2) for rank, degree in enumerate(found[:10]))
            for found in (
                [degrees.get(document, 0) for document in ranking],
                sorted(degrees.values(), reverse=True),
            )
        )
        expected.append(gain / most)
    np.testing.assert_allclose(sets.per_query(encoder)["set"], expected, atol=1e-6)
    scores = sets.score(encoder)
    assert list(scores) == ["score", "set/ndcg@10", "set/recall@10", "set/accuracy@1"]
    assert scores["score"] == scores["set/ndcg@10"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert sets.described() == {
        "set": {
            "queries": 12,
            "of_queries": 13,
            "without_answer": 1,
            "documents": 15,
            "of_documents": 15,
            "cut_queries": 0,
            "cut_documents": 0,
        }
    }


def test_a_part_of_a_set_keeps_right_documents_and_says_so(
    encoder: Encoder, make: Callable[..., DevSets], folder: Path
) -> None:
    whole, part = make(RETRIEVAL), make(replace(RETRIEVAL, max_queries=4, max_documents=11))
    facts = part.described()["set"]
    assert (facts["queries"], facts["of_queries"], facts["documents"], facts["of_documents"]) == (
        4,
        13,
        11,
        15,
    )
    of_whole = dict(zip(whole.sets[0].queries, whole.sets[0].degrees, strict=True))
    for query, degrees in zip(part.sets[0].queries, part.sets[0].degrees, strict=True):
        texts = {part.sets[0].documents[index]: degree for index, degree in degrees.items()}
        assert texts == {
            whole.sets[0].documents[index]: degree for index, degree in of_whole[query].items()
        }
    kept = [whole.sets[0].documents.index(document) for document in part.sets[0].documents]
    assert kept == sorted(kept)
    assert make(replace(RETRIEVAL, max_queries=4, max_documents=11)).score(encoder) == part.score(
        encoder
    )
    with pytest.raises(ConfigError, match=r"are right answers to its 12 queries, max_documents=2"):
        make(replace(RETRIEVAL, max_documents=2))


def test_similarity_is_spearman_of_the_cosines(
    encoder: Encoder, make: Callable[..., DevSets], tmp_path: Path
) -> None:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    draw = np.random.default_rng(2)
    rows = [
        {
            "a": TEXTS[n % 15],
            "b": TEXTS[(n * 7 + 4) % 15],
            "score": float(draw.integers(0, 6)),
            "lang": ("en", "de")[n % 2],
        }
        for n in range(30)
    ]
    write(tmp_path / "sts.jsonl", rows)
    config = DevConfig(name="sts", kind="similarity", path="sts.jsonl", task="sentence similarity")
    sets = make(config)
    prompt = "task: sentence similarity | query: "
    with torch.no_grad():
        ids = [
            [torch.tensor([sets.tokenizer.encode(prompt + row[side]).ids]) for row in rows]
            for side in ("a", "b")
        ]
        left, right = (
            torch.cat([encoder(row, torch.ones_like(row).bool()) for row in side]) for side in ids
        )
    expected = spearmanr(
        (left.double() * right).sum(1).numpy(), [row["score"] for row in rows]
    ).statistic
    assert sets.score(encoder)["sts/spearman"] == pytest.approx(expected, abs=1e-6)
    assert sets.per_query(encoder)["sts"].mean() == pytest.approx(expected, abs=1e-6)
    assert make(replace(config, languages=("de",), max_queries=10)).described() == {
        "sts": {"pairs": 10, "of_pairs": 15, "cut_texts": 0}
    }
    with pytest.raises(InputError, match=r"no row has lang \['fr'\]; there are \['de', 'en'\]"):
        make(replace(config, languages=("de", "fr")))
    write(tmp_path / "sts.jsonl", [row | {"score": 3} for row in rows])
    with pytest.raises(InputError, match="no two differ in score"):
        make(config)


def test_spearman_with_ties_is_scipys() -> None:
    from scipy.stats import spearmanr

    draw = np.random.default_rng(3)
    for distinct in (2, 5, 1000):
        one, other = (
            draw.integers(0, distinct, 200).astype(float),
            draw.integers(0, 4, 200) + draw.normal(0, 1, 200).round(1),
        )
        assert rank_products(one, other).mean() == pytest.approx(
            spearmanr(one, other).statistic, abs=1e-12
        )
    assert rank_products(np.arange(3.0), np.array([10.0, 20.0, 30.0])).mean() == pytest.approx(1)
    assert rank_products(np.ones(5), np.arange(5.0)).tolist() == [0] * 5


def test_held_out_pairs_search_all_positives(
    encoder: Encoder, make: Callable[..., DevSets], tmp_path: Path
) -> None:
    rows = [{"query": " ".join(reversed(text.split())), "positive": text} for text in TEXTS] + [
        {"query": " ".join(reversed(TEXTS[0].split())), "positive": TEXTS[5]}
    ]
    write(tmp_path / "pairs.jsonl", rows)
    sets = make(DevConfig(name="pairs", kind="pairs", path="pairs.jsonl"))
    assert sets.described()["pairs"] | {"cut_queries": 0, "cut_documents": 0} == {
        "queries": 15,
        "of_queries": 15,
        "without_answer": 0,
        "documents": 15,
        "of_documents": 15,
        "cut_queries": 0,
        "cut_documents": 0,
    }
    assert [sorted(degrees) for degrees in sets.sets[0].degrees] == [
        [0, 5],
        *([index] for index in range(1, 15)),
    ]
    dataset = read_dataset(
        DatasetConfig(name="part", path=("pairs.jsonl",), kind="pairs", task="search result"),
        tmp_path,
    )
    _, held = hold_out(dataset, 2)
    both = make(DevConfig(name="pairs", kind="pairs", path="pairs.jsonl"), held_out=[held])
    assert both.described()["part"]["documents"] == len({row.positive for row in held.rows}) < 15
    scores = both.score(encoder)
    assert scores["score"] == pytest.approx((scores["pairs/ndcg@10"] + scores["part/ndcg@10"]) / 2)
    symmetric = make(
        DevConfig(name="pairs", kind="pairs", path="pairs.jsonl", task="sentence similarity")
    )
    assert [
        sets.tokenizer.decode(ids[:-1]).split(" query: ")[0]
        for ids in symmetric.sets[0].documents[:2]
    ] == ["task: sentence similarity |"] * 2


def test_the_encoders_mode_and_gradients_are_left_alone_and_the_width_counts(
    encoder: Encoder, make: Callable[..., DevSets], folder: Path
) -> None:
    sets, narrow = make(RETRIEVAL), make(replace(RETRIEVAL, dim=8))
    modes: set[bool] = set()
    encoder.norm.register_forward_hook(lambda module, *_: modes.add(module.training))
    for mode in (True, False):
        encoder.train(mode)
        scores = sets.score(encoder)
        assert encoder.training is mode
    assert modes == {False}
    assert all(weight.requires_grad and weight.grad is None for weight in encoder.parameters())
    with torch.no_grad():
        # what follows the eighth channel decides everything but the short vectors
        encoder.dense[1].weight[8:] *= 100
        assert sets.score(encoder) != scores
        short = narrow.score(encoder)
        encoder.dense[1].weight[8:] /= 100
    assert narrow.score(encoder)["score"] == pytest.approx(short["score"], abs=1e-9)
    with pytest.raises(DimensionError, match="dim=4 was not trained"):
        make(replace(RETRIEVAL, dim=4)).score(encoder)


def test_bfloat16_is_used_where_it_is_asked_for(
    encoder: Encoder, make: Callable[..., DevSets], folder: Path
) -> None:
    seen: list[torch.dtype] = []
    encoder.dense[1].register_forward_hook(lambda *inputs: seen.append(inputs[2].dtype))
    plain, rough = (
        make(RETRIEVAL).score(encoder)["score"],
        make(RETRIEVAL, precision="bfloat16").score(encoder)["score"],
    )
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert rough == pytest.approx(plain, abs=0.1)


def test_a_model_that_diverged_has_no_score(
    encoder: Encoder, make: Callable[..., DevSets], folder: Path
) -> None:
    with torch.no_grad():
        encoder.norm.weight[0] = float("nan")
    encoder.train()
    with pytest.raises(InputError, match="NaN"):
        make(RETRIEVAL).score(encoder)
    assert encoder.training


def test_long_texts_are_cut_and_counted(make: Callable[..., DevSets], folder: Path) -> None:
    sets = make(replace(RETRIEVAL, max_tokens=20))
    facts = sets.described()["set"]
    assert facts["cut_documents"] > 0
    assert max(len(ids) for ids in sets.sets[0].documents) == 20
    assert sum(len(ids) == 20 for ids in sets.sets[0].documents) >= facts["cut_documents"]
    assert all(ids[-1] == EOS for ids in sets.sets[0].documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "search"}, "kind='search'"),
        ({"name": "a/b"}, "without '/'"),
        ({"name": "score"}, "other than 'score'"),
        ({"max_queries": 0}, "of at least 1"),
        ({"languages": ("en",)}, "has no languages"),
        ({"kind": "similarity", "max_documents": 5}, "has no max_documents"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RETRIEVAL, **changes)


def test_sets_that_cannot_work_are_refused(make: Callable[..., DevSets], folder: Path) -> None:
    with pytest.raises(ConfigError, match="each name once"):
        make(RETRIEVAL, RETRIEVAL)
    with pytest.raises(ConfigError, match="at least one"):
        make()
    with pytest.raises(PromptError, match="cooking"):
        make(replace(RETRIEVAL, task="cooking"))
    with pytest.raises(ConfigError, match="float16"):
        make(RETRIEVAL, precision="float16")


def test_a_recipes_table_is_read() -> None:
    table = {
        "kind": "similarity",
        "path": "sts.jsonl",
        "task": "sentence similarity",
        "languages": ["en"],
        "max_queries": 5,
    }
    assert read_table(DevConfig, table, "[dev.sts]", name="sts") == DevConfig(
        name="sts",
        kind="similarity",
        path="sts.jsonl",
        task="sentence similarity",
        languages=("en",),
        max_queries=5,
    )
    with pytest.raises(
        ConfigError, match=r"\[dev.sts\]: 'max_query' is not known; did you mean 'max_queries'"
    ):
        read_table(
            DevConfig,
            {"kind": "similarity", "path": "x", "max_query": 5},
            "[dev.sts]",
            name="sts",
        )


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("queries", "{", "queries.jsonl, line 3: not JSON"),
        ("queries", '"text"', "queries.jsonl, line 3: found str 'text': write one object"),
        ("queries", '{"id": "q9"}', r"queries.jsonl, line 3: field 'text': found only \['id'\]"),
        ("queries", '{"id": 9, "text": "x"}', "queries.jsonl, line 3: field 'id': found int 9"),
        ("queries", '{"id": "q9", "text": " "}', "line 3: field 'text': found str ' '"),
        ("queries", '{"id": "q1", "text": "x"}', "line 3: field 'id': 'q1' was given before"),
        (
            "corpus",
            '{"id": "d9", "text": "\\ud800"}',
            "corpus.jsonl, line 3: field 'text' holds a lone surrogate U\\+D800 at character 0",
        ),
        (
            "corpus",
            '{"id": "d9", "text": "x", "title": 7}',
            "corpus.jsonl, line 3: field 'title': found int 7",
        ),
        (
            "qrels",
            '{"q": "q9", "d": "d0", "rel": 1}',
            "qrels.jsonl, line 3: no query has the id 'q9'",
        ),
        (
            "qrels",
            '{"q": "q0", "d": "d9", "rel": 1}',
            "qrels.jsonl, line 3: no document has the id 'd9'",
        ),
        ("qrels", '{"q": "q0", "d": "d0", "rel": 1}', "line 3: 'q0' and 'd0' were judged before"),
        ("qrels", '{"q": "q0", "d": "d1", "rel": -1}', "line 3: rel=-1.0 must be"),
        (
            "qrels",
            '{"q": "q0", "d": "d1", "rel": "1"}',
            "line 3: field 'rel': found str '1', want a number",
        ),
        ("qrels", '{"q": "q0", "d": "d1", "rel": NaN}', "line 3: field 'rel': found float nan"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(
    file: str, row: str, message: str, tmp_path: Path
) -> None:
    whole = {
        "queries": [{"id": f"q{n}", "text": "x"} for n in range(2)],
        "corpus": [{"id": f"d{n}", "text": "x"} for n in range(2)],
        "qrels": [{"q": f"q{n}", "d": f"d{n}", "rel": 1} for n in range(2)],
    }
    for name, rows in whole.items():
        write(tmp_path / f"{name}.jsonl", rows)
    assert len(read_retrieval(tmp_path).relevant) == 2
    with (tmp_path / f"{file}.jsonl").open("a") as out:
        out.write(row + "\n")
    with pytest.raises(InputError, match=message):
        read_retrieval(tmp_path)


def test_files_that_are_absent_empty_or_damaged_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"no queries.jsonl or queries.jsonl.gz"):
        read_retrieval(tmp_path)
    with pytest.raises(InputError, match=r"absent\.jsonl: not readable"):
        read_similarity(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"is not a \.jsonl"):
        read_similarity(tmp_path / "sts.csv")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty file"):
        read_similarity(tmp_path / "empty.jsonl")
    qrels = folder / "qrels.jsonl.gz"
    qrels.write_bytes(qrels.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"qrels.jsonl.gz: not readable after line"):
        read_retrieval(folder)
    qrels.unlink()
    write(folder / "qrels.jsonl", [{"q": "q0", "d": "d00", "rel": 0}])
    with pytest.raises(InputError, match="no query has a right document"):
        read_retrieval(folder)
    write(folder / "qrels.jsonl.gz", [])
    with pytest.raises(InputError, match=r"both a qrels.jsonl and a qrels.jsonl.gz"):
        read_retrieval(folder)


def test_the_paired_interval_is_that_of_the_mean_difference() -> None:
    draw = np.random.default_rng(4)
    base = draw.random(400)
    better = base + draw.normal(0.1, 0.3, 400)
    mean, low, high = paired_difference(better, base, seed=0, samples=4000)
    assert mean == pytest.approx((better - base).mean(), abs=1e-12)
    standard = (better - base).std() / 20  # the normal interval, which 400 values come close to
    assert low == pytest.approx(mean - 1.96 * standard, abs=0.1 * standard)
    assert high == pytest.approx(mean + 1.96 * standard, abs=0.1 * standard)
    assert paired_difference(better, base, seed=0, samples=100) == paired_difference(
        better, base, seed=0, samples=100
    )
    with pytest.raises(InputError, match="same queries"):
        paired_difference(better, base[1:])


def test_the_interval_over_seeds_is_students() -> None:
    # Mean 3, standard deviation 1, three seeds: 4.302653 / sqrt(3), the quantile from a printed
    # table.
    assert t_interval([2.0, 3.0, 4.0]) == pytest.approx(
        (3, 3 - 4.302653 / math.sqrt(3), 3 + 4.302653 / math.sqrt(3)), abs=1e-6
    )
    assert t_interval([1.0, 1.0])[1:] == (1.0, 1.0)
    with pytest.raises(InputError, match="at least two seeds"):
        t_interval([1.0])


def test_the_files_of_the_shared_data_are_read() -> None:
    folder = SHARED_DATA / "code" / "nl2bash-test"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set EGEMMA_DATA")
    found = read_retrieval(folder)
    assert (len(found.queries), len(found.documents), len(found.relevant)) == (1230, 998, 1230)
    assert len(read_similarity(SHARED_DATA / "sts" / "stsb.dev.jsonl.gz", ("en",))) == 1500
