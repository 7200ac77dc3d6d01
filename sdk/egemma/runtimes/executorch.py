"""ExecuTorch without torch: ctypes over sdk/egemma/_native/egx.cpp, which setup.py builds."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egemma.runtimes import check_output
from egemma_core.errors import BundleError, ConfigError, EgemmaError, RuntimeUnavailableError

NATIVE = Path(__file__).resolve().parent.parent / "_native"
_OTHERS = re.compile(
    r"/(libexecutorch|libquantized_ops_aot_lib|_portable_lib)[^/]*$|/executorch/extension/.*\.so$"
)


@dataclass
class _Pool:
    """The thread pool of ExecuTorch: one per process, whoever opens a model."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: int = 0  # its size while models are open
    open_models: int = 0
    process: int | None = None  # that made it; its threads do not survive a fork


_pool = _Pool()


class ExecuTorchRuntime:
    """One .pte; see `Runtime` for its methods, and `open_runtime` for what is refused.

    Args:
        dim, max_tokens: what the manifest promises; the file must agree.
    """

    name = "executorch"
    batch = "one"

    def __init__(self, path: Path, *, dim: int, max_tokens: int, threads: int) -> None:
        self._egx = _library()
        self.version: str = self._egx.egx_version().decode()
        self.threads = threads
        self._path, self._dim = path, dim
        self._model: int | None = None
        _take_threads(self._egx, threads)
        try:
            found_tokens, found_dim = ctypes.c_int32(), ctypes.c_int32()
            facts = ctypes.byref(found_tokens), ctypes.byref(found_dim)
            self._model = self._egx.egx_open(os.fsencode(path), *facts)
            if not self._model:
                found = f"{path}: ExecuTorch {self.version} cannot load it: {self._error()}."
                raise BundleError(found, hint="Copy it again.")
            if found_dim.value != dim or found_tokens.value < max_tokens:
                raise BundleError(
                    f"{path} reads {found_tokens.value} tokens and gives {found_dim.value} "
                    f"channels; the manifest says {max_tokens} and {dim}.",
                    hint="Export again.",
                )
        except BaseException:
            self.close()
            raise

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._model is not None, "closed"
        assert ids.shape == mask.shape == (1, ids.size), "batch is 'one'"
        ids, mask = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(mask, np.int64)
        # what is not written does not pass for a vector
        vectors = np.full((1, self._dim), np.nan, np.float32)
        inputs = ids.ctypes.data, mask.ctypes.data, ids.shape[1]
        if self._egx.egx_run(self._model, *inputs, vectors.ctypes.data, self._dim) != 0:
            found = f"ExecuTorch {self.version} failed on {ids.shape[1]} tokens: {self._error()}."
            raise BundleError(f"{self._path}: {found}")
        return check_output(vectors, texts=1, dim=self._dim, model=self._path)

    def close(self) -> None:
        if self._model:
            self._egx.egx_close(self._model)
        self._model = None
        with _pool.lock:
            _pool.open_models -= 1

    def _error(self) -> str:
        text: bytes = self._egx.egx_error()
        return text.decode("utf-8", "replace").rstrip(".")


def _take_threads(egx: ctypes.CDLL, threads: int) -> None:
    with _pool.lock:
        if _pool.process not in (None, os.getpid()):
            raise EgemmaError(
                "this process was forked from one that had an ExecuTorch model open; its threads "
                "did not come along.",
                hint="Open models after the fork only, or start workers with the 'spawn' method.",
            )
        if _pool.open_models and _pool.threads != threads:
            raise ConfigError(
                f"threads={threads}: an open ExecuTorch model computes with {_pool.threads}, and "
                "the thread pool is one for the whole process.",
                hint=f"Ask for {_pool.threads}, or close that model first.",
            )
        if not _pool.open_models and egx.egx_set_threads(threads) != 0:
            raise EgemmaError(f"threads={threads}: {egx.egx_error().decode('utf-8', 'replace')}")
        _pool.process, _pool.threads = os.getpid(), threads
        _pool.open_models += 1


@cache
def _library() -> ctypes.CDLL:
    """Load libegx with its five ExecuTorch libraries, once."""
    path = NATIVE / ("libegx.dylib" if sys.platform == "darwin" else "libegx.so")
    if not path.is_file():
        raise RuntimeUnavailableError(
            "this egemma was built without ExecuTorch and cannot run model.pte.",
            hint="Install a wheel that has it, build egemma again without "
            "EGEMMA_BUILD_EXECUTORCH=0 on Linux or macOS, or export the model with --runtime "
            "onnxruntime.",
        )
    others = _other_executorch()
    if others:
        raise RuntimeUnavailableError(
            f"another copy of ExecuTorch is loaded in this process ({others[0]}); both would "
            "share the libraries and the thread pool of whichever came first.",
            hint="Run the bundle in a process of its own, one that imports neither `executorch` "
            "nor an exporter.",
        )
    try:
        return _declare(ctypes.CDLL(str(path)))
    # AttributeError: an in-place build older than this file
    except (OSError, AttributeError) as error:
        found = f"{path} cannot be used: {error}."
        raise RuntimeUnavailableError(found, hint="Build egemma again on this machine.") from error


def _declare(egx: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    egx.egx_error.restype = egx.egx_version.restype = ctypes.c_char_p
    egx.egx_set_threads.argtypes = [ctypes.c_uint32]
    egx.egx_open.restype = pointer
    egx.egx_open.argtypes = [ctypes.c_char_p, pointer, pointer]
    egx.egx_run.argtypes = [pointer, pointer, pointer, number, pointer, number]
    egx.egx_close.argtypes = [pointer]
    egx.egx_close.restype = None
    return egx


def _other_executorch() -> list[str]:
    """List the libraries of the `executorch` Python package in this process."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text(errors="surrogateescape").splitlines()
        rows = (line.split(maxsplit=5) for line in lines)
        loaded = {row[5] for row in rows if len(row) == 6}
    else:  # macOS: what Python imported
        loaded = {str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}
    return sorted(path for path in loaded if Path(path).parent != NATIVE and _OTHERS.search(path))
