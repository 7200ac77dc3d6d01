"""The embedder over the tiny model: its numbers against NumPy, and everything a caller can do
wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import egemma
from egemma import (
    BundleError,
    ConfigError,
    DimensionError,
    EgemmaError,
    Embedder,
    InputError,
    PromptError,
    RuntimeUnavailableError,
    ShapeError,
    TokenLimitError,
)
from egemma.embedder import WINDOW_TEXTS
from egemma_core.bundle import Bundle, read_bundle
from tests.sdk.conftest import run_python
from tests.tiny import DIMS, MAX_TOKENS, WIDTH, tiny_bundle, tiny_onnx, tiny_vectors

TEXTS = ["Water pumps", "", "The cat sleeps on the warm stone. " * 3, "日本語", "two\x00parts", "x"]
BOUND = 1e-6  # float32 against float64, on vectors of length 1


@pytest.fixture(scope="module", params=["onnx_bundle", "pte_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return read_bundle(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    with Embedder.open(bundle.folder, threads=2) as opened:
        yield opened


def expected(bundle: Bundle, texts: list[str]) -> np.ndarray:
    tokenizer = bundle.tokenizer()
    return tiny_vectors([tokenizer.encode(text).ids for text in texts])


def test_a_query_is_embedded_behind_its_prompt(bundle: Bundle, embedder: Embedder) -> None:
    found = embedder.embed_query("where is the pump", task="clustering")
    text = "task: clustering | query: where is the pump"
    assert np.abs(found.vector - expected(bundle, [text])[0]).max() < BOUND
    assert (found.dim, found.truncated, found.fingerprint) == (
        WIDTH,
        False,
        bundle.manifest.fingerprint,
    )
    assert found.num_tokens == len(bundle.tokenizer().encode(text).ids)
    assert found.vector.dtype == np.float32


def test_documents_keep_their_order_and_their_titles(bundle: Bundle, embedder: Embedder) -> None:
    titles = ["Manual", None, "", " ", "none", "A"]
    prompts = ["title: Manual | text: ", *["title: none | text: "] * 4, "title: A | text: "]
    found = embedder.embed_documents(TEXTS, titles=titles)
    wanted = expected(bundle, [prompt + text for prompt, text in zip(prompts, TEXTS, strict=True)])
    assert np.abs(np.asarray(found) - wanted).max() < BOUND
    assert len(found) == len(TEXTS)


def test_queries_and_raw_texts_are_embedded_in_order(bundle: Bundle, embedder: Embedder) -> None:
    queries = ["task: sentence similarity | query: " + text for text in TEXTS]
    assert (
        np.abs(
            np.asarray(embedder.embed_query(TEXTS, task="STS")) - expected(bundle, queries)
        ).max()
        < BOUND
    )
    assert np.abs(np.asarray(embedder.embed_raw(TEXTS)) - expected(bundle, TEXTS)).max() < BOUND


def test_token_ids_are_embedded_as_they_are(bundle: Bundle, embedder: Embedder) -> None:
    rows = [[2, 50, 1], [2, 60, 61, 62, 1], [7]]
    assert np.abs(embedder.embed_ids(rows) - tiny_vectors(rows)).max() < BOUND
    assert embedder.embed_ids([]).shape == (0, WIDTH)
    for bad in ([], [512], [-1], [5] * (MAX_TOKENS + 1)):
        with pytest.raises(InputError, match="row 1"):
            embedder.embed_ids([[2, 1], bad])


def test_many_texts_of_all_lengths_come_back_in_order(bundle: Bundle, embedder: Embedder) -> None:
    texts = ["ab " * (number * 7 % 19) for number in range(100)]
    assert np.abs(np.asarray(embedder.embed_raw(texts)) - expected(bundle, texts)).max() < BOUND


@pytest.mark.parametrize("dim", DIMS)
def test_a_shortened_vector_is_a_prefix_at_unit_length(
    bundle: Bundle, embedder: Embedder, dim: int
) -> None:
    found = embedder.embed_documents(TEXTS, dim=dim)
    prefix = expected(bundle, ["title: none | text: " + text for text in TEXTS])[:, :dim]
    assert found.vectors.shape == (len(TEXTS), dim)
    assert found.dim == dim
    assert (
        np.abs(found.vectors - prefix / np.linalg.norm(prefix, axis=1, keepdims=True)).max() < BOUND
    )


def test_no_texts_give_no_vectors_of_the_width_asked_for(embedder: Embedder) -> None:
    assert embedder.embed_documents([]).vectors.shape == (0, WIDTH)
    assert np.asarray(embedder.embed_documents([], dim=8)).shape == (0, 8)
    assert embedder.embed_documents([], titles=[]).vectors.shape == (0, WIDTH)
    assert list(embedder.stream_documents([])) == []


def test_a_stream_reads_one_window_at_a_time(bundle: Bundle, embedder: Embedder) -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for number in range(WINDOW_TEXTS + 3):
            taken += 1
            yield f"text {number}"

    stream = embedder.stream_documents(texts(), dim=16)
    assert taken == 0
    first = next(stream)
    assert (taken, len(first)) == (WINDOW_TEXTS, WINDOW_TEXTS)
    (rest,) = stream
    assert rest.vectors.shape == (3, 16)
    assert np.array_equal(
        rest.vectors,
        embedder.embed_documents(
            [f"text {WINDOW_TEXTS + number}" for number in range(3)], dim=16
        ).vectors,
    )


def test_a_stream_takes_titles_and_names_the_position_in_the_whole(embedder: Embedder) -> None:
    texts: list[object] = ["a"] * (WINDOW_TEXTS + 5)
    texts[WINDOW_TEXTS + 2] = "a" * 10_000
    stream = embedder.stream_documents(texts, titles=(None for _ in texts))  # type: ignore[arg-type]
    assert len(next(stream)) == WINDOW_TEXTS
    with pytest.raises(TokenLimitError, match=f"text {WINDOW_TEXTS + 2}: ") as caught:
        next(stream)
    assert caught.value.position == WINDOW_TEXTS + 2


def test_results_can_be_indexed_sliced_and_walked(embedder: Embedder) -> None:
    found = embedder.embed_documents(TEXTS)
    assert np.array_equal(found[1].vector, found.vectors[1])
    assert np.array_equal(found[-1].vector, found.vectors[5])
    assert [one.num_tokens for one in found] == list(found.num_tokens)
    assert np.array_equal(np.asarray(found[2:4]), found.vectors[2:4])
    assert len(found[2:4]) == 2
    with pytest.raises(IndexError):
        found[6]


def test_results_become_arrays(embedder: Embedder) -> None:
    found = embedder.embed_documents(TEXTS)
    assert np.asarray(found, dtype=np.float64).dtype == np.float64
    copy = np.array(found)
    copy[:] = 0
    assert np.linalg.norm(found.vectors[0]) == pytest.approx(1)
    assert np.asarray(found[0]).shape == (WIDTH,)
    assert found.vectors @ found[0] == pytest.approx(found.vectors @ found.vectors[0])


# What a caller can do wrong.


def test_one_string_is_not_a_list_of_texts(embedder: Embedder) -> None:
    for method in (
        embedder.embed_documents,
        embedder.embed_raw,
        embedder.stream_documents,
    ):
        for text in ("hello", b"hello"):
            with pytest.raises(InputError, match="one string"):
                method(text)  # type: ignore[operator]
    with pytest.raises(InputError, match="titles is one string"):
        embedder.embed_documents(["a"], titles="b")


@pytest.mark.parametrize("bad", [3, None, b"bytes", ["nested"], np.zeros(3)])
def test_what_is_not_text_is_refused_with_its_position(embedder: Embedder, bad: object) -> None:
    for method in (embedder.embed_documents, embedder.embed_query, embedder.embed_raw):
        with pytest.raises(InputError, match="text 2: the text is ") as caught:
            method(["a", "b", bad])  # type: ignore[operator]
        assert caught.value.position == 2
    with pytest.raises(InputError, match="text 2: the text is "):
        next(embedder.stream_documents(["a", "b", bad]))  # type: ignore[list-item]
    if not isinstance(bad, list):  # which is several texts
        with pytest.raises(InputError, match=r"must be a list of str|must be str|list of texts"):
            embedder.embed_query(bad)  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", [None, 7, {"a": 1}, {"a", "b"}])
def test_what_is_no_ordered_collection_is_refused(embedder: Embedder, bad: object) -> None:
    with pytest.raises(InputError, match="texts is "):
        embedder.embed_documents(bad)  # type: ignore[arg-type]


def test_titles_must_match_the_texts(embedder: Embedder) -> None:
    with pytest.raises(ShapeError, match="1 titles, but more texts"):
        embedder.embed_documents(["a", "b"], titles=["t"])
    with pytest.raises(ShapeError, match="more titles than the 2 texts"):
        embedder.embed_documents(["a", "b"], titles=["t"] * 3)
    with pytest.raises(ShapeError, match="more titles than the 0 texts"):
        embedder.embed_documents([], titles=["t"])
    with pytest.raises(InputError, match="text 1: its title is int"):
        embedder.embed_documents(["a", "b"], titles=["t", 5])  # type: ignore[list-item]


def test_a_lone_surrogate_is_refused_with_its_position(embedder: Embedder) -> None:
    with pytest.raises(InputError, match=r"text 1: .*U\+D800 at character") as caught:
        embedder.embed_documents(["a", "b\ud800"])
    assert (caught.value.position, caught.value.place) == (1, "text 1")


def test_a_megabyte_is_refused_or_truncated_and_says_so(bundle: Bundle, embedder: Embedder) -> None:
    text = "water and oil " * 75_000
    with pytest.raises(TokenLimitError, match=r"text 1: .* tokens, the limit is 128") as caught:
        embedder.embed_documents(["short", text])
    assert (caught.value.position, caught.value.found[:8]) == (1, "the text")
    assert 'overflow="truncate"' in caught.value.hint
    with pytest.raises(TokenLimitError, match=r"^the text has") as caught:
        embedder.embed_query(text)
    assert caught.value.position is None
    found = embedder.embed_documents(["short", text], overflow="truncate")
    assert found.truncated == (False, True)
    assert found.num_tokens[1] > 100_000
    ids = bundle.tokenizer().encode("title: none | text: " + text, overflow="truncate").ids
    assert len(ids) == MAX_TOKENS == embedder.max_tokens
    assert np.abs(found.vectors[1] - tiny_vectors([ids])[0]).max() < BOUND


@pytest.mark.parametrize("dim", [300, 0, -8, True, 8.5, "8", 64])
def test_a_width_that_was_not_trained_is_refused(embedder: Embedder, dim: object) -> None:
    for embed in (embedder.embed_documents, embedder.stream_documents):
        with pytest.raises(DimensionError, match="was not trained"):
            embed(["a"], dim=dim)  # type: ignore[operator]


def test_other_settings_are_checked(embedder: Embedder) -> None:
    with pytest.raises(PromptError, match="task='cooking'"):
        embedder.embed_query("a", task="cooking")
    with pytest.raises(ConfigError, match="overflow="):
        embedder.embed_documents(["a"], overflow="cut")  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_mb", [0, -1, 1.5, True, "64"])
def test_an_impossible_memory_bound_is_refused(onnx_bundle: Path, memory_mb: object) -> None:
    with pytest.raises(ConfigError, match="memory_mb="):
        Embedder.open(onnx_bundle, memory_mb=memory_mb)  # type: ignore[arg-type]


# Life of an embedder.


def test_it_says_what_it_is(bundle: Bundle, embedder: Embedder) -> None:
    assert (embedder.dim, embedder.dims, embedder.max_tokens, embedder.threads) == (
        WIDTH,
        DIMS,
        MAX_TOKENS,
        2,
    )
    assert embedder.fingerprint == embedder.manifest.fingerprint == bundle.manifest.fingerprint
    assert embedder.runtime.split()[0] == bundle.manifest.runtime
    assert embedder.tasks == bundle.prompts.tasks
    assert "clustering" in embedder.tasks


def test_a_closed_embedder_refuses_and_closes_again(bundle: Bundle) -> None:
    with Embedder.open(bundle.folder, threads=2) as embedder:
        stream = embedder.stream_documents(["a"])
    embedder.close()
    for use in (
        lambda: embedder.embed_query("a"),
        lambda: embedder.embed_documents([]),
        lambda: next(stream),
    ):
        with pytest.raises(EgemmaError, match="closed"):
            use()
    assert embedder.dim == WIDTH  # what it was can still be asked


def test_a_forgotten_embedder_is_released(bundle: Bundle) -> None:
    script = """
import sys
from egemma import Embedder
for kept in (True, False):
    embedder = Embedder.open(sys.argv[1], threads=2 if kept else 1)  # another number: only when the first holds the pool no more
    embedder.embed_query("a")
    if kept:
        del embedder
print(embedder.dim)
"""
    done = run_python(script, bundle.folder)  # it ends with an open embedder
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(WIDTH), "")


def test_threads_take_turns_and_get_their_own_vectors(bundle: Bundle, embedder: Embedder) -> None:
    wanted = expected(bundle, [f"task: search result | query: {number}" for number in range(40)])
    found: dict[int, np.ndarray] = {}

    def embed(numbers: range) -> None:
        for number in numbers:
            found[number] = embedder.embed_query(str(number)).vector

    workers = [threading.Thread(target=embed, args=(range(start, 40, 4),)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert np.abs(np.stack([found[number] for number in range(40)]) - wanted).max() < BOUND


def test_an_interrupt_passes_and_leaves_the_embedder_usable(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedder._runtime, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedder.embed_query("a")
    assert embedder.embed_query("a").dim == WIDTH


def test_it_refuses_to_work_in_a_forked_process(embedder: Embedder, bundle: Bundle) -> None:
    script = """
import os, sys
from egemma import EgemmaError, Embedder
embedder = Embedder.open(sys.argv[1], threads=2)
embedder.embed_query("a")
if os.fork() == 0:
    try:
        embedder.embed_query("a")
    except EgemmaError as error:
        assert "forked" in str(error), error
        embedder.close()
        fails = embedder.runtime.startswith("executorch")  # its pool is one for the process, and came along without its threads
        try:
            with Embedder.open(sys.argv[1], threads=2) as mine:
                mine.embed_query("a")
            assert not fails
        except EgemmaError as error:
            assert fails and "spawn" in str(error), error
        sys.exit(5)
    sys.exit(6)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 5
embedder.embed_query("a")
"""
    done = run_python(script, bundle.folder)
    assert done.returncode == 0, done.stderr


def test_many_openings_do_not_pile_up_memory(bundle: Bundle) -> None:
    script = """
import sys
from egemma import Embedder
def resident_kb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
for number in range(60):
    with Embedder.open(sys.argv[1], threads=1) as embedder:
        embedder.embed_query("a")
    if number == 20:
        before = resident_kb()
print(resident_kb() - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads /proc")
    done = run_python(script, bundle.folder)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4096, "KB more after 40 openings"


# Bundles that are not what they should be.


def copy_of(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


def test_a_path_without_a_bundle_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(BundleError):
            Embedder.open(path)


def test_a_missing_builtin_model_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("egemma.embedder.BUILTIN_FOLDER", tmp_path / "builtin")
    with pytest.raises(BundleError, match="without its built-in model"):
        Embedder.open("builtin")


def test_the_builtin_model_is_a_bundle_by_name(
    monkeypatch: pytest.MonkeyPatch, onnx_bundle: Path
) -> None:
    monkeypatch.setattr("egemma.embedder.BUILTIN_FOLDER", onnx_bundle)
    with Embedder.open("builtin") as embedder:
        assert embedder.dim == WIDTH


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_damaged_bundle_is_refused(
    bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    folder = copy_of(bundle.folder, tmp_path)
    damage(next(folder.glob(f"{part}.*")))
    with pytest.raises(BundleError, match=part):
        Embedder.open(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dims": (16, 8)}, BundleError),
        ({"batch": "dynamic"}, BundleError),
        ({"architecture": {}}, BundleError),
        ({"prompts": {}}, EgemmaError),
        (
            {
                "tokenizer": {
                    "bos_id": 1,
                    "eos_id": 2,
                    "pad_id": 0,
                    "vocab_size": 512,
                    "max_tokens": 128,
                }
            },
            EgemmaError,
        ),
        (
            {
                "tokenizer": {
                    "bos_id": 2,
                    "eos_id": 1,
                    "pad_id": 0,
                    "vocab_size": 512,
                    "max_tokens": 129,
                }
            },
            BundleError,
        ),
    ],
)
def test_a_manifest_that_disagrees_with_the_files_is_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, object], error: type[EgemmaError]
) -> None:
    manifest = bundle.manifest
    if manifest.runtime == "onnxruntime" and (
        changes.get("batch") or changes.get("tokenizer", {}).get("max_tokens") == 129
    ):  # type: ignore[attr-defined]
        pytest.skip("an ONNX file takes batches, and does not say how long a text may be")
    folder = tiny_bundle(
        tmp_path / "bundle",
        runtime=manifest.runtime,
        tokenizer=bundle.folder / "tokenizer.model",
        model=bundle.model_path,
        changes=changes,
    )
    with pytest.raises(error), Embedder.open(folder, threads=2) as embedder:
        embedder.embed_query("a")


def test_no_manifest_however_wrong_gives_anything_but_an_egemma_error(
    onnx_bundle: Path, tmp_path: Path
) -> None:
    folder = copy_of(onnx_bundle, tmp_path)
    manifest = folder / "manifest.json"
    good = json.loads(manifest.read_text())
    wrong: list[Any] = [None, 0, -1, 1.5, True, "x", [], {}, [[]], {"a": 1}, 2**70, float("nan")]
    bodies: list[Any] = [good | {name: value} for name in good for value in wrong]
    for table in ("tokenizer", "prompts", "architecture", "files", "scheme"):
        bodies += [
            good | {table: good[table] | {name: value}} for name in good[table] for value in wrong
        ]
    texts = [json.dumps(body).encode() for body in bodies]
    for text in (*texts, b"", b"\xff\xfe", b"[]", b"null", b'{"a":' + b"[" * 100_000):
        manifest.write_bytes(text)
        with (
            contextlib.suppress(EgemmaError),
            Embedder.open(folder, threads=1, check_hashes=False) as embedder,
        ):
            embedder.embed_documents(["a"], titles=["t"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": float("nan")}, "NaN"),
        ({"factor": float("inf")}, "NaN or infinity"),
        ({"output": "last_hidden_state"}, "it must take"),
        ({"mask": "mask"}, "it must take"),
    ],
)
def test_a_broken_export_gives_no_vectors(
    tmp_path: Path, tiny_spm: Path, changes: dict[str, object], said: str
) -> None:
    model = tiny_onnx(tmp_path / "broken.onnx", **changes)  # type: ignore[arg-type]
    folder = tiny_bundle(tmp_path / "bundle", tokenizer=tiny_spm, model=model)
    with pytest.raises(BundleError, match=said), Embedder.open(folder) as embedder:
        embedder.embed_query("a")


def test_kleidiai_is_refused_where_it_means_nothing(pte_bundle: Path, onnx_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="kleidiai"):
        Embedder.open(pte_bundle, kleidiai=False)
    with Embedder.open(onnx_bundle, kleidiai=False) as embedder:
        assert embedder.embed_query("a").dim == WIDTH


def test_a_package_without_executorch_says_what_to_do(pte_bundle: Path) -> None:
    script = """
import sys
from pathlib import Path
import egemma.runtimes.executorch as executorch
from egemma import Embedder, RuntimeUnavailableError
executorch.NATIVE = Path("/nowhere")
try:
    Embedder.open(sys.argv[1])
except RuntimeUnavailableError as error:
    print(error)
"""
    assert "EGEMMA_BUILD_EXECUTORCH" in run_python(script, pte_bundle).stdout


# The package itself.


def test_importing_egemma_loads_nothing_heavy() -> None:
    done = run_python(
        "import sys, egemma; print([name for name in ('torch', 'onnxruntime', 'sentencepiece', "
        "'numpy') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_exists(onnx_bundle: Path) -> None:
    done = run_python(
        "import egemma; print([name for name in egemma.__all__ if getattr(egemma, name, None) is "
        "None])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="Embeder"):
        egemma.Embeder  # noqa: B018
    assert RuntimeUnavailableError.__mro__[1] is EgemmaError
