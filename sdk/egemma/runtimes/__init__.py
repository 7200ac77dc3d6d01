"""The two programs that can run a bundle's model, behind one small interface."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from egemma_core.bundle import Bundle
from egemma_core.errors import BundleError, ConfigError

# A float32 vector divided by its own length is within 1e-6 of 1; XNNPACK's reciprocal square root
# may be coarser on some processors.
LARGEST_LENGTH_ERROR = 1e-3


class Runtime(Protocol):
    """A loaded model. Calls must not overlap; the embedder holds the lock."""

    @property
    def name(self) -> str:
        """As in the manifest: "onnxruntime" or "executorch"."""

    @property
    def version(self) -> str: ...

    @property
    def threads(self) -> int:
        """Threads that it computes with."""

    @property
    def batch(self) -> str:
        """What one run takes: "one" text, or "dynamic": any number of them."""

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Compute one vector per text: (B, D) float32, finite, owned by the caller.

        Args:
            ids: (B, T) int64.
            mask: (B, T) int64, 1 on real tokens and 0 on padding; at least one 1 per row.

        Raises:
            BundleError: the model failed, or gave something else than such vectors.
        """

    def close(self) -> None:
        """Give the memory back; nothing else may be called afterwards."""


def open_runtime(bundle: Bundle, *, threads: int, kleidiai: bool) -> Runtime:
    """Load the bundle's model into the runtime it was exported for.

    Args:
        threads: of ONNX Runtime, for this model; of ExecuTorch, for all that are open together.
        kleidiai: False keeps Arm's KleidiAI kernels out of ONNX Runtime: symmetric int4 then gives
            the same numbers as on x86, more slowly.

    Raises:
        BundleError: the model file is damaged, or is not what the manifest says.
        RuntimeUnavailableError: that runtime is not installed here, or another copy of ExecuTorch
            is loaded.
        ConfigError: ExecuTorch without KleidiAI, or with other threads than an open model has.
    """
    manifest, path = bundle.manifest, bundle.model_path
    dim, max_tokens = manifest.dims[0], manifest.tokenizer["max_tokens"]
    if manifest.runtime == "executorch":
        from egemma.runtimes.executorch import ExecuTorchRuntime

        if not kleidiai:
            found = "kleidiai=False is a switch of ONNX Runtime, this bundle is for ExecuTorch."
            raise ConfigError(found, hint="Leave it out.")
        runtime: Runtime = ExecuTorchRuntime(path, dim=dim, max_tokens=max_tokens, threads=threads)
    else:
        from egemma.runtimes.onnx import OnnxRuntime

        runtime = OnnxRuntime(path, dim=dim, threads=threads, kleidiai=kleidiai)
    if manifest.batch == "dynamic" and runtime.batch == "one":
        runtime.close()
        found = f"{path} takes one text per run, the manifest says batch='dynamic'."
        raise BundleError(found, hint="Export again.")
    return runtime


def check_output(
    vectors: NDArray[np.float32], *, texts: int, dim: int, model: object
) -> NDArray[np.float32]:
    """Return a model's output when it is (texts, dim) float32, each row finite and of length 1.

    Raises:
        BundleError: it is not: a model that gives NaN must not fill an index, and one that lost its
            last step gives other vectors.
    """
    if vectors.dtype != np.float32 or vectors.shape != (texts, dim):
        found = f"{model} gave {vectors.shape} {vectors.dtype}, the manifest says"
        raise BundleError(f"{found} {(texts, dim)} float32.", hint="Export again.")
    if not np.isfinite(vectors).all():
        hint = "Copy the bundle again, or export it again and look at its verification."
        raise BundleError(f"{model} gave NaN or infinity.", hint=hint)
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = lengths[np.abs(lengths - 1) > LARGEST_LENGTH_ERROR]
    if wrong.size:
        found = f"{model} gave a vector of length {wrong[0]:.4g}, not 1: it lost its last step."
        raise BundleError(found, hint="Export again.")
    return vectors
