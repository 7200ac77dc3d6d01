"""One export, from checkpoint to a bundle whose finished file was run and compared."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from egemma_core.bundle import RUNTIMES, TOKENIZER, Bounds
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.checks import one_of
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_export import run_bundle
from egemma_export.bundle_folder import atomic_folder, write_manifest
from egemma_export.golden import (
    GoldenText,
    golden_file,
    golden_texts,
    reference_vectors,
    write_golden,
)
from egemma_export.manifest import make_manifest, measured_manifest
from egemma_export.mistakes import mistaken_vectors
from egemma_export.report import ExportReport, LayerLoss, failure_text
from egemma_export.targets import TARGETS, Target
from egemma_quant.layer_report import HEAD, kept_outputs, layer_cosines, layers_of, weight_errors
from egemma_quant.qat import rounded_weights
from egemma_quant.schemes import Scheme

STAGES = ("read", "reference", "lower", "round", "verify", "finish")
PROBE = "titled document"  # the golden text of which the outputs of every layer are compared

Vectors = dict[str, NDArray[np.float32]]  # (dim,) float32 by golden text


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export and how strictly to judge it."""

    target: str
    model: str  # folder or hub id
    out: Path
    revision: str | None = None  # of a hub id
    replace: bool = False  # an existing bundle at `out`
    min_cosine_float: float | None = None  # None: the target's own bound
    min_cosine_quantized: float | None = None
    threads: int | None = None  # of the verification run; None: what this process may use

    @property
    def bounds(self) -> Bounds:
        """The target's own, or what was asked for instead."""
        asked = {
            "min_cosine_float": self.min_cosine_float,
            "min_cosine_quantized": self.min_cosine_quantized,
        }
        return replace(
            TARGETS[self.target].bounds,
            **{name: bound for name, bound in asked.items() if bound is not None},
        )

    def __post_init__(self) -> None:
        one_of("target", self.target, list(TARGETS))
        _ = self.bounds  # refuses what is no cosine


def export(
    config: ExportConfig, progress: Callable[[str, str], None] = lambda stage, detail: None
) -> ExportReport:
    """Make the bundle `config.out`; nothing is left there unless its finished file passed.

    Args:
        progress: called with a stage of STAGES and a detail.

    Raises:
        CheckpointError: the model is refused.
        ExportError: the finished file fails its bounds; the text says by how much and which layers
            lost what.
        BundleError: `out` exists or cannot be written.
    """
    target = TARGETS[config.target]
    clock = _Clock(progress)
    with clock.stage("read"):
        checkpoint = open_checkpoint(config.model, config.revision)
        texts = golden_texts(checkpoint.tokenizer(), checkpoint.prompts)
    with atomic_folder(config.out, replace=config.replace) as folder:
        with clock.stage("read"):
            encoder = load_encoder(checkpoint)
        with clock.stage("reference"):
            exact = _observe(encoder, texts)
        with clock.stage("lower"):
            graph = _write_model(encoder, target, folder, partial(progress, "lower"))
        with clock.stage("round"):
            rounded = _round(encoder, target.scheme, texts, exact)
            del encoder
            gc.collect()
        with clock.stage("verify"):
            shutil.copyfile(checkpoint.tokenizer_path, folder / TOKENIZER)
            golden = golden_file(texts, exact.vectors, rounded.vectors, rounded.mistaken)
            write_golden(folder, golden)
            manifest = make_manifest(checkpoint, target, folder, config.bounds)
            write_manifest(folder, manifest)
            verification = run_bundle.verify(folder, config.threads)
            if not verification["passed"]:
                raise ExportError(failure_text(verification, rounded.layers))
            latency = run_bundle.bench(folder, config.threads, checkpoint.config.max_tokens)
        with clock.stage("finish"):
            write_golden(folder, golden | {"measured": {"cases": verification["cases"]}})
            write_manifest(folder, measured_manifest(manifest, folder, _summary(verification)))
            file_bytes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return ExportReport.of(
        checkpoint,
        target,
        config.out,
        file_bytes=file_bytes,
        graph=graph,
        layers=rounded.layers,
        verification=verification,
        latency=latency,
        seconds=clock.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """What a model gives for the golden texts."""

    vectors: Vectors
    outputs: dict[str, Tensor]  # by layer, (T, D) of the text PROBE; of the head (dim,)


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """What the rounded model gives, and what rounding cost."""

    vectors: Vectors
    mistaken: dict[str, Vectors]  # by mistake
    layers: list[LayerLoss]  # none for a float32 target


def _observe(encoder: Encoder, texts: list[GoldenText]) -> _Observed:
    """Run each golden text once."""
    probe = [text for text in texts if text.name == PROBE]
    others = [text for text in texts if text.name != PROBE]
    with kept_outputs([*layers_of(encoder), (HEAD, encoder)]) as outputs:
        vectors = reference_vectors(encoder, probe)
    return _Observed(vectors=vectors | reference_vectors(encoder, others), outputs=outputs)


def _round(
    encoder: Encoder, scheme: Scheme | None, texts: list[GoldenText], exact: _Observed
) -> _Rounded:
    """Run each golden text with rounded weights, right and under each known mistake.

    Args:
        exact: what the float model gives.
    """
    if scheme is None:
        mistaken = mistaken_vectors(encoder, texts, exact.vectors)
        return _Rounded(vectors=exact.vectors, mistaken=mistaken, layers=[])
    with rounded_weights(encoder, scheme) as float_weights:
        errors = weight_errors(encoder, float_weights)
        found = _observe(encoder, texts)
        mistaken = mistaken_vectors(encoder, texts, found.vectors)
    cosines = layer_cosines([exact.outputs], [found.outputs])
    layers = [
        LayerLoss(
            layer=layer,
            weight_error=errors.get(layer, 0.0),
            hidden_cosine=float(of_tokens.mean()),
        )
        for layer, of_tokens in cosines.items()
    ]
    return _Rounded(vectors=found.vectors, mistaken=mistaken, layers=layers)


def _write_model(
    encoder: Encoder, target: Target, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write the model file and return what its writer counted."""
    path = folder / RUNTIMES[target.runtime]
    if target.runtime == "executorch":
        from egemma_export.to_executorch import write_pte

        return asdict(write_pte(encoder, target.scheme, path, progress=progress))
    from egemma_export.to_onnx import write_onnx

    # Beside, because ONNX Runtime maps that file instead of copying it: less than half the memory
    # after loading.
    return asdict(write_onnx(encoder, target.scheme, path, weights_beside=True, progress=progress))


def _summary(verification: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest keeps of a verification; its cases go into golden.json."""
    left_out = ("cases", "failures", "path")
    return {name: value for name, value in verification.items() if name not in left_out}


class _Clock:
    """The seconds of each stage, and who is told when a stage begins."""

    def __init__(self, progress: Callable[[str, str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the stage's."""
        started = time.perf_counter()
        self._progress(name, "")
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.seconds[name] = round(spent, 2)
