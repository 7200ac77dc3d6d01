"""How long does one text take on this machine, and how much memory does the process need?

Leaves out: tokenizing (the ids are drawn at random), batches, a cold disk cache, and what heat does
to a phone after a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egemma.embedder import Embedder
from egemma_core.checks import whole_number

DEFAULT_TOKENS = (16, 64, 256)
_WARM_UP_RUNS = 2


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one text with this many tokens takes."""

    tokens: int  # BOS and EOS included
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What was measured, and on what."""

    path: str
    target: str
    runtime: str  # name and version
    threads: int
    runs: int  # of each length, after two that do not count
    load_ms: float  # opening the bundle, the hashes of its files included
    # of the whole process since it began; None where the system does not tell
    peak_rss_mb: float | None
    latency: list[Latency]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        lines = [
            f"{self.path}: {self.target} on {self.runtime}, {self.threads} threads, {self.runs} "
            "runs each",
            "",
            "tokens  median ms     p95 ms",
        ]
        lines += [
            f"{row.tokens:>6}  {row.median_ms:>9.2f}  {row.p95_ms:>9.2f}" for row in self.latency
        ]
        memory = "not known here" if self.peak_rss_mb is None else f"{self.peak_rss_mb:.0f} MB"
        return "\n".join(
            [*lines, "", f"load {self.load_ms:.0f} ms, peak memory of the process {memory}"]
        )


def bench(
    path: str | Path,
    *,
    tokens: Sequence[int] | None = None,
    runs: int = 20,
    threads: int | None = None,
) -> BenchReport:
    """Measure load time, latency by length and peak memory of a bundle on this machine.

    Args:
        path: the bundle folder, or "builtin".
        tokens: lengths, BOS and EOS included; None for those of DEFAULT_TOKENS that the model
            reads.
        runs: how often each length is measured.

    Raises:
        ConfigError: a length that the model does not read, or too few runs.
        BundleError, RuntimeUnavailableError: as `Embedder.open`.
    """
    whole_number("runs", runs, 1)
    start = time.perf_counter()
    with Embedder.open(path, threads=threads) as embedder:
        load_ms = 1000 * (time.perf_counter() - start)
        most = embedder.max_tokens
        if tokens is None:
            tokens = [count for count in DEFAULT_TOKENS if count <= most]
        lengths = [whole_number("tokens", count, 3, most) for count in tokens]
        latency = [_measure(embedder, count, runs) for count in lengths]
        return BenchReport(
            path=str(path),
            target=embedder.manifest.target,
            runtime=embedder.runtime,
            threads=embedder.threads,
            runs=runs,
            load_ms=round(load_ms, 1),
            peak_rss_mb=_peak_rss_mb(),
            latency=latency,
        )


def _measure(embedder: Embedder, count: int, runs: int) -> Latency:
    facts, random = embedder.manifest.tokenizer, np.random.default_rng(count)
    times_ms = []
    for run in range(_WARM_UP_RUNS + runs):
        # Fresh ids for each run, as a user's texts would be: the table of a real model is larger
        # than any cache.
        words = random.integers(
            max(facts["bos_id"], facts["eos_id"], facts["pad_id"]) + 1,
            facts["vocab_size"],
            size=count - 2,
        )
        ids = [facts["bos_id"], *words.tolist(), facts["eos_id"]]
        start = time.perf_counter()
        embedder.embed_ids([ids])
        if run >= _WARM_UP_RUNS:
            times_ms.append(1000 * (time.perf_counter() - start))
    return Latency(
        tokens=count,
        median_ms=round(float(np.median(times_ms)), 3),
        p95_ms=round(float(np.percentile(times_ms, 95)), 3),
    )


def _peak_rss_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
