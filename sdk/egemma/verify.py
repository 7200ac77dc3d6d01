"""Does this bundle, on this machine, give the vectors that its model gave when it was exported?

`verify_bundle` replays golden.json; `Verification` and its `CaseResult`s say what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.embedder import Embedder, folder_of
from egemma.exported import exported
from egemma.golden_file import MAX_LENGTH_ERROR, Golden, GoldenCase, read_golden
from egemma_core.bundle import Bounds, Bundle, read_bundle
from egemma_core.errors import BundleError, EgemmaError
from egemma_core.tokens import Overflow, Tokenizer
from egemma_core.vectors import shorten

# Of the way from the right vector to a mistaken one: rounding goes a few hundredths of it, the
# mistake itself all of it.
MAX_MISTAKE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One golden text as this machine embeds it; None where there is no vector to measure."""

    name: str
    num_tokens: int
    same_tokens: bool  # ids, their count and the truncation mark are as they were at export
    length_error: float | None  # |length - 1|
    cosine_float: Mapping[str, float | None]  # width -> cosine
    cosine_quantized: Mapping[str, float | None]


@exported
@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_bundle` found, and whether it is within the bounds."""

    path: str
    target: str
    fingerprint: str
    runtime: str  # name and version
    threads: int
    passed: bool
    failures: list[str]  # each says what was found and the bound
    bounds: Bounds
    worst_cosine_float: float | None  # over all texts and widths
    worst_cosine_quantized: float | None
    batch_difference: float | None  # None when the runtime takes one text at a time
    # known mistake -> share of the way from the right vectors to those it gives; about 0
    mistakes: dict[str, float]
    cases: list[CaseResult]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """Return a table for people."""
        dims = list(self.cases[0].cosine_float)
        name_width = max(len(case.name) for case in self.cases)
        lines = [
            f"{self.path}: {self.target} on {self.runtime}, {self.threads} threads",
            "",
            f"{'text':<{name_width}}  tokens  ids   "
            + "  ".join(f"cos {dim:>4}" for dim in dims)
            + "  cos rounded",
        ]
        for case in self.cases:
            cosines = "  ".join(_number(case.cosine_float[dim]) for dim in dims)
            lines.append(
                f"{case.name:<{name_width}}  {case.num_tokens:>6}  "
                f"{'same' if case.same_tokens else 'DIFF'}  {cosines}"
                f"  {_number(case.cosine_quantized[dims[0]]):>11}"
            )
        lines += [
            "",
            f"worst cosine to the float model      {_number(self.worst_cosine_float)}  (bound "
            f"{self.bounds.min_cosine_float})",
            f"worst cosine to the rounded weights  {_number(self.worst_cosine_quantized)}  (bound "
            f"{self.bounds.min_cosine_quantized})",
        ]
        if self.batch_difference is not None:
            lines.append(
                f"alone against in a padded batch      {self.batch_difference:.1e}  (bound "
                f"{self.bounds.max_batch_difference})"
            )
        for name, share in self.mistakes.items():
            lines.append(f"{'of the way to ' + name:<35}{share:8.2f}   (bound {MAX_MISTAKE_SHARE})")
        return "\n".join(
            [
                *lines,
                "",
                *(f"FAILED  {failure}" for failure in self.failures),
                *(["passed"] if self.passed else []),
            ]
        )


@exported
def verify_bundle(
    path: str | Path,
    *,
    threads: int | None = None,
    check_hashes: bool = True,
    min_cosine_float: float | None = None,
    min_cosine_quantized: float | None = None,
    max_batch_difference: float | None = None,
) -> Verification:
    """Run a bundle's golden texts on its own runtime and compare.

    Args:
        path: the bundle folder, or "builtin".
        threads: to compute with; None for as many as this process has CPUs.
        check_hashes: compare every file with its SHA-256 first.
        min_cosine_float, min_cosine_quantized, max_batch_difference: bounds instead of the
            manifest's.

    Raises:
        BundleError: the bundle or its golden.json cannot be read.
        RuntimeUnavailableError: this machine lacks the runtime.
        ConfigError: a bound or `threads` cannot work.
    """
    bundle = read_bundle(folder_of(path), check_hashes=check_hashes)
    golden = read_golden(bundle)
    asked = {
        "min_cosine_float": min_cosine_float,
        "min_cosine_quantized": min_cosine_quantized,
        "max_batch_difference": max_batch_difference,
    }
    given = {name: bound for name, bound in asked.items() if bound is not None}
    bounds = replace(_stated_bounds(bundle), **given)
    with Embedder(bundle, threads=threads) as embedder:
        results: list[CaseResult] = []
        vectors: dict[str, NDArray[np.float32]] = {}
        failures: list[str] = []
        tokenizer = bundle.tokenizer()
        for case in golden.cases:
            vector, result, found = _run_case(embedder, tokenizer, case)
            results.append(result)
            failures += found
            if vector is not None:
                vectors[case.name] = vector
        difference = None
        if bundle.manifest.batch == "dynamic":
            difference, found = _run_batches(embedder, golden, vectors)
            failures += found
        runtime, used_threads = embedder.runtime, embedder.threads
    failures += _compare(results, difference, bounds)
    mistakes = _mistake_shares(golden, vectors)
    failures += [
        f"it computes like a model with {name}: {share:.2f} of the way to its vectors, bound "
        f"{MAX_MISTAKE_SHARE}"
        for name, share in mistakes.items()
        if not share <= MAX_MISTAKE_SHARE
    ]
    return Verification(
        path=str(path),
        target=bundle.manifest.target,
        fingerprint=bundle.manifest.fingerprint,
        runtime=runtime,
        threads=used_threads,
        passed=not failures,
        failures=failures,
        bounds=bounds,
        worst_cosine_float=_worst(result.cosine_float for result in results),
        worst_cosine_quantized=_worst(result.cosine_quantized for result in results),
        batch_difference=difference,
        mistakes=mistakes,
        cases=results,
    )


def _stated_bounds(bundle: Bundle) -> Bounds:
    stated = bundle.manifest.verification.get("bounds", {})
    unknown: dict[str, None] = dict.fromkeys(Bounds.__dataclass_fields__)
    if not isinstance(stated, Mapping) or not set(stated) <= set(unknown):
        raise BundleError(
            f"{bundle.folder}: verification bounds {stated!r} are not understood, only "
            f"{sorted(unknown)}.",
            hint="Export again.",
        )
    return Bounds(**(unknown | dict(stated)))


def _run_case(
    embedder: Embedder, tokenizer: Tokenizer, case: GoldenCase
) -> tuple[NDArray[np.float32] | None, CaseResult, list[str]]:
    """Embed a golden text as a user's text, its prompt already in front.

    Returns:
        The vector, None where it cannot be measured; what is to be reported; what is wrong already.
    """
    name, dims = case.name, embedder.dims
    nothing = {str(dim): None for dim in dims}
    result = CaseResult(
        name=name,
        num_tokens=case.num_tokens,
        same_tokens=False,
        length_error=None,
        cosine_float=nothing,
        cosine_quantized=nothing,
    )
    overflow: Overflow = "truncate" if case.truncated else "error"
    try:
        ids = list(tokenizer.encode(case.text, overflow=overflow).ids)
        found = embedder.embed_raw([case.text], overflow=overflow)[0]
    except EgemmaError as error:
        return None, result, [f"{name}: it could not be embedded: {error}"]
    failures = []
    counted = (found.num_tokens, found.truncated)
    same_counts = counted == (case.num_tokens, case.truncated)
    if ids != case.ids:
        at = _first_difference(ids, case.ids)
        failures.append(
            f"{name}: its token ids differ from those at export, first at {at}: {ids[at : at + 3]} "
            f"instead of {case.ids[at : at + 3]}"
        )
    elif not same_counts:
        failures.append(
            f"{name}: {found.num_tokens} tokens, truncated={found.truncated}; at export "
            f"{case.num_tokens}, {case.truncated}"
        )
    same = ids == case.ids and same_counts
    result = replace(result, num_tokens=found.num_tokens, same_tokens=same)
    if not np.isfinite(found.vector).all():
        return None, result, [*failures, f"{name}: its vector is NaN or infinite"]
    length_error = abs(float(np.linalg.norm(found.vector.astype(np.float64))) - 1)
    if length_error > MAX_LENGTH_ERROR:
        failures.append(
            f"{name}: its vector's length is off by {length_error:.1e}, bound {MAX_LENGTH_ERROR}"
        )
    result = replace(
        result,
        length_error=length_error,
        cosine_float=_cosines(found.vector, case.vector, dims),
        cosine_quantized=_cosines(found.vector, case.quantized_vector, dims),
    )
    return found.vector, result, failures


def _first_difference(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _run_batches(
    embedder: Embedder, golden: Golden, alone: Mapping[str, NDArray[np.float32]]
) -> tuple[float | None, list[str]]:
    """Compare each text alone with the same text in its padded batch.

    Returns:
        The largest difference of a channel, texts without a vector left out; and what failed.
    """
    ids = {case.name: case.ids for case in golden.cases}
    differences: list[float] = []
    failures = []
    for batch in golden.batches:
        names = [name for name in batch if name in alone]
        if not names:
            continue
        try:
            together = embedder.embed_ids([ids[name] for name in names])
        except EgemmaError as error:
            failures.append(f"batch {names}: it could not be embedded: {error}")
            continue
        differences += [
            float(np.abs(row - alone[name]).max())
            for name, row in zip(names, together, strict=True)
        ]
    return (max(differences) if differences else None), failures


def _mistake_shares(golden: Golden, vectors: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """Measure how far the file's vectors went from the right ones towards those of each mistake.

    Rounding moves a vector as far as some mistakes do, but in no particular direction.

    Returns:
        Mistake -> share of the way: 0 not at all, 1 all of it.
    """
    right = {case.name: case.quantized_vector for case in golden.cases}
    shares = {}
    for mistake in golden.mistakes:
        along = whole = 0.0
        for name, wrong in mistake.vectors.items():
            direction = wrong - right[name]
            whole += float(direction @ direction)
            if name in vectors:
                along += float((vectors[name] - right[name]) @ direction)
        shares[mistake.name] = along / whole if whole else 0.0
    return shares


def _cosines(
    vector: NDArray[np.float32], reference: NDArray[np.float64], dims: Sequence[int]
) -> dict[str, float | None]:
    expected = reference.astype(np.float32)
    return {
        str(dim): float(
            shorten(vector, dim, dims).astype(np.float64)
            @ shorten(expected, dim, dims).astype(np.float64)
        )
        for dim in dims
    }


def _compare(results: Sequence[CaseResult], difference: float | None, bounds: Bounds) -> list[str]:
    failures = [
        f"no bound {name}: give it with --{name.replace('_', '-')}"
        for name, bound in asdict(bounds).items()
        if bound is None and (name != "max_batch_difference" or difference is not None)
    ]
    for result in results:
        for cosines, bound, of in (
            (result.cosine_float, bounds.min_cosine_float, "the float model"),
            (result.cosine_quantized, bounds.min_cosine_quantized, "the rounded weights"),
        ):
            below = {
                dim: cosine
                for dim, cosine in cosines.items()
                if cosine is not None and bound is not None and not cosine >= bound
            }
            if below:
                dim = min(below, key=lambda dim: below[dim])
                failures.append(
                    f"{result.name}: cosine {below[dim]:.5f} to {of} at width {dim}, bound {bound}"
                )
    if (
        difference is not None
        and bounds.max_batch_difference is not None
        and not difference <= bounds.max_batch_difference
    ):
        failures.append(
            f"in a padded batch a channel differs by {difference:.1e}, bound "
            f"{bounds.max_batch_difference}"
        )
    return failures


def _worst(cosines: Iterator[Mapping[str, float | None]]) -> float | None:
    values = [cosine for of_case in cosines for cosine in of_case.values() if cosine is not None]
    return min(values) if values else None


def _number(value: float | None) -> str:
    return "      --" if value is None else f"{value:8.5f}"
