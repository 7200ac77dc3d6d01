"""How well does the built-in model find things, beside BM25, at its three widths, and with int4 weights?

Every set is searched whole: its own queries (at most --queries of them, drawn with a fixed seed) over all of its documents.
No query and no document of these sets was trained on. Not answered: long documents (what follows 512 tokens is cut),
other languages than English, exported files (their vectors are checked against this model by the export itself).

    python benchmarks/builtin_quality.py --data ../shared/data --model models/egemma-small

Writes benchmarks/results/builtin_quality.json and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from egemma_core.checkpoint import Checkpoint, open_checkpoint
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.train.data import tokenize
from egemma_core.train.loop import encode_rows
from egemma_core.vectors import shorten
from egemma_quant.schemes import INT4
from egemma_quant.weights import quantize_encoder, with_weights

RESULTS = Path(__file__).parent / "results" / "builtin_quality.json"
HERE = Path(__file__).parent
QUESTION, SEARCH, CODE = "question answering", "search result", "code retrieval"
SETS = {  # folder and the task its queries are given
    "retrieval/squad-dev": QUESTION,
    "retrieval/medquad-test": QUESTION,
    "retrieval/cranfield": SEARCH,
    "code/nl2bash-test": CODE,
    "code/tldr-test": CODE,
    "code/pycode-test": CODE,
    "code/mbxp-test/python": CODE,
}
WORD = re.compile(r"[^\W_]+")
CUT = 10  # hits that count


@dataclass(frozen=True)
class RetrievalSet:
    queries: dict[str, str]
    documents: dict[str, tuple[str | None, str]]  # id to title and text
    relevant: dict[str, dict[str, float]]  # query id to document id to degree


def read_set(folder: Path, max_queries: int) -> RetrievalSet:
    def rows(name: str) -> list[dict[str, str]]:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    relevant: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows("qrels"):
        relevant[row["q"]][row["d"]] = float(row["rel"])
    queries = {row["id"]: row["text"] for row in rows("queries") if row["id"] in relevant}
    chosen = sorted(random.Random(0).sample(sorted(queries), min(max_queries, len(queries))))
    documents = {row["id"]: (row.get("title"), row["text"]) for row in rows("corpus")}
    return RetrievalSet({query: queries[query] for query in chosen}, documents, dict(relevant))


def bm25(queries: Sequence[str], documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> NDArray[np.float32]:
    """(queries, documents) scores over lower-cased words. Source: Robertson and Zaragoza 2009, with Lucene's idf."""
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
                scores[row, where] += weight * idf * times * (k1 + 1) / (times + k1 * (1 - b + b * lengths[where] / lengths.mean()))
    return scores


def measure(scores: NDArray[np.float32], found: RetrievalSet) -> dict[str, float]:
    """nDCG@10, recall@10 and recall@1 (share of queries whose first hit is right), averaged over the queries."""
    ids = list(found.documents)
    ndcg, recall, first = [], [], []
    for query, row in zip(found.queries, scores, strict=True):
        degrees = found.relevant[query]
        hits = [degrees.get(ids[index], 0.0) for index in np.argsort(-row, kind="stable")[:CUT]]
        gain = sum(degree / math.log2(rank + 2) for rank, degree in enumerate(hits))
        best = sum(degree / math.log2(rank + 2) for rank, degree in enumerate(sorted(degrees.values(), reverse=True)[:CUT]))
        ndcg.append(gain / best)
        recall.append(sum(degree > 0 for degree in hits) / min(CUT, len(degrees)))
        first.append(float(hits[0] > 0))
    return {
        "ndcg@10": round(float(np.mean(ndcg)), 4),
        "recall@10": round(float(np.mean(recall)), 4),
        "first_hit_right": round(float(np.mean(first)), 4),
    }


@torch.no_grad()
def embed(encoder: Encoder, checkpoint: Checkpoint, prompted: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """(texts, dim) vectors of (prompt, text) pairs."""
    tokenizer = checkpoint.tokenizer()
    rows = [row for prompt, text in prompted for row in tokenize(tokenizer, prompt, [text], checkpoint.config.max_tokens)]
    return encode_rows(encoder, rows, checkpoint.config.pad_id, texts_per_chunk=16).numpy()


def embed_set(
    encoder: Encoder, checkpoint: Checkpoint, found: RetrievalSet, task: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the queries and of the documents."""
    prompts = checkpoint.prompts
    queries = embed(encoder, checkpoint, [(prompts.query(task), query) for query in found.queries.values()])
    return queries, embed(encoder, checkpoint, [(prompts.document(title), text) for title, text in found.documents.values()])


def demo(encoder: Encoder, checkpoint: Checkpoint) -> list[dict[str, object]]:
    """The first three hits of each demo query, under the default prompt."""
    texts = [json.loads(line) for line in (HERE / "demo_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = (HERE / "demo_queries.txt").read_text(encoding="utf-8").splitlines()
    prompts = checkpoint.prompts
    documents = embed(encoder, checkpoint, [(prompts.document(text.get("title")), text["text"]) for text in texts])
    scores = embed(encoder, checkpoint, [(prompts.query(), query) for query in queries]) @ documents.T
    return [
        {"query": query, "hits": [[texts[i]["id"], round(float(row[i]), 3)] for i in np.argsort(-row)[:3]]}
        for query, row in zip(queries, scores, strict=True)
    ]


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str) -> str:
    systems = list(next(iter(results.values())))
    rows = [[name, *(f"{of[system][metric]:.3f}" for system in systems)] for name, of in results.items()]
    rows.append(["mean", *(f"{np.mean([of[system][metric] for of in results.values()]):.3f}" for system in systems)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [[metric, *systems], ["---"] * (len(systems) + 1), *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=Path("models/egemma-small"))
    parser.add_argument("--queries", type=int, default=500, help="at most so many per set")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    checkpoint = open_checkpoint(args.model)
    encoder = load_encoder(checkpoint)
    int4 = with_weights(encoder, quantize_encoder(encoder, INT4)).eval()
    results: dict[str, dict[str, dict[str, float]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, task in SETS.items():
        found = read_set(args.data / name, args.queries)
        sizes[name] = {"queries": len(found.queries), "documents": len(found.documents)}
        of = {
            "BM25": measure(
                bm25(list(found.queries.values()), [f"{title or ''} {text}" for title, text in found.documents.values()]), found
            )
        }
        queries, documents = embed_set(encoder, checkpoint, found, task)
        for dim in checkpoint.config.dims:
            dims = checkpoint.config.dims
            of[f"float {dim}"] = measure(shorten(queries, dim, dims) @ shorten(documents, dim, dims).T, found)
        queries, documents = embed_set(int4, checkpoint, found, task)
        of[f"int4 {checkpoint.config.dim}"] = measure(queries @ documents.T, found)
        results[name.split("/", 1)[1]] = of
        print(name, of, flush=True)
    report = {
        "model": checkpoint.weight_hashes(),
        "sets": sizes,
        "results": results,
        "demo": demo(encoder, checkpoint),
        "demo_int4": demo(int4, checkpoint),
        "seconds": round(time.monotonic() - started, 1),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(results, "ndcg@10"), table(results, "recall@10"), table(results, "first_hit_right"), sep="\n\n")
    print(json.dumps(report["demo"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
