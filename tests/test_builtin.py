"""The bundle that comes with the package: made from the checkpoint in the repository, and its hits make sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tables import PAGES, with_numbers
from egemma import Embedder, Index
from egemma.embedder import BUILTIN_FOLDER
from egemma.verify import verify_bundle
from egemma_core.bundle import read_bundle
from egemma_core.checkpoint import open_checkpoint, sha256_of
from egemma_core.nn.load import load_encoder
from egemma_export.read_onnx import read_onnx_weights
from egemma_quant.schemes import INT4
from egemma_quant.weights import quantize_encoder

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "egemma-small"


def test_the_bundle_is_made_from_the_checkpoint_of_this_repository() -> None:
    checkpoint, manifest = open_checkpoint(MODEL), read_bundle(BUILTIN_FOLDER).manifest
    assert dict(manifest.source["weights"]) == checkpoint.weight_hashes()
    assert manifest.files["tokenizer.model"]["sha256"] == sha256_of(checkpoint.tokenizer_path)
    assert dict(manifest.prompts) == dict(checkpoint.prompts.by_name)
    assert manifest.dims == checkpoint.config.dims
    wanted = quantize_encoder(load_encoder(checkpoint), INT4)
    found = read_onnx_weights(BUILTIN_FOLDER / "model.onnx")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name].codes, weight.codes), name
        assert torch.equal(found[name].scales, weight.scales), name


def test_the_bundle_keeps_its_bounds_on_this_machine() -> None:
    verification = verify_bundle(BUILTIN_FOLDER)
    assert verification.passed, verification.failures


def test_the_bundle_is_a_few_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUILTIN_FOLDER.iterdir()) < 4e6


def test_the_first_hits_of_the_demo_make_sense(tmp_path: Path) -> None:
    documents = [json.loads(line) for line in (ROOT / "benchmarks" / "demo_texts.jsonl").read_text().splitlines()]
    queries = (ROOT / "benchmarks" / "demo_queries.txt").read_text().splitlines()
    wanted = ["med-diabetes", "shell-find-size", "git-undo", "py-chunks", "garden-tomato", "phys-sky", "travel-luggage"]
    with Embedder.open("builtin") as embedder, Index.open(tmp_path / "notes.db", embedder) as index:
        index.add([row["text"] for row in documents], ids=[row["id"] for row in documents], titles=[row.get("title") for row in documents])
        assert [index.search(query, k=1)[0].id for query in queries] == wanted
        assert [index.search(query, k=1, dim=128)[0].id for query in queries] == wanted


@pytest.mark.parametrize("name", PAGES)
def test_the_numbers_of_a_page_are_those_of_the_results(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert with_numbers(page, PAGES[name]) == page, "run python benchmarks/tables.py"


@pytest.mark.parametrize("page", ["README.md"])
def test_the_snippets_of_the_readme_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = [part.split("```")[0] for part in (ROOT / page).read_text().split("```python\n")[1:]]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})
        promised = [line.split("  # ", 1)[1] for line in snippet.splitlines() if "print(" in line]
        assert capsys.readouterr().out.splitlines() == promised
