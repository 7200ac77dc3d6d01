"""Bulk embedding in one process: its vectors against the embedder's, everything that can stop it,
and everything that an input can be.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="bulk embedding needs the bulk extra")
pq = pytest.importorskip("pyarrow.parquet", reason="bulk embedding needs the bulk extra")

import egemma_server.bulk.source  # noqa: E402
from egemma import (  # noqa: E402
    ConfigError,
    DimensionError,
    EgemmaError,
    Embedder,
    IndexFileError,
    IndexMismatchError,
    InputError,
    PromptError,
    RuntimeUnavailableError,
    TokenLimitError,
)
from egemma.embedder import WINDOW_TEXTS  # noqa: E402
from egemma_server.bulk import embed_parquet  # noqa: E402
from egemma_server.bulk.job import JOB_FILE, read_job  # noqa: E402
from egemma_server.bulk.shards import check_shard  # noqa: E402
from egemma_server.bulk.source import describe_file, place_of, read_rows  # noqa: E402
from tests.sdk.conftest import run_python  # noqa: E402
from tests.sdk.test_privacy import CALLS, sealed  # noqa: E402
from tests.tiny import CORPUS, MAX_TOKENS, PROMPTS, WIDTH, tiny_bundle  # noqa: E402

LINES = CORPUS.splitlines()
BOUND = 1e-6  # float32: other texts in a batch, other padding
TOO_LONG = "water " * MAX_TOKENS


def texts_of(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [
        " ".join(
            chance.choices(LINES, k=1) + chance.choices(LINES[0].split(), k=chance.randrange(9))
        )
        for _ in range(count)
    ]


def write(
    path: Path, rows: int | list[Any] = 100, *, seed: int = 0, row_group: int = 37, **columns: Any
) -> Path:
    texts = texts_of(rows, seed) if isinstance(rows, int) else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string()), **columns}), path, row_group_size=row_group
    )
    return path


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards(out)}


def read(out: Path) -> Any:
    return pa.concat_tables([pq.read_table(path) for path in shards(out)])


def flipped(body: bytes) -> bytes:
    """A shard with one bit of one vector changed."""
    column = pq.read_metadata(pa.BufferReader(body)).row_group(0).column(2)
    assert column.path_in_schema.startswith("vector.")
    position = column.data_page_offset + column.total_compressed_size - 50
    return body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]


def vectors(table: Any) -> np.ndarray:
    return np.stack([np.array(row, np.float32) for row in table.column("vector").to_pylist()])


@pytest.fixture(scope="module")
def embedder(onnx_bundle: Path) -> Any:
    with Embedder.open(onnx_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def run(onnx_bundle: Path, tmp_path: Path) -> Any:
    def embed(source: Any, out: str = "out", **settings: Any) -> Any:
        return embed_parquet(
            source,
            tmp_path / out,
            **{"bundle": onnx_bundle, "threads_per_worker": 1, "shard_rows": 64, **settings},
        )

    return embed


def test_vectors_are_those_of_embed_documents_in_the_order_of_the_rows(
    run: Any, tmp_path: Path, embedder: Embedder
) -> None:
    texts = texts_of(1300)
    write(tmp_path / "in" / "a.parquet", texts[:1200], row_group=500)
    write(tmp_path / "in" / "deep" / "b.parquet", texts[1200:])
    report = run(tmp_path / "in", shard_rows=2 * WINDOW_TEXTS)
    table = read(tmp_path / "out")
    assert table.column("text").to_pylist() == texts
    assert table.column("id").to_pylist() == [f"a.parquet:{row}" for row in range(1200)] + [
        f"deep/b.parquet:{row}" for row in range(100)
    ]
    # The same texts in the same runs: bit for bit. All at once, other texts share a run.
    streamed = [*embedder.stream_documents(texts[:1200]), *embedder.stream_documents(texts[1200:])]
    assert np.array_equal(vectors(table), np.concatenate([part.vectors for part in streamed]))
    together = embedder.embed_documents(texts)
    assert np.abs(vectors(table) - together.vectors).max() < BOUND
    assert table.column("num_tokens").to_pylist() == list(together.num_tokens)
    assert table.column("truncated").to_pylist() == [False] * 1300
    assert table.column("error").null_count == 1300
    assert table.schema.field("vector").type == pa.list_(pa.field("element", pa.float32()), WIDTH)
    assert (report.rows, report.tokens, report.shards, report.embedded, report.embedded_rows) == (
        1300,
        sum(together.num_tokens),
        3,
        3,
        1300,
    )


def test_titles_ids_and_kept_columns_go_along(run: Any, tmp_path: Path, embedder: Embedder) -> None:
    texts, titles = texts_of(100), [None, "Pumps", "", "Öl"] * 25
    source = write(
        tmp_path / "in.parquet",
        texts,
        name=pa.array(titles),
        key=pa.array(range(100)),
        lang=pa.array(["en", None] * 50).dictionary_encode(),
    )
    run(source, title_column="name", id_column="key", keep=["lang"], dim=8)
    table = read(tmp_path / "out")
    assert table.column_names == [
        "key",
        "name",
        "text",
        "lang",
        "vector",
        "num_tokens",
        "truncated",
        "error",
    ]
    assert table.column("key").to_pylist() == list(range(100))
    assert (table.column("name").to_pylist(), table.column("lang").to_pylist()) == (
        titles,
        ["en", None] * 50,
    )
    expected = embedder.embed_documents(texts, titles=titles, dim=8)
    assert np.abs(vectors(table) - expected.vectors).max() < BOUND
    run(source, "vectors-only", keep_text=False, title_column="name")
    assert read(tmp_path / "vectors-only").column_names == [
        "id",
        "vector",
        "num_tokens",
        "truncated",
        "error",
    ]


def test_queries_are_embedded_behind_the_prompt_of_their_task(
    run: Any, tmp_path: Path, embedder: Embedder
) -> None:
    texts = texts_of(60)
    run(write(tmp_path / "in.parquet", texts), role="query", task="clustering")
    assert (
        np.abs(
            vectors(read(tmp_path / "out")) - embedder.embed_query(texts, task="clustering").vectors
        ).max()
        < BOUND
    )
    job = read_job(tmp_path / "out")
    assert job is not None
    assert job.prompt == PROMPTS["Clustering"]


def test_each_file_says_which_model_made_it(run: Any, tmp_path: Path, embedder: Embedder) -> None:
    run(write(tmp_path / "in.parquet"))
    facts = json.loads(pq.read_schema(shards(tmp_path / "out")[1]).metadata[b"egemma"])
    assert (facts["fingerprint"], facts["dim"], facts["prompt"]) == (
        embedder.fingerprint,
        WIDTH,
        PROMPTS["document"],
    )
    assert (facts["source"], facts["first_row"], facts["result"]["rows"]) == ("in.parquet", 64, 36)


def test_a_long_text_is_cut_when_asked_and_the_row_says_so(
    run: Any, tmp_path: Path, embedder: Embedder
) -> None:
    texts = [*texts_of(5), TOO_LONG, "short"]
    report = run(write(tmp_path / "in.parquet", texts), overflow="truncate")
    table = read(tmp_path / "out")
    assert (report.truncated, table.column("truncated").to_pylist()) == (
        1,
        [False] * 5 + [True, False],
    )
    assert np.array_equal(
        vectors(table), embedder.embed_documents(texts, overflow="truncate").vectors
    )


BAD = {
    "null": (None, "null", InputError),
    "blank": (" \n", "blank", InputError),
    "too long": (TOO_LONG, "tokens", TokenLimitError),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_what_is_finished_stays(run: Any, tmp_path: Path, kind: str) -> None:
    bad, word, error = BAD[kind]
    texts = texts_of(200)
    texts[150], texts[180] = bad, bad
    source = write(tmp_path / "in.parquet", texts, row_group=60)
    with pytest.raises(
        error, match=rf"in\.parquet, row group 2, row 30 \(row 150 of the file\): .*{word}"
    ):
        run(source)
    assert [path.name for path in shards(tmp_path / "out")] == [
        "shard-000000.parquet",
        "shard-000001.parquet",
    ]


def test_bad_rows_may_stay_without_a_vector_and_say_why(
    run: Any, tmp_path: Path, embedder: Embedder
) -> None:
    texts: list[Any] = texts_of(200)
    good = [row for row in range(200) if row not in (3, 70, 190)]
    texts[3], texts[70], texts[190] = None, "\t", TOO_LONG
    source = write(tmp_path / "in.parquet", texts)
    report = run(source, on_error="null")
    table = read(tmp_path / "out")
    errors = table.column("error").to_pylist()
    assert (
        [row for row in range(200) if errors[row] is not None]
        == [3, 70, 190]
        == [row for row in range(200) if table.column("vector")[row].as_py() is None]
    )
    assert ("null" in errors[3], "blank" in errors[70], "tokens" in errors[190], report.errors) == (
        True,
        True,
        True,
        3,
    )
    assert table.column("text").to_pylist() == texts
    assert table.column("num_tokens").null_count == table.column("truncated").null_count == 3
    expected = embedder.embed_documents([texts[row] for row in good]).vectors
    assert (
        np.abs(vectors(table.filter(pa.compute.is_null(table.column("error")))) - expected).max()
        < BOUND
    )
    with pytest.raises(InputError, match=r"row 3 of the file.*null"):
        run(source)  # what was let pass is not forgotten
    assert run(source, on_error="null").embedded == 0


def test_a_run_that_failed_at_a_bad_row_goes_on_with_on_error_null(
    run: Any, tmp_path: Path
) -> None:
    texts = texts_of(200)
    texts[150] = " "
    source = write(tmp_path / "in.parquet", texts)
    with pytest.raises(InputError):
        run(source)
    report = run(source, on_error="null")
    assert (report.embedded, report.errors, report.rows) == (2, 1, 200)


def test_invalid_utf8_is_refused_or_left_out_with_a_reason(run: Any, tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", "schön".encode()], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "in.parquet")
    with pytest.raises(
        InputError, match=r"row 1 \(row 1 of the file\): the text is not valid UTF-8"
    ):
        run(tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", on_error="null")
    table = read(tmp_path / "out")
    assert table.column("text").to_pylist() == ["fine", None, "schön"]
    assert table.column("error").null_count == 2
    pq.write_table(
        pa.table({"text": pa.array(["a"] * 3), "other": broken}), tmp_path / "other.parquet"
    )
    with pytest.raises(InputError, match="'other' is damaged"):
        run(tmp_path / "other.parquet", "other", keep=["other"])


def test_a_null_id_is_refused(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", 100, key=pa.array([*range(80), None, *range(19)]))
    with pytest.raises(
        InputError, match=r"row group 2, row 6 \(row 80 of the file\): 'key' is null"
    ):
        run(source, id_column="key")


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_kind_of_string_column_is_read(
    run: Any, tmp_path: Path, embedder: Embedder, kind: Any
) -> None:
    texts = texts_of(80)
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet")
    table = read(tmp_path / "out")
    assert table.column("text").to_pylist() == texts
    assert np.abs(vectors(table) - embedder.embed_documents(texts).vectors).max() < BOUND


@pytest.mark.parametrize("row_group", [1, 7, 64, 10_000])
def test_row_groups_of_any_size_lose_and_repeat_no_row(
    run: Any, tmp_path: Path, row_group: int
) -> None:
    texts = [f"water pump {number}" for number in range(300)]
    report = run(write(tmp_path / "in.parquet", texts, row_group=row_group), shard_rows=33)
    assert read(tmp_path / "out").column("text").to_pylist() == texts
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path / "out")] == [33] * 9 + [3]
    assert (report.shards, report.rows) == (10, 300)


def test_any_range_of_rows_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egemma_server.bulk.source, "_READ_ROWS", 10)
    chance = random.Random(5)
    for number in range(20):
        name, row_group = f"{number}.parquet", chance.randrange(1, 70)
        write(tmp_path / name, [str(row) for row in range(200)], row_group=row_group)
        file = describe_file(tmp_path, name)
        for _ in range(20):
            start = chance.randrange(200)
            stop = chance.randrange(start + 1, 201)
            assert read_rows(tmp_path, file, start, stop, ["text"]).column("text").to_pylist() == [
                str(row) for row in range(start, stop)
            ]
            assert place_of(tmp_path, file, start) == (
                f"{name}, row group {start // row_group}, row {start % row_group} (row {start} of "
                "the file)"
            )


def test_files_without_rows_are_no_error(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [])
    assert (run(tmp_path / "in").rows, run(tmp_path / "in").shards) == (0, 0)
    write(tmp_path / "in" / "b.parquet", 10)
    assert run(tmp_path / "in", "more").shards == 1


def test_a_run_that_was_interrupted_goes_on_and_gives_the_same_files(
    run: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 300)

    def stop(done: int, total: int) -> None:
        assert total == 300
        if done == 192:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, progress=stop)
    kept = {path.name: path.stat().st_ino for path in shards(tmp_path / "out")}
    assert len(kept) == 2  # the third was embedded and not yet written
    seen: list[tuple[int, int]] = []
    report = run(source, progress=lambda done, total: seen.append((done, total)))
    assert (report.embedded, report.shards, report.rows) == (3, 5, 300)
    assert (seen[0], seen[-1]) == ((128, 300), (300, 300))
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    run(source, "in-one-go")
    assert contents(tmp_path / "out") == contents(tmp_path / "in-one-go")


KILLED = """
import os, random, signal, sys, threading, time
from egemma_server.bulk import embed_parquet
threading.Timer(float(sys.argv[4]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
embed_parquet(sys.argv[1], sys.argv[2], bundle=sys.argv[3], threads_per_worker=1, shard_rows=16)
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_files(
    run: Any, tmp_path: Path, onnx_bundle: Path
) -> None:
    source = write(tmp_path / "in.parquet", 2000)
    run(source, "in-one-go", shard_rows=16)
    chance, kills = random.Random(3), 0
    for _ in range(6):
        done = run_python(KILLED, source, tmp_path / "out", onnx_bundle, 0.5 + chance.random() / 2)
        kills += done.returncode == -signal.SIGKILL
        for path in shards(tmp_path / "out"):  # a file with that name is whole at any moment
            assert path.read_bytes() == (tmp_path / "in-one-go" / path.name).read_bytes()
    assert kills
    run(source, shard_rows=16)
    assert contents(tmp_path / "out") == contents(tmp_path / "in-one-go")
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: body[:-9],
        lambda body: body[: len(body) // 2],
        lambda body: b"x" * len(body),
        flipped,
    ],
    ids=["empty", "cut", "half", "other", "bit"],
)
def test_a_damaged_shard_is_made_again_and_the_report_says_so(
    run: Any, tmp_path: Path, damage: Any
) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    before = contents(tmp_path / "out")
    path = shards(tmp_path / "out")[1]
    path.write_bytes(damage(path.read_bytes()))
    report = run(source)
    assert (report.embedded, report.repaired) == (1, 1)
    assert contents(tmp_path / "out") == before
    assert "1 damaged files" in report.to_text()


def test_no_flipped_bit_passes_for_a_vector(run: Any, tmp_path: Path) -> None:
    run(write(tmp_path / "in.parquet", 40))
    job, path = read_job(tmp_path / "out"), shards(tmp_path / "out")[0]
    assert job is not None
    shard, body, table = job.shards()[0], path.read_bytes(), pq.read_table(path)
    chance, caught = random.Random(1), 0
    for _ in range(400):
        position = chance.randrange(len(body))
        path.write_bytes(
            body[:position]
            + bytes([body[position] ^ 1 << chance.randrange(8)])
            + body[position + 1 :]
        )
        try:
            result = check_shard(path, job, shard, read_data=True)
        except ConfigError:
            result = None
        caught += result is None
        # a flip that changes nothing that is read
        assert result is None or pq.read_table(path).equals(table)
    assert caught > 300


def test_another_model_is_refused(run: Any, tmp_path: Path, tiny_spm: Path) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    before = contents(tmp_path / "out")
    other = tiny_bundle(tmp_path / "other", tokenizer=tiny_spm, changes={"fingerprint": "f" * 64})
    with pytest.raises(IndexMismatchError, match=r"holds vectors of tiny .*another output folder"):
        run(source, bundle=other)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 8},
        {"role": "query"},
        {"overflow": "truncate"},
        {"shard_rows": 65},
        {"id_column": "key"},
        {"keep": ["key"]},
    ],
    ids=str,
)
def test_other_settings_are_refused_and_named(
    run: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    source = write(tmp_path / "in.parquet", key=pa.array(range(100)))
    run(source)
    with pytest.raises(ConfigError, match=rf"was begun with .*{next(iter(change))}="):
        run(source, **change)


def test_another_input_is_refused_and_named(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet")
    run(tmp_path / "in")
    write(tmp_path / "in" / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet is new"):
        run(tmp_path / "in")
    os.rename(tmp_path / "in" / "b.parquet", tmp_path / "b.parquet")
    write(tmp_path / "in" / "a.parquet", seed=1)
    with pytest.raises(ConfigError, match=r"a\.parquet changed"):
        run(tmp_path / "in")


def test_a_folder_with_something_else_is_refused(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        run(source)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    run(source, "mixed")
    write(tmp_path / "mixed" / "stray.parquet")
    with pytest.raises(ConfigError, match=r"stray\.parquet"):
        run(source, "mixed")


def test_a_shard_of_another_run_is_refused(run: Any, tmp_path: Path) -> None:
    run(write(tmp_path / "a.parquet"), "a")
    run(write(tmp_path / "b.parquet", seed=1), "b")
    shards(tmp_path / "b")[0].rename(shards(tmp_path / "a")[0])
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(tmp_path / "a.parquet", "a")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '{"format": "egemma-bulk", "format_version": 2}',
        "[" * 100_000,
        '{"format": "egemma-bulk", "format_version": 1}',
    ],
)
def test_a_damaged_job_file_is_refused(run: Any, tmp_path: Path, body: str) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    (tmp_path / "out" / JOB_FILE).write_text(body)
    with pytest.raises(IndexFileError, match=JOB_FILE):
        run(source)


def test_an_altered_job_file_is_refused(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    path = tmp_path / "out" / JOB_FILE
    path.write_text(path.read_text().replace('"role": "document"', '"role": "query"'))
    with pytest.raises(IndexFileError, match="damaged"):
        run(source)


def test_two_runs_do_not_share_a_folder(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    other = sqlite3.connect(tmp_path / "out" / ".lock", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match="another process"):
        run(source)
    other.close()
    run(source)


def test_output_and_input_are_apart(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "out" / "in.parquet")
    with pytest.raises(ConfigError, match="output folder"):
        run(tmp_path / "out" / "in.parquet")
    write(tmp_path / "in" / "a.parquet")
    with pytest.raises(ConfigError, match="its own output"):
        run(tmp_path / "in", "in/out")


def test_sources_that_are_none(run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("water")
    (tmp_path / "text.parquet").write_text("water")
    one = write(tmp_path / "one.parquet")
    for source, word in [
        (tmp_path / "absent", "no file"),
        (tmp_path / "empty", r"no \*\.parquet"),
        ([], "empty"),
        ([one, one], "twice"),
        (tmp_path / "text.parquet", "not readable Parquet"),
    ]:
        with pytest.raises(InputError, match=word):
            run(source)
    assert not (tmp_path / "out").exists()


def test_files_that_begin_with_a_dot_or_an_underscore_are_not_input(
    run: Any, tmp_path: Path
) -> None:
    for name in ("a.parquet", ".b.parquet", "_c.parquet", "_temporary/d.parquet"):
        write(tmp_path / "in" / name, 10)
    assert run(tmp_path / "in").rows == 10


def test_columns_that_are_missing_or_of_another_type_are_refused_before_the_work(
    run: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 10, year=pa.array(range(10)))
    for settings, word in [
        ({"text_column": "body"}, r"no columns 'body'.*'text', 'year'"),
        ({"text_column": "year"}, "int64, wanted is string"),
        ({"title_column": "year"}, "wanted is string"),
        ({"keep": ["absent"]}, "absent"),
        ({"id_column": "absent"}, "absent"),
    ]:
        with pytest.raises(ConfigError, match=word):
            run(source, **settings)
    write(tmp_path / "two" / "a.parquet", 10, year=pa.array(range(10)))
    write(tmp_path / "two" / "b.parquet", 10, year=pa.array(["x"] * 10))
    with pytest.raises(
        ConfigError, match=r"b\.parquet: column 'year' is string, but int64 in a\.parquet"
    ):
        run(tmp_path / "two", keep=["year"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"role": "passage"}, ConfigError),
        ({"role": "query", "title_column": "text"}, ConfigError),
        ({"task": "clustering"}, ConfigError),
        ({"role": "query", "task": "cooking"}, PromptError),
        ({"dim": 9}, DimensionError),
        ({"overflow": "chunk"}, ConfigError),
        ({"shard_rows": 0}, ConfigError),
        ({"shard_rows": True}, ConfigError),
        ({"keep": "text"}, ConfigError),
        ({"keep": ["text"]}, ConfigError),
        ({"keep": ["vector"]}, ConfigError),
        ({"keep": ["id"]}, ConfigError),
        ({"id_column": "text"}, ConfigError),
        ({"engine": "spark"}, ConfigError),
        ({"workers": 2}, ConfigError),
        ({"engine": "ray"}, ConfigError),
        ({"engine": "ray", "workers": 0}, ConfigError),
        ({"on_error": "skip"}, ConfigError),
        ({"threads_per_worker": 0}, ConfigError),
        ({"text_column": ""}, ConfigError),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    run: Any, tmp_path: Path, settings: dict[str, Any], error: type[EgemmaError]
) -> None:
    source = write(tmp_path / "in.parquet", 10, id=pa.array(range(10)))
    with pytest.raises(error):
        run(source, **settings)
    assert not (tmp_path / "out").exists()


def test_an_id_column_named_id_is_kept_when_named(run: Any, tmp_path: Path) -> None:
    run(write(tmp_path / "in.parquet", 10, id=pa.array(range(10))), id_column="id")
    assert read(tmp_path / "out").column("id").to_pylist() == list(range(10))


def test_titles_are_refused_where_the_model_has_no_place_for_them(
    run: Any, tmp_path: Path, tiny_spm: Path
) -> None:
    bundle = tiny_bundle(
        tmp_path / "plain",
        tokenizer=tiny_spm,
        changes={"prompts": {"query": "q: ", "document": "d: "}},
    )
    source = write(tmp_path / "in.parquet", 10, name=pa.array(["x"] * 10))
    with pytest.raises(ConfigError, match="no place for a title"):
        run(source, bundle=bundle, title_column="name")


FULL_DISK = """
import resource, signal, sys
from egemma import IndexFileError
from egemma_server.bulk import embed_parquet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # every longer write fails, as on a full disk
try:
    embed_parquet(sys.argv[1], sys.argv[2], bundle=sys.argv[3], threads_per_worker=1, shard_rows=64)
except IndexFileError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_leaves_no_half_file(
    run: Any, tmp_path: Path, onnx_bundle: Path
) -> None:
    source = write(tmp_path / "in.parquet")
    done = run_python(FULL_DISK, source, tmp_path / "out", onnx_bundle)
    assert "shard-000000.parquet cannot be written" in done.stdout, done.stderr
    assert shards(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert run(source).rows == 100


def test_the_engine_may_have_other_threads_without_another_result(run: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet")
    run(source)
    run(source, "two", threads_per_worker=2)
    assert np.abs(vectors(read(tmp_path / "out")) - vectors(read(tmp_path / "two"))).max() < BOUND


@pytest.mark.parametrize(
    ("missing", "extra"), [("pyarrow", r"egemma\[bulk\]"), ("ray", r"egemma\[ray\]")]
)
def test_a_missing_library_is_named(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, extra: str
) -> None:
    source = write(tmp_path / "in.parquet", 10)
    for module in ("source", "on_ray"):
        monkeypatch.setattr(
            f"egemma_server.bulk.{module}.find_spec",
            lambda name: None if name == missing else object(),
        )
    with pytest.raises(RuntimeUnavailableError, match=extra):
        run(source, engine="ray", workers=1)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in CALLS, reason="needs Linux's seccomp"
)
def test_the_local_engine_makes_no_socket(tmp_path: Path, onnx_bundle: Path) -> None:
    source = write(tmp_path / "in.parquet")
    (tmp_path / "home").mkdir()
    script = (
        f"from egemma_server.bulk import embed_parquet; print(embed_parquet({str(source)!r}, "
        f"{str(tmp_path / 'out')!r}, bundle=sys.argv[2]).rows)"
    )
    done = sealed(script, onnx_bundle, tmp_path / "home")
    assert (done.returncode, done.stdout.strip()) == (0, "100"), done.stderr


def test_importing_the_package_loads_neither_pyarrow_nor_ray() -> None:
    done = run_python(
        "import egemma_server.bulk, sys; print([name for name in ('pyarrow', 'ray', 'torch') if name in "
        "sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
