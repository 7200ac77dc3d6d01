"""Real vectors for the search benchmark: a 768-wide model trained on real texts, and its vectors of
a million of them.

    python benchmarks/search_vectors.py train --data ../shared/data   # 25 minutes, 2 cores
    python benchmarks/search_vectors.py embed --data ../shared/data   # 40, a million texts

EmbeddingGemma's own weights are gated, so the model is a small sibling with its output widths (768,
512, 256, 128), trained by the same contrastive and Matryoshka losses on the same pairs as the
built-in model. Random or clustered synthetic vectors would not do: how much a prefix of a vector
knows is a property of the training. Both steps resume where they were stopped.

Texts are all distinct ones of the data folder, long ones cut into passages. Queries are those of
the evaluation sets, whose documents are among the passages. Writes
build/search-vectors/{passages,queries}.npy (float32) and passages.txt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from egemma_core.checkpoint.config import FULL, SLIDING
from egemma_core.errors import EgemmaError
from egemma_train.loop_config import LoopConfig
from models.train_builtin import CONFIG, SEED, batch_config, make_model

WIDE = replace(
    CONFIG,
    width=768,
    ffn_width=512,
    num_layers=2,
    layer_types=(SLIDING, FULL),
    dense=((768, 768), (768, 768)),
    dims=(768, 512, 256, 128),
)
PASSAGE_CHARS = 400
NUM_QUERIES = 2000
BLOCK = 8192  # texts between two saves


def passages_of(text: str) -> Iterator[str]:
    """Passages of about PASSAGE_CHARS characters, cut at sentences and lines."""
    passage = ""
    for sentence in re.split(r"(?<=[.!?。！？])\s+|\n+", text):
        if passage and len(passage) + len(sentence) > PASSAGE_CHARS:
            yield passage
            passage = ""
        passage = f"{passage} {sentence[: 2 * PASSAGE_CHARS]}".strip()
    if passage:
        yield passage


def read_texts(data: Path) -> tuple[list[str], list[str]]:
    """Distinct passages in a fixed order, those of the evaluation corpora first; and the queries of
    these.
    """
    seen: dict[str, None] = {}
    queries: dict[str, None] = {}
    for path in [
        *sorted(data.glob("retrieval/**/*.gz")),
        *sorted(data.glob("code/**/*.gz")),
        *sorted(data.glob("*/*.gz")),
    ]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if path.name.startswith("queries"):
                    queries[row["text"]] = None
                    continue
                for key in ("title", "text", "positive", "negative", "query", "a", "b"):
                    if isinstance(row.get(key), str):
                        seen.update(dict.fromkeys(passages_of(row[key])))
    passages, asked = list(seen), sorted(queries)
    corpus = passages[:40_000]  # what the queries ask about stays in every size
    rest = passages[40_000:]
    random.Random(SEED).shuffle(rest)
    return corpus + rest, random.Random(SEED).sample(asked, NUM_QUERIES)


def embed(data: Path, work: Path, bundle: Path, limit: int) -> None:
    from egemma import Embedder

    passages, queries = read_texts(data)
    passages = passages[:limit]
    print(f"{len(passages)} passages, {len(queries)} queries", flush=True)
    (work / "passages.txt").write_text(
        "\n".join(json.dumps(p, ensure_ascii=False) for p in passages) + "\n", encoding="utf-8"
    )
    with Embedder.open(bundle) as embedder:
        np.save(work / "queries.npy", embedder.embed_query(queries, overflow="truncate").vectors)
        (work / "queries.txt").write_text(
            "\n".join(json.dumps(q, ensure_ascii=False) for q in queries) + "\n", encoding="utf-8"
        )
        path = work / "passages.f32"
        done = path.stat().st_size // (4 * embedder.dim) // BLOCK * BLOCK if path.exists() else 0
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(done * 4 * embedder.dim)
            started, first = time.monotonic(), done
            while done < len(passages):
                vectors = embedder.embed_documents(
                    passages[done : done + BLOCK], overflow="truncate"
                ).vectors
                file.write(vectors.astype("<f4").tobytes())
                file.flush()
                done += len(vectors)
                rate = (done - first) / (time.monotonic() - started)
                print(
                    f"{done} of {len(passages)}, {rate:.0f} texts/s, "
                    f"{(len(passages) - done) / rate / 60:.0f} min left",
                    flush=True,
                )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("train", "embed"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/search-vectors"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bundle", type=Path, help="default: the exported model in --work")
    parser.add_argument("--limit", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    try:
        if args.step == "train":
            loop = LoopConfig(steps=args.steps, learning_rate=1e-3, warmup_steps=30, save_every=50)
            make_model(args.data, WIDE, batch_config(128, 64), loop, args.work, args.work / "model")
        else:
            embed(args.data, args.work, args.bundle or args.work / "bundle", args.limit)
    except EgemmaError as error:
        print(f"search_vectors: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
