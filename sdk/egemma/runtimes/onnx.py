"""ONNX Runtime: CPU only, silent, and with its telemetry off."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.runtimes import check_output
from egemma_core.errors import BundleError, RuntimeUnavailableError

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
_TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"


class OnnxRuntime:
    """A session over one model file; see `Runtime` and `open_runtime`.

    Args:
        dim: width that the manifest promises.
        threads: for the operators of the one run at a time.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, dim: int, threads: int, kleidiai: bool = True) -> None:
        onnxruntime = _import_onnxruntime()
        self.version: str = onnxruntime.__version__
        self.threads = threads
        self._path, self._dim = path, dim
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised; nothing is printed
        # Idle threads sleep instead of spinning: between two searches a phone should do nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The arena halves the peak and saves a tenth of the time against malloc, but keeps what its
        # largest run took: see `run`.
        options.enable_cpu_mem_arena = True
        # x86 without VNNI multiplies unsigned by signed bytes in a kernel that saturates: cosine
        # 0.98 instead of 0.9999, silently.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if not kleidiai:
            options.add_session_config_entry("mlas.disable_kleidiai", "1")
        try:
            # the fallback prints, and tries the same again
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            inputs = _nodes(self._session.get_inputs())
            outputs = _nodes(self._session.get_outputs())
        except Exception as error:  # its exceptions have no other parent
            found = f"{path}: ONNX Runtime {self.version} cannot load it: {_first_line(error)}."
            raise BundleError(found, hint="Copy it again.") from error
        taken = {name: (kind, len(shape)) for name, (kind, shape) in inputs.items()}
        given = outputs.get(OUTPUT, ("",))[0]
        if taken != dict.fromkeys(INPUTS, ("tensor(int64)", 2)) or given != "tensor(float)":
            raise BundleError(
                f"{path} takes {inputs} and gives {outputs}; it must take {INPUTS} int64 (B, T) "
                f"and give {OUTPUT} float32 (B, D).",
                hint="Export again.",
            )
        self.batch = "one" if isinstance(inputs[INPUTS[0]][1][0], int) else "dynamic"
        self._shrink = onnxruntime.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._largest_run = 0  # tokens, padding included, since the arena was last shrunk

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        # Shrinking costs a tenth of a run: only the first much smaller run after a large one, such
        # as a query after indexing, pays it.
        shrink = ids.size * 4 <= self._largest_run
        self._largest_run = ids.size if shrink else max(ids.size, self._largest_run)
        feed = dict(zip(INPUTS, (ids, mask), strict=True))
        try:
            vectors = self._session.run([OUTPUT], feed, self._shrink if shrink else None)[0]
        except Exception as error:  # its exceptions have no other parent
            found = f"ONNX Runtime {self.version} failed on {ids.shape} tokens"
            raise BundleError(f"{self._path}: {found}: {_first_line(error)}.") from error
        return check_output(vectors, texts=len(ids), dim=self._dim, model=self._path)

    def close(self) -> None:
        del self._session


def _nodes(nodes: Iterable[Any]) -> dict[str, tuple[str, list[int | str | None]]]:
    """Return type and shape of a graph's inputs or outputs; a free size is a name or None."""
    return {node.name: (node.type, node.shape) for node in nodes}


def _import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime with its telemetry off.

    Since 1.32 the import alone writes a device id and reports to Microsoft. Where the application
    imported it before us with telemetry on, that was its choice; we stop further events and say so.
    """
    already_on = "onnxruntime" in sys.modules and os.environ.get(_TELEMETRY_SWITCH) != "1"
    if not already_on:
        os.environ[_TELEMETRY_SWITCH] = "1"
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        found = f"ONNX Runtime cannot be imported: {error}."
        raise RuntimeUnavailableError(found, hint="pip install onnxruntime") from error
    if already_on:
        onnxruntime.disable_telemetry_events()
        warnings.warn(
            f"onnxruntime was imported before egemma without {_TELEMETRY_SWITCH}=1 and may have "
            f"reported its start; its events are off from now on. Set {_TELEMETRY_SWITCH}=1 first.",
            RuntimeWarning,
            stacklevel=2,
        )
    return onnxruntime  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
