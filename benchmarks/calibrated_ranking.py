"""Does a model whose weights are rounded on texts rank as well as one of nearest codes?

    python benchmarks/calibrated_ranking.py --data ../shared/data   # ten minutes on one thread

The built-in model, which no training prepared for rounding; nDCG@10 on two dev sets, with the 95 %
interval of the paired difference over queries, and the mean cosine distance (x 1000) to the float
model on texts of the calibration's kind, none of which was calibrated on. Writes
benchmarks/results/calibrated_ranking.json. Not answered: larger models, and other kinds of texts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_quant.calibrate import chunks, round_calibrated
from egemma_quant.cli import calibration_rows
from egemma_quant.qat import rounded_weights
from egemma_quant.schemes import SCHEMES
from egemma_train.evaluate import DevSets
from egemma_train.metrics import paired_difference
from models import small

RESULTS = small.ROOT / "benchmarks/results/calibrated_ranking.json"
DEV = ("retrieval/medquad-test", "code/pycode-test")
SOURCES = (
    ("texts/wikipedia-en", "text"),
    ("pairs/pycode", "positive"),
    ("pairs/medquad", "positive"),
)


def texts(data: Path, start: int, every: int) -> list[str]:
    """Return some texts of each source, none of them the same for another start below `every`."""
    found = []
    for name, column in SOURCES:
        with gzip.open(data / f"{name}.train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)[column] for line, _ in zip(lines, range(3000), strict=False)]
        found += rows[start::every]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=small.DATA)
    parser.add_argument("--schemes", nargs="*", default=["int4", "mixed"], choices=list(SCHEMES))
    parser.add_argument("--queries", type=int, default=300, help="at most so many per set")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(small.BUILTIN)
    pad_id = checkpoint.config.pad_id
    held_out = calibration_rows(checkpoint, texts(args.data, 1, 150))
    calibration = calibration_rows(checkpoint, texts(args.data, 0, 30))
    dev = DevSets(
        small.dev_sets(args.queries, 128, DEV),
        args.data,
        checkpoint.tokenizer(),
        checkpoint.prompts,
    )
    encoder = load_encoder(checkpoint)

    def judged(some: Encoder) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            return encode_rows(some, held_out, pad_id), dev.per_query(some)

    exact, right = judged(encoder)
    table: dict[str, Any] = {
        "float": {name: float(values.mean()) for name, values in right.items()}
    }

    def add(name: str, found: tuple[Tensor, dict[str, Any]]) -> None:
        vectors, values = found
        table[name] = {
            "distance": round(1000 * float((1 - (vectors * exact).sum(-1)).mean()), 2),
            **{key: round(float(some.mean()), 4) for key, some in values.items()},
            "difference to float": {
                key: [round(value, 4) for value in paired_difference(some, right[key])]
                for key, some in values.items()
            },
        }
        print(name, table[name], flush=True)

    for scheme in args.schemes:
        with rounded_weights(encoder, SCHEMES[scheme]):
            add(f"{scheme}, nearest codes", judged(encoder))
        calibrated = load_encoder(checkpoint)
        round_calibrated(calibrated, SCHEMES[scheme], chunks(calibration, pad_id))
        add(f"{scheme}, {len(calibration)} calibration rows", judged(calibrated))
    body = {"table": table, "machine": machine(), "threads": args.threads, "commit": commit()}
    RESULTS.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
