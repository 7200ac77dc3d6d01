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

from egemma_core.bundle import RUNTIMES, TOKENIZER, Bounds
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.checks import one_of
from egemma_core.errors import ExportError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_export import run_bundle
from egemma_export.bundle_folder import atomic_folder, write_manifest
from egemma_export.golden import golden_file, golden_texts, write_golden
from egemma_export.manifest import make_manifest, measured_manifest
from egemma_export.observe import observe, observe_rounded
from egemma_export.report import ExportReport, failure_text
from egemma_export.targets import TARGETS, Target

STAGES = ("read", "reference", "lower", "round", "verify", "finish")


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
            exact = observe(encoder, texts)
        with clock.stage("lower"):
            graph = _write_model(encoder, target, folder, partial(progress, "lower"))
        with clock.stage("round"):
            rounded = observe_rounded(encoder, target.scheme, texts, exact)
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
