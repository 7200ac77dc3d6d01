"""The first pass finds what NumPy finds among the same int8 heads, ties included, and keeps up with
the file.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from egemma.identity import ModelIdentity
from egemma.index import Index, heads
from egemma.index.checksums import Damage, block_crc32, head_crc32
from egemma.index.codes import squares
from egemma.index.facts import BLOCK_ROWS, State, read_state
from egemma.index.heads import Heads
from egemma.index.scan import best_kernel, int8_products, kernel_name
from egemma.index.vectors import live_numbers
from egemma_core.errors import IndexFileError
from egemma_core.vectors import normalize


def state_of(generation: int, next_number: int, chunks: int) -> State:
    """What the facts of a file say to whoever keeps its heads."""
    return State(
        identity=identity(),
        scan_width=DIMS[-1],
        floats=False,
        generation=generation,
        numbering=0,
        next_number=next_number,
        chunks=chunks,
        model_path=None,
        tuned=None,
    )


def held(
    codes: NDArray[np.int8], dead: Any = (), threads: int = 1, kernel: str | None = None
) -> Heads:
    """Heads as they stand in memory after these codes were read from a file."""
    blocks = -(-len(codes) // BLOCK_ROWS)
    live = np.ones(blocks * BLOCK_ROWS, bool)
    live[len(codes) :] = False
    live[list(dead)] = False
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE blocks (number, changed, crc32, live)")
    connection.execute("CREATE TABLE heads (block, crc32, squares, codes)")
    for block in range(blocks):
        rows = slice(BLOCK_ROWS * block, BLOCK_ROWS * (block + 1))
        bits, lengths, values = (
            np.packbits(live[rows], bitorder="little").tobytes(),
            squares(codes[rows]).astype("<i4").tobytes(),
            codes[rows].tobytes(),
        )
        connection.execute(
            "INSERT INTO blocks VALUES (?, 1, ?, ?)", (block, block_crc32(block, bits), bits)
        )
        connection.execute(
            "INSERT INTO heads VALUES (?, ?, ?, ?)",
            (block, head_crc32(block, lengths, values), lengths, values),
        )
    made = Heads(codes.shape[1], threads, kernel or best_kernel())
    made.refresh(connection, state_of(1, len(codes), int(live.sum())))
    connection.close()
    return made


def numpy_scan(
    codes: NDArray[np.int8],
    dead: Any,
    query: NDArray[np.float32],
    count: int,
    allowed: NDArray[np.bool_] | None,
) -> set[int]:
    """The same from the definition: whole numbers, one division, and a full sort."""
    rounded = np.rint(query * (127 / np.abs(query).max())).astype(np.int64)
    wide = codes.astype(np.int64)
    lengths = np.sqrt((wide * wide).sum(axis=1).astype(np.float32))
    scores = (wide @ rounded).astype(np.float32) * np.divide(
        1, lengths, out=np.zeros_like(lengths), where=lengths > 0
    )
    here = np.ones(len(codes), bool) if allowed is None else allowed.copy()
    here[list(dead)] = False
    numbers = np.flatnonzero(here)
    if len(numbers) <= count:
        return set(numbers.tolist())
    edge = np.sort(scores[numbers])[-count]
    return set(numbers[scores[numbers] >= edge].tolist())


@pytest.fixture(params=["numkong", "numpy"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param != "numpy":
        pytest.importorskip("numkong")
    assert kernel_name(request.param).split()[0] == request.param
    return str(request.param)


CASES: dict[str, Any] = {
    "random": lambda random, rows: random.integers(-127, 128, (rows, 16)),
    "few values, many ties": lambda random, rows: random.integers(-1, 2, (rows, 16)),
    "all equal": lambda random, rows: np.full((rows, 16), 127),
    "all opposite": lambda random, rows: (
        np.full((rows, 16), -127) * np.where(np.arange(rows) % 2, 1, -1)[:, None]
    ),
    "all zero": lambda random, rows: np.zeros((rows, 16)),
    "best rows last": lambda random, rows: (
        np.sort(random.integers(-127, 128, (rows, 1)), axis=0) * np.ones((1, 16))
    ),
    "best rows together": lambda random, rows: np.where(
        (np.arange(rows) < rows // 4)[:, None], 127, random.integers(-127, 128, (rows, 16))
    ),
}


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 1500])
@pytest.mark.parametrize("case", CASES)
def test_a_scan_finds_what_a_full_sort_finds(kernel: str, case: str, rows: int) -> None:
    random = np.random.default_rng(rows)
    codes = CASES[case](random, rows).astype(np.int8)
    dead = random.choice(rows, size=rows // 5, replace=False)
    some = held(codes, dead, kernel=kernel)
    queries = random.normal(size=(3, 16)).astype(np.float32)
    masks = [
        None,
        np.ones(rows, bool),
        np.zeros(rows, bool),
        random.random(rows) < 0.05,
        random.random(rows) < 0.9,
    ]
    for count in (1, 3, 100, rows, 10 * rows):
        for allowed in masks:
            found = some.scan(queries, count, allowed)
            assert len(found) == 3
            for query, numbers in zip(queries, found, strict=True):
                assert len(set(numbers.tolist())) == len(numbers)
                assert set(numbers.tolist()) == numpy_scan(codes, dead, query, count, allowed)


@given(st.data())
@settings(max_examples=150)
def test_a_scan_of_anything_finds_what_a_full_sort_finds(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 20))
    rows = data.draw(st.integers(1, 600))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([1, 2, 127]))
    codes = random.integers(-size, size + 1, (rows, width)).astype(np.int8)
    dead = np.flatnonzero(random.random(rows) < data.draw(st.sampled_from([0, 0.3, 1])))
    allowed = data.draw(st.sampled_from([None, 0.0, 0.02, 0.2, 1.0]))
    mask = None if allowed is None else random.random(rows) < allowed
    query = random.normal(size=(1, width)).astype(np.float32)
    count = data.draw(st.integers(1, 700))
    assert set(held(codes, dead).scan(query, count, mask)[0].tolist()) == numpy_scan(
        codes, dead, query[0], count, mask
    )


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 63, 128, 129, 768, 1040, 1041, 16_384])
def test_both_kernels_give_the_same_integers_as_numpy_in_64_bits(width: int) -> None:
    random = np.random.default_rng(width)
    for rows in (0, 1, 3, 65):
        for count in (1, 4, 5):
            codes = random.choice(np.array([-127, -126, 1, 127], np.int8), (rows, width))
            queries = random.choice(np.array([-127, 126, 127], np.int8), (count, width))
            if rows:
                codes[0], queries[0] = 127, 127  # the largest sum there is
            expected = codes.astype(np.int64) @ queries.T.astype(np.int64)
            for kernel in {"numpy", best_kernel()}:
                found = int8_products(queries, kernel)(codes)
                assert found.dtype == np.int32
                np.testing.assert_array_equal(found, expected)


def test_many_queries_and_threads_give_what_each_query_gives_alone(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    codes = random.integers(-127, 128, (3000, 16)).astype(np.int8)
    queries = random.normal(size=(11, 16)).astype(np.float32)
    one = held(codes, kernel=kernel)
    alone = [set(one.scan(query[None], 50)[0].tolist()) for query in queries]
    monkeypatch.setattr(heads, "_SPLIT_BYTES", 5000)  # several threads for a table this small
    monkeypatch.setattr(heads, "_SCAN_ROWS", 700)  # in several pieces
    monkeypatch.setattr(heads, "_SCORES_BYTES", 30_000)  # and two or three queries at a time
    assert [
        set(numbers.tolist()) for numbers in held(codes, threads=4, kernel=kernel).scan(queries, 50)
    ] == alone


def test_bits_of_a_block_stand_for_numbers_from_the_least_significant_on() -> None:
    live = bytearray(32)
    live[0], live[31] = 0b00000101, 0b10000000
    assert live_numbers(0, bytes(live)).tolist() == [0, 2, 255]
    assert live_numbers(3, bytes(live)).tolist() == [768, 770, 1023]


# Keeping up with the file.

DIMS = (8, 4)


def identity() -> ModelIdentity:
    return ModelIdentity(fingerprint="0" * 64, name="a model", dims=DIMS, parts={})


def refreshed(connection: sqlite3.Connection, into: Heads) -> Heads:
    into.refresh(connection, read_state(connection))
    return into


def same(one: Heads, other: Heads) -> None:
    assert (one.count, one.generation) == (other.count, other.generation)
    np.testing.assert_array_equal(one.live[: one.count], other.live[: other.count])
    np.testing.assert_array_equal(one.dead, other.dead)
    np.testing.assert_array_equal(one.codes[: one.count], other.codes[: other.count])
    np.testing.assert_array_equal(one.inverse[: one.count], other.inverse[: other.count])


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_were_kept_up_equal_heads_that_are_read_anew(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    with Index.open(tmp_path / "a.egx", identity()) as writer:
        reader = sqlite3.connect(tmp_path / "a.egx")  # as another process sees it
        kept = Heads(DIMS[-1], 1)
        stored: list[str] = []
        for round_ in range(25):
            if stored and random.random() < 0.4:
                gone = [
                    str(id_)
                    for id_ in random.choice(
                        stored, size=int(random.integers(1, len(stored) + 1)), replace=False
                    )
                ]
                writer.remove(gone)
                stored = [id_ for id_ in stored if id_ not in set(gone)]
            else:
                count = int(random.choice([1, 2, 100, 255, 256, 257, 600]))
                # some are replaced
                new = [f"{round_}-{row}" for row in range(count)] + stored[
                    : int(random.integers(0, 3))
                ]
                writer.add_vectors(
                    normalize(random.normal(size=(len(new), DIMS[0])).astype(np.float32)), ids=new
                )
                stored = list(dict.fromkeys(stored + new))
            if random.random() < 0.7:  # else several writes until the next look
                same(refreshed(reader, kept), refreshed(reader, Heads(DIMS[-1], 1)))
                assert kept.live[: kept.count].sum() == len(stored)
        reader.close()


def test_only_blocks_that_changed_are_read_again(tmp_path: Path) -> None:
    with Index.open(tmp_path / "a.egx", identity()) as index:
        index.add_vectors(
            normalize(np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)),
            ids=[str(row) for row in range(2000)],
        )
        reader = sqlite3.connect(tmp_path / "a.egx")
        taken: list[int] = []

        class Watched(Heads):
            def _take(self, block: int, *parts: Any) -> None:
                taken.append(block)
                super()._take(block, *parts)

        kept = refreshed(reader, Watched(4, 1))
        assert sorted(taken) == list(range(8))
        taken.clear()
        index.remove(["300", "1999"])
        refreshed(reader, kept)
        assert sorted(taken) == [1, 7]
        taken.clear()
        refreshed(reader, kept)
        assert taken == []
        reader.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE blocks SET live = zeroblob(32) WHERE number = 1",
        "UPDATE blocks SET live = substr(live, 1, 31) WHERE number = 1",
        "UPDATE blocks SET crc32 = crc32 + 1 WHERE number = 1",
        "UPDATE blocks SET number = 9 WHERE number = 1",
        "UPDATE blocks SET number = -1 WHERE number = 1",
        "UPDATE blocks SET changed = -7 WHERE number = 1",
        "UPDATE blocks SET (live, crc32) = (SELECT live, crc32 FROM blocks WHERE number = 0) WHERE "
        "number = 2",
        "DELETE FROM blocks WHERE number = 1",
        "UPDATE heads SET codes = zeroblob(1024) WHERE block = 1",
        "UPDATE heads SET squares = zeroblob(1024) WHERE block = 1",
        "UPDATE heads SET codes = substr(codes, 5) WHERE block = 1",
        "UPDATE heads SET codes = 'text' WHERE block = 1",
        "UPDATE heads SET crc32 = 'x' WHERE block = 1",
        "DELETE FROM heads WHERE block = 1",
        "UPDATE heads SET (codes, squares, crc32) = (SELECT codes, squares, crc32 FROM heads WHERE "
        "block = 0) WHERE block = 1",
    ],
)
def test_damaged_blocks_are_found_when_they_are_read_and_again_at_the_next_call(
    tmp_path: Path, damage: str
) -> None:
    with Index.open(tmp_path / "a.egx", identity()) as index:
        index.add_vectors(
            normalize(np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)),
            ids=[str(row) for row in range(600)],
        )
        index.remove(["5"])
    connection = sqlite3.connect(tmp_path / "a.egx")
    connection.execute(damage)
    made = Heads(4, 1)
    for _ in range(2):
        with pytest.raises(Damage):
            refreshed(connection, made)
    connection.close()


LIVE, CODES, SQUARES = b"\xff" * 32, bytes(4 * 256), bytes(4 * 256)


@pytest.mark.parametrize(
    ("block", "live", "squares_", "codes"),
    [
        (0, LIVE[:31], SQUARES, CODES),
        (0, LIVE + b"\0", SQUARES, CODES),
        (0, LIVE, SQUARES, CODES[:-1]),
        (0, LIVE, SQUARES[:-4], CODES),
        (0, LIVE, SQUARES + b"\0", CODES),
        (0, LIVE, SQUARES[:-4], CODES[:-4]),
        (0, LIVE, b"", b""),
        (1, LIVE, SQUARES, CODES),
        (2**40, LIVE, SQUARES, CODES),
        (0, LIVE, SQUARES * 2, CODES * 2),
        (0, LIVE, None, CODES),
        (0, LIVE, SQUARES, "text"),
    ],
)
def test_a_block_of_impossible_lengths_is_damage_though_its_checksums_fit(
    block: int, live: bytes, squares_: Any, codes: Any
) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE blocks (number, changed, crc32, live)")
    connection.execute("CREATE TABLE heads (block, crc32, squares, codes)")
    connection.execute(
        "INSERT INTO blocks VALUES (?, 1, ?, ?)", (block, block_crc32(block, live), live)
    )
    sound = isinstance(squares_, bytes) and isinstance(codes, bytes)
    connection.execute(
        "INSERT INTO heads VALUES (?, ?, ?, ?)",
        (block, head_crc32(block, squares_, codes) if sound else 0, squares_, codes),
    )
    with pytest.raises(Damage):
        Heads(4, 1).refresh(connection, state_of(1, 256, 256))
    connection.close()


def test_a_block_that_is_missing_is_not_made_up_for_by_what_stood_there_before() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE blocks (number, changed, crc32, live)")
    connection.execute("CREATE TABLE heads (block, crc32, squares, codes)")
    for block in (0, 1):
        connection.execute(
            "INSERT INTO blocks VALUES (?, 1, ?, ?)", (block, block_crc32(block, LIVE), LIVE)
        )
        connection.execute(
            "INSERT INTO heads VALUES (?, ?, ?, ?)",
            (block, head_crc32(block, SQUARES, CODES), SQUARES, CODES),
        )
    kept = Heads(4, 1)
    kept.refresh(connection, state_of(1, 512, 512))
    connection.execute("UPDATE blocks SET changed = 2")
    connection.execute("DELETE FROM blocks WHERE number = 1")
    with pytest.raises(Damage):  # compacted to one chunk fewer, as the facts say
        kept.refresh(connection, state_of(2, 511, 511))
    connection.close()


@pytest.mark.parametrize("change", ["codes", "squares", "shorter"])
def test_damage_in_the_last_block_is_not_written_anew_with_a_checksum_that_fits(
    tmp_path: Path, change: str
) -> None:
    vectors = normalize(np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32))
    with Index.open(tmp_path / "a.egx", identity()) as index:
        index.add_vectors(vectors, ids=[str(row) for row in range(20)])
        connection = sqlite3.connect(tmp_path / "a.egx")
        lengths, codes = connection.execute("SELECT squares, codes FROM heads").fetchone()
        if change == "shorter":
            connection.execute(
                "UPDATE heads SET codes = ?, squares = ?, crc32 = ?",
                (codes[4:], lengths[4:], head_crc32(0, lengths[4:], codes[4:])),
            )
        else:
            connection.execute(
                f"UPDATE heads SET {change} = ?",
                (bytes(len(codes if change == "codes" else lengths)),),
            )
        connection.commit()
        connection.close()
        with pytest.raises(IndexFileError, match="block 0"):
            index.add_vectors(vectors[:1], ids=["more"])


def test_a_refresh_that_failed_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    with Index.open(tmp_path / "a.egx", identity()) as index:
        index.add_vectors(
            normalize(np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)),
            ids=[str(row) for row in range(600)],
        )
        reader = sqlite3.connect(tmp_path / "a.egx", isolation_level=None)
        kept = refreshed(reader, Heads(4, 1))
        index.remove(["1", "599"])
        reader.execute("BEGIN")
        good = reader.execute("SELECT crc32 FROM blocks WHERE number = 2").fetchone()
        reader.execute("UPDATE blocks SET crc32 = 0 WHERE number = 2")
        with pytest.raises(Damage):
            refreshed(reader, kept)
        reader.execute("UPDATE blocks SET crc32 = ? WHERE number = 2", good)
        same(refreshed(reader, kept), refreshed(reader, Heads(4, 1)))
        reader.execute("ROLLBACK")
        reader.close()
