"""What rounding costs a model: by matrix, by layer, by trained width, and on dev sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from egemma_core.errors import InputError
from egemma_core.nn.encode import Ids, encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_quant.layer_report import ROWS_AT_ONCE, kept_outputs, layer_cosines, layers_of
from egemma_quant.qat import rounded
from egemma_quant.roles import role_of
from egemma_quant.schemes import Format, Scheme, quantize

# Texts whose hidden states of every layer are kept for comparison: 25 x T x 768 floats each.
LAYER_TEXTS = 8


@dataclass(frozen=True, kw_only=True)
class MatrixCost:
    """One matrix. Errors are squared and relative: |W - rounded W|^2 / |W|^2."""

    name: str
    role: str
    bits: int
    group_size: int | None
    error: float
    # the largest error of a group of weights that share a scale, to that group's own |W|^2
    worst_group: float
    clipped: float  # share of weights more than half a step beyond the outermost code


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cosine of a layer's outputs, rounded to float, over all tokens of the texts."""

    layer: str  # "embedding", "layer 0", ...
    min_cosine: float
    mean_cosine: float


@dataclass(frozen=True, kw_only=True)
class WidthCost:
    """Cosine of a text's vector, rounded to float, at one trained width."""

    dim: int
    min_cosine: float
    median_cosine: float
    min_cosine_activations: float  # with 8-bit activations too
    median_cosine_activations: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What rounding one model by one scheme cost."""

    model: str
    scheme: str
    num_texts: int
    truncated: int  # texts of these that were cut at the model's limit
    matrices: tuple[MatrixCost, ...]
    layers: tuple[LayerCost, ...]
    widths: tuple[WidthCost, ...]
    # score of the float model, of the rounded one; {} without dev sets
    dev: dict[str, tuple[float, float]]
    hint: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return tables of at most 120 columns."""
        cut = f", {self.truncated} of them cut at the limit" if self.truncated else ""
        lines = [f"{self.model}, scheme {self.scheme}, {self.num_texts} texts{cut}"[:120]]
        lines += [f"note: {self.hint}"] if self.hint else []
        lines += ["", *_matrix_lines(self.matrices)]
        lines += ["", *_layer_lines(self.layers)]
        lines += ["", *_width_lines(self.widths)]
        lines += ["", *_dev_lines(self.dev)] if self.dev else []
        return "\n".join(lines)


def _matrix_lines(matrices: Sequence[MatrixCost]) -> Iterator[str]:
    yield (
        f"{'matrix':<44} {'role':<13} {'bits':>4} {'group':>5} {'error':>10} "
        f"{'worst group':>12} {'clipped %':>10}"
    )
    for cost in matrices:
        yield (
            f"{cost.name:<44} {cost.role:<13} {cost.bits:>4} {cost.group_size or 'row':>5} "
            f"{cost.error:>10.6f} {cost.worst_group:>12.6f} {100 * cost.clipped:>10.4f}"
        )


def _layer_lines(layers: Sequence[LayerCost]) -> Iterator[str]:
    yield f"{'layer, rounded weights':<44} {'min cosine':>10} {'mean':>10}"
    for cost in layers:
        yield f"{cost.layer:<44} {cost.min_cosine:>10.6f} {cost.mean_cosine:>10.6f}"


def _width_lines(widths: Sequence[WidthCost]) -> Iterator[str]:
    yield (
        f"{'vectors':<24} {'min cosine':>10} {'median':>10}   "
        f"{'8-bit activations: min':>22} {'median':>10}"
    )
    for cost in widths:
        yield (
            f"{f'{cost.dim} wide':<24} {cost.min_cosine:>10.6f} {cost.median_cosine:>10.6f}   "
            f"{cost.min_cosine_activations:>22.6f} {cost.median_cosine_activations:>10.6f}"
        )


def _dev_lines(dev: dict[str, tuple[float, float]]) -> Iterator[str]:
    yield f"{'dev score':<44} {'float':>10} {'rounded':>10} {'change %':>10}"
    for name, (exact, after) in dev.items():
        change = f"{100 * (after / exact - 1):>+10.2f}" if exact > 0 else f"{'-':>10}"
        yield f"{name:<44} {exact:>10.4f} {after:>10.4f} {change}"


@torch.no_grad()
def measure(
    encoder: Encoder,
    scheme: Scheme,
    rows: Sequence[Ids],
    *,
    model: str,
    truncated: int = 0,
    hint: str | None = None,
    score: Callable[[Encoder], dict[str, float]] | None = None,
) -> QuantizationReport:
    """Compare an encoder with itself, rounded; its float weights are back afterwards.

    Args:
        encoder: float32.
        rows: token ids of texts with prompt, BOS and EOS.
        model: what the report calls it.
        truncated: how many of the texts were cut, for the report.
        score: dev scores of an encoder, such as `DevSets.score`; None for no dev sets.

    Raises:
        InputError: no text.
        ConfigError: as `rounded`.
    """
    if not rows:
        raise InputError(
            "0 texts were given, and a cosine needs at least one.",
            hint="Give a file with one text per line.",
        )
    pad_id = encoder.config.pad_id
    vectors = encode_rows(encoder, rows, pad_id)
    hidden = list(_hidden_states(encoder, rows[:LAYER_TEXTS]))
    exact_scores = score(encoder) if score else {}
    with rounded(encoder, scheme):
        after = encode_rows(encoder, rows, pad_id)
        cosines = layer_cosines(hidden, _hidden_states(encoder, rows[:LAYER_TEXTS]))
        rounded_scores = score(encoder) if score else {}
    with rounded(encoder, scheme, activations=True):
        both = encode_rows(encoder, rows, pad_id)
    matrices = [
        _matrix_cost(name, role, weight, scheme.format_of(role))
        for name, weight in encoder.named_parameters()
        if (role := role_of(name)) is not None
    ]
    layers = [
        LayerCost(layer=layer, min_cosine=float(found.min()), mean_cosine=float(found.mean()))
        for layer, found in cosines.items()
    ]
    return QuantizationReport(
        model=model,
        scheme=scheme.name,
        num_texts=len(rows),
        truncated=truncated,
        matrices=tuple(matrices),
        layers=tuple(layers),
        widths=tuple(_width_cost(dim, vectors, after, both) for dim in encoder.config.dims),
        dev={name: (exact_scores[name], rounded_scores[name]) for name in exact_scores},
        hint=hint,
    )


def _matrix_cost(name: str, role: str, weight: Tensor, weight_format: Format) -> MatrixCost:
    lowest, highest = (-8, 7) if weight_format.bits == 4 else (-127, 127)
    lost = whole = worst = 0.0
    clipped = 0
    for rows in weight.split(ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
        found = quantize(rows, weight_format)
        groups = rows.view(*found.scales.shape, -1)  # (rows, G, g)
        error = (found.dequantize().view_as(groups) - groups).double().square().sum(-1)  # (rows, G)
        energy = groups.double().square().sum(-1)
        # a group of zeros under scale 0 gives NaN, which is not clipped
        steps = groups / found.scales.unsqueeze(-1)
        clipped += int(((steps < lowest - 0.5) | (steps > highest + 0.5)).sum())
        lost, whole = lost + float(error.sum()), whole + float(energy.sum())
        if (energy > 0).any():
            worst = max(worst, float((error / energy)[energy > 0].max()))
    return MatrixCost(
        name=name,
        role=role,
        bits=weight_format.bits,
        group_size=weight_format.group_size,
        error=lost / whole if whole else 0.0,
        worst_group=worst,
        clipped=clipped / weight.numel(),
    )


def _width_cost(dim: int, vectors: Tensor, after: Tensor, both: Tensor) -> WidthCost:
    weights, activations = (
        torch.cosine_similarity(found[:, :dim], vectors[:, :dim], dim=-1) for found in (after, both)
    )
    return WidthCost(
        dim=dim,
        min_cosine=float(weights.min()),
        median_cosine=float(weights.quantile(0.5)),
        min_cosine_activations=float(activations.min()),
        median_cosine_activations=float(activations.quantile(0.5)),
    )


def _hidden_states(encoder: Encoder, rows: Sequence[Ids]) -> Iterator[dict[str, Tensor]]:
    """Give the (T, D) outputs of the table and of each layer, for each text."""
    for row in rows:
        ids = torch.tensor([row], device=encoder.norm.weight.device)
        with kept_outputs(layers_of(encoder)) as outputs:
            encoder(ids, torch.ones_like(ids, dtype=torch.bool))
        yield outputs
