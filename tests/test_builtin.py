"""The built-in model and the bundle that comes with the package: made by the script and from the
checkpoint in the repository; their hits make sense.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egemma import Embedder, Index
from egemma.embedder import BUILTIN_FOLDER
from egemma.verify import verify_bundle
from egemma_core.bundle import read_bundle
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.files import sha256_of
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.load import load_encoder
from egemma_export.read_onnx import read_onnx_weights
from egemma_quant.roles import quantize_encoder
from egemma_quant.schemes import INT4
from egemma_train import loop
from egemma_train.objectives.contrast import Contrast
from models import small, train_builtin
from tests.core.test_save import assert_sentence_transformers_agrees

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "egemma-small"
FIRST_HITS = [
    "med-diabetes",
    "shell-find-size",
    "git-undo",
    "py-chunks",
    "garden-tomato",
    "phys-sky",
    "travel-luggage",
]


def demo_rows() -> tuple[list[dict[str, str]], list[str]]:
    """The documents and the queries of `make demo`."""
    documents = (ROOT / "benchmarks" / "demo_texts.jsonl").read_text(encoding="utf-8")
    queries = (ROOT / "benchmarks" / "demo_queries.txt").read_text(encoding="utf-8")
    return [json.loads(line) for line in documents.splitlines()], queries.splitlines()


def test_the_checkpoint_is_what_the_script_makes() -> None:
    checkpoint = open_checkpoint(MODEL)
    assert checkpoint.config == train_builtin.CONFIG
    assert checkpoint.prompts == EMBEDDING_GEMMA
    stored = json.loads((MODEL / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"


def test_sentence_transformers_agrees_on_the_checkpoint() -> None:
    assert_sentence_transformers_agrees(MODEL)


def test_the_checkpoint_finds_what_the_demo_asks_for() -> None:
    checkpoint = open_checkpoint(MODEL)
    encoder, tokenizer, prompts = (
        load_encoder(checkpoint),
        checkpoint.tokenizer(),
        checkpoint.prompts,
    )

    def vectors(texts: list[str]) -> torch.Tensor:
        rows = [tokenizer.encode(text, overflow="truncate").ids for text in texts]
        with torch.no_grad():
            return encode_rows(encoder, rows, tokenizer.pad_id)

    documents, queries = demo_rows()
    scores = (
        vectors([prompts.query() + query for query in queries])
        @ vectors([prompts.document(row.get("title")) + row["text"] for row in documents]).T
    )
    assert [documents[best]["id"] for best in scores.argmax(1).tolist()] == FIRST_HITS


@pytest.fixture
def little_data(tmp_path: Path) -> Path:
    """A few dozen rows in each file that the script reads."""
    for config in train_builtin.DATASETS:
        path = tmp_path / "data" / config.path[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for number in range(400):
                words = (
                    {
                        "text": f"where is {config.name} {number}?",
                        "label": f"find_{config.name}_{number % 3}",
                    }
                    if config.kind == "labels"
                    else {
                        "query": f"where is {config.name} {number}?",
                        "positive": f"{config.name} {number} is there.",
                        "task": config.task,
                        "lang": "en",
                    }
                )
                if config.kind == "pairs" and number % 2:
                    words["negative"] = f"{config.name} {number} was never there."
                file.write(json.dumps(words) + "\n")
    return tmp_path / "data"


def test_held_out_answers_are_not_trained_on_and_large_sets_are_capped(
    little_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_builtin, "MOST_ROWS", 100)
    kept, held = train_builtin.read_sets(little_data)
    assert [dataset.config.rate for dataset in kept] == [10.0] * len(train_builtin.DATASETS)
    trained, out = (
        {row.positive for dataset in datasets for row in dataset.rows} for datasets in (kept, held)
    )
    pairs = [config for config in train_builtin.DATASETS if config.kind == "pairs"]
    assert [dataset.name for dataset in held] == [config.name for config in pairs]
    assert not trained & out
    assert len(out) + len([text for text in trained if text.endswith("is there.")]) == 400 * len(
        pairs
    )


def test_the_training_script_goes_on_where_it_was_stopped(
    little_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def made(name: str, *changes: str) -> int:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        # 8,000 pieces need more text than this
        shutil.copyfile(MODEL / "tokenizer.model", work / "tokenizer.model")
        return train_builtin.main(
            [
                "--data",
                str(little_data),
                "--work",
                str(work),
                "--out",
                str(work / "model"),
                "--batch-size",
                "8",
                "--steps",
                "4",
                "--warmup-steps",
                "1",
                "--save-every",
                "2",
                "--threads",
                "1",
                *changes,
            ]
        )

    starts: list[int] = []

    # the real ones take half a minute
    def token_vectors(
        rows: list[tuple[int, ...]], vocab_size: int, width: int, seed: int
    ) -> torch.Tensor:
        starts.append(len(rows))
        return torch.randn(vocab_size, width, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(small, "token_vectors", token_vectors)
    assert made("whole") == 0
    backward = Contrast.backward

    def stop_at_the_fourth(self: Contrast, step: int) -> loop.Outcome:
        if step == 3:
            raise KeyboardInterrupt
        return backward(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Contrast, "backward", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            made("stopped")
    assert not (tmp_path / "stopped/model").exists()
    assert made("stopped") == 0
    assert len(starts) == 2, "token vectors are made once for each run"
    whole, stopped = (open_checkpoint(tmp_path / name / "model") for name in ("whole", "stopped"))
    assert whole.weight_hashes() == stopped.weight_hashes()
    assert whole.config == train_builtin.CONFIG
    assert json.loads((whole.folder / "config.json").read_text())["dtype"] == "bfloat16"
    capsys.readouterr()
    assert made("stopped") == 1
    assert "model exists. Remove it" in capsys.readouterr().err
    (tmp_path / "early/model").mkdir(parents=True)
    assert made("early") == 1
    assert not (tmp_path / "early/run").exists(), "said before the run, not after it"
    shutil.rmtree(tmp_path / "stopped/model")
    assert made("stopped", "--learning-rate", "1.0") == 1
    assert "learning_rate was 0.0015 and is 1.0" in capsys.readouterr().err


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
    documents, queries = demo_rows()
    with Embedder.open("builtin") as embedder, Index.open(tmp_path / "notes.db", embedder) as index:
        index.add(
            [row["text"] for row in documents],
            ids=[row["id"] for row in documents],
            titles=[row.get("title") for row in documents],
        )
        assert [index.search(query, k=1)[0].id for query in queries] == FIRST_HITS
        assert [index.search(query, k=1, dim=128)[0].id for query in queries] == FIRST_HITS


def test_the_numbers_of_the_pages_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
