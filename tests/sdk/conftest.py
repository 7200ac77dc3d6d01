"""Bundles that several tests of the SDK open; copy one before you damage it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from egemma.runtimes.executorch import NATIVE
from tests.tiny import tiny_bundle, tiny_pte

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("onnx") / "bundle", tokenizer=tiny_spm)


@pytest.fixture(scope="session")
def pte_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    if not list(NATIVE.glob("libegx.*")):
        pytest.skip("no libegx here; build it with `python setup.py build_ext --inplace`")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("executorch") is None:
        pytest.skip("making a .pte needs the export extra")
    folder = tmp_path_factory.mktemp("pte")
    return tiny_bundle(
        folder / "bundle",
        runtime="executorch",
        tokenizer=tiny_spm,
        model=tiny_pte(folder / "tiny.pte"),
    )


def run_python(
    script: str, *arguments: object, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, which may crash; a variable set to None is left out of
    its environment.
    """
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in variables.items() if value is not None},
    )
