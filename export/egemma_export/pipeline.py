"""One export, from checkpoint to a bundle whose finished file was run and compared."""

from __future__ import annotations

import gc
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from egemma_core.bundle import (
    GOLDEN,
    RUNTIMES,
    TOKENIZER,
    Bounds,
    Manifest,
    atomic_folder,
    describe_files,
    fingerprint_of,
    write_manifest,
)
from egemma_core.checkpoint import Checkpoint, open_checkpoint
from egemma_core.errors import ConfigError, ExportError
from egemma_core.files import sha256_of
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_export.golden import golden_file, golden_texts, reference_vectors
from egemma_export.layers import LayerLoss, compare_layers, outputs_by_layer, round_in_place
from egemma_export.mistakes import mistaken_vectors
from egemma_export.targets import TARGETS, Target
from egemma_quant.published import hint
from egemma_quant.schemes import ROLES, Scheme
from egemma_quant.weights import quantize_encoder

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
        if self.target not in TARGETS:
            raise ConfigError(
                f"target={self.target!r} is unknown; choose one of {', '.join(TARGETS)}."
            )
        for name in ("min_cosine_float", "min_cosine_quantized"):
            bound = getattr(self, name)
            if bound is not None and not -1 <= bound <= 1:
                raise ConfigError(f"{name}={bound}: a cosine lies between -1 and 1.")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was made and what was measured on the file that ships."""

    out: str
    target: str
    runtime: str
    scheme: str
    instead: str
    # on a model that was trained for another rounding than the target's; empty when there is
    # nothing to say
    note: str
    bundle_bytes: int
    model_bytes: int
    num_cases: int
    worst_cosine_float: float
    worst_cosine_quantized: float
    graph: dict[str, Any]  # delegates and operators, as the writer of the model file counts them
    layers: list[LayerLoss]
    latency_ms: dict[str, float]  # median by number of tokens
    latency_threads: int
    seconds: dict[str, float]  # by stage
    peak_mb: int  # resident, this process; the verification runs in its own
    verification: dict[str, Any] = field(repr=False)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        worst = min(self.layers, key=lambda layer: layer.hidden_cosine, default=None)
        latency = ", ".join(
            f"{tokens} tokens {ms:.1f} ms" for tokens, ms in self.latency_ms.items()
        )
        rows = [
            ("bundle", self.out),
            ("target", f"{self.target} ({self.runtime}, {self.scheme})"),
            ("instead", self.instead),
            ("note", self.note),
            (
                "size",
                f"{self.bundle_bytes / 1e6:.1f} MB, model file {self.model_bytes / 1e6:.1f} MB",
            ),
            (
                "cosine to float",
                f"{self.worst_cosine_float:.5f} worst of {self.num_cases} golden texts at every "
                "width",
            ),
            (
                "cosine to rounded",
                f"{self.worst_cosine_quantized:.5f} worst, float arithmetic on the same rounded "
                "weights",
            ),
            ("known mistakes", self._mistakes_text()),
            (
                "rounding hurts most",
                f"{worst.layer}, cosine {worst.hidden_cosine:.5f}" if worst else "",
            ),
            ("graph", _graph_text(self.graph)),
            ("latency", f"{latency}; {self.latency_threads} threads, median" if latency else ""),
            (
                "took",
                ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
                + f"; peak {self.peak_mb} MB",
            ),
        ]
        width = max(len(name) for name, value in rows if value)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows if value)

    def _mistakes_text(self) -> str:
        shares = self.verification["mistakes"]
        name = max(shares, key=shares.get, default=None)
        return (
            f"{len(shares)} ruled out; nearest {name}, {shares[name]:.2f} of the way"
            if name
            else ""
        )


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
    with clock("read"):
        checkpoint = open_checkpoint(config.model, config.revision)
        tokenizer = checkpoint.tokenizer()
        texts = golden_texts(tokenizer, checkpoint.prompts)
    with atomic_folder(config.out, replace=config.replace) as folder:
        with clock("read"):
            encoder = load_encoder(checkpoint)
        with clock("reference"):
            exact = reference_vectors(encoder, texts)
            probe = next(text for text in texts if text.name == "titled document")
            before = outputs_by_layer(encoder, probe.tokens.ids)
        with clock("lower"):
            graph = _write_model(encoder, target, folder, lambda detail: progress("lower", detail))
        with clock("round"):
            layers: list[LayerLoss] = []
            rounded = exact
            if target.scheme is not None:
                errors = round_in_place(encoder, quantize_encoder(encoder, target.scheme))
                layers = compare_layers(before, outputs_by_layer(encoder, probe.tokens.ids), errors)
                rounded = reference_vectors(encoder, texts)
            mistaken = mistaken_vectors(encoder, texts, rounded)
            del encoder
            gc.collect()
        with clock("verify"):
            shutil.copyfile(checkpoint.tokenizer_path, folder / TOKENIZER)
            bounds = asdict(config.bounds)
            _write_golden(folder, golden_file(texts, exact, rounded, mistaken, None))
            write_manifest(folder, _manifest(checkpoint, target, folder, {"bounds": bounds}))
            verification = _run_sdk(folder, "verify", config.threads)
            if not verification["passed"]:
                raise ExportError(_failure(verification, layers))
            measured = {
                key: value
                for key, value in verification.items()
                if key not in ("cases", "failures", "path")
            }
            latency = _run_sdk(
                folder,
                "bench",
                config.threads,
                "--tokens",
                _bench_lengths(checkpoint),
                "--runs",
                "5",
            )
        with clock("finish"):
            _write_golden(
                folder,
                golden_file(texts, exact, rounded, mistaken, {"cases": verification["cases"]}),
            )
            write_manifest(
                folder,
                _manifest(checkpoint, target, folder, {"bounds": bounds, "measured": measured}),
            )
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return ExportReport(
        out=str(config.out),
        target=target.name,
        runtime=target.runtime,
        scheme=target.scheme.name if target.scheme else "float32",
        instead=target.instead,
        note=(hint(checkpoint, target.scheme.name) or "") if target.scheme else "",
        bundle_bytes=sum(sizes.values()),
        model_bytes=sum(
            size for name, size in sizes.items() if name.startswith(RUNTIMES[target.runtime])
        ),
        num_cases=len(texts),
        worst_cosine_float=verification["worst_cosine_float"],
        worst_cosine_quantized=verification["worst_cosine_quantized"],
        graph=graph,
        layers=layers,
        latency_ms={str(row["tokens"]): row["median_ms"] for row in latency["latency"]},
        latency_threads=latency["threads"],
        seconds=clock.seconds,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        verification=verification,
    )


def _write_model(
    encoder: Encoder, target: Target, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    path = folder / RUNTIMES[target.runtime]
    if target.runtime == "executorch":
        from egemma_export.to_executorch import write_pte

        return asdict(write_pte(encoder, target.scheme, path, progress=progress))
    from egemma_export.to_onnx import write_onnx

    # Beside, because ONNX Runtime maps that file instead of copying it: less than half the memory
    # after loading.
    return asdict(write_onnx(encoder, target.scheme, path, weights_beside=True, progress=progress))


def _manifest(
    checkpoint: Checkpoint, target: Target, folder: Path, verification: dict[str, Any]
) -> Manifest:
    config = checkpoint.config
    weights = checkpoint.weight_hashes()
    architecture = {
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "width": config.width,
        "ffn_width": config.ffn_width,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_scale": config.query_scale,
        "norm_eps": config.norm_eps,
        "layer_types": list(config.layer_types),
        "window": config.window,
        "rope_theta_full": config.rope_theta_full,
        "rope_theta_sliding": config.rope_theta_sliding,
        "pooling": config.pooling,
        "dense": [list(pair) for pair in config.dense],
    }
    scheme = _scheme(target.scheme)
    prompts = dict(checkpoint.prompts.by_name)
    tokenizer = {
        "bos_id": config.bos_id,
        "eos_id": config.eos_id,
        "pad_id": config.pad_id,
        "vocab_size": config.vocab_size,
        "max_tokens": config.max_tokens,
    }
    return Manifest(
        target=target.name,
        runtime=target.runtime,
        fingerprint=fingerprint_of(
            weights=weights,
            tokenizer_sha256=sha256_of(checkpoint.tokenizer_path),
            prompts=prompts,
            architecture=architecture,
            scheme=scheme,
        ),
        # The folder's name, not its path: a bundle is handed to strangers.
        source={
            "model": checkpoint.source if checkpoint.revision else checkpoint.folder.name,
            "revision": checkpoint.revision,
            "weights": weights,
        },
        architecture=architecture,
        tokenizer=tokenizer,
        prompts=prompts,
        dims=config.dims,
        scheme=scheme | {"activations": target.activations, "instead": target.instead},
        batch="one" if target.runtime == "executorch" else "dynamic",
        verification=verification,
        tools=_tools(target.runtime),
        files=describe_files(folder),
    )


def _scheme(scheme: Scheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"name": "float32", "weights": dict.fromkeys(ROLES)}
    return {
        "name": scheme.name,
        "weights": {role: asdict(scheme.format_of(role)) for role in ROLES},
    }


def _tools(runtime: str) -> dict[str, str]:
    names = [
        "egemma",
        "torch",
        *(("executorch", "torchao") if runtime == "executorch" else ("onnx", "onnxruntime")),
    ]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _graph_text(graph: dict[str, Any]) -> str:
    if "delegates" in graph:
        return (
            f"{graph['delegates']} delegate, {sum(graph['outside'].values())} operators outside "
            "of it"
        )
    return (
        f"{sum(graph['nodes'].values())} nodes, "
        f"{max(graph['nodes'].items(), key=lambda row: row[1])[0]} the most frequent"
    )


def _bench_lengths(checkpoint: Checkpoint) -> str:
    return ",".join(
        str(tokens) for tokens in (16, 64, 256) if tokens <= checkpoint.config.max_tokens
    )


def _run_sdk(folder: Path, command: str, threads: int | None, *more: str) -> dict[str, Any]:
    """Run `egemma COMMAND` in a process of its own, as a user would: without torch, and with the
    SDK's own ExecuTorch library, which cannot share a process with the exporter's.
    """
    arguments = [sys.executable, "-m", "egemma", command, str(folder), "--json", *more]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    try:
        body = json.loads(ended.stdout)
        assert isinstance(body, dict)
        return body
    except (ValueError, AssertionError) as error:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportError(
            f"the finished file could not be run: `egemma {command}` ended with "
            f"{ended.returncode}: {last}"
        ) from error


def _failure(verification: dict[str, Any], layers: list[LayerLoss]) -> str:
    lines = [
        "the finished file failed its verification; nothing was written.",
        *(f"  {failure}" for failure in verification["failures"]),
    ]
    if layers:
        lines.append(
            "  What rounding cost, layer by layer (weights: relative error; output: cosine to the "
            "float model):"
        )
        lines += [
            f"    {loss.layer:<12} weights {loss.weight_error:.4f}   output "
            f"{loss.hidden_cosine:.5f}"
            for loss in layers
        ]
        lines.append(
            "  A first layer with a low cosine lost it itself; where these look sound, the loss is "
            "in the runtime's file."
        )
    lines.append(
        "  Train the model for the rounding, choose a target with more bits, or lower the bound "
        "with --min-cosine-float."
    )
    return "\n".join(lines)


def _write_golden(folder: Path, body: dict[str, Any]) -> None:
    (folder / GOLDEN).write_text(json.dumps(body, ensure_ascii=True) + "\n", encoding="utf-8")


class _Clock:
    """Tells progress of each stage as it begins and adds up its seconds."""

    def __init__(self, progress: Callable[[str, str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def __call__(self, stage: str) -> _Clock:
        self._stage, self._start = stage, time.perf_counter()
        self._progress(stage, "")
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        self.seconds[self._stage] = round(
            self.seconds.get(self._stage, 0.0) + time.perf_counter() - self._start, 2
        )
