"""Another model for an index: the old one answers until one moment, the new one from then on, and a
kill costs at most a batch.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from egemma import Embedder, upkeep
from egemma.identity import ModelIdentity
from egemma.index import Index, describe_index
from egemma.index.facts import NEXT_TABLES, TABLES
from egemma.index.migration import MigrationReport, abandon, migrate
from egemma.upkeep import check, compact
from egemma_core.errors import (
    ConfigError,
    IndexFileError,
    IndexMismatchError,
    InputError,
    TokenLimitError,
)
from tests.sdk.conftest import ROOT
from tests.sdk.fakes import DIMS, TEXTS, WordEmbedder, open_index

OLD, NEW = "words-1", "words-2"
WORDS = [f"w{number}" for number in range(60)]
QUERIES = ["w1 w2 w3", "w7", "w11 w30 w31 w32", "harbour w5"]


def texts(count: int, seed: int = 0) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {f"d{number}": " ".join(rng.choice(WORDS, size=6)) for number in range(count)}


def answers(index: Index) -> list[list[tuple[str, float, str, bool]]]:
    return [
        [(hit.id, hit.score, hit.text, hit.truncated) for hit in index.search(query, 9, mode=mode)]
        for query in QUERIES
        for mode in ("vector", "hybrid", "text")
    ]


def made_by(
    path: Path, model: WordEmbedder, documents: dict[str, str], **settings: Any
) -> list[list[tuple[str, float, str, bool]]]:
    """What an index says that never knew another model: the yardstick."""
    with Index.open(path, cast(Any, model), **settings) as index:
        index.add(list(documents.values()), ids=list(documents))
        return answers(index)


def to(path: Path | Index, model: Any, **settings: Any) -> MigrationReport:
    return (
        path.migrate(model, **settings)
        if isinstance(path, Index)
        else migrate(path, model, **settings)
    )


class StopError(Exception):
    """Raised in the middle, where a kill would be."""


class Stopping(WordEmbedder):
    """Raises at the call after `after` batches; `before_each` is called before each batch."""

    def __init__(
        self, name: str = NEW, *, after: int | None = None, before_each: Any = None, **settings: Any
    ) -> None:
        super().__init__(name, **settings)
        self.after, self.before_each = after, before_each

    def embed_documents(self, texts: Any, **settings: Any) -> Any:
        if self.calls == self.after:
            raise StopError
        if self.before_each is not None:
            self.before_each(self.calls)
        return super().embed_documents(texts, **settings)


@pytest.mark.parametrize("dims", [DIMS, (96, 48, 24), (40,)], ids=str)
@pytest.mark.parametrize("floats", [False, True])
def test_afterwards_the_index_answers_as_one_that_never_knew_another_model(
    tmp_path: Path, dims: tuple[int, ...], floats: bool
) -> None:
    documents = texts(600)
    new = WordEmbedder(NEW, dims=dims)
    wanted = made_by(tmp_path / "fresh.egx", new, documents, keep_floats=floats)
    with open_index(tmp_path / "a.egx", OLD, keep_floats=floats) as index:
        # numbers 0 to 599 are dead
        index.add(
            [f"gone {text}" for text in documents.values()],
            ids=[f"gone {id_}" for id_ in documents],
        )
        index.add(list(documents.values()), ids=list(documents))
        index.remove([f"gone {id_}" for id_ in documents])
        old = answers(index)
        seen: list[tuple[int, int]] = []
        report = index.migrate(
            cast(Any, new), batch=50, progress=lambda done, total: seen.append((done, total))
        )
        assert report == MigrationReport(
            chunks=600,
            embedded=600,
            resumed=0,
            truncated=0,
            from_model=ModelIdentity.of(cast(Any, WordEmbedder(OLD).manifest)).name,
            to_model=ModelIdentity.of(cast(Any, new).manifest).name,
        )
        assert seen == [(done, 600) for done in range(50, 601, 50)]
        assert answers(index) == wanted != old
        assert index.identity.fingerprint == new.fingerprint
        assert index.identity.dims == dims
        assert upkeep.check(index.path) == []
        index.add(["w1 and something new"], ids=["later"])
        assert index.search("w1 and something new").hits[0].id == "later"
    with Index.open(tmp_path / "a.egx", cast(Any, new)) as index:
        assert len(index) == 601
        assert upkeep.check(index.path) == []
    facts = describe_index(tmp_path / "a.egx")
    assert (facts.dims, facts.scan_width, facts.floats, facts.migrating_to) == (
        dims,
        dims[-1],
        floats,
        None,
    )


def test_the_old_model_is_not_needed_and_is_refused_afterwards_by_whoever_has_the_index_open(
    tmp_path: Path,
) -> None:
    documents = texts(40)
    with open_index(tmp_path / "a.egx", OLD) as reader:
        reader.add(list(documents.values()), ids=list(documents))
        reader.search("w1")
        migrate(tmp_path / "a.egx", cast(Any, WordEmbedder(NEW)))
        for doing in (
            lambda: reader.search("w1"),
            lambda: reader.search(WordEmbedder(OLD).vector("w1")),
            lambda: reader.add(["x"]),
            lambda: reader.remove(["d1"]),
            lambda: reader.add_vectors(WordEmbedder(OLD).vector("x")[None], ids=["x"]),
        ):
            with pytest.raises(
                IndexMismatchError, match=f"holds vectors of {NEW}.*this is {OLD}.*weights"
            ):
                doing()
    with pytest.raises(IndexMismatchError), open_index(tmp_path / "a.egx", OLD):
        pass
    with Index.open(tmp_path / "a.egx", cast(Any, WordEmbedder(NEW))) as index:
        assert answers(index) == made_by(tmp_path / "b.egx", WordEmbedder(NEW), documents)


def test_an_index_that_was_opened_without_a_model_can_be_migrated_and_then_searched(
    tmp_path: Path,
) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
    with Index.open(tmp_path / "a.egx") as index:
        index.migrate(cast(Any, WordEmbedder(NEW)))
        assert index.search(TEXTS[1]).hits[0].text == TEXTS[1]


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_interrupted_migration_goes_on_and_embeds_nothing_twice(
    tmp_path: Path, after: int
) -> None:
    documents = texts(300)
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(list(documents.values()), ids=list(documents))
        before = answers(index)
        stopping = Stopping(after=after)
        with pytest.raises(StopError):
            index.migrate(cast(Any, stopping), batch=50)
        assert answers(index) == before
        assert upkeep.check(index.path) == []
        assert index.identity.name.startswith(OLD)
        assert index.facts().migrating_to is not None
        assert NEW in index.facts().migrating_to
        new = WordEmbedder(NEW)
        report = index.migrate(cast(Any, new), batch=50)
        assert (report.resumed, report.embedded) == (50 * after, 300 - 50 * after)
        assert sorted(stopping.embedded + new.embedded) == sorted(documents.values())
        assert answers(index) == made_by(tmp_path / "b.egx", WordEmbedder(NEW), documents)
        assert upkeep.check(index.path) == []


def test_what_others_add_change_and_remove_meanwhile_is_migrated_as_it_is_then(
    tmp_path: Path,
) -> None:
    documents = texts(200)
    with open_index(tmp_path / "a.egx", OLD) as index, open_index(tmp_path / "a.egx", OLD) as other:
        index.add(list(documents.values()), ids=list(documents))

        def meddle(call: int) -> None:
            # among what is embedded already, what is being embedded, and what comes later
            if call == 1:
                gone = ["d3", "d60", "d70", "d150", "d199"]
                assert other.remove(gone) == 5
                for id_ in gone:
                    del documents[id_]
            if call == 2:
                documents["d5"] = "w1 w2 w3 changed"
                documents["d198"] = "w7 changed"
                other.add([documents["d5"], documents["d198"]], ids=["d5", "d198"])
            if call == 4:  # the last batch of what was there: these come in the round after it
                documents.update({"new1": "harbour w5", "new2": "w30 w31"})
                other.add([documents["new1"], documents["new2"]], ids=["new1", "new2"])

        report = index.migrate(cast(Any, Stopping(before_each=meddle)), batch=50)
        assert report.chunks == len(documents) == index.facts().chunks
        assert upkeep.check(index.path) == []
        ours = {
            query: {(hit.id, hit.score) for hit in index.search(query, 500)} for query in QUERIES
        }
        with Index.open(tmp_path / "b.egx", cast(Any, WordEmbedder(NEW))) as fresh:
            fresh.add(list(documents.values()), ids=list(documents))
            assert ours == {
                query: {(hit.id, hit.score) for hit in fresh.search(query, 500)}
                for query in QUERIES
            }


def test_an_empty_index_and_one_whose_documents_all_left_can_be_migrated(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        assert index.migrate(cast(Any, WordEmbedder(NEW))).chunks == 0
        index.add(TEXTS)
        index.remove(index.ids())
        assert index.migrate(cast(Any, WordEmbedder(OLD))).chunks == 0
        assert upkeep.check(index.path) == []
        assert index.search("cat").hits == ()


def test_the_same_model_in_another_folder_is_the_same_model(
    tmp_path: Path, onnx_bundle: Path
) -> None:
    shutil.copytree(onnx_bundle, tmp_path / "moved")
    with Embedder.open(onnx_bundle) as model, Index.open(tmp_path / "a.egx", model) as index:
        index.add(["a cat"])
        before = index.facts()
    with Embedder.open(tmp_path / "moved") as moved, Index.open(tmp_path / "a.egx", moved) as index:
        report = index.migrate(moved)
        assert (report.embedded, report.from_model) == (0, report.to_model)
        # the WAL of the first one is merged
        assert replace(index.facts(), file_bytes=0) == replace(before, file_bytes=0)


def test_a_second_call_after_the_switch_does_nothing(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
    migrate(tmp_path / "a.egx", cast(Any, WordEmbedder(NEW)))
    again = WordEmbedder(NEW)
    assert migrate(tmp_path / "a.egx", cast(Any, again)).embedded == 0
    assert again.embedded == []


def test_a_third_model_is_refused_half_way_until_the_migration_is_given_up(tmp_path: Path) -> None:
    documents = texts(100)
    path = tmp_path / "a.egx"
    with open_index(path, OLD) as index:
        index.add(list(documents.values()), ids=list(documents))
        before = answers(index)
        with pytest.raises(StopError):
            index.migrate(cast(Any, Stopping(after=1)), batch=20)
        for model in ("words-3", OLD):
            with pytest.raises(
                IndexFileError, match=f"half way through a migration to {NEW}.*abandon"
            ):
                index.migrate(cast(Any, WordEmbedder(model)))
        with pytest.raises(IndexFileError, match="half way through a migration"):
            upkeep.compact(index.path)
        assert abandon(path)
        assert not abandon(path)
        assert answers(index) == before
        assert upkeep.check(index.path) == []
        assert index.facts().migrating_to is None
        upkeep.compact(index.path)
        index.migrate(cast(Any, WordEmbedder("words-3")))
        assert answers(index) == made_by(tmp_path / "b.egx", WordEmbedder("words-3"), documents)


def test_a_migration_that_another_program_gave_up_or_completed_notices(tmp_path: Path) -> None:
    documents = texts(100)
    path = tmp_path / "a.egx"
    with open_index(path, OLD) as index:
        index.add(list(documents.values()), ids=list(documents))
        with pytest.raises(IndexFileError, match="given up by another program"):
            index.migrate(
                cast(Any, Stopping(before_each=lambda call: call == 2 and abandon(path))), batch=20
            )
        fast = WordEmbedder(NEW)
        report = index.migrate(
            cast(
                Any, Stopping(before_each=lambda call: call == 2 and migrate(path, cast(Any, fast)))
            ),
            batch=20,
        )
        assert report.embedded == 40
        assert len(fast.embedded) == 60
        assert answers(index) == made_by(tmp_path / "b.egx", WordEmbedder(NEW), documents)
        assert upkeep.check(index.path) == []


def test_a_text_too_long_for_the_new_model_is_named_before_any_work(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add([*TEXTS, "long " * 30], ids=["a", "b", "c", "d", "the long one"])
        short = WordEmbedder(NEW, max_tokens=20)
        with pytest.raises(
            TokenLimitError,
            match=r"document 'the long one', chunk 0 has 34 tokens.*reads 20.*truncate",
        ):
            index.migrate(cast(Any, short))
        assert short.embedded == []
        assert index.facts().migrating_to is None
        assert index.migrate(cast(Any, short), overflow="truncate").truncated == 1
        assert upkeep.check(index.path) == []
        assert [document.truncated for document in index.get(["a", "the long one"])] == [
            False,
            True,
        ]
        assert index.get(["the long one"])[0].num_tokens == 34
        with pytest.raises(ConfigError, match="overflow='chunk'"):
            index.migrate(cast(Any, WordEmbedder(OLD)), overflow=cast(Any, "chunk"))


def test_what_the_new_tokenizer_counts_replaces_what_the_old_one_counted(tmp_path: Path) -> None:
    class Letters(WordEmbedder):
        def count_tokens(self, text: str) -> int:
            return len(text) // 4

    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS, ids=list("abcd"))
        counted = [document.num_tokens for document in index.get(list("abcd"))]
        letters = Letters(NEW)
        index.migrate(cast(Any, letters))
        recounted = [document.num_tokens for document in index.get(list("abcd"))]
        assert (
            recounted
            == [letters.count_tokens(letters.document_prompt(None) + text) for text in TEXTS]
            != counted
        )
        assert upkeep.check(index.path) == []


def test_a_vector_without_a_text_cannot_be_migrated_and_its_document_is_named(
    tmp_path: Path,
) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
        index.add_vectors(WordEmbedder(OLD).vector("x")[None], ids=["bare"])
        with pytest.raises(InputError, match="document 'bare', chunk 0 has no text"):
            index.migrate(cast(Any, WordEmbedder(NEW)))
        index.remove(["bare"])
        index.migrate(cast(Any, WordEmbedder(NEW)))


def test_a_model_that_gives_nonsense_ends_the_migration_and_changes_nothing(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
        before = answers(index)
        broken = WordEmbedder(NEW)
        broken.broken = np.full((4, DIMS[0]), np.nan, np.float32)
        with pytest.raises(InputError, match="length nan"):
            index.migrate(cast(Any, broken))
        broken.broken = np.eye(DIMS[0], dtype=np.float32)[:3]
        with pytest.raises(InputError, match="3 vectors for 4 texts"):
            index.migrate(cast(Any, broken))
        assert answers(index) == before
        assert upkeep.check(index.path) == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE next_vectors SET rest = zeroblob(length(rest)) WHERE number = 7",
        "UPDATE next_heads SET codes = zeroblob(length(codes))",
        "DELETE FROM next_vectors WHERE number = 7",
        "DELETE FROM next_tokens WHERE number = 7",
    ],
)
def test_damage_to_the_new_vectors_is_found_before_the_old_ones_go(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "a.egx"
    documents = texts(60)

    def harm(call: int) -> None:
        if call == 2:
            with sqlite3.connect(path) as connection:
                connection.execute(damage)
            connection.close()

    with open_index(path, OLD) as index:
        index.add(list(documents.values()), ids=list(documents))
        before = answers(index)
        with pytest.raises(
            IndexFileError, match=r"damaged.*abandon|damaged.*is not what was stored"
        ):
            index.migrate(cast(Any, Stopping(before_each=harm)), batch=20)
        assert answers(index) == before
        assert abandon(path)
        assert upkeep.check(index.path) == []


def test_a_disk_without_room_for_both_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 300, 300)
        )  # type: ignore[attr-defined]
        new = WordEmbedder(NEW)
        with pytest.raises(IndexFileError, match="MB free: migrating"):
            index.migrate(cast(Any, new))
        assert new.embedded == []


def test_tables_that_only_look_like_those_of_a_migration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.egx"
    for statement in (
        "CREATE TABLE next_vectors (number INTEGER PRIMARY KEY)",
        "CREATE TABLE next_month (day)",
        NEXT_TABLES["next_heads"],
        "CREATE VIEW words_mine AS SELECT 1",
        "CREATE TRIGGER words_data2 AFTER DELETE ON chunks BEGIN DELETE FROM facts; END",
    ):
        with open_index(path, OLD) as index:
            index.add(TEXTS)
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
        with (
            pytest.raises(IndexFileError, match="is not as egemma makes it"),
            open_index(path, OLD),
        ):
            pass
        path.unlink()


def test_a_migrated_file_has_the_tables_of_its_description(tmp_path: Path) -> None:
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(TEXTS)
        index.migrate(cast(Any, WordEmbedder(NEW)))
    with sqlite3.connect(tmp_path / "a.egx") as connection:
        made = {
            name: sql.replace('"', "")
            for name, sql in connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"
            )
            if not name.startswith("words_")
        }
        assert made == TABLES
        assert not connection.execute(
            "SELECT 1 FROM facts WHERE name LIKE 'next\\_%' ESCAPE '\\' AND name != 'next_number'"
        ).fetchall()
    connection.close()


def test_threads_that_search_meanwhile_get_the_old_answers_until_the_switch_and_the_new_ones_after(
    tmp_path: Path,
) -> None:
    documents = texts(400)
    # of the same widths, so that only the index itself can tell a vector of one from one of the
    # other
    new = WordEmbedder(NEW)
    wanted = made_by(tmp_path / "fresh.egx", new, documents)
    with open_index(tmp_path / "a.egx", OLD) as index:
        index.add(list(documents.values()), ids=list(documents))
        # By meaning only: a document that passes by changes every BM25.
        pairs = dict(zip(QUERIES, zip(answers(index)[::3], wanted[::3], strict=True), strict=True))
        done = threading.Event()
        problems: list[object] = []
        counts = {"old": 0, "new": 0}

        def search() -> None:
            try:
                switched = False
                while not (done.is_set() and counts["new"] > 30):
                    for query, (old, fresh) in pairs.items():
                        found = [
                            (hit.id, hit.score, hit.text, hit.truncated)
                            for hit in index.search(query, 9)
                        ]
                        if found == old != fresh:
                            counts["old"] += 1
                            if switched:
                                problems.append(f"old answers after new ones: {query}")
                        elif found == fresh != old:
                            counts["new"] += 1
                            switched = True
                        elif found != old:
                            problems.append(f"{query}: neither nor")
            except Exception as error:
                problems.append(error)

        def write() -> None:
            try:
                while not done.is_set():
                    index.add(["nothing like a query"], ids=["passing"])
                    index.remove(["passing"])
            except Exception as error:
                problems.append(error)

        threads = [threading.Thread(target=search) for _ in range(3)] + [
            threading.Thread(target=write)
        ]
        for thread in threads:
            thread.start()
        try:
            index.migrate(cast(Any, new), batch=20)
        finally:
            done.set()
            for thread in threads:
                thread.join(60)
        assert problems == []
        assert counts["old"]
        assert counts["new"]
        assert upkeep.check(index.path) == []


@pytest.mark.parametrize("dims", [DIMS, (96, 48, 24)], ids=str)
def test_a_search_and_an_addition_that_the_switch_overtakes_ask_the_new_model(
    tmp_path: Path, dims: tuple[int, ...]
) -> None:
    class Overtaken(WordEmbedder):
        """Migrates the index while it is embedding, as another thread can."""

        def embed_query(self, *args: Any, **settings: Any) -> Any:
            found = super().embed_query(*args, **settings)
            index.migrate(cast(Any, new))
            return found

        def embed_documents(self, *args: Any, **settings: Any) -> Any:
            found = super().embed_documents(*args, **settings)
            if len(index):
                index.migrate(cast(Any, new))
            return found

    documents = texts(50)
    new = WordEmbedder(NEW, dims=dims)
    for doing in ("search", "add"):
        with Index.open(tmp_path / f"{doing}.egx", cast(Any, Overtaken(OLD))) as index:
            index.add(list(documents.values()), ids=list(documents))
            if doing == "search":
                found = index.search("w1 w2 w3", 5).hits
            else:
                index.add(["w1 w2 w3 w59"], ids=["late"])
                found = index.search("w1 w2 w3 w59", 1).hits
                assert (found[0].id, round(found[0].score, 2)) == ("late", 1)
                index.remove(["late"])
                found = index.search("w1 w2 w3", 5).hits
            assert upkeep.check(index.path) == []
        with Index.open(tmp_path / f"fresh {doing}.egx", cast(Any, new)) as fresh:
            fresh.add(list(documents.values()), ids=list(documents))
            assert found == fresh.search("w1 w2 w3", 5).hits


MIGRATOR = """
import sys, time
from pathlib import Path
from tests.sdk.fakes import WordEmbedder
from egemma.index.migration import migrate
print("ready", flush=True)
sys.stdin.readline()
migrate(Path(sys.argv[1]), WordEmbedder("words-2"), batch=8, progress=lambda done, total: print(done, flush=True))
print("switched", flush=True)
"""


@pytest.mark.parametrize("after", [0, 1, 13, 24, 25])
def test_a_migration_killed_at_any_time_loses_at_most_a_batch(tmp_path: Path, after: int) -> None:
    documents = texts(200)
    path = tmp_path / "a.egx"
    wanted = made_by(tmp_path / "fresh.egx", WordEmbedder(NEW), documents)
    old = made_by(path, WordEmbedder(OLD), documents)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", MIGRATOR, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    told = 0
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("go\n")
    child.stdin.flush()
    for _ in range(after):
        told = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    rest = child.stdout.read().split()
    child.wait()
    told = max([told, *(int(word) for word in rest if word.isdigit())])
    assert check(path) == []
    if describe_index(path).fingerprint == WordEmbedder(OLD).fingerprint:
        assert "switched" not in rest
        with open_index(path, OLD) as index:
            assert answers(index) == old
    model = WordEmbedder(NEW)
    report = migrate(path, cast(Any, model))
    assert len(model.embedded) == report.embedded <= 200 - told
    with Index.open(path, cast(Any, WordEmbedder(NEW))) as index:
        assert answers(index) == wanted
        assert upkeep.check(index.path) == []
    compact(path)
    assert check(path) == []
