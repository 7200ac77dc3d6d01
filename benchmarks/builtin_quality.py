"""How well does the built-in model find things, beside BM25, at its three widths, and with int4
weights?

Every set is searched whole: its own queries (at most --queries of them, drawn with a fixed seed)
over all of its documents. No query and no document of these sets was trained on. Not answered: long
documents (what follows 512 tokens is cut), other languages than English, exported files (their
vectors are checked against this model by the export itself).

    python benchmarks/builtin_quality.py --data ../shared/data --model models/egemma-small

Writes benchmarks/results/builtin_quality.json and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from egemma_core.checkpoint.folder import Checkpoint, open_checkpoint
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.vectors import shorten
from egemma_quant.qat import rounded
from egemma_quant.schemes import INT4
from egemma_train.data.dev_files import Retrieval, read_retrieval
from egemma_train.metrics import best_hits, judge
from models.small import BUILTIN, DEV

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "builtin_quality.json"
WORD = re.compile(r"[^\W_]+")


def read_set(folder: Path, max_queries: int) -> Retrieval:
    """A set with at most that many of its queries, drawn with a fixed seed."""
    found = read_retrieval(folder)
    chosen = sorted(
        random.Random(0).sample(sorted(found.relevant), min(max_queries, len(found.relevant)))
    )
    return replace(found, queries={query: found.queries[query] for query in chosen})


def bm25(
    queries: Sequence[str], documents: Sequence[str], k1: float = 1.2, b: float = 0.75
) -> NDArray[np.float32]:
    """(queries, documents) scores over lower-cased words.

    Source: Robertson and Zaragoza 2009, with Lucene's idf.
    """
    counts = [Counter(WORD.findall(text.lower())) for text in documents]
    lengths = np.array([max(1, count.total()) for count in counts], dtype=np.float32)
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, count in enumerate(counts):
        for word, times in count.items():
            postings[word].append((index, times))
    scores = np.zeros((len(queries), len(documents)), dtype=np.float32)
    for row, query in enumerate(queries):
        for word, weight in Counter(WORD.findall(query.lower())).items():
            if word in postings:
                where, times = np.array(postings[word]).T
                idf = math.log(1 + (len(documents) - len(where) + 0.5) / (len(where) + 0.5))
                scores[row, where] += (
                    weight
                    * idf
                    * times
                    * (k1 + 1)
                    / (times + k1 * (1 - b + b * lengths[where] / lengths.mean()))
                )
    return scores


def measure(scores: NDArray[np.float32], found: Retrieval) -> dict[str, float]:
    """nDCG@10, recall@10 and accuracy@1 (share of queries whose first hit is right), averaged over
    the queries.
    """
    place = {document: index for index, document in enumerate(found.documents)}
    degrees = [
        {place[document]: degree for document, degree in found.relevant[query].items()}
        for query in found.queries
    ]
    return {
        metric: round(float(values.mean()), 4)
        for metric, values in judge(best_hits(scores), degrees).items()
    }


@torch.no_grad()
def embed(
    encoder: Encoder, checkpoint: Checkpoint, prompted: Sequence[tuple[str, str]]
) -> NDArray[np.float32]:
    """(texts, dim) vectors of (prompt, text) pairs."""
    tokenizer = checkpoint.tokenizer()
    rows = [tokenizer.encode(prompt + text, overflow="truncate").ids for prompt, text in prompted]
    return encode_rows(encoder, rows, tokenizer.pad_id).numpy()


def embed_set(
    encoder: Encoder, checkpoint: Checkpoint, found: Retrieval, task: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the queries and of the documents."""
    prompts = checkpoint.prompts
    queries = embed(
        encoder, checkpoint, [(prompts.query(task), query) for query in found.queries.values()]
    )
    return queries, embed(
        encoder,
        checkpoint,
        [(prompts.document(title), text) for title, text in found.documents.values()],
    )


def demo(encoder: Encoder, checkpoint: Checkpoint) -> list[dict[str, object]]:
    """The first three hits of each demo query, under the default prompt."""
    texts = [
        json.loads(line)
        for line in (HERE / "demo_texts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    queries = (HERE / "demo_queries.txt").read_text(encoding="utf-8").splitlines()
    prompts = checkpoint.prompts
    documents = embed(
        encoder, checkpoint, [(prompts.document(text.get("title")), text["text"]) for text in texts]
    )
    scores = (
        embed(encoder, checkpoint, [(prompts.query(), query) for query in queries]) @ documents.T
    )
    return [
        {
            "query": query,
            "hits": [[texts[i]["id"], round(float(row[i]), 3)] for i in np.argsort(-row)[:3]],
        }
        for query, row in zip(queries, scores, strict=True)
    ]


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str) -> str:
    systems = list(next(iter(results.values())))
    rows = [
        [name, *(f"{of[system][metric]:.3f}" for system in systems)] for name, of in results.items()
    ]
    rows.append(
        [
            "mean",
            *(
                f"{np.mean([of[system][metric] for of in results.values()]):.3f}"
                for system in systems
            ),
        ]
    )
    return "\n".join(
        "| " + " | ".join(row) + " |"
        for row in [[metric, *systems], ["---"] * (len(systems) + 1), *rows]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--queries", type=int, default=500, help="at most so many per set")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    checkpoint = open_checkpoint(args.model)
    encoder = load_encoder(checkpoint)
    results: dict[str, dict[str, dict[str, float]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, task in DEV.items():
        found = read_set(args.data / name, args.queries)
        sizes[name] = {"queries": len(found.queries), "documents": len(found.documents)}
        of = {
            "BM25": measure(
                bm25(
                    list(found.queries.values()),
                    [f"{title or ''} {text}" for title, text in found.documents.values()],
                ),
                found,
            )
        }
        queries, documents = embed_set(encoder, checkpoint, found, task)
        for dim in checkpoint.config.dims:
            dims = checkpoint.config.dims
            of[f"float {dim}"] = measure(
                shorten(queries, dim, dims) @ shorten(documents, dim, dims).T, found
            )
        with rounded(encoder, INT4):
            queries, documents = embed_set(encoder, checkpoint, found, task)
        of[f"int4 {checkpoint.config.dim}"] = measure(queries @ documents.T, found)
        results[name.split("/", 1)[1]] = of
        print(name, of, flush=True)
    with rounded(encoder, INT4):
        demo_int4 = demo(encoder, checkpoint)
    report = {
        "model": checkpoint.weight_hashes(),
        "sets": sizes,
        "results": results,
        "demo": demo(encoder, checkpoint),
        "demo_int4": demo_int4,
        "seconds": round(time.monotonic() - started, 1),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        table(results, "ndcg@10"),
        table(results, "recall@10"),
        table(results, "accuracy@1"),
        sep="\n\n",
    )
    print(json.dumps(report["demo"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
