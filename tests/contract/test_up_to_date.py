"""What contract/make.py makes now is what is committed: the library does what it promised."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from contract import make
from contract.notation import BUILTIN, CASES, FOLDER, ROOT
from egemma.runtimes.executorch import NATIVE

BUNDLES = ("bundle", "bundle-executorch")


@pytest.mark.parametrize("part", [part for part in make.PARTS if part not in BUNDLES])
def test_what_is_committed_is_what_the_library_does(part: str) -> None:
    assert list(make.part(part, check=True)) == []


def test_the_bundle_is_what_the_exporter_makes() -> None:
    # In a process of its own: the exporter's ExecuTorch and the SDK's cannot share one.
    done = _python("-m", "contract.make", "--check", "--only", "bundle")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_both_bundles_hold_the_same_model() -> None:
    manifests = [
        json.loads((FOLDER / name / "manifest.json").read_text("utf-8")) for name in BUNDLES
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    tokenizers = {(FOLDER / name / "tokenizer.model").read_bytes() for name in BUNDLES}
    assert len(tokenizers) == 1


@pytest.mark.parametrize("name", BUNDLES)
def test_a_committed_bundle_passes_its_own_verification(name: str) -> None:
    if name == "bundle-executorch" and not list(NATIVE.glob("libegx.*")):
        pytest.skip("no libegx here; build it with `python setup.py build_ext --inplace`")
    done = _python("-m", "egemma", "verify", str(FOLDER / name), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["passed"] is True


def test_cases_of_another_vocabulary_can_be_written(tmp_path: Path) -> None:
    path, out = BUILTIN / "tokenizer.model", tmp_path / "tokens.json"
    assert make.main(["--tokenizer", str(path), "--out", str(out), "--max-tokens", "512"]) == 0
    committed, made = (json.loads(file.read_text("utf-8")) for file in (CASES / "tokens.json", out))
    assert made["cases"] == committed["cases"]
    assert make.main(["--tokenizer", str(path)]) == 2


def test_a_changed_case_is_told_and_only_written_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.json"
    sound = (CASES / "prompts.json").read_text("utf-8")
    path.write_text(sound.replace("clustering", "gathering", 1), "utf-8")
    monkeypatch.setattr(make, "CASES", tmp_path)
    assert make.main(["--check", "--only", "prompts"]) == 1
    assert "gathering" in capsys.readouterr().out
    assert path.read_text("utf-8") != sound
    assert make.main(["--only", "prompts"]) == 0
    assert path.read_text("utf-8") == sound
    assert make.main(["--check", "--only", "prompts"]) == 0


def test_the_readme_names_every_file_of_cases_and_every_page() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    for path in [*CASES.glob("*.json"), *FOLDER.glob("*.md")]:
        assert path.name in readme or path.name == "README.md", path.name


@pytest.mark.parametrize("path", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_of_cases_says_what_it_is(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    for name in ("about", "made_by", "tolerance"):
        assert content[name].strip(), name


def test_the_contract_is_small() -> None:
    files = [
        path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) < 1_600_000


def test_only_one_file_of_the_contract_imports_the_library() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                room = name.split(".")[0]
                assert room not in ("tests", "benchmarks"), f"{path.name} imports {name}"
                if room in ("egemma", "egemma_core", "egemma_quant"):
                    # the exporter's side, which needs torch, is imported where it is used
                    assert path.name in ("library.py", "make_bundle.py"), (
                        f"{path.name} imports {name}"
                    )


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
