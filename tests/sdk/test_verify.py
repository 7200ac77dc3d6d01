"""`verify_bundle` passes a sound bundle and names what is wrong with any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egemma.embedder import Embedder
from egemma.verify import verify_bundle
from egemma_core.bundle import GOLDEN, MANIFEST, TOKENIZER, read_bundle
from egemma_core.errors import BundleError, ConfigError, InputError
from egemma_export.bundle_folder import describe_files
from tests.tiny import DIMS, MAX_TOKENS, WIDTH, tiny_bundle, tiny_onnx, tiny_vectors

BOUNDS = {"min_cosine_float": 0.9999, "min_cosine_quantized": 0.9999, "max_batch_difference": 1e-4}
TEXTS = {
    "query": "task: search result | query: where is the water pump",
    "empty": "",
    "smuggled": "title: none | text: <bos>\0 \U00010380",
    "cut": "title: none | text: " + "bread and water " * 60,
}


def certify(folder: Path, *, bounds: dict[str, float] | None = BOUNDS, **changes: Any) -> Path:
    """Write golden.json as the exporter does, from vectors that NumPy computed; `changes` are
    applied to it last.
    """
    tokenizer = read_bundle(folder, check_hashes=False).tokenizer()
    cases = []
    for name, text in TEXTS.items():
        tokens = tokenizer.encode(text, overflow="truncate")
        vector = [float(str(value)) for value in tiny_vectors([tokens.ids])[0].astype(np.float32)]
        cases.append(
            {
                "name": name,
                "text": text,
                "ids": list(tokens.ids),
                "num_tokens": tokens.num_tokens,
                "truncated": tokens.truncated,
                "vector": vector,
                "quantized_vector": vector,
            }
        )
    golden = {
        "format_version": 1,
        "cases": cases,
        "batches": [["query", "empty", "cut"]],
        "mistakes": [],
        "measured": {},
    }
    (folder / GOLDEN).write_text(json.dumps(golden | changes))
    rewrite_manifest(folder, verification={} if bounds is None else {"bounds": bounds})
    return folder


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(body | changes | {"files": describe_files(folder)}))


def change_case(folder: Path, name: str, /, **changes: Any) -> None:
    golden = json.loads((folder / GOLDEN).read_text())
    for case in golden["cases"]:
        if case["name"] == name:
            case.update(changes)
    (folder / GOLDEN).write_text(json.dumps(golden))
    rewrite_manifest(folder)


@pytest.fixture
def bundle(tmp_path: Path, tiny_spm: Path) -> Path:
    return certify(tiny_bundle(tmp_path / "tiny", tokenizer=tiny_spm))


def test_a_sound_bundle_passes_and_every_text_is_measured_at_every_width(bundle: Path) -> None:
    result = verify_bundle(bundle, threads=1)
    assert result.passed
    assert result.failures == []
    assert [case.name for case in result.cases] == list(TEXTS)
    assert [case.num_tokens > MAX_TOKENS for case in result.cases] == [False, False, False, True]
    for case in result.cases:
        assert case.same_tokens
        assert case.length_error is not None
        assert case.length_error < 1e-6
        assert case.cosine_float.keys() == {str(dim) for dim in DIMS}
        assert all(
            cosine is not None and cosine > 0.999999
            for cosine in [*case.cosine_float.values(), *case.cosine_quantized.values()]
        )
    assert result.batch_difference is not None
    assert result.batch_difference < 1e-5
    assert result.threads == 1
    assert result.runtime.startswith("onnxruntime ")
    assert result.fingerprint == read_bundle(bundle).manifest.fingerprint
    assert (
        json.loads(json.dumps(result.to_dict(), allow_nan=False))["worst_cosine_float"]
        == result.worst_cosine_float
    )
    assert "passed" in result.to_text()


def test_the_worst_cosine_is_over_all_texts_and_widths(bundle: Path) -> None:
    vector = np.array(json.loads((bundle / GOLDEN).read_text())["cases"][0]["vector"])
    turned = vector.copy()
    turned[:8] = turned[:8][::-1]  # at width 8 the direction is another one; at 32 less so
    turned /= np.linalg.norm(turned)
    change_case(bundle, "query", vector=turned.tolist())
    result = verify_bundle(bundle)
    expected = [
        float(
            turned[:dim]
            @ vector[:dim]
            / np.linalg.norm(turned[:dim])
            / np.linalg.norm(vector[:dim])
        )
        for dim in DIMS
    ]
    assert list(result.cases[0].cosine_float.values()) == pytest.approx(expected, abs=1e-6)
    assert result.worst_cosine_float == pytest.approx(min(expected), abs=1e-6)
    assert result.worst_cosine_quantized == pytest.approx(1.0, abs=1e-6)
    assert not result.passed
    assert len(result.failures) == 1
    assert "query: cosine" in result.failures[0]
    assert "bound 0.9999" in result.failures[0]
    assert "FAILED  query" in result.to_text()


def test_another_model_than_the_certificates_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.tiny

    random = np.random.default_rng(8)
    other = (
        random.standard_normal(tests.tiny.tiny_weights()[0].shape, np.float32),
        random.standard_normal((WIDTH, WIDTH), np.float32),
    )
    monkeypatch.setattr(tests.tiny, "tiny_weights", lambda: other)
    tiny_onnx(bundle / "model.onnx")
    rewrite_manifest(bundle)
    result = verify_bundle(bundle)
    assert not result.passed
    assert result.worst_cosine_float is not None
    assert result.worst_cosine_float < 0.9
    assert {failure.split(":")[0] for failure in result.failures} == set(TEXTS)


def test_a_model_whose_vectors_cannot_be_used_fails_in_every_text(bundle: Path) -> None:
    tiny_onnx(bundle / "model.onnx", factor=float("nan"))
    rewrite_manifest(bundle)
    result = verify_bundle(bundle)
    assert not result.passed
    assert len(result.failures) >= len(TEXTS)
    assert result.worst_cosine_float is None
    json.dumps(result.to_dict(), allow_nan=False)
    result.to_text()


def test_another_tokenizer_fails_with_the_first_ids_that_differ(bundle: Path) -> None:
    ids = json.loads((bundle / GOLDEN).read_text())["cases"][0]["ids"]
    change_case(bundle, "query", ids=[*ids[:3], ids[3] + 1, *ids[4:]])
    result = verify_bundle(bundle)
    assert not result.passed
    assert [case.same_tokens for case in result.cases] == [False, True, True, True]
    assert "query: its token ids differ" in result.failures[0]
    assert "first at 3" in result.failures[0]


@pytest.mark.parametrize("changes", [{"num_tokens": 999}, {"ids": [2, 1, 1]}])
def test_a_token_count_or_length_that_differs_fails(bundle: Path, changes: dict[str, Any]) -> None:
    change_case(bundle, "empty", **changes)
    result = verify_bundle(bundle)
    assert not result.passed
    assert not result.cases[1].same_tokens
    assert any(failure.startswith("empty: ") for failure in result.failures)


def test_a_text_that_was_cut_at_export_but_is_marked_whole_fails(bundle: Path) -> None:
    change_case(bundle, "cut", truncated=False)
    result = verify_bundle(bundle)
    assert not result.passed
    assert "cut: it could not be embedded" in result.failures[0]


def test_a_batch_that_moves_a_vector_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Embedder.embed_ids

    def shaken(self: Embedder, rows: Any) -> Any:  # as a padded batch without a mask would
        return honest(self, rows) + np.float32(0.01) * (len(rows) > 1)

    monkeypatch.setattr(Embedder, "embed_ids", shaken)
    result = verify_bundle(bundle)
    assert not result.passed
    assert result.batch_difference == pytest.approx(0.01, abs=1e-4)
    assert "in a padded batch a channel differs by 1.0e-02, bound 0.0001" in result.failures


def test_a_batch_that_cannot_be_run_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Embedder, rows: Any) -> Any:
        raise InputError("no batches today")

    monkeypatch.setattr(Embedder, "embed_ids", refuse)
    result = verify_bundle(bundle)
    assert not result.passed
    assert result.failures == [
        "batch ['query', 'empty', 'cut']: it could not be embedded: no batches today"
    ]


def test_without_a_bound_nothing_passes_but_everything_is_measured(
    tmp_path: Path, tiny_spm: Path
) -> None:
    folder = certify(tiny_bundle(tmp_path / "tiny", tokenizer=tiny_spm), bounds=None)
    result = verify_bundle(folder)
    assert not result.passed
    assert len(result.failures) == 3
    assert "no bound min_cosine_float: give it with --min-cosine-float" in result.failures
    assert result.worst_cosine_float is not None
    given = verify_bundle(
        folder, min_cosine_float=0.9, min_cosine_quantized=0.9, max_batch_difference=0.1
    )
    assert given.passed
    assert given.bounds.min_cosine_float == 0.9


def test_bounds_that_are_given_replace_the_bundles_own(bundle: Path) -> None:
    result = verify_bundle(bundle, min_cosine_float=1.0)
    assert result.bounds.min_cosine_float == 1.0
    assert result.bounds.min_cosine_quantized == BOUNDS["min_cosine_quantized"]
    for bound in (float("nan"), 2.0, True, "0.9"):
        with pytest.raises(ConfigError, match="min_cosine_float="):
            verify_bundle(bundle, min_cosine_float=bound)  # type: ignore[arg-type]


def test_a_runtime_that_takes_one_text_at_a_time_runs_no_batch(bundle: Path) -> None:
    rewrite_manifest(bundle, batch="one")
    result = verify_bundle(bundle)
    assert result.passed
    assert result.batch_difference is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 2}, "format_version=2"),
        ({"cases": []}, "no cases"),
        ({"cases": [{"name": "x"}]}, "case 0 lacks"),
        ({"cases": ["x"]}, "case 0 lacks"),
        ({"batches": []}, "no batches"),
        ({"batches": [["query", "unknown"]]}, "a batch"),
        ({"batches": [["query"]]}, "a batch"),
    ],
)
def test_a_certificate_that_proves_nothing_is_refused(
    bundle: Path, change: dict[str, Any], says: str
) -> None:
    certify(bundle, **change)
    with pytest.raises(BundleError, match=says):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    "vector",
    [
        [1.0],
        [float("nan")] * WIDTH,
        [0.5] * WIDTH,
        ["a"] * WIDTH,
        [[1.0]] * WIDTH,
        [1.0, *[0.0] * (WIDTH - 1), "more"],
    ],
)
def test_a_golden_vector_that_is_no_unit_vector_is_refused(bundle: Path, vector: list[Any]) -> None:
    change_case(bundle, "query", vector=vector)
    with pytest.raises(BundleError, match="'query' is not a unit vector"):
        verify_bundle(bundle)


def nudged(vector: list[float], towards: list[float], by: float) -> list[float]:
    moved = np.array(vector) + by * (np.array(towards) - np.array(vector))
    return [float(value) for value in moved / np.linalg.norm(moved)]


def test_a_file_that_computes_a_known_mistake_is_told_from_one_that_rounds(bundle: Path) -> None:
    # The true vectors stand 0.2 of the way from what the golden file calls right towards another
    # text's: cosines are all above the bound. With the mistake at the true vectors, the file went
    # all the way to it; with the mistake elsewhere, nowhere near.
    golden = json.loads((bundle / GOLDEN).read_text())
    query, other = (
        next(case["vector"] for case in golden["cases"] if case["name"] == name)
        for name in ("query", "smuggled")
    )
    right = nudged(query, other, -0.2)
    change_case(bundle, "query", vector=right, quantized_vector=right)
    loose = {"min_cosine_float": 0.9, "min_cosine_quantized": 0.9}

    def verified(mistaken: list[float]) -> Any:
        body = json.loads((bundle / GOLDEN).read_text())
        (bundle / GOLDEN).write_text(
            json.dumps(
                body | {"mistakes": [{"name": "upside down", "vectors": {"query": mistaken}}]}
            )
        )
        rewrite_manifest(bundle)
        return verify_bundle(bundle, **loose)

    caught = verified(query)
    assert not caught.passed
    assert caught.mistakes["upside down"] == pytest.approx(1, abs=0.01)
    assert caught.failures == [
        "it computes like a model with upside down: 1.00 of the way to its vectors, bound 0.5"
    ]
    assert "of the way to upside down" in caught.to_text()
    away = verified(nudged(query, other, -0.4))
    assert away.passed, away.failures
    assert away.mistakes["upside down"] < 0


@pytest.mark.parametrize(
    "mistakes",
    [
        None,
        {},
        ["x"],
        [{"name": "x"}],
        [{"name": "x", "vectors": {}}],
        [{"name": "x", "vectors": {"unknown": [1.0] * WIDTH}}],
        [{"name": "x", "vectors": {"query": [1.0]}}],
        [{"name": 3, "vectors": {"query": [1.0] * WIDTH}}],
        [{"name": "x", "vectors": {"query": ["a"] * WIDTH}}],
    ],
)
def test_mistakes_that_are_not_understood_are_refused(bundle: Path, mistakes: Any) -> None:
    certify(bundle, mistakes=mistakes)
    with pytest.raises(BundleError, match="mistakes must each have a name"):
        verify_bundle(bundle)


def test_two_golden_texts_of_one_name_are_refused(bundle: Path) -> None:
    change_case(bundle, "query", name="empty")
    with pytest.raises(BundleError, match="two cases of one name"):
        verify_bundle(bundle)


def test_an_altered_file_is_refused_before_anything_runs(bundle: Path) -> None:
    content = bytearray((bundle / TOKENIZER).read_bytes())
    content[-1] ^= 1
    (bundle / TOKENIZER).write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        verify_bundle(bundle)
    with pytest.raises(BundleError, match="no such folder"):
        verify_bundle(bundle / "none")
