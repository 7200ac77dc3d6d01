"""`egemma-quantize`: parse, read the checkpoint, call one function, print.

`egemma-train` trains for the rounding, and scores a rounded model on dev sets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from egemma_core.checks import number
from egemma_core.errors import ConfigError, EgemmaError, InputError

if TYPE_CHECKING:  # at run time they would import torch for --help
    from egemma_core.checkpoint.folder import Checkpoint
    from egemma_core.nn.encode import Ids

# What `report` embeds without --texts: short and long, several languages, code, numbers.
TEXTS = (
    "Tomatoes need six hours of sun a day and water at their roots, not on their leaves.",
    "How do I undo the last commit without losing my changes?",
    "def mean(values):\n    return sum(values) / len(values)",
    "El tren de las 7:45 sale del andén 3 y llega a Sevilla a las 10:20.",
    "La photosynthèse transforme la lumière en énergie chimique dans les feuilles des plantes.",
    "地震のときは、まず机の下に入り、揺れがおさまるのを待ってください。",
    "تحتاج النباتات إلى الماء والضوء لكي تنمو.",
    "Rechnung Nr. 2024-118: 3 Stück zu je 49,90 EUR, zahlbar binnen 14 Tagen.",
    "The committee met on Tuesday. It approved the minutes, heard the treasurer's report, "
    "postponed the vote on the new bridge, and asked the engineers for a second "
    "estimate that includes the cost of closing the road for a summer.",
    "ok",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="egemma-quantize",
        description="Say what rounding a model's weights costs, or write the rounded model. To "
        "train for it, give a stage of egemma-train a scheme; to score it, run egemma-train "
        "evaluate --scheme NAME.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    report = verbs.add_parser(
        "report",
        help="compare a model with itself, rounded: by matrix, layer and width",
    )
    report.add_argument(
        "--texts",
        type=Path,
        help="UTF-8 file, one text per line, embedded as documents (default: ten built-in texts)",
    )
    round_ = verbs.add_parser(
        "round",
        help="write the model with its weights on the grid, in float32 and the published layout",
    )
    round_.add_argument(
        "--out", type=Path, required=True, help="folder of the rounded checkpoint; must not exist"
    )
    round_.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXTS",
        help="UTF-8 file, some hundred texts like yours, one per line: keep the products of these "
        "texts as they were, instead of each weight; takes minutes",
    )
    round_.add_argument(
        "--equalize",
        type=float,
        metavar="STRENGTH",
        help="with --calibrate: first make the channels that products read alike in size, which "
        "changes nothing in float and helps 8-bit activations; above 0, at most 1 (0.5 is a start)",
    )
    for verb in (report, round_):
        verb.add_argument(
            "--model",
            required=True,
            help="checkpoint folder, or hub id such as google/embeddinggemma-300m[@revision]",
        )
        verb.add_argument(
            "--scheme",
            required=True,
            help="int4, int8, int8-per-channel, mixed; q4_0, q8_0 for published QAT checkpoints",
        )
        verb.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    args = parser().parse_args(argv)
    try:
        print(_report(args) if args.verb == "report" else _round(args))
    except EgemmaError as error:
        print(f"egemma-quantize: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"egemma-quantize: {error.name} is not installed. pip install 'egemma[train]'",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(
            f"egemma-quantize: {error.strerror or error} ({error.filename or args.model}).",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("egemma-quantize: stopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _report(args: argparse.Namespace) -> str:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_quant.ggml import hint
    from egemma_quant.report import measure
    from egemma_quant.schemes import scheme_named

    scheme, checkpoint = scheme_named(args.scheme), open_checkpoint(args.model)
    rows, truncated = _rows(checkpoint, read_texts(args.texts) if args.texts else TEXTS)
    report = measure(
        load_encoder(checkpoint),
        scheme,
        rows,
        truncated=truncated,
        model=checkpoint.source,
        hint=hint(checkpoint, scheme.name),
    )
    return report.to_json() if args.json else report.to_text()


def _round(args: argparse.Namespace) -> str:
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_core.nn.save import save_checkpoint
    from egemma_quant.calibrate import chunks, round_calibrated
    from egemma_quant.equalize import channel_maxima, equalize_encoder
    from egemma_quant.ggml import hint
    from egemma_quant.qat import rounded
    from egemma_quant.schemes import scheme_named

    if args.equalize is not None:
        number("--equalize", args.equalize, above=0, most=1)
        if not args.calibrate:
            raise ConfigError(
                "--equalize needs texts that show how large each channel is.",
                hint="Add --calibrate TEXTS.",
            )
    scheme, checkpoint = scheme_named(args.scheme), open_checkpoint(args.model)
    encoder = load_encoder(checkpoint)

    def save() -> None:
        save_checkpoint(encoder, checkpoint.tokenizer_path, checkpoint.prompts, args.out)

    if args.calibrate:
        rows = calibration_rows(checkpoint, read_texts(args.calibrate))
        batches = chunks(rows, checkpoint.config.pad_id)
        if args.equalize is not None:
            encoder = equalize_encoder(encoder, channel_maxima(encoder, batches), args.equalize)
        round_calibrated(encoder, scheme, batches)
        save()
    else:
        with rounded(encoder, scheme):
            save()
    note = hint(checkpoint, scheme.name)
    if args.json:
        return json.dumps({"out": str(args.out), "scheme": scheme.name, "hint": note})
    written = (
        f"{args.out}: {checkpoint.source} with weights rounded to {scheme.name}, held in float32"
    )
    return f"{written}\nnote: {note}" if note else written


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 file.

    Raises:
        InputError: it is empty, a line is blank, or it is not UTF-8.
    """
    try:
        lines = tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8.",
            hint="Save the file as UTF-8, one text per line.",
        ) from error
    for position, line in enumerate(lines):
        if not line.strip():
            raise InputError(
                f"{path}, line {position + 1} is blank.",
                hint="Write one text per line.",
                position=position,
            )
    return lines


CALIBRATION_TOKENS = 128  # of a text that is read; more texts tell more than longer ones


def calibration_rows(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Ids]:
    """Return token rows of each text as a document, as a query, and of its first word alone.

    Short texts lose most by rounding, and their users write no prompt.
    """
    tokenizer, prompts = checkpoint.tokenizer(), checkpoint.prompts
    limit = min(CALIBRATION_TOKENS, checkpoint.config.max_tokens)
    wanted = [
        variant
        for text in texts
        for variant in (prompts.document() + text, prompts.query() + text, text.split()[0])
    ]
    return [tokenizer.encode(text, max_tokens=limit, overflow="truncate").ids for text in wanted]


def _rows(checkpoint: Checkpoint, texts: Sequence[str]) -> tuple[list[Ids], int]:
    """Return token rows, and how many texts are longer than the model reads.

    Of those the beginning is compared, which tells as much.
    """
    tokenizer, prompt = checkpoint.tokenizer(), checkpoint.prompts.document()
    tokens = [tokenizer.encode(prompt + text, overflow="truncate") for text in texts]
    return [found.ids for found in tokens], sum(found.truncated for found in tokens)


if __name__ == "__main__":
    sys.exit(main())
