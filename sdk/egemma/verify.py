"""Does this bundle, on this machine, give the vectors that its model gave when it was exported?

Replays golden.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.embedder import BUILTIN, BUILTIN_FOLDER, Embedder
from egemma_core.bundle import GOLDEN, Bundle, read_bundle
from egemma_core.errors import BundleError, ConfigError, EgemmaError
from egemma_core.tokens import Overflow, Tokenizer
from egemma_core.vectors import shorten

GOLDEN_VERSION = 1
# A float32 vector of 768 channels that was divided by its own length is within 1e-6 of length 1.
MAX_LENGTH_ERROR = 1e-5
# Of the way from the right vector to a mistaken one: rounding goes a few hundredths of it, the
# mistake itself all of it.
MAX_MISTAKE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a bundle has to keep; None is a bound that nobody has set, which no bundle passes."""

    min_cosine_float: float | None = None  # to the float model's vector, worst text and width
    min_cosine_quantized: float | None = None  # to float arithmetic on the same rounded weights
    # of any channel, between a text alone and the same text in a padded batch
    max_batch_difference: float | None = None

    def __post_init__(self) -> None:
        for name, bound in asdict(self).items():
            if bound is not None and (
                isinstance(bound, bool)
                or not isinstance(bound, (int, float))
                or not -1 <= bound <= 1
            ):
                raise ConfigError(f"{name}={bound!r}: a number from -1 to 1.")


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One golden text as this machine embeds it; None where there is no vector to measure."""

    name: str
    num_tokens: int
    same_tokens: bool  # ids, their count and the truncation mark are as they were at export
    length_error: float | None  # |length - 1|
    cosine_float: Mapping[str, float | None]  # width -> cosine
    cosine_quantized: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found, and whether it is within the bounds."""

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
        """A table for people."""
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
    bundle = read_bundle(BUILTIN_FOLDER if path == BUILTIN else path, check_hashes=check_hashes)
    golden = read_golden(bundle)
    given = {
        "min_cosine_float": min_cosine_float,
        "min_cosine_quantized": min_cosine_quantized,
        "max_batch_difference": max_batch_difference,
    }
    bounds = Bounds(
        **{
            **_stated_bounds(bundle),
            **{name: bound for name, bound in given.items() if bound is not None},
        }
    )
    with Embedder(bundle, threads=threads) as embedder:
        results: list[CaseResult] = []
        vectors: dict[str, NDArray[np.float32]] = {}
        failures: list[str] = []
        tokenizer = bundle.tokenizer()
        for case in golden["cases"]:
            vector, result, found = _run_case(embedder, tokenizer, case)
            results.append(result)
            failures += found
            if vector is not None:
                vectors[case["name"]] = vector
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


def read_golden(bundle: Bundle) -> dict[str, Any]:
    """golden.json, checked.

    Raises:
        BundleError: another version, no cases, or a case that lacks something.
    """
    golden, path = bundle.golden(), bundle.folder / GOLDEN
    if golden.get("format_version") != GOLDEN_VERSION:
        raise BundleError(
            f"{path}: format_version={golden.get('format_version')!r}, this egemma reads "
            f"{GOLDEN_VERSION}. Export again."
        )
    cases, batches = golden.get("cases"), golden.get("batches")
    if (
        not isinstance(cases, list)
        or not cases
        or not isinstance(batches, list)
        or (bundle.manifest.batch == "dynamic" and not batches)
    ):
        raise BundleError(f"{path} has no cases or no batches, so it proves nothing. Export again.")
    wanted = {
        "name": str,
        "text": str,
        "ids": list,
        "num_tokens": int,
        "truncated": bool,
        "vector": list,
        "quantized_vector": list,
    }
    width = bundle.manifest.dims[0]
    for number, case in enumerate(cases):
        wrong = [
            key
            for key, kind in wanted.items()
            if not isinstance(case, dict) or not isinstance(case.get(key), kind)
        ]
        if wrong:
            raise BundleError(f"{path}: case {number} lacks {wrong}. Export again.")
        for key in ("vector", "quantized_vector"):
            numbers = [value for value in case[key] if isinstance(value, (int, float))]
            if (
                len(case[key]) != width
                or len(numbers) != width
                or not abs(np.linalg.norm(numbers) - 1) < MAX_LENGTH_ERROR
            ):
                raise BundleError(
                    f"{path}: {key} of case {case['name']!r} is not a unit vector of {width} "
                    "channels. Export again."
                )
    names = [case["name"] for case in cases]
    if len(set(names)) < len(names) or not all(
        isinstance(batch, list) and len(batch) > 1 and set(batch) <= set(names) for batch in batches
    ):
        raise BundleError(
            f"{path}: two cases of one name, or a batch that is not of two or more cases. Export "
            "again."
        )
    _check_mistakes(golden.get("mistakes"), names, width, path)
    return golden


def _check_mistakes(mistakes: object, names: Sequence[str], width: int, path: Path) -> None:
    def is_mistake(row: object) -> bool:
        return (
            isinstance(row, dict)
            and isinstance(row.get("name"), str)
            and isinstance(row.get("vectors"), dict)
            and bool(row["vectors"])
            and set(row["vectors"]) <= set(names)
            and all(
                isinstance(vector, list)
                and len(vector) == width
                and all(isinstance(value, (int, float)) for value in vector)
                for vector in row["vectors"].values()
            )
        )

    if not isinstance(mistakes, list) or not all(is_mistake(row) for row in mistakes):
        raise BundleError(
            f"{path}: mistakes must each have a name and vectors of {width} channels by case. "
            "Export again."
        )


def _stated_bounds(bundle: Bundle) -> dict[str, float]:
    stated = bundle.manifest.verification.get("bounds", {})
    known = Bounds.__dataclass_fields__.keys()
    if not isinstance(stated, Mapping) or not set(stated) <= known:
        raise BundleError(
            f"{bundle.folder}: verification bounds {stated!r} are not understood, only "
            f"{sorted(known)}. Export again."
        )
    return dict(stated)


def _run_case(
    embedder: Embedder, tokenizer: Tokenizer, case: Mapping[str, Any]
) -> tuple[NDArray[np.float32] | None, CaseResult, list[str]]:
    """The text as a user's text, its prompt already in front: the vector, what is to be reported,
    and what is wrong already.
    """
    name, failures = case["name"], []
    overflow: Overflow = "truncate" if case["truncated"] else "error"
    nothing = {str(dim): None for dim in embedder.dims}
    try:
        ids = list(tokenizer.encode(case["text"], overflow=overflow).ids)
        embedded = embedder.embed_raw([case["text"]], overflow=overflow)
    except EgemmaError as error:
        result = CaseResult(
            name=name,
            num_tokens=case["num_tokens"],
            same_tokens=False,
            length_error=None,
            cosine_float=nothing,
            cosine_quantized=nothing,
        )
        return None, result, [f"{name}: it could not be embedded: {error}"]
    vector, num_tokens, truncated = (
        embedded.vectors[0],
        embedded.num_tokens[0],
        embedded.truncated[0],
    )
    same = ids == case["ids"] and (num_tokens, truncated) == (case["num_tokens"], case["truncated"])
    if ids != case["ids"]:
        at = next(
            (
                at
                for at, (mine, theirs) in enumerate(zip(ids, case["ids"], strict=False))
                if mine != theirs
            ),
            min(len(ids), len(case["ids"])),
        )
        failures.append(
            f"{name}: its token ids differ from those at export, first at {at}: {ids[at : at + 3]} "
            "instead of "
            f"{case['ids'][at : at + 3]}"
        )
    elif not same:
        failures.append(
            f"{name}: {num_tokens} tokens, truncated={truncated}; at export {case['num_tokens']}, "
            f"{case['truncated']}"
        )
    if not np.isfinite(vector).all():
        result = CaseResult(
            name=name,
            num_tokens=num_tokens,
            same_tokens=same,
            length_error=None,
            cosine_float=nothing,
            cosine_quantized=nothing,
        )
        return None, result, [*failures, f"{name}: its vector is NaN or infinite"]
    length_error = abs(float(np.linalg.norm(vector.astype(np.float64))) - 1)
    if length_error > MAX_LENGTH_ERROR:
        failures.append(
            f"{name}: its vector's length is off by {length_error:.1e}, bound {MAX_LENGTH_ERROR}"
        )
    result = CaseResult(
        name=name,
        num_tokens=num_tokens,
        same_tokens=same,
        length_error=length_error,
        cosine_float=_cosines(vector, case["vector"], embedder.dims),
        cosine_quantized=_cosines(vector, case["quantized_vector"], embedder.dims),
    )
    return vector, result, failures


def _run_batches(
    embedder: Embedder, golden: Mapping[str, Any], alone: Mapping[str, NDArray[np.float32]]
) -> tuple[float | None, list[str]]:
    """The largest difference of a channel between a text alone and in its padded batch; texts
    without a vector are left out.
    """
    ids = {case["name"]: case["ids"] for case in golden["cases"]}
    differences: list[float] = []
    failures = []
    for batch in golden["batches"]:
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


def _mistake_shares(
    golden: Mapping[str, Any], vectors: Mapping[str, NDArray[np.float32]]
) -> dict[str, float]:
    """For each known mistake how far the file's vectors went from the right ones towards those of
    the mistake: 0 not at all, 1 all the way.

    Rounding moves a vector as far as some mistakes do, but in no particular direction.
    """
    right = {case["name"]: np.array(case["quantized_vector"]) for case in golden["cases"]}
    shares = {}
    for mistake in golden["mistakes"]:
        along = whole = 0.0
        for name, wrong in mistake["vectors"].items():
            direction = np.array(wrong) - right[name]
            whole += float(direction @ direction)
            if name in vectors:
                along += float((vectors[name] - right[name]) @ direction)
        shares[mistake["name"]] = along / whole if whole else 0.0
    return shares


def _cosines(
    vector: NDArray[np.float32], reference: Sequence[float], dims: Sequence[int]
) -> dict[str, float | None]:
    expected = np.array(reference, dtype=np.float32)
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
