"""Both runtimes on damaged files, on wrong shapes, and beside other users of the same libraries."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from egemma import BundleError, ConfigError, Embedder
from egemma.runtimes import Runtime, check_output, open_runtime
from egemma_core.bundle import read_bundle
from tests.sdk.conftest import run_python
from tests.tiny import MAX_TOKENS, WIDTH, tiny_vectors


@pytest.fixture(params=["onnx_bundle", "pte_bundle"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def opened(folder: Path, threads: int = 2) -> Runtime:
    return open_runtime(read_bundle(folder), threads=threads, kleidiai=True)


def rows(*lengths: int) -> list[list[int]]:
    return [[(7 * number + length) % 500 for number in range(length)] for length in lengths]


def test_padding_does_not_change_a_vector(onnx_bundle: Path) -> None:
    texts = rows(3, 9, 1)
    ids, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = text, 1
    runtime = opened(onnx_bundle)
    assert runtime.batch == "dynamic"
    assert np.abs(runtime.run(ids, mask) - tiny_vectors(texts)).max() < 1e-6
    runtime.close()


@pytest.mark.parametrize("tokens", [1, 2, 17, MAX_TOKENS])
def test_every_length_gives_the_vector_that_numpy_gives(folder: Path, tokens: int) -> None:
    runtime = opened(folder)
    ids = np.array(rows(tokens))
    assert np.abs(runtime.run(ids, np.ones_like(ids)) - tiny_vectors(rows(tokens))).max() < 1e-6
    runtime.close()


def test_a_result_stays_as_it_was_when_the_model_runs_again(folder: Path) -> None:
    runtime = opened(folder)
    first, second = np.array(rows(4)), np.array(rows(8))
    kept = runtime.run(first, np.ones_like(first))
    before = kept.copy()
    runtime.run(second, np.ones_like(second))
    runtime.close()
    assert np.array_equal(kept, before)


def test_a_runtime_says_what_it_is(folder: Path) -> None:
    runtime = opened(folder, threads=1)
    assert (runtime.name, runtime.threads) == (read_bundle(folder).manifest.runtime, 1)
    assert runtime.version.count(".") == 2
    runtime.close()


def test_executorch_refuses_more_tokens_than_memory_was_planned_for(pte_bundle: Path) -> None:
    runtime = opened(pte_bundle)
    for tokens in (MAX_TOKENS + 1, 10_000):
        ids = np.zeros((1, tokens), np.int64)
        with pytest.raises(
            BundleError, match=f"{tokens} tokens; this program takes 1 to {MAX_TOKENS}"
        ):
            runtime.run(ids, ids + 1)
    with pytest.raises(BundleError, match="0 tokens"):
        runtime.run(np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64))
    runtime.close()


@pytest.mark.parametrize("token", [-1, 512, 2**40])
def test_a_token_that_is_not_in_the_table_is_an_error(folder: Path, token: int) -> None:
    runtime = opened(folder)
    # ONNX counts -1 from the end
    ids = np.array([[1, 512 if token == -1 and runtime.name == "onnxruntime" else token]])
    with pytest.raises(BundleError, match="failed on"):
        runtime.run(ids, np.ones_like(ids))
    good = np.array(rows(5))
    assert np.abs(runtime.run(good, np.ones_like(good)) - tiny_vectors(rows(5))).max() < 1e-6
    runtime.close()


def test_vectors_of_another_shape_type_or_length_or_without_a_number_are_refused() -> None:
    good = np.full((2, 4), 0.5, np.float32)
    assert check_output(good, texts=2, dim=4, model="m") is good
    for bad in (
        good[:1],
        good[:, :3],
        good.astype(np.float64),
        good * np.nan,
        good * np.inf,
        good * 2,
        good * 0,
        good * np.array([[1], [1.01]], np.float32),
    ):
        with pytest.raises(BundleError, match="m gave"):
            check_output(bad, texts=2, dim=4, model="m")


# One thread pool per process.


def test_executorch_models_that_are_open_together_share_their_threads(pte_bundle: Path) -> None:
    with Embedder.open(pte_bundle, threads=2) as first:
        with pytest.raises(ConfigError, match="computes with 2"):
            Embedder.open(pte_bundle, threads=1)
        with Embedder.open(pte_bundle, threads=2) as second:
            assert np.array_equal(first.embed_query("a").vector, second.embed_query("a").vector)
    # the failed and the closed ones hold nothing back
    with Embedder.open(pte_bundle, threads=1) as alone:
        assert alone.threads == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_asked_for_are_the_threads_there_are(folder: Path, threads: int) -> None:
    script = """
import os, sys
from egemma import Embedder
import numpy
before = len(os.listdir("/proc/self/task"))
with Embedder.open(sys.argv[1], threads=int(sys.argv[2])) as embedder:
    embedder.embed_query("a")
    print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("reads /proc")
    done = run_python(script, folder, threads, OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == threads - 1  # the calling thread computes as well


# Files that are not models. Each runs in a process of its own: what is tested is that it ends with
# an error, not a signal.

OPEN_DAMAGED = """
import sys
from pathlib import Path
from egemma import EgemmaError, Embedder
folder, mode = Path(sys.argv[1]), sys.argv[2]
(model,) = folder.glob("model.*")
good = model.read_bytes()
manifest = (folder / "manifest.json").read_text()

def damaged():
    if mode == "cut":
        yield from (good[:size] for size in (0, 1, 7, 64, *range(1000, len(good), 7919), len(good) - 1))
    elif mode == "random":
        import random
        source = random.Random(3)
        yield from (source.randbytes(size) for size in (1, 64, 4096, len(good)) for _ in range(5))
    elif mode == "flipped":
        for bit in range(8 * 60, 8 * len(good), 8 * 1511):
            yield good[: bit // 8] + bytes([good[bit // 8] ^ (1 << bit % 8)]) + good[bit // 8 + 1 :]
    elif mode == "other":
        yield from (b"PK\\x03\\x04" + bytes(500), b"{}", good[::-1], bytes(len(good)))

outcomes = {"error": 0, "vector": 0}
for body in damaged():
    model.write_bytes(body)
    (folder / "manifest.json").write_text(manifest.replace(f'"bytes": {len(good)}', f'"bytes": {len(body)}'))
    try:
        with Embedder.open(folder, threads=1, check_hashes=False) as embedder:
            assert abs(1 - float((embedder.embed_query("a b c").vector ** 2).sum())) < 1e-5
        outcomes["vector"] += 1
    except EgemmaError as error:
        assert str(error)
        outcomes["error"] += 1
    try:
        Embedder.open(folder, threads=1)
        sys.exit("a wrong hash was accepted")
    except EgemmaError:
        pass
print(outcomes)
"""


@pytest.mark.parametrize("mode", ["cut", "random", "flipped", "other"])
def test_a_damaged_model_is_an_error_and_nothing_is_printed(
    folder: Path, tmp_path: Path, mode: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    done = run_python(OPEN_DAMAGED, copy, mode)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{'error': ")
    assert done.stdout.count("\n") == 1
    if mode != "flipped":  # a bit of a weight, or the last byte of padding, still leaves a model
        assert int(done.stdout.rsplit(" ", 1)[1].rstrip("}\n")) <= 1


@pytest.mark.parametrize("name", [b"ReduceSum", b"input_ids"])
def test_a_name_that_is_no_text_is_refused_and_nothing_is_printed(
    onnx_bundle: Path, tmp_path: Path, name: bytes
) -> None:
    """ONNX Runtime's Python wrapper prints "EP Error" and tries again, unless told not to."""
    copy = shutil.copytree(onnx_bundle, tmp_path / "copy")
    model = copy / "model.onnx"
    model.write_bytes(model.read_bytes().replace(name, name[:-3] + b"\xff\xfe\xfd"))
    script = """
import sys
from egemma import BundleError, Embedder
try:
    Embedder.open(sys.argv[1], check_hashes=False)
except BundleError:
    print("refused")
"""
    done = run_python(script, copy)
    assert (done.stdout, done.stderr) == ("refused\n", "")


# Beside torch's ExecuTorch.


def test_a_process_with_another_executorch_is_refused(pte_bundle: Path) -> None:
    script = """
import sys
import executorch.extension.pybindings.portable_lib
from egemma import Embedder, RuntimeUnavailableError
try:
    Embedder.open(sys.argv[1])
except RuntimeUnavailableError as error:
    print(error)
"""
    done = run_python(script, pte_bundle)
    assert done.returncode == 0, done.stderr
    assert "another copy of ExecuTorch" in done.stdout


def test_executorch_runs_without_torch_and_without_the_executorch_package(pte_bundle: Path) -> None:
    script = """
import sys
for name in ("torch", "executorch", "onnxruntime"):
    sys.modules[name] = None  # importing it fails
from egemma import Embedder
with Embedder.open(sys.argv[1], threads=1) as embedder:
    print(embedder.embed_query("a").dim)
"""
    done = run_python(script, pte_bundle)
    assert done.stdout.strip() == str(WIDTH), done.stderr


def test_a_missing_onnx_runtime_says_what_to_do(onnx_bundle: Path) -> None:
    script = """
import sys
sys.modules["onnxruntime"] = None
from egemma import Embedder, RuntimeUnavailableError
try:
    Embedder.open(sys.argv[1])
except RuntimeUnavailableError as error:
    print(error)
"""
    assert "pip install onnxruntime" in run_python(script, onnx_bundle).stdout


def test_onnx_runtime_may_not_use_the_kernel_that_saturates(onnx_bundle: Path) -> None:
    # x86 without VNNI, emulated: cosine 0.981 to the float model without this option, 0.99994 with
    # it, and no error either way.
    with Embedder.open(onnx_bundle) as embedder:
        options = embedder._runtime._session.get_session_options()  # type: ignore[union-attr]
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
