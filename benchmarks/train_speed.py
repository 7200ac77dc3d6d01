"""How many tokens a second does a contrastive step take in at full size, and what share of the
device's arithmetic is that?

    python benchmarks/train_speed.py --size full --peak-tflops 989   # an H100, bfloat16, dense
    python benchmarks/train_speed.py --size small --steps 6          # any machine

Random weights and random tokens: speed does not depend on them. A step is forward, backward,
gradient clipping and AdamW, without reading and tokenizing. Model FLOPs are counted as 6 for each
weight of a matrix product and token (2 forward, 4 backward), plus attention's scores and sums over
the T tokens that a full layer sees and the 2 windows that a sliding one should see; the second
forward pass of gradient caching is work but no model FLOP. Utilisation is model FLOPs per second
over the peak that was named.

Writes benchmarks/results/train_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_train.data.batches import Batch
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import Contrast, ContrastConfig
from egemma_train.optimizer import make_optimizer
from egemma_train.ranks import join
from egemma_train.start.decoder import random_encoder
from models import small

RESULTS = Path(__file__).parent / "results/train_speed.json"
EMBEDDING_GEMMA = EncoderConfig(
    vocab_size=262144,
    width=768,
    ffn_width=1152,
    num_layers=24,
    num_heads=3,
    num_kv_heads=1,
    head_dim=256,
    query_scale=256**-0.5,
    norm_eps=1e-6,
    layer_types=((SLIDING,) * 5 + (FULL,)) * 4,
    window=256,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=2048,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((768, 3072), (3072, 768)),
    dims=(768, 512, 256, 128),
)
SIZES = {"full": EMBEDDING_GEMMA, "small": small.shape(256, 4, 256, (256, 128, 64))}


def flops_per_token(config: EncoderConfig, tokens: int) -> float:
    """Model FLOPs of one token of a text of `tokens`, forward and backward."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # weights of matrix products
    layer = config.width * (2 * queries + 2 * keys + 3 * config.ffn_width)
    seen = sum(
        tokens if kind == FULL else min(tokens, 2 * config.window + 1)
        for kind in config.layer_types
    )
    head = sum(into * out for into, out in config.dense) / tokens  # once per text
    return 6 * (config.num_layers * layer + head) + 12 * queries * seen


class OneBatch:
    """A batch of random tokens, all texts of one length, for every step."""

    def __init__(self, config: EncoderConfig, pairs: int, tokens: int) -> None:
        rows = torch.randint(
            10, config.vocab_size, (3, pairs, tokens), generator=torch.Generator().manual_seed(0)
        ).tolist()
        queries, positives, negatives = ([tuple(row) for row in side] for side in rows)
        texts = [[f"{side} {row}" for row in range(pairs)] for side in range(3)]
        self.batch = Batch(
            dataset="random",
            symmetric=False,
            queries=queries,
            positives=positives,
            negatives=negatives,
            has_negative=[True] * pairs,
            query_texts=texts[0],
            positive_texts=texts[1],
            negative_texts=texts[2],
            truncated=0,
        )

    def at(self, step: int) -> Batch:
        return self.batch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of every text")
    parser.add_argument("--chunk-tokens", type=int, default=65536)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="of the device, in this precision; without it no utilisation is printed",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = SIZES[args.size]
    path, _, prompts = small.tokenizer_and_prompts()
    with join(args.device) as ranks:
        encoder = random_encoder(config, 0).requires_grad_().to(ranks.device)
        loss = ContrastConfig(
            precision=args.precision, chunk_tokens=args.chunk_tokens, recompute=args.recompute
        )
        # the same `at`
        objective = Contrast(
            encoder,
            OneBatch(config, args.pairs, args.tokens),
            loss,
            tokenizer_path=path,
            prompts=prompts,
            ranks=ranks,
        )  # type: ignore[arg-type]
        optimizer = make_optimizer(objective.parameters(), LoopConfig(steps=args.steps))
        seconds = []
        for step in range(args.steps + 3):
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            objective.backward(step)
            torch.nn.utils.clip_grad_norm_(objective.parameters().values(), 1.0)
            optimizer.step()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[3:])
        tokens = 3 * args.pairs * args.tokens
        flops = flops_per_token(config, args.tokens) * tokens / median
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else machine()
        memory = torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else None
        result = {
            "device": device,
            "commit": commit(),
            "size": args.size,
            "parameters": sum(weight.numel() for weight in encoder.parameters()),
            "pairs": args.pairs,
            "tokens": args.tokens,
            "precision": args.precision,
            "recompute": args.recompute,
            "step_ms": round(1000 * median, 2),
            "tokens_per_s": round(tokens / median),
            "model_tflops_per_s": round(flops / 1e12, 3),
            "peak_memory_gib": memory,
            "utilisation": round(flops / 1e12 / args.peak_tflops, 4) if args.peak_tflops else None,
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
