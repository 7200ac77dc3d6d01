"""Search finds what float64 arithmetic, a hand-made BM25 and hand-summed ranks find, and says how
it did.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from egemma.chunks import Chunk, ChunkedDocument
from egemma.identity import ModelIdentity
from egemma.index import Hits, Index
from egemma.index.scan import kernel_name
from egemma.index.upkeep.rewrite import rewrite_heads
from egemma_core.errors import ConfigError, DimensionError, InputError, PromptError, TokenLimitError
from egemma_core.vectors import normalize
from tests.sdk.fakes import DIMS, TEXTS, WordEmbedder, model_of, open_index

ROWS = 900


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path / "notes.egx") as opened:
        yield opened


def random_vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors with a few directions in common and small last channels, as a Matryoshka model
    gives them.
    """
    random = np.random.default_rng(seed)
    themes = random.normal(size=(8, DIMS[0]))
    mixed = random.normal(size=(count, DIMS[0])) + themes[random.integers(0, 8, count)]
    return normalize((mixed * np.linspace(2, 0.3, DIMS[0])).astype(np.float32))


def cosine_order(
    query: NDArray[Any], stored: NDArray[Any], dim: int | None
) -> tuple[list[int], NDArray[np.float64]]:
    """Rows by falling cosine at a width, in float64, equal ones by row; and all cosines."""
    left, right = query.astype(np.float64)[:dim], stored.astype(np.float64)[:, :dim]
    cosines = right @ left / np.linalg.norm(right, axis=1) / np.linalg.norm(left)
    return np.argsort(-cosines, kind="stable").tolist(), cosines


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Index]]:
    """The same 900 vectors in one file of codes and one that keeps floats, after some were deleted
    and some replaced.
    """
    made = {}
    for name in ("codes", "floats"):
        made[name] = open_index(
            tmp_path_factory.mktemp(name) / "a.egx", keep_floats=name == "floats"
        )
        vectors = random_vectors(ROWS + 200)
        ids = [f"{row:04}" for row in range(ROWS + 200)]
        metadata = [
            {"row": row, "even": row % 2 == 0, "part": row // 100} for row in range(ROWS + 200)
        ]
        made[name].add_vectors(
            vectors, ids=ids, metadata=metadata, texts=[f"text {row}" for row in range(ROWS + 200)]
        )
        made[name].remove(ids[:100])
        made[name].remove(ids[-100:])
    yield made
    for opened in made.values():
        opened.close()


HELD = range(100, ROWS + 100)  # rows of the vectors that are in the files


# By vector.


@pytest.mark.parametrize("dim", [None, *DIMS])
@pytest.mark.parametrize("exact", [True, False])
def test_a_search_of_floats_gives_the_cosines_of_float64_at_every_trained_width(
    filled: dict[str, Index], dim: int | None, exact: bool
) -> None:
    stored = random_vectors(ROWS + 200)[HELD.start : HELD.stop]
    for query in random_vectors(5, seed=1):
        order, cosines = cosine_order(query, stored, dim)
        hits = filled["floats"].search(
            query, 25, dim=dim, exact=exact, **({} if exact else {"shortlist": 10_000})
        )
        assert [hit.id for hit in hits] == [f"{HELD[row]:04}" for row in order[:25]]
        np.testing.assert_allclose([hit.score for hit in hits], cosines[order[:25]], atol=1e-12)
        assert all(hit.vector_score == hit.score and hit.text_score is None for hit in hits)


@pytest.mark.parametrize("dim", [None, *DIMS])
def test_codes_cost_little_of_a_cosine_and_the_cascade_finds_what_comparing_all_finds(
    filled: dict[str, Index], dim: int | None
) -> None:
    stored = random_vectors(ROWS + 200)
    for query in random_vectors(5, seed=2):
        exact = filled["codes"].search(query, 50, dim=dim, exact=True)
        _, cosines = cosine_order(query, stored, dim)
        np.testing.assert_allclose(
            [hit.score for hit in exact], [cosines[int(hit.id)] for hit in exact], atol=5e-3
        )
        cascade = filled["codes"].search(query, 50, dim=dim, shortlist=10_000)
        assert cascade.hits == exact.hits
        default = filled["codes"].search(query, 10, dim=dim)
        assert len({hit.id for hit in default} & {hit.id for hit in exact[:10]}) >= 9


def test_a_short_shortlist_orders_only_what_the_heads_left_over(filled: dict[str, Index]) -> None:
    query = random_vectors(1, seed=3)[0]
    stored = random_vectors(ROWS + 200)
    hits = filled["floats"].search(query, 5, shortlist=5)
    by_head, _ = cosine_order(query, stored[HELD.start : HELD.stop], DIMS[-1])
    _, cosines = cosine_order(query, stored, None)
    left_over = sorted((HELD[row] for row in by_head[:5]), key=lambda row: -cosines[row])
    # heads are int8 in the first pass
    assert len({int(hit.id) for hit in hits} & set(left_over)) >= 4
    assert [int(hit.id) for hit in hits] == sorted(
        (int(hit.id) for hit in hits), key=lambda row: -cosines[row]
    )
    assert hits.how.shortlist == 5


def test_scores_that_float32_cannot_tell_apart_are_ordered_as_in_float64(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    query = normalize(random.normal(size=64).astype(np.float32))
    stored = normalize((query + 3e-4 * random.normal(size=(2000, 64)) / 8).astype(np.float32))
    assert len(np.unique(stored @ query)) < 100
    with open_index(tmp_path / "a.egx", keep_floats=True) as index:
        index.add_vectors(stored, ids=[f"{row:04}" for row in range(2000)])
        order, _ = cosine_order(query, stored, None)
        for settings_ in ({"exact": True}, {"shortlist": 2000}):
            assert [hit.id for hit in index.search(query, 5, **cast(Any, settings_))] == [
                f"{row:04}" for row in order[:5]
            ]


def test_equal_vectors_tie_exactly_and_come_in_the_order_in_which_they_were_added(
    index: Index,
) -> None:
    # no multiple of a kernel's row count
    ids = [f"{number:04}" for number in np.random.default_rng(1).permutation(997)]
    index.add_vectors(np.repeat(WordEmbedder().vector("same words")[None], 997, axis=0), ids=ids)
    # put in again: now the last
    index.add_vectors(WordEmbedder().vector("same words")[None], ids=[ids[3]])
    expected = [*ids[:3], *ids[4:], ids[3]]
    for k in (1, 7, 997):
        for settings_ in (
            {},
            {"exact": True},
            {"dim": 16},
            {"where": {"missing": {"$exists": False}}},
        ):
            hits = index.search("same words", k, **cast(Any, settings_))
            assert [hit.id for hit in hits] == expected[:k]
            assert len({hit.score for hit in hits}) == 1


def test_ties_among_other_scores_come_in_the_order_in_which_they_were_added(index: Index) -> None:
    pair = np.stack([WordEmbedder().vector("same words"), WordEmbedder().vector("other words")])
    index.add_vectors(np.tile(pair, (400, 1)), ids=[str(row) for row in range(800)])
    expected = [*range(0, 800, 2), *range(1, 800, 2)]
    for settings_ in ({"shortlist": 800}, {"exact": True}):
        assert [
            int(hit.id) for hit in index.search("same words", 800, **cast(Any, settings_))
        ] == expected


def test_vectors_that_are_read_some_at_a_time_are_ordered_all_together(
    filled: dict[str, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    for query in random_vectors(3, seed=6):
        right = filled["codes"].search(query, 60, exact=True).hits
        with monkeypatch.context() as patch:
            patch.setattr("egemma.index.search._VECTORS_TOGETHER", 101)
            assert filled["codes"].search(query, 60, exact=True).hits == right
            assert filled["codes"].search(query, 60, shortlist=ROWS).hits == right


def test_fewer_hits_come_back_when_fewer_are_stored(index: Index) -> None:
    index.add(TEXTS)
    assert len(index.search("cat", k=10_000)) == 4
    assert len(index.search("cat", k=10_000, exact=True)) == 4


def test_a_vector_of_a_smaller_width_searches_at_that_width(index: Index) -> None:
    index.add(TEXTS)
    full = WordEmbedder().vector("rain harbour")
    for dim in DIMS:
        wanted = index.search("rain harbour", dim=dim)
        for vector, settings_ in (
            (full[:dim], {}),
            (full, {"dim": dim}),
            (full[:dim] * np.float32(8), {}),
            (full.astype(np.float64), {"dim": dim}),
        ):
            found = index.search(vector, **cast(Any, settings_))
            assert [hit.id for hit in found] == [hit.id for hit in wanted]
            np.testing.assert_allclose(
                [hit.score for hit in found], [hit.score for hit in wanted], atol=1e-7
            )
            assert found.how == wanted.how
    with pytest.raises(InputError, match="dim=32"):
        index.search(full[:16], dim=32)


def test_what_the_model_gave_searches_as_its_vectors_do(index: Index) -> None:
    one, several = index.embedder.embed_query("cat"), index.embedder.embed_query(["cat", "rain"])
    assert index.search(one) == index.search(one.vector) == index.search("cat")
    assert index.search(several) == index.search(["cat", "rain"])
    assert index.search(several) == index.search(several.vectors)


def test_queries_searched_together_get_what_each_gets_alone(filled: dict[str, Index]) -> None:
    index = filled["codes"]
    queries = ["text 300", "words", "text 7 text 8", "words"]
    for settings_ in (
        {},
        {"mode": "text"},
        {"mode": "hybrid"},
        {"dim": 16},
        {"where": {"even": True}},
        {"exact": True},
        {"shortlist": 3, "k": 2},
    ):
        together = index.search(queries, **cast(Any, settings_))
        assert together == [index.search(query, **cast(Any, settings_)) for query in queries]
        assert index.search(tuple(queries), **cast(Any, settings_)) == together
    vectors = random_vectors(70, seed=5)
    assert index.search(vectors, 3) == [index.search(vector, 3) for vector in vectors]
    assert index.search([]) == index.search(vectors[:0]) == []


def test_a_search_by_words_takes_nothing_that_is_about_vectors(filled: dict[str, Index]) -> None:
    for settings_ in ({"dim": 16}, {"shortlist": 3}, {"exact": True}):
        with pytest.raises(ConfigError, match="compares no vectors"):
            filled["codes"].search("text", mode="text", **cast(Any, settings_))


# Filters.


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"row": 777}, [777]),
        ({"part": 5}, range(500, 600)),
        ({"even": True}, range(100, 1000, 2)),
        ({"row": {"$gte": 150}}, range(150, 1000)),
        ({"row": {"$in": [100, 999, 5]}}, [100, 999]),
        ({"row": -1}, []),
        ({"$not": {"row": {"$exists": True}}}, []),
    ],
)
def test_a_filter_is_applied_before_the_search_so_k_hits_come_back_when_they_exist(
    filled: dict[str, Index], mode: Any, where: Any, rows: Any
) -> None:
    index = filled["floats"]
    assert index.ids(where) == [f"{row:04}" for row in rows]
    for k, shortlist in ((10, None), (3, 3), (2000, None)):
        hits = index.search(
            "text", k, where=where, mode=mode, shortlist=None if mode == "text" else shortlist
        )
        assert len(hits) == min(k, len(rows))
        assert {int(hit.id) for hit in hits} <= set(rows)
    if mode == "vector":
        stored = random_vectors(ROWS + 200)[list(rows)]
        order, _ = cosine_order(WordEmbedder().vector("text"), stored, None)
        for settings_ in ({"exact": True}, {"shortlist": 5000}):
            hits = index.search("text", 10, where=where, **cast(Any, settings_))
            assert [int(hit.id) for hit in hits] == [list(rows)[row] for row in order[:10]]
            assert hits.how.vectors == len(rows)


def test_a_filter_takes_all_chunks_of_a_document_that_passes(index: Index) -> None:
    chunks = (
        Chunk(start=0, stop=4, title=None, text="one "),
        Chunk(start=4, stop=7, title=None, text="two"),
    )
    for id_, metadata in (("a", {"lang": "en"}), ("b", {"lang": "de"}), ("c", None)):
        index.put(
            [ChunkedDocument(id=id_, title=None, metadata=metadata, source=None, chunks=chunks)]
        )
    for mode in ("vector", "text", "hybrid"):
        found = {
            (hit.id, hit.position)
            for hit in index.search("one two", where={"lang": "en"}, mode=cast(Any, mode))
        }
        assert found == {("a", 0), ("a", 1)}


def test_kept_filters_are_of_this_filter_and_this_state(index: Index) -> None:
    index.add(
        TEXTS, ids=["a", "b", "c", "d"], metadata=[{"n": 1}, {"n": 1.5}, {"n": True}, {"n": "1"}]
    )
    for _ in range(2):
        for value, id_ in ((1, "a"), (1.5, "b"), (True, "c"), ("1", "d")):
            assert [hit.id for hit in index.search("the", where={"n": value})] == [id_]
        for number in range(40):  # more than are kept
            assert list(index.search("the", where={"n": 100 + number})) == []
    index.add([TEXTS[0]], ids=["a"], metadata=[{"n": 2}])
    assert list(index.search("the", where={"n": 1})) == []
    assert [hit.id for hit in index.search("the", where={"n": 2})] == ["a"]


# By words.


def bm25(texts: list[str], query: list[str]) -> list[float]:
    """From FTS5's documentation: k1 = 1.2, b = 0.75, one term for each word that a text has."""
    split = [text.lower().split() for text in texts]
    average = sum(map(len, split)) / len(split)
    scores = [0.0] * len(texts)
    for word in query:
        holding = sum(word in words for words in split)
        idf = max(math.log((len(texts) - holding + 0.5) / (holding + 0.5)), 1e-6)
        for row, words in enumerate(split):
            frequency = words.count(word)
            scores[row] += (
                idf * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * len(words) / average))
            )
    return scores


def test_text_search_ranks_by_bm25_as_worked_out_by_hand(index: Index) -> None:
    random = np.random.default_rng(4)
    texts = [
        " ".join(f"w{number}" for number in random.geometric(0.08, size=random.integers(3, 30)))
        for _ in range(150)
    ]
    index.add_vectors(random_vectors(150), ids=[f"{row:03}" for row in range(150)], texts=texts)
    scores = bm25(texts, ["w3", "w9", "w20"])
    hits = index.search("W3, w9 (w20)!", 20, mode="text")
    assert [hit.id for hit in hits] == [
        f"{row:03}" for row in np.argsort(-np.array(scores), kind="stable")[:20]
    ]
    np.testing.assert_allclose(
        [hit.score for hit in hits], sorted(scores, reverse=True)[:20], rtol=1e-9
    )
    assert all(hit.text_score == hit.score and hit.vector_score is None for hit in hits)


def test_equal_words_tie_and_come_in_the_order_in_which_they_were_added(index: Index) -> None:
    ids = [f"{number}" for number in np.random.default_rng(1).permutation(50)]
    index.add_vectors(random_vectors(50), ids=ids, texts=["the same words"] * 50)
    assert [hit.id for hit in index.search("words", 20, mode="text")] == ids[:20]


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '""',
        '"rain',
        'rain"',
        '"rain" "quiet',
        "NEAR(rain quiet)",
        "rain NEAR/2 quiet",
        "text:rain",
        "title : rain",
        "{title text}: rain",
        "- text : rain",
        "rai*",
        "rain *",
        "^rain",
        "rain -quiet",
        "-rain",
        "rain AND missing",
        "NOT rain",
        "rain NOT quiet",
        "rain OR",
        "AND rain",
        "(rain",
        "rain)",
        "((((rain",
        "rain + quiet",
        "rain; DROP TABLE words; --",
        "' OR 1=1 -- rain",
        "rain\\",
        "rain%",
        "rain\0quiet",
        "\0rain",
        "rain\ud800",
        "rain\ufffe",
        "🦊 rain",
        "rain🦊",
        "rain 中文",
        "\u202erain",
        "rain\u200bquiet",
        "RAIN",
        "ráin",
        "rain" * 3 + " rain",
        " ".join(f"x{number}" for number in range(999)) + " rain",
        "rain " * 10_000,
        "rank rain",
        "rowid rain",
        "words MATCH rain",
        "rain " + "y" * 1_000_000,
    ],
)
def test_whatever_is_typed_is_searched_for_as_words(index: Index, query: str) -> None:
    index.add(TEXTS, ids=["cat", "dog", "rain", "bicycle"])
    before = index.facts(check=True)
    hits = index.search(query, mode="text")
    if any(character.isalnum() for character in query):
        assert [hit.id for hit in hits] == ["rain"] or query == "rai*"
    else:
        assert list(hits) == []
    assert index.facts(check=True) == before


@pytest.mark.parametrize("query", ["*", "...", "🦊", "_", "\u0301", "--", "\ud800"])
def test_a_query_without_a_word_finds_nothing_by_words(index: Index, query: str) -> None:
    index.add(TEXTS)
    assert list(index.search(query, mode="text")) == []
    if query != "\ud800":
        assert len(index.search(query, mode="hybrid")) == 4


def test_more_words_than_full_text_takes_are_an_input_error(index: Index) -> None:
    index.add(TEXTS)
    model_of(index).max_tokens = 20_000
    for mode in ("text", "hybrid"):
        with pytest.raises(InputError, match="10000 different words"):
            index.search(" ".join(f"w{number}" for number in range(10_000)), mode=cast(Any, mode))


@pytest.mark.parametrize(
    "text",
    [
        unicodedata.normalize("NFD", "Crème brûlée über Đà Nẵng"),
        "hug🤗ging",
        "₺100",
        "हिन्दी में",
        "ภาษาไทย",
        "ab\ue000cd",
        "a\u20dd",
        "Ⅻ ½ ²",
        "👋🏽wave",
        "x_y_z",
        "foo_bar",
        "don't",
        "naïve—indeed",
        "中文分词",
        "한국어",
        "\u1abe\u1abe",
    ],
)
def test_a_text_is_found_by_its_own_words_in_any_script(index: Index, text: str) -> None:
    index.add_vectors(random_vectors(2), ids=["a", "b"], texts=[text, "something else"])
    assert [hit.id for hit in index.search(text, mode="text")] == ["a"]
    for piece in text.split():
        assert [hit.id for hit in index.search(piece, mode="text")] == ["a"]


def test_composed_and_decomposed_letters_find_each_other(index: Index) -> None:
    index.add_vectors(
        random_vectors(2),
        ids=["composed", "decomposed"],
        texts=[
            unicodedata.normalize("NFC", "café crèmes"),
            unicodedata.normalize("NFD", "café crèmes"),
        ],
    )
    for query in ("crèmes", unicodedata.normalize("NFD", "crèmes"), "cremes", "CRÈMES"):
        assert {hit.id for hit in index.search(query, mode="text")} == {"composed", "decomposed"}


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
    )
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_can_be_searched_for_and_is_found_where_it_has_a_word(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    index = searched_by_anything(tmp_path_factory)
    if text.strip():
        index.add_vectors(random_vectors(1), ids=["x"], texts=[text])
        found = [hit.id for hit in index.search(text, mode="text")]
        quoted = '"' + text.replace('"', '""') + '"'
        has_words = index._session._reader.execute(
            "SELECT count(*) FROM words WHERE words MATCH ?", (quoted,)
        ).fetchone()[0]
        assert found == ["x"] * has_words


_OPEN: list[Index] = []


def searched_by_anything(factory: pytest.TempPathFactory) -> Index:
    if not _OPEN:
        _OPEN.append(open_index(factory.mktemp("any") / "a.egx"))
    return _OPEN[0]


# Both.


def test_hybrid_search_sums_the_reciprocals_of_both_ranks(index: Index) -> None:
    texts = ["alpha beta", "alpha gamma", "beta gamma", "delta", "alpha", "epsilon zeta"]
    index.add(texts, ids=["a", "b", "c", "d", "e", "f"])
    by_vector = [hit.id for hit in index.search("alpha beta", 6)]
    by_words = [hit.id for hit in index.search("alpha beta", 6, mode="text")]
    assert len(by_vector) == 6
    assert set(by_words) == {"a", "b", "c", "e"}
    expected = {
        id_: 1 / (61 + by_vector.index(id_))
        + (1 / (61 + by_words.index(id_)) if id_ in by_words else 0)
        for id_ in by_vector
    }
    hits = index.search("alpha beta", 6, mode="hybrid")
    assert {hit.id: pytest.approx(hit.score, abs=1e-15) for hit in hits} == expected
    assert [hit.id for hit in hits] == sorted(by_vector, key=lambda id_: -expected[id_])
    cosines = {hit.id: hit.score for hit in index.search("alpha beta", 6)}
    words = {hit.id: hit.score for hit in index.search("alpha beta", 6, mode="text")}
    assert [(hit.vector_score, hit.text_score) for hit in hits] == [
        (cosines[hit.id], words.get(hit.id)) for hit in hits
    ]
    assert index.search("alpha beta", 2, mode="hybrid").hits == hits.hits[:2]


def test_hybrid_search_finds_what_only_one_of_both_finds(filled: dict[str, Index]) -> None:
    index = filled["codes"]
    hits = index.search("777", 200, mode="hybrid")
    assert hits[0].id == "0777" or "0777" in [hit.id for hit in hits]
    only_words = [hit for hit in hits if hit.vector_score is None]
    only_vector = [hit for hit in hits if hit.text_score is None]
    assert len(only_words) + len(only_vector) >= len(hits) - 1
    assert len(hits) == 200


# What a search says of itself, and what it refuses.


def test_words_are_not_searched_for_with_a_vector(filled: dict[str, Index]) -> None:
    vector = random_vectors(1)[0]
    for mode in ("text", "hybrid"):
        with pytest.raises(ConfigError, match="the query is a vector"):
            filled["codes"].search(vector, mode=cast(Any, mode))


def test_hits_are_a_sequence_with_slices(filled: dict[str, Index]) -> None:
    hits = filled["codes"].search("x", 5)
    assert (hits[0], hits[-1], hits[1:3]) == (hits.hits[0], hits.hits[4], hits.hits[1:3])
    assert list(hits) == list(hits.hits)


def test_a_search_says_how_it_was_done(filled: dict[str, Index]) -> None:
    index = filled["codes"]

    def how(hits: Hits) -> tuple[Any, ...]:
        told = hits.how
        return (
            told.mode,
            told.dim,
            told.scan_width,
            told.shortlist,
            told.vectors,
            told.approximate,
            told.kernel,
        )

    assert how(index.search("x")) == ("vector", 64, 16, 300, ROWS, False, kernel_name())
    assert how(index.search("x", 40, dim=32)) == ("vector", 32, 16, 400, ROWS, False, kernel_name())
    assert how(index.search("x", shortlist=50, where={"part": 3})) == (
        "vector",
        64,
        16,
        50,
        100,
        False,
        kernel_name(),
    )
    assert how(index.search("x", 80, shortlist=50)) == (
        "vector",
        64,
        16,
        80,
        ROWS,
        False,
        kernel_name(),
    )
    assert how(index.search("x", exact=True, dim=16)) == (
        "vector",
        16,
        None,
        None,
        ROWS,
        False,
        "numpy",
    )
    assert how(index.search("x", mode="text")) == ("text", None, None, None, 0, False, None)
    assert how(index.search("x", mode="hybrid")) == (
        "hybrid",
        64,
        16,
        300,
        ROWS,
        False,
        kernel_name(),
    )


def test_the_task_reaches_the_model(tmp_path: Path) -> None:
    class Tasks(WordEmbedder):
        def embed_query(self, text: Any, *, task: str = "none", **settings_: Any) -> Any:
            return super().embed_query([f"{task} {one}" for one in text], **settings_)

    with Index.open(tmp_path / "a.egx", cast(Any, Tasks())) as index:
        index.add(["clustering word", "retrieval word"])
        assert index.search("word", task="retrieval")[0].text == "retrieval word"
        assert index.search(["word"], task="clustering")[0][0].text == "clustering word"
    with open_index(tmp_path / "a.egx") as index, pytest.raises(PromptError):
        index.search("word", task="no such task")


@pytest.mark.parametrize("k", [0, -1, 10_001, 2.5, True, None, "3"])
def test_a_k_that_is_no_count_is_refused(index: Index, k: Any) -> None:
    for call in (
        lambda: index.search("cat", k),
        lambda: index.search("cat", k, mode="text"),
        lambda: index.search([], k),
        lambda: index.search(np.ones(64, np.float32), k),
        lambda: index.search(np.ones((1, 64), np.float32), k),
    ):
        with pytest.raises(ConfigError, match="k="):
            call()


@pytest.mark.parametrize(
    ("settings_", "error", "says"),
    [
        ({"dim": 300}, DimensionError, "dim=300"),
        ({"dim": True}, DimensionError, "dim=True"),
        ({"dim": "16"}, DimensionError, "dim='16'"),
        ({"mode": "fuzzy"}, ConfigError, "mode='fuzzy'"),
        ({"mode": None}, ConfigError, "mode=None"),
        ({"shortlist": 0}, ConfigError, "shortlist=0"),
        ({"shortlist": 1.5}, ConfigError, "shortlist=1.5"),
        ({"shortlist": True}, ConfigError, "shortlist=True"),
        ({"exact": True, "shortlist": 5}, ConfigError, "exact=True"),
        ({"where": "lang = 'en'"}, ConfigError, "where"),
        ({"where": {"$where": "1"}}, ConfigError, r"\$where"),
        ({"where": [1]}, ConfigError, "where"),
        ({"where": {"n": {"$like": "x"}}}, ConfigError, r"\$like"),
        ({"where": {"n": float("nan")}}, ConfigError, "nan"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_embedded(
    index: Index, settings_: Any, error: Any, says: str
) -> None:
    index.add(TEXTS)
    cast(Any, index.embedder).embed_query = None
    with pytest.raises(error, match=says):
        index.search("cat", **settings_)


@pytest.mark.parametrize("query", ["", "  \n", None, 7, b"cat", ["cat"]])
def test_a_query_without_words_is_refused(index: Index, query: Any) -> None:
    for mode in ("vector", "text", "hybrid"):
        if query != ["cat"]:
            with pytest.raises(InputError, match="the query"):
                index.search(query, mode=cast(Any, mode))
    with pytest.raises(InputError, match="query 1: ") as caught:
        index.search(["cat", query])
    assert caught.value.position == 1


def test_a_query_too_long_for_the_model_is_refused(index: Index) -> None:
    index.add(TEXTS)
    with pytest.raises(TokenLimitError):
        index.search("word " * 100)


@pytest.mark.parametrize(
    "vector",
    [
        np.full(64, np.nan),
        np.full(64, np.inf),
        np.zeros(64),
        np.ones((1, 1, 64)),
        np.ones(64, dtype=int),
        np.ones(64, bool),
        np.ones(64, complex),
        np.array(1.0),
        np.r_[np.zeros(16), np.ones(48)],
        None,
        [[1.0], [1.0, 2.0]],
        np.full(64, 1e300),
        np.full(64, 1e-300),
        np.r_[1.0, np.full(63, np.nan)],
    ],
)
def test_a_query_vector_without_a_direction_is_refused(index: Index, vector: Any) -> None:
    index.add(TEXTS)
    for settings_ in ({}, {"dim": 16}, {"exact": True}):
        with pytest.raises(InputError), np.errstate(all="ignore"):
            index.search(vector, **cast(Any, settings_))


def test_query_vectors_of_other_widths_are_refused(index: Index) -> None:
    for width in (0, 1, 15, 63, 65, 768):
        with pytest.raises(DimensionError, match=f"dim={width}"):
            index.search(np.ones(width, np.float32))
    for vectors in (
        np.ones((1, 1, 64), np.float32),
        [[1.0] * 64, [1.0]],
        None,
        {},
        [[None] * 64],
    ):
        with pytest.raises(InputError):
            index.search(cast(Any, vectors))


def test_a_vector_narrower_than_the_scan_searches_exactly_or_not_at_all(tmp_path: Path) -> None:
    identity = ModelIdentity(fingerprint="0" * 64, name="a model", dims=DIMS, parts={})
    with Index.open(tmp_path / "a.egx", identity) as index:
        index.add_vectors(random_vectors(20), ids=[str(row) for row in range(20)])
        with index._session.writing("tune") as change:  # as `tune` may choose
            rewrite_heads(change, 32)
        query = random_vectors(1, seed=9)[0]
        order, _ = cosine_order(query, random_vectors(20), 16)
        with pytest.raises(InputError, match="16 channels, and this index scans 32"):
            index.search(query[:16], 1)
        assert index.search(query[:16], 1, exact=True)[0].id == str(order[0])
        hits = index.search(query, 1, dim=16)
        assert (hits[0].id, hits.how.dim, hits.how.scan_width) == (str(order[0]), 16, 32)
