"""What `egemma` shows to those who import it: names, types, tracebacks."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import pytest

import egemma
from egemma import EgemmaError
from egemma.embeddings import Embedding
from tests.sdk.conftest import run_python

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "quant", "export", "sdk", "server")
THINGS = [name for name in egemma.__all__ if name != "__version__"]
OURS = [name for name in THINGS if not isinstance(getattr(egemma, name), types.ModuleType)]


def test_the_names_are_sorted_each_is_there_and_nothing_else_is_shown() -> None:
    assert egemma.__all__ == sorted(egemma.__all__) == dir(egemma)
    for name in egemma.__all__:
        assert getattr(egemma, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        egemma.Embeder  # noqa: B018


@pytest.mark.parametrize("name", OURS)
def test_every_name_says_that_it_is_of_egemma(name: str) -> None:
    thing = getattr(egemma, name)
    assert thing.__module__ == "egemma"
    assert pickle.loads(pickle.dumps(thing)) is thing
    assert typing.get_type_hints(thing) is not None


def test_the_fields_of_a_result_can_be_looked_up() -> None:
    hints = typing.get_type_hints(Embedding)
    assert (hints["num_tokens"], hints["truncated"], hints["fingerprint"]) == (int, bool, str)
    assert typing.get_type_hints(egemma.ChunkedDocument)["chunks"] == tuple[egemma.Chunk, ...]


def test_a_name_is_of_egemma_also_when_its_inner_module_came_first() -> None:
    homes = {name: getattr(egemma, name).__name__ for name in OURS if name in egemma._HOMES}
    for name, attribute in homes.items():
        script = (
            f"from egemma.{egemma._HOMES[name]} import {attribute} as thing\n"
            "import egemma, pickle\n"
            f"assert thing is egemma.{attribute} and thing.__module__ == 'egemma'\n"
            "assert pickle.loads(pickle.dumps(thing)) is thing"
        )
        done = run_python(script)
        assert done.returncode == 0, (name, done.stderr)


def test_every_error_of_the_tree_is_shown() -> None:
    def below(kind: type[EgemmaError]) -> set[str]:
        return {kind.__name__}.union(*(below(child) for child in kind.__subclasses__()))

    of_core = {name for name in below(EgemmaError) if hasattr(egemma.errors, name)}
    assert of_core == set(egemma.errors.__all__)
    assert set(egemma.errors.__all__) < set(egemma.__all__)
    assert "NotFoundError (KeyError)" in str(egemma.errors.__doc__)
    for name in egemma.errors.__all__:
        assert getattr(egemma, name) is getattr(egemma.errors, name)
        error = getattr(egemma, name)("found.", hint="Do this.", position=2, place="text 2")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), "text 2: found. Do this.")


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run_python(
        "import sys, egemma\n"
        "from egemma import EgemmaError, InputError\n"
        "heavy = {'numpy', 'onnxruntime', 'sentencepiece', 'sqlite3', 'torch', 'inspect'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_device_loads_nothing_of_checkpoints() -> None:
    done = run_python(
        "import sys, egemma.index, egemma.embedder, egemma.verify, egemma.cli.commands\n"
        "rooms = {'checkpoint', 'config', 'nn'}\n"
        "print(sorted(room for room in rooms if f'egemma_core.{room}' in sys.modules))"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


PROGRAM = """
from pathlib import Path

import egemma
from egemma import Embedder, EgemmaError, Index, split_text


def find(bundle: Path, notes: Path) -> list[str]:
    with Embedder.open(bundle, threads=1) as model, Index.open(notes, model) as index:
        index.add(["Water the tomatoes."], ids=["garden"], metadata=[{"year": 2026}])
        query = model.embed_query("tomatoes", dim=None)
        several = model.embed_query(["tomatoes", "water"])
        reveal_type(query)
        reveal_type(several)
        reveal_type(several[0].vector)
        reveal_type(model.embed_documents(["a"]).num_tokens)
        hits = index.search("tomatoes", k=3, where={"year": 2026})
        reveal_type(hits)
        reveal_type(index.search(query))
        reveal_type(index.search(several, mode="vector"))
        reveal_type(index.search(["tomatoes"]))
        reveal_type(hits.how)
        reveal_type(egemma.upkeep.check(notes))
        chunks = split_text("a", title=None, count_tokens=model.count_tokens, max_tokens=64)
        reveal_type(chunks)
        reveal_type(egemma.verify_bundle(bundle).worst_cosine_float)
        return [hit.text for hit in hits]


def careful(bundle: Path) -> str:
    try:
        return egemma.Embedder.open(bundle).runtime
    except EgemmaError as error:
        reveal_type(error.position)
        return error.hint
"""
REVEALED = (
    "egemma.embeddings.Embedding",
    "egemma.embeddings.Embeddings",
    "numpy.ndarray[",
    "tuple[int, ...]",
    "egemma.index.hits.Hits",
    "egemma.index.hits.Hits",
    "list[egemma.index.hits.Hits]",
    "list[egemma.index.hits.Hits]",
    "egemma.index.hits.SearchInfo",
    "list[str]",
    "list[egemma.chunks.Chunk]",
    "float | None",
    "int | None",
)


def mypy(folder: Path, program: str) -> tuple[int, list[str]]:
    """Check a program as a user would, outside of this repository and its settings."""
    pytest.importorskip("mypy", reason="types are checked with egemma[dev]")
    (folder / "program.py").write_text(textwrap.dedent(program))
    # as packages that are installed: without py.typed every type of theirs would be Any
    installed = os.pathsep.join([str(ROOT / room) for room in ROOMS] + sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "program.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": installed},
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_users_program_is_checked_against_real_types(tmp_path: Path) -> None:
    code, lines = mypy(tmp_path, PROGRAM)
    assert code == 0, lines
    revealed = [line.partition("Revealed type is ")[2] for line in lines if "Revealed" in line]
    assert len(revealed) == len(REVEALED)
    for found, expected in zip(revealed, REVEALED, strict=True):
        shown = found.replace("Union[float, None]", "float | None")
        shown = shown.replace("Union[int, None]", "int | None")
        assert expected in shown, lines
        assert not shown.startswith('"Any"')


WRONG = {
    'model.embed_query("a", dims=3)': "dims",
    "model.embed_query(3)": "embed_query",
    'model.embed_query("a").vectors': "vectors",
    'model.embed_query(["a"]).vector': "vector",
    'model.embed_documents(["a"], overflow="cut")': "overflow",
    "egemma.Index.open(1)": "open",
    'egemma.EgemmaError("a").positions': "positions",
    "egemma.Embeder": "Embeder",
}


def test_a_wrong_use_is_reported(tmp_path: Path) -> None:
    head = "import egemma\n\n\ndef use(model: egemma.Embedder) -> None:\n"
    code, lines = mypy(tmp_path, head + "".join(f"    {wrong}\n" for wrong in WRONG))
    assert code == 1, lines
    for number, (wrong, says) in enumerate(WRONG.items(), start=5):
        found = [line for line in lines if line.startswith(f"program.py:{number}: error")]
        assert found, wrong
        assert says in found[0]


@pytest.mark.parametrize("room", ROOMS)
def test_every_package_says_that_it_is_typed(room: str) -> None:
    packages = [path.parent for path in (ROOT / room).glob("egemma*/__init__.py")]
    assert packages
    for package in packages:
        assert (package / "py.typed").is_file(), package


def test_an_uncaught_error_names_egemma(onnx_bundle: Path) -> None:
    script = (
        "import sys\n"
        "from egemma import Embedder\n"
        "Embedder.open(sys.argv[1]).embed_documents(['short', 'word ' * 1000])\n"
    )
    done = run_python(script, onnx_bundle)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("egemma.TokenLimitError: text 1: the text has ")
    assert "egemma_core.errors" not in done.stderr


def test_names_for_type_checkers_are_the_names_that_are_loaded() -> None:
    tree = ast.parse((ROOT / "sdk" / "egemma" / "__init__.py").read_text(encoding="utf-8"))
    homes: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("egemma."):
            homes |= {alias.name: str(node.module).split(".")[1] for alias in node.names}
    lazy = {name: home for name, home in homes.items() if home != "errors"}
    submodules = {name for name, home in egemma._HOMES.items() if name == home}
    assert lazy == {k: v for k, v in egemma._HOMES.items() if k not in submodules}
