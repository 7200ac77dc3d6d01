"""What one export made, and what was measured on the file that ships."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from egemma_core.bundle import RUNTIMES
from egemma_core.checkpoint.folder import Checkpoint
from egemma_export.targets import Target
from egemma_quant.ggml import hint


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """What rounding cost one layer."""

    layer: str  # "embedding", "layer 0" .. or "dense head"
    weight_error: float  # |rounded - float| / |float| over the layer's rounded weights
    # mean cosine of its output rows to those of the float model, on one golden text
    hidden_cosine: float


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

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        target: Target,
        out: Path,
        *,
        file_bytes: Mapping[str, int],
        graph: dict[str, Any],
        layers: list[LayerLoss],
        verification: dict[str, Any],
        latency: Mapping[str, Any],
        seconds: dict[str, float],
    ) -> ExportReport:
        """Put together what the stages of an export found.

        Args:
            file_bytes: of every file of the bundle, by its name.
            graph: what the writer of the model file counted.
            verification, latency: what `egemma verify` and `egemma bench` printed.
            seconds: by stage.
        """
        model = RUNTIMES[target.runtime]
        grid = target.scheme.name if target.scheme else None
        return cls(
            out=str(out),
            target=target.name,
            runtime=target.runtime,
            scheme=grid or "float32",
            instead=target.instead,
            note=(hint(checkpoint, grid) or "") if grid else "",
            bundle_bytes=sum(file_bytes.values()),
            # of onnx the weights are in a second file, model.onnx.data
            model_bytes=sum(size for name, size in file_bytes.items() if name.startswith(model)),
            num_cases=len(verification["cases"]),
            worst_cosine_float=verification["worst_cosine_float"],
            worst_cosine_quantized=verification["worst_cosine_quantized"],
            graph=graph,
            layers=layers,
            latency_ms={str(row["tokens"]): row["median_ms"] for row in latency["latency"]},
            latency_threads=latency["threads"],
            seconds=seconds,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            verification=verification,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return a table of two columns; a row with nothing to say is left out."""
        rows = [(name, value) for name, value in self._rows() if value]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "bundle", self.out
        yield "target", f"{self.target} ({self.runtime}, {self.scheme})"
        yield "instead", self.instead
        yield "note", self.note
        yield (
            "size",
            f"{self.bundle_bytes / 1e6:.1f} MB, model file {self.model_bytes / 1e6:.1f} MB",
        )
        yield (
            "cosine to float",
            f"{self.worst_cosine_float:.5f} worst of {self.num_cases} golden texts at every width",
        )
        yield (
            "cosine to rounded",
            f"{self.worst_cosine_quantized:.5f} worst, float arithmetic on the same rounded "
            "weights",
        )
        yield "known mistakes", _mistakes_text(self.verification["mistakes"])
        yield "rounding hurts most", _worst_layer_text(self.layers)
        yield "graph", _graph_text(self.graph)
        yield "latency", _latency_text(self.latency_ms, self.latency_threads)
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        yield "took", f"{stages}; peak {self.peak_mb} MB"


def failure_text(verification: Mapping[str, Any], layers: Sequence[LayerLoss]) -> str:
    """Return what a finished file failed, which layer lost what, and what could be done."""
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
            f"    {loss.layer:<12} weights {loss.weight_error:.4f}   "
            f"output {loss.hidden_cosine:.5f}"
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


def _mistakes_text(shares: Mapping[str, float]) -> str:
    if not shares:
        return ""
    name = max(shares, key=lambda mistake: shares[mistake])
    return f"{len(shares)} ruled out; nearest {name}, {shares[name]:.2f} of the way"


def _worst_layer_text(layers: Sequence[LayerLoss]) -> str:
    if not layers:
        return ""
    worst = min(layers, key=lambda loss: loss.hidden_cosine)
    return f"{worst.layer}, cosine {worst.hidden_cosine:.5f}"


def _latency_text(latency_ms: Mapping[str, float], threads: int) -> str:
    if not latency_ms:
        return ""
    medians = ", ".join(f"{tokens} tokens {ms:.1f} ms" for tokens, ms in latency_ms.items())
    return f"{medians}; {threads} threads, median"


def _graph_text(graph: Mapping[str, Any]) -> str:
    if "delegates" in graph:
        outside = sum(graph["outside"].values())
        return f"{graph['delegates']} delegate, {outside} operators outside of it"
    nodes = graph["nodes"]
    most = max(nodes, key=lambda operator: nodes[operator])
    return f"{sum(nodes.values())} nodes, {most} the most frequent"
