"""The `egemma-server` command as a shell sees it: stdout, stderr, exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egemma.embedder import Embedder
from egemma_server.cli import main
from tests.sdk.conftest import ROOT, run_python
from tests.tiny import WIDTH

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def _at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_bundle: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EGEMMA_MODEL", str(onnx_bundle))


class Shell:
    """Runs `egemma-server` in this process and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *arguments: object) -> Any:
        assert self(*arguments, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def server(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def write(name: str, count: int = 2) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs egemma[bulk]")
    from pyarrow import parquet

    texts = [f"{number} pumps" for number in range(count)]
    parquet.write_table(pyarrow.table({"text": texts, "key": range(7, 7 + count)}), name)


def vectors(folder: str) -> Any:
    from pyarrow import parquet

    table = parquet.read_table(f"{folder}/shard-000000.parquet")
    return np.stack(table["vector"].to_numpy(zero_copy_only=False))


def test_bulk_takes_parquet_to_parquet(server: Shell, onnx_bundle: Path) -> None:
    write("in.parquet")
    report = server.json("bulk", "in.parquet", "vectors", "--id-column", "key")
    assert (report["rows"], report["dim"], report["engine"]) == (2, WIDTH, "local")
    with Embedder.open(onnx_bundle) as embedder:
        expected = embedder.embed_documents(["0 pumps", "1 pumps"]).vectors
    np.testing.assert_allclose(vectors("vectors"), expected, atol=1e-6)
    assert server("bulk", "in.parquet", "vectors", "--id-column", "key") == 0
    assert "finished before" in server.out
    assert server.err == ""


def test_the_model_may_be_named_and_queries_have_a_task(
    server: Shell, onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EGEMMA_MODEL")
    write("in.parquet")
    options = ["--model", onnx_bundle, "--as", "query", "--task", "clustering", "--dim", "8"]
    assert server.json("bulk", *options, "in.parquet", "vectors")["dim"] == 8
    with Embedder.open(onnx_bundle) as embedder:
        queries = [
            embedder.embed_query(text, task="clustering", dim=8).vector
            for text in ("0 pumps", "1 pumps")
        ]
    np.testing.assert_allclose(vectors("vectors"), np.stack(queries), atol=1e-6)


def test_several_files_may_stand_before_and_after_options(server: Shell) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        write(name)
    report = server.json("bulk", "a.parquet", "b.parquet", "--threads", "1", "c.parquet", "vectors")
    assert (report["rows"], report["threads_per_worker"]) == (6, 1)
    assert Path(report["out"]) == Path("vectors").resolve()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bulk", "none.parquet", "v"], "none.parquet is no file. Give a Parquet file"),
        (["bulk", "in.parquet", "v", "--model", "nowhere"], "nowhere: no such folder"),
        (["bulk", "in.parquet", "v", "--text-column", "body"], "no columns 'body'"),
        (["bulk", "in.parquet", "v", "--dim", "7"], "dim=7 was not trained"),
        (["bulk", "in.parquet", "v", "--engine", "ray"], "workers=None must be a whole number"),
        (["bulk", "in.parquet", "in.parquet/v"], "in.parquet/v cannot be made"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_line(
    server: Shell, arguments: list[str], says: str
) -> None:
    write("in.parquet")
    assert server(*arguments) == 1
    assert server.err.startswith("egemma-server: ")
    assert server.err.count("\n") == 1
    assert says in server.err
    assert server.out == ""
    assert not Path("v").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["bulk"],
        ["bulk", "a.parquet"],
        ["bulk", "a.parquet", "v", "--as", "poem"],
        ["bulk", "a.parquet", "v", "--task", "clustering"],
        ["bulk", "a.parquet", "v", "--engine", "spark"],
        ["bulk", "a.parquet", "v", "--workers", "2"],
        ["bulk", "a.parquet", "v", "--title", "t"],
        ["bulk", "a.parquet", "v", "--dim", "wide"],
    ],
)
def test_a_wrong_command_line_ends_with_2(server: Shell, arguments: list[str]) -> None:
    assert server(*arguments) == 2
    assert "usage: egemma-server" in server.err
    assert server.out == ""


def test_a_missing_library_is_named(server: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egemma_server.bulk.source.find_spec", lambda name: None)
    assert server("bulk", "in.parquet", "v") == 1
    assert "pip install 'egemma[bulk]'" in server.err


def test_help_and_version_load_nothing_heavy() -> None:
    script = (
        "import sys; from egemma_server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: print(stop.code, [name for name in ('numpy', 'onnxruntime', "
        "'pyarrow', 'ray') if name in sys.modules])"
    )
    for arguments in (["--help"], ["bulk", "--help"], ["--version"]):
        done = run_python(script, *arguments)
        assert done.stdout.endswith("0 []\n"), done.stdout + done.stderr


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "egemma_server", "bulk", "none.parquet", "v"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("egemma-server: ")


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = scripts["scripts"]["egemma-server"].split(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="sends Ctrl-C as a terminal does")
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(server: Shell) -> None:
    write("in.parquet", 30_000)
    run = subprocess.Popen(
        [sys.executable, "-m", "egemma_server", "bulk", "in.parquet", "vectors"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(Path().glob("vectors/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("egemma-server: interrupted.")
    report = server.json("bulk", "in.parquet", "vectors")
    assert report["rows"] == 30_000
    assert 0 < report["embedded"] < report["shards"]
