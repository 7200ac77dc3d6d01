"""Bulk embedding on a local Ray with two workers: the same files as in one process, and what
happens when a process is lost.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pa = pytest.importorskip("pyarrow", reason="bulk embedding needs the bulk extra")
pytest.importorskip("ray", reason="bulk embedding on Ray needs the ray extra")

import egemma_core.errors  # noqa: E402
from egemma import BundleError, ConfigError, EgemmaError, TokenLimitError  # noqa: E402
from egemma.ingest.parse import UnreadableFileError  # noqa: E402
from egemma_server.bulk import embed_parquet  # noqa: E402
from egemma_server.bulk.job import Job, read_job  # noqa: E402
from egemma_server.bulk.on_ray import MOST_ATTEMPTS, RayWorker, ray_running  # noqa: E402
from egemma_server.bulk.shards import WorkerConfig  # noqa: E402
from tests.sdk.conftest import run_python  # noqa: E402
from tests.server.test_bulk import TOO_LONG, contents, shards, texts_of, write  # noqa: E402
from tests.tiny import tiny_bundle  # noqa: E402

GONE_WITHIN_S = 60


def every_error() -> list[type[EgemmaError]]:
    """Every class of errors that the core has, and one that only the SDK knows."""
    found = [EgemmaError, UnreadableFileError]
    found += [
        kind
        for kind in vars(egemma_core.errors).values()
        if isinstance(kind, type) and issubclass(kind, EgemmaError) and kind is not EgemmaError
    ]
    return found


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")


# Every process of this Ray runs this as it starts: a worker dies, or cannot read a file, at a shard
# of an output folder that says so.
DYING = """
import os
import egemma_server.bulk.shards
embed = egemma_server.bulk.shards.ShardEmbedder.embed

def die(self, shard, progress=None):
    if (self.out / ".dies").exists() and (self.out / ".dies").read_text() == shard.name:
        os._exit(9)
    if (self.out / ".unreadable").exists():
        from egemma.ingest.parse import UnreadableFileError
        raise UnreadableFileError(shard.file.name, "damaged", "its pages are torn")
    return embed(self, shard, progress)

egemma_server.bulk.shards.ShardEmbedder.embed = die
"""


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(DYING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        with ray_running(cpus=2, threads=1):
            yield sys.modules["ray"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "in" / "a.parquet", 300, name=pa.array([None, "Pumps"] * 150))
    write(tmp_path / "in" / "b.parquet", 200, seed=1, name=pa.array(["x"] * 200))
    return tmp_path / "in"


@pytest.fixture
def run(onnx_bundle: Path, tmp_path: Path) -> Any:
    def embed(source: Any, out: str, **settings: Any) -> Any:
        return embed_parquet(
            source,
            tmp_path / out,
            **{"bundle": onnx_bundle, "threads_per_worker": 1, "shard_rows": 64, **settings},
        )

    return embed


@pytest.mark.usefixtures("ray")
def test_two_workers_write_the_files_that_one_process_writes(
    run: Any, source: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    run(source, "local", title_column="name")
    report = run(
        source,
        "ray",
        title_column="name",
        engine="ray",
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert (report.rows, report.shards, report.embedded, report.workers) == (500, 9, 9, 2)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, 500), (500, 500))
    assert run(source, "ray", title_column="name", engine="ray", workers=2).embedded == 0


@pytest.mark.usefixtures("ray")
def test_either_engine_goes_on_with_what_the_other_began(
    run: Any, source: Path, tmp_path: Path
) -> None:
    run(source, "whole")
    for name in ("begun", "begun-on-ray"):
        first, second = (
            ({"engine": "ray", "workers": 2}, {})
            if "ray" in name
            else ({}, {"engine": "ray", "workers": 2})
        )
        with pytest.raises(KeyboardInterrupt):
            run(source, name, progress=partway, **first)
        kept = {path.name: path.stat().st_ino for path in shards(tmp_path / name)}
        assert kept
        run(source, name, **second)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        assert {shard: (tmp_path / name / shard).stat().st_ino for shard in kept} == kept


@pytest.mark.usefixtures("ray")
def test_a_bad_row_is_named_as_in_one_process(run: Any, tmp_path: Path) -> None:
    texts = texts_of(200)
    texts[150] = TOO_LONG
    source = write(tmp_path / "in.parquet", texts)
    said = []
    for settings in ({}, {"engine": "ray", "workers": 2}):
        with pytest.raises(TokenLimitError, match="row 150 of the file") as caught:
            run(source, f"out{len(said)}", **settings)
        said.append(str(caught.value))
    assert said[0] == said[1]
    run(source, "out0", on_error="null")
    run(source, "out1", on_error="null", engine="ray", workers=2)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")


def test_a_ray_that_was_there_stays_there(run: Any, source: Path, ray: Any) -> None:
    run(source, "out", engine="ray", workers=2)
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray")
def test_more_threads_than_a_machine_has_are_refused_instead_of_waited_for(
    run: Any, source: Path
) -> None:
    with pytest.raises(ConfigError, match="no machine of the Ray cluster has more than 2 CPUs"):
        run(source, "out", engine="ray", workers=1, threads_per_worker=3)


def test_a_worker_refuses_another_model_at_the_same_path(
    run: Any, source: Path, tmp_path: Path, tiny_spm: Path
) -> None:
    run(source, "out")
    job = read_job(tmp_path / "out")
    assert job is not None
    other = tiny_bundle(tmp_path / "other", tokenizer=tiny_spm, changes={"fingerprint": "f" * 64})
    answer = worker(job, source, tmp_path / "out", other)({"number": [0]})
    error = pickle.loads(answer["error"][0])
    assert type(error) is BundleError
    assert error.hint == "Put the same bundle on every machine."


@pytest.mark.usefixtures("ray")
def test_a_shard_that_kills_its_worker_is_tried_again_and_then_given_up(
    run: Any, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, "out", progress=interrupt)
    (tmp_path / "out" / ".dies").write_text("shard-000003.parquet")
    with pytest.raises(
        EgemmaError,
        match=rf"a\.parquet, rows 192 to 256: the worker that embeds them died {MOST_ATTEMPTS} "
        r"times",
    ):
        run(source, "out", engine="ray", workers=2)
    assert "shard-000003.parquet" not in contents(tmp_path / "out")
    # the fourth did not begin
    assert (tmp_path / "out" / ".attempts" / "shard-000003.parquet").stat().st_size == 4
    (tmp_path / "out" / ".dies").unlink()
    run(source, "out", engine="ray", workers=2)
    run(source, "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("ray")
def test_an_error_of_any_class_arrives_from_a_worker_as_itself(
    run: Any, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, "out", progress=interrupt)
    (tmp_path / "out" / ".unreadable").touch()
    with pytest.raises(UnreadableFileError) as caught:
        run(source, "out", engine="ray", workers=2)
    assert type(caught.value) is UnreadableFileError
    assert str(caught.value) == f"{caught.value.path}: its pages are torn."
    assert caught.value.path in ("a.parquet", "b.parquet")
    assert (caught.value.reason, caught.value.detail) == ("damaged", "its pages are torn")
    (tmp_path / "out" / ".unreadable").unlink()
    assert run(source, "out", engine="ray", workers=2).rows == 500


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_a_worker_gives_an_error_of_each_class_back_with_all_it_carries(
    run: Any, source: Path, tmp_path: Path, kind: type[EgemmaError], onnx_bundle: Path
) -> None:
    error = kind.__new__(kind, "three were found. Give two.")
    vars(error).update(found="three were found.", hint="Give two.", position=2, place="")

    def fail(shard: Any) -> None:
        raise error

    run(source, "out")
    job = read_job(tmp_path / "out")
    assert job is not None
    one = worker(job, source, tmp_path / "out", onnx_bundle)
    one._embedder = cast(Any, SimpleNamespace(embed=fail))
    back = pickle.loads(one({"number": [3]})["error"][0])
    assert type(back) is kind
    assert str(back) == "three were found. Give two."
    assert vars(back) == vars(error)


def partway(done: int, _: int) -> None:
    if done >= 128:
        raise KeyboardInterrupt


def interrupt(done: int, _: int) -> None:
    if done:
        raise KeyboardInterrupt


def worker(job: Job, source: Path, out: Path, bundle: Path) -> RayWorker:
    (out / ".attempts").mkdir(exist_ok=True)
    config = WorkerConfig(
        job=job,
        folder=source,
        out=out,
        bundle=bundle,
        threads=1,
        memory_mb=256,
        on_error="fail",
    )
    return RayWorker(pickle.loads(pickle.dumps(config)))


OLD_RAY = """
import ray, sys
from egemma_core.errors import MissingDependencyError
from egemma_server.bulk import embed_parquet
ray.__version__ = "2.58.1"
try:
    embed_parquet(sys.argv[1], sys.argv[2], bundle=sys.argv[3], engine="ray", workers=1)
except MissingDependencyError as error:
    print(error)
"""


def test_a_ray_that_asks_for_no_token_is_not_started(
    source: Path, tmp_path: Path, onnx_bundle: Path
) -> None:
    done = run_python(OLD_RAY, source, tmp_path / "out", onnx_bundle, RAY_ADDRESS=None)
    assert "Ray 2.58.1 would let whoever reaches this machine run code" in done.stdout, done.stderr


OWN_RAY = """
import os, signal, sys
from egemma_server.bulk import embed_parquet

def killed(done, total):
    if done:
        print(os.environ["RAY_USAGE_STATS_ENABLED"], len(os.environ["RAY_AUTH_TOKEN"]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

embed_parquet(sys.argv[1], sys.argv[2], bundle=sys.argv[3], threads_per_worker=1, shard_rows=64, engine="ray", workers=2, progress=killed)
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_killed_run_takes_its_own_ray_along_and_another_run_goes_on(
    run: Any, source: Path, tmp_path: Path, onnx_bundle: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = ray_folders()
    done = run_python(
        OWN_RAY,
        source,
        tmp_path / "out",
        onnx_bundle,
        HOME=str(home),
        RAY_ADDRESS=None,
        RAY_AUTH_TOKEN=None,
        RAY_AUTH_MODE=None,
        RAY_USAGE_STATS_ENABLED=None,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # no reports to anybody; a token, as Ray listens on every network interface
    assert done.stdout.split() == ["0", "64"]
    assert list(home.iterdir()) == []
    left = ray_folders() - before
    assert left
    deadline = time.monotonic() + GONE_WITHIN_S
    # a worker writes the shard that it is at, and ends then
    while holding(left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not holding(left)
    for folder in left:  # logs, which nobody was left to remove
        shutil.rmtree(folder, ignore_errors=True)
    kept = len(shards(tmp_path / "out"))
    assert kept
    assert run(source, "out").embedded == 9 - kept
    run(source, "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def ray_folders() -> set[Path]:
    """Of each Ray that egemma started here."""
    return set(Path(tempfile.gettempdir()).glob("egemma-ray-*"))


def holding(folders: set[Path]) -> set[int]:
    """Processes with a file of one of these folders open.

    Their command lines do not tell: Ray's workers rename themselves. Ray's two agents are left out:
    they try to report for a minute, then end.
    """
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [Path(os.readlink(link)) for link in (process / "fd").iterdir()]
            agent = (
                (process / "cmdline")
                .read_bytes()
                .startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
            )
        except OSError:  # it ended meanwhile, or is not ours
            continue
        if not agent and any(folder in file.parents for folder in folders for file in files):
            found.add(int(process.name))
    return found
