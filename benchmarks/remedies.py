"""Which remedies keep a real model's vectors when weights and activations are rounded, alone and
together?

    python benchmarks/real_weights.py --download   # makes the model; says whose licence it has
    python benchmarks/remedies.py                  # two hours on one thread; --only for a part

Emulated in float arithmetic on Gemma 3 270M as an encoder (see real_weights.py): weights on the
grids that ship, activations rounded to 8 bits per token or per block of 32 before each product.
Scored: mean cosine distance (x 1000) to the float model and to the same rounded weights in float
arithmetic, over ordinary texts (5 to 96 tokens with their prompts) and over texts of 2 to 4 tokens,
none of which is used for calibration. Not answered: ranking, and what the kernels themselves give.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit
from benchmarks.real_weights import (
    ACTIVATIONS,
    CACHE,
    DATA,
    RESULTS,
    Rounding,
    skipped,
    write,
    yardstick,
)
from egemma_core.checkpoint.folder import open_checkpoint, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.nn.encode import Ids, encode_rows
from egemma_core.nn.encoder import Encoder, Layer
from egemma_core.nn.load import load_encoder
from egemma_quant import equalize
from egemma_quant.calibrate import Flow, chunks, flow_of, moments
from egemma_quant.feedback import codes_and_scales
from egemma_quant.schemes import SCHEMES, Format, Scheme, group_size_of, quantize

TOKENS = 96  # the longest calibration or evaluation text
PAIRS = ("medquad", "pycode", "squad-sentences", "scitldr", "cpp-docs")
WORDS = (
    "tomato river lighthouse Berlin invoice 42 why gravity music yes error winter 你好 maison "
    "quantum login"
)
CALIBRATION_WORDS = (
    "house ocean Paris contract 7 how energy film no warning summer 水 Haus biology password "
    "bicycle teacher garden moon bread sleep history Monday red phone engine tree law heart news "
    "fire bridge"
)


def texts(data: Path, start: int, passages: int, words: str) -> tuple[list[str], ...]:
    """Return ordinary texts (two thirds documents, one third queries), and short ones."""
    ordinary = []
    for name in PAIRS:
        with gzip.open(data / f"pairs/{name}.train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(4000), strict=False)]
        chosen = rows[start::37][: passages // len(PAIRS)]  # neighbours in a file are alike
        ordinary += [EMBEDDING_GEMMA.document() + row["positive"] for row in chosen]
        ordinary += [EMBEDDING_GEMMA.query() + row["query"] for row in chosen[::2]]
    return ordinary, ["", *words.split()]


def flows_of(encoder: Encoder, rows: Sequence[Ids]) -> list[Flow]:
    """Return the rows as they enter the first layer."""
    return [flow_of(encoder, *chunk) for chunk in chunks(rows, encoder.config.pad_id)]


def compact(encoder: Encoder, rows: Sequence[Sequence[Ids]]) -> tuple[Encoder, list[list[Ids]]]:
    """Return the encoder with only the token vectors that the rows use, and the rows for it."""
    used = sorted(
        {encoder.config.pad_id, *(piece for some in rows for row in some for piece in row)}
    )
    place = {piece: index for index, piece in enumerate(used)}
    encoder.embed_tokens = nn.Embedding.from_pretrained(
        encoder.embed_tokens.weight[used].clone(), freeze=True
    )
    return encoder, [[tuple(place[piece] for piece in row) for row in some] for some in rows]


def maxima(encoder: Encoder, rows: Sequence[Ids]) -> equalize.Maxima:
    """Return what `channel_maxima` finds on rows."""
    return equalize.channel_maxima(encoder, chunks(rows, encoder.config.pad_id))


# ---- weights -------------------------------------------------------------------------------------


ROLES = {"attention": "attention", "o": "attention", "mlp": "feed_forward", "down": "feed_forward"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How weights become codes."""

    method: str = "plain"  # float, plain, scales (searched, weighted), feedback
    relative: bool = True  # see `moments`
    by_text: bool = True
    inputs: str = "rounded"  # of the moments: those of the rounded layers before, or of "float"
    head: str = ""  # the method of the dense head; empty: as the layers
    # float, plain, scales (unweighted), gradients (feedback by `table_moments`); BOS and EOS may
    # stay float: "plain, BOS and EOS float"
    table: str = "plain"


def rounded(weight: Tensor, weight_format: Format, method: str, moment: Tensor | None) -> Tensor:
    if method == "float":
        return weight
    if method == "plain":
        return quantize(weight, weight_format).dequantize()
    size = group_size_of(weight, weight_format)
    moment = torch.eye(weight.shape[1]) if moment is None else moment
    codes, scales = codes_and_scales(
        weight, moment, weight_format.bits, size, feedback=method == "feedback"
    )
    return (codes.view(len(codes), -1, size) * scales.unsqueeze(-1)).view_as(weight).float()


Costs = dict[int, Tensor] | None


@torch.no_grad()
def with_rounded_weights(
    encoder: Encoder, scheme: Scheme, how: Weights, rows: Sequence[Ids], costs: Costs = None
) -> Encoder:
    """Return a copy with rounded weights; layers are rounded in order, each on what it will read.

    Args:
        costs: what `table_moments` gives, where `how.table` is "gradients".
    """
    encoder = copy.deepcopy(encoder)
    weight = encoder.embed_tokens.weight
    weight.copy_(rounded_table(weight.clone(), scheme.embedding, how.table, costs or {}))
    needed = how.method not in ("plain", "float")
    flows = flows_of(encoder, rows) if needed else []
    exact = copy.deepcopy(flows) if how.inputs == "float" else flows
    for layer, kind in zip(encoder.layers, encoder.config.layer_types, strict=True):
        by_place = {}
        if needed:
            by_place = moments(layer, exact, kind, relative=how.relative, by_text=how.by_text)
        if how.inputs == "float":
            for flow in exact:
                flow.x = flow.through(layer, kind)
        for place in equalize.PLACES:
            for product in equalize.consumers(layer, place):
                weight_format = scheme.format_of(ROLES[place])
                moment = by_place.get(place)
                product.weight.copy_(rounded(product.weight, weight_format, how.method, moment))
        if how.inputs != "float":
            for flow in flows:
                flow.x = flow.through(layer, kind)
    method = how.head or how.method
    pooled = torch.zeros(1, encoder.config.width)
    if needed:
        pooled = torch.cat([encoder.pooler(encoder.norm(flow.x), flow.mask) for flow in exact])
    for dense in encoder.dense:
        unit = nn.functional.normalize(pooled, dim=-1)
        moment = unit.t() @ unit / len(unit)
        dense.weight.copy_(rounded(dense.weight, scheme.projection, method, moment))
        pooled = dense(pooled)
    return encoder


@contextmanager
def kept_table_output(encoder: Encoder) -> Iterator[list[Tensor]]:
    """Keep what the table gives inside the block."""
    kept: list[Tensor] = []
    handle = encoder.embed_tokens.register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    try:
        yield kept
    finally:
        handle.remove()


FREQUENT = (1, 2)  # EOS and BOS, which every text has; their places in the compact table
OTHERS = -1


def table_moments(encoder: Encoder, rows: Sequence[Ids]) -> dict[int, Tensor]:
    """Return (D, D) what an error of a token's vector costs: of EOS, of BOS, and of all OTHERS.

    The mean of g gᵀ, g the gradient of a random direction of a text's vector by a token's vector:
    an error e then moves the text's vector by about e M eᵀ. By texts alike, so in a short one a
    token counts more.
    """
    generator = torch.Generator().manual_seed(0)
    found = {token: torch.zeros((encoder.config.width,) * 2) for token in (*FREQUENT, OTHERS)}
    encoder.embed_tokens.weight.requires_grad_()
    for ids, mask in chunks(rows, encoder.config.pad_id, 512):
        with kept_table_output(encoder) as kept:
            out = encoder(ids, mask)
        direction = torch.randn(out.shape, generator=generator)
        (gradient,) = torch.autograd.grad((out * direction).sum(), kept)
        for token, moment in found.items():
            at = ids == token
            if token == OTHERS:
                at = mask & ~sum(ids == frequent for frequent in FREQUENT).bool()
            moment.addmm_(gradient[at].t(), gradient[at])
    encoder.embed_tokens.weight.requires_grad_(False)
    return {token: moment / moment.diagonal().mean() for token, moment in found.items()}


def rounded_table(
    weight: Tensor, weight_format: Format, how: str, costs: dict[int, Tensor]
) -> Tensor:
    """Return the table, rounded as `Weights.table` says."""
    method = how.removesuffix(", BOS and EOS float")
    if method == "gradients":
        table = rounded(weight, weight_format, "feedback", costs[OTHERS])
        for token in FREQUENT:
            row = weight[token : token + 1]
            table[token] = rounded(row, weight_format, "feedback", costs[token])[0]
    else:
        table = rounded(weight, weight_format, method, None)
    if how != method:
        table[list(FREQUENT)] = weight[list(FREQUENT)]
    return table


# ---- activations ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How activations are rounded."""

    rounding: str = "per token"  # a key of ACTIVATIONS
    exact: Callable[[str], bool] = lambda name: False  # products that read float32
    two_parts_first: bool = False  # the first token as a sum of two 8-bit parts


def read_as(how: Activations) -> Rounding:
    one = ACTIVATIONS[how.rounding]
    if not how.two_parts_first:
        return one

    def two(x: Tensor) -> Tensor:
        first = one(x)
        if x.dim() == 3:
            rest = x[:, :1] - first[:, :1]
            first[:, :1] += one(rest)
        return first

    return two


def vectors(encoder: Encoder, rows: Sequence[Ids], how: Activations | None) -> Tensor:
    """Return (rows, dim) vectors, with rounded activations unless `how` is None."""
    handles = []
    if how is not None:
        rounding = read_as(how)
        handles = [
            module.register_forward_pre_hook(lambda _module, inputs: (rounding(inputs[0]),))
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear) and not how.exact(name)
        ]
    with torch.no_grad():
        found = encode_rows(encoder, rows, encoder.config.pad_id, chunk_tokens=1536)
    for handle in handles:
        handle.remove()
    return found


# ---- equalisation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """How a place is equalised."""

    share: float
    by_weights: bool = True  # SmoothQuant's factors; otherwise maxima ** share alone


CANDIDATES = (
    *(Strength(share, by_weights=False) for share in (0.0, 0.3, 0.5)),
    *(Strength(share) for share in (0.5, 0.65, 0.8)),
)


def equalized(
    encoder: Encoder, found: equalize.Maxima, strength: Callable[[int, str], Strength]
) -> Encoder:
    """Return a copy with every place of every layer equalised."""
    encoder = copy.deepcopy(encoder)
    for index, layer in enumerate(encoder.layers):
        for place in equalize.PLACES:
            divide(layer, place, found[index][place], strength(index, place))
    return encoder


def divide(layer: Layer, place: str, largest: Tensor, strength: Strength) -> None:
    if strength.by_weights:
        equalize.divide(layer, place, largest, strength.share)
        return
    if place == "o":
        largest = largest.view(layer.self_attn.kv_heads, -1, layer.self_attn.channels)
        largest = largest.amax(1).reshape(-1)
    logs = strength.share * largest.clamp(min=equalize.LEAST * float(largest.max())).log()
    equalize.equalize_layer(layer, place, (logs - logs.mean()).exp())


@torch.no_grad()
def chosen_strengths(
    encoder: Encoder,
    found: equalize.Maxima,
    rows: Sequence[Ids],
    scheme: Scheme | None,
    how: Activations | None,
    method: str = "plain",
) -> list[dict[str, Strength]]:
    """Return the strength of each place whose rounding moves the layer's half least.

    A token's error counts by what its half of the layer adds to the residual stream.
    """
    flows = flows_of(encoder, rows)
    rounding = read_as(how) if how is not None else lambda x: x
    chosen: list[dict[str, Strength]] = []
    for index, (layer, kind) in enumerate(
        zip(encoder.layers, encoder.config.layer_types, strict=True)
    ):
        right: list[dict[str, Tensor]] = [{} for _ in flows]
        by_place = moments(layer, flows, kind)
        best: dict[str, Strength] = {}
        for place in equalize.PLACES:
            errors = {}
            for strength in CANDIDATES:
                trial = copy.deepcopy(layer)
                divide(trial, place, found[index][place], strength)
                moment = by_place[place] if method == "scales" else None
                if moment is not None:
                    ratio = ratio_of(layer, trial, place)
                    moment = moment / ratio / ratio.unsqueeze(1)
                products = equalize.consumers(trial, place)
                if scheme is not None:
                    for product in products:
                        product.weight.copy_(
                            rounded(product.weight, scheme.format_of(ROLES[place]), method, moment)
                        )
                errors[strength] = sum(
                    half_error(trial, layer, place, batch, kind, rounding, seen)
                    for batch, seen in zip(flows, right, strict=True)
                )
            best[place] = min(errors, key=lambda strength: errors[strength])
        chosen.append(best)
        for batch in flows:
            batch.x = batch.through(layer, kind)
    return chosen


def ratio_of(layer: Layer, trial: Layer, place: str) -> Tensor:
    """Return by what the channels that a place's products read were divided."""
    before, after = (equalize.consumers(some, place)[0].weight for some in (layer, trial))
    return (after.square().sum(0) / before.square().sum(0)).sqrt()


def half_error(
    trial: Layer,
    layer: Layer,
    place: str,
    batch: Flow,
    kind: str,
    rounding: Rounding,
    seen: dict[str, Tensor],
) -> float:
    """Return the summed squared error of what the place's half adds, relative by token."""
    handles = [
        product.register_forward_pre_hook(lambda _module, inputs: (rounding(inputs[0]),))
        for product in equalize.consumers(trial, place)
    ]
    x, rotary, bias = batch.x, batch.rotary[kind], batch.bias[kind]
    if place in ("attention", "o"):
        key = "right attention"
        norm = layer.post_attention_layernorm
        if key not in seen:
            seen[key] = norm(layer.self_attn(layer.input_layernorm(x), rotary, bias))
        got = norm(trial.self_attn(trial.input_layernorm(x), rotary, bias))
    else:
        key = "right mlp"
        norm = layer.post_feedforward_layernorm
        if "middle" not in seen:
            attended = layer.self_attn(layer.input_layernorm(x), rotary, bias)
            seen["middle"] = x + layer.post_attention_layernorm(attended)
        if key not in seen:
            seen[key] = norm(layer.mlp(layer.pre_feedforward_layernorm(seen["middle"])))
        got = norm(trial.mlp(trial.pre_feedforward_layernorm(seen["middle"])))
    for handle in handles:
        handle.remove()
    right = seen[key]
    error = (got - right).square().sum(-1) / right.square().sum(-1)
    return float(error[batch.mask].sum())


@torch.no_grad()
def permuted(encoder: Encoder, found: equalize.Maxima) -> Encoder:
    """Return a copy whose feed-forward channels lie in the order of their largest activation."""
    encoder = copy.deepcopy(encoder)
    for layer, of_layer in zip(encoder.layers, found, strict=True):
        equalize.permute_feed_forward(layer, of_layer["down"].argsort(descending=True))
    return encoder


@torch.no_grad()
def split(encoder: Encoder, found: equalize.Maxima, extra: int = 32) -> Encoder:
    """Return a copy with `extra` more feed-forward channels: the largest ones in equal parts.

    gelu(gate) * up / n, n times, each read by the same column of down: exact, and the largest
    activation is an n-th. A channel gets the next part where it is largest by then.
    """
    encoder = copy.deepcopy(encoder)
    for layer, of_layer in zip(encoder.layers, found, strict=True):
        mlp = layer.mlp
        parts = torch.ones_like(of_layer["down"])
        for _ in range(extra):
            parts[(of_layer["down"] / parts).argmax()] += 1
        source = torch.repeat_interleave(torch.arange(len(parts)), parts.long())
        for product, weight in (
            (mlp.gate_proj, mlp.gate_proj.weight[source]),
            (mlp.up_proj, (mlp.up_proj.weight / parts.unsqueeze(1))[source]),
            (mlp.down_proj, mlp.down_proj.weight[:, source]),
        ):
            product.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            product.out_features, product.in_features = weight.shape
    return encoder


# ---- the table -----------------------------------------------------------------------------------


@dataclass
class Bench:
    """The model, its texts, and what is known so far."""

    encoder: Encoder
    calibration: list[Ids]
    ordinary: list[Ids]
    short: list[Ids]
    exact: Tensor  # of ordinary and short texts
    maxima: equalize.Maxima

    def vectors(self, encoder: Encoder, how: Activations | None) -> Tensor:
        return vectors(encoder, [*self.ordinary, *self.short], how)

    def score(self, name: str, found: Tensor, rounded: Tensor | None = None) -> None:
        row: dict[str, Any] = {}
        for to, right in (("float", self.exact), ("rounded", rounded)):
            if right is not None:
                distance = 1000 * (1 - (found.double() * right.double()).sum(-1))
                count = len(self.ordinary)
                row[f"ordinary to {to}"] = round(float(distance[:count].mean()), 2)
                row[f"short to {to}"] = round(float(distance[count:].mean()), 2)
        written = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        row |= {"calibrated on": len(self.calibration), "commit": commit()}
        write({"remedies": written.get("remedies", {}) | {name: row}})
        print(f"{time.strftime('%H:%M:%S')} {name:<60} {list(row.values())[:4]}", flush=True)

    def activations(self, name: str, encoder: Encoder, *hows: Activations) -> None:
        """Score float weights under rounded activations."""
        for how in hows or (Activations(), Activations(rounding="blocks of 32")):
            self.score(f"float, {how.rounding}: {name}", self.vectors(encoder, how))

    def weights(
        self,
        name: str,
        encoder: Encoder,
        scheme: str,
        how: Weights,
        *hows: Activations,
        **more: Any,
    ) -> Encoder:
        """Score rounded weights, then with rounded activations."""
        rounded = with_rounded_weights(encoder, SCHEMES[scheme], how, self.calibration, **more)
        right = self.vectors(rounded, None)
        self.score(f"{scheme}: {name}", right)
        for act in hows:
            self.score(f"{scheme}, {act.rounding}: {name}", self.vectors(rounded, act), right)
        return rounded


def setup(checkpoint_folder: Path, data: Path, passages: int) -> Bench:
    checkpoint = open_checkpoint(checkpoint_folder)
    tokenizer = tokenizer_of(checkpoint.tokenizer_path, checkpoint.config)

    def ids(some: Sequence[str]) -> list[Ids]:
        return [tokenizer.encode(text, max_tokens=TOKENS, overflow="truncate").ids for text in some]

    calibration = [text for part in texts(data, 0, passages, CALIBRATION_WORDS) for text in part]
    ordinary, short = texts(data, 17, 20, WORDS)
    encoder, (calibrating, long, brief) = compact(
        load_encoder(checkpoint), [ids(calibration), ids(ordinary), ids(short)]
    )
    brief = [row for row in brief if len(row) <= 4]
    print(
        f"calibration: {len(calibrating)} texts, {sum(map(len, calibrating))} tokens; "
        f"{len(long)} ordinary texts, {sum(map(len, long))} tokens; {len(brief)} short texts"
    )
    exact = vectors(encoder, [*long, *brief], None)
    count = len(long)
    for name, some in (("ordinary", exact[:count]), ("short", exact[count:])):
        apart = 1 - (some @ some.t())
        mean = 1000 * apart.sum() / (len(some) * (len(some) - 1))
        print(f"mean distance between two {name} texts: {mean:.1f}", flush=True)
    return Bench(encoder, calibrating, long, brief, exact, maxima(encoder, calibrating))


TOKEN, BLOCKS = Activations(), Activations(rounding="blocks of 32")


def exact_downs(name: str) -> bool:
    """Return whether a product is `down` of layers 0 to 7."""
    return name.endswith("down_proj") and int(name.split(".")[1]) < 8


def activations_alone(bench: Bench) -> None:
    encoder, found = bench.encoder, bench.maxima
    for rounding in ACTIVATIONS:
        bench.activations("nothing", encoder, Activations(rounding=rounding))
        bench.activations(
            "float32 down 0-7", encoder, Activations(rounding=rounding, exact=exact_downs)
        )
        bench.activations(
            "first token in two parts",
            encoder,
            Activations(rounding=rounding, two_parts_first=True),
        )
    for strength in (0.25, 0.5, 0.75):
        same = equalized(
            encoder, found, lambda _layer, _place, strength=strength: Strength(strength)
        )
        if strength == 0.75:
            gap = (bench.vectors(same, None) - bench.exact).abs().max()
            print(f"equalised, largest difference in float: {gap:.1e}")
        bench.activations(f"equalised {strength}", same)
    bench.activations("equalised 0.75, float32 down 0-7", same, Activations(exact=exact_downs))
    bench.activations(
        "equalised 0.75, first token in two parts", same, Activations(two_parts_first=True)
    )
    bench.activations("permuted", permuted(encoder, found), BLOCKS)
    wider = split(encoder, found)
    gap = (bench.vectors(wider, None) - bench.exact).abs().max()
    print(f"split, largest difference in float: {gap:.1e}")
    bench.activations("32 channels split", wider)
    again = maxima(wider, bench.calibration)
    for strength in (0.5, 0.75):
        same = equalized(wider, again, lambda _layer, _place, strength=strength: Strength(strength))
        bench.activations(f"32 channels split, equalised {strength}", same)


def weights_alone(bench: Bench) -> None:
    """Score ways to round the layers and the head under a float table."""
    for scheme in ("int4", "mixed"):
        for name, how in {
            "plain": Weights(table="float"),
            "scales": Weights(method="scales", table="float"),
            "feedback": Weights(method="feedback", table="float"),
            "feedback, head plain": Weights(method="feedback", head="plain", table="float"),
            "feedback, float inputs": Weights(method="feedback", table="float", inputs="float"),
            "feedback, tokens alike": Weights(method="feedback", table="float", by_text=False),
            "feedback, absolute": Weights(method="feedback", table="float", relative=False),
        }.items():
            bench.weights(f"table float; {name}", bench.encoder, scheme, how)


def tables_alone(bench: Bench) -> None:
    """Score ways to round the table under float layers."""
    costs = table_moments(bench.encoder, bench.calibration)
    for scheme in ("int4", "mixed"):
        for how in (
            "plain",
            "scales",
            "gradients",
            *(f"{how}, BOS and EOS float" for how in ("plain", "scales", "gradients")),
        ):
            weights = Weights(method="float", table=how)
            bench.weights(f"only table; {how}", bench.encoder, scheme, weights, costs=costs)


def variants(bench: Bench, scheme: str) -> Iterator[tuple[str, Encoder]]:
    """Yield the encoder as it is and equalised, with names."""
    encoder, found = bench.encoder, bench.maxima
    yield "as it is", encoder
    for share in (0.5, 0.75):
        strength = Strength(share)
        yield (
            f"equalised {share}",
            equalized(encoder, found, lambda _index, _place, strength=strength: strength),
        )


def both(bench: Bench, schemes: Sequence[str] = ("mixed", "int4")) -> None:
    """Score rounded weights and activations, with and without equalisation."""
    for scheme in schemes:
        acts = (TOKEN, BLOCKS) if scheme == "int4" else (TOKEN,)
        for name, encoder in variants(bench, scheme):
            for method, how in {
                "plain": Weights(),
                "feedback, BOS and EOS float": Weights(
                    method="feedback", table="plain, BOS and EOS float"
                ),
            }.items():
                bench.weights(f"{name}; {method}", encoder, scheme, how, *acts)


def as_chosen(bench: Bench) -> None:
    """Score strengths chosen by place."""
    for scheme in ("int4", "mixed"):
        strengths = picked(bench, scheme, bench.calibration[::10])
        encoder = equalized(bench.encoder, bench.maxima, strengths)
        how = Weights(method="feedback", table="plain, BOS and EOS float")
        bench.weights(
            "equalised as chosen; feedback, BOS and EOS float", encoder, scheme, how, TOKEN
        )


def picked(bench: Bench, scheme: str, rows: Sequence[Ids]) -> Callable[[int, str], Strength]:
    chosen = chosen_strengths(
        bench.encoder, bench.maxima, rows, SCHEMES[scheme], TOKEN, method="scales"
    )
    for index, of_layer in enumerate(chosen):
        print(index, *(f"{p} {s.share}{'w' if s.by_weights else ''}" for p, s in of_layer.items()))
    return lambda index, place: chosen[index][place]


GROUPS: dict[str, Callable[[Bench], None]] = {
    "activations": activations_alone,
    "tables": tables_alone,
    "both": both,
    "weights": weights_alone,
    "chosen": as_chosen,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passages", type=int, default=100, help="documents to calibrate on")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if skipped(args.cache):
        return 0
    bench = setup(yardstick(args.cache, args.data), args.data, args.passages)
    for name in args.only:
        GROUPS[name](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
