"""How many chunks does one edit change, and how long does cutting take?

Joins passages of retrieval sets into one long document without headings, and for the hardest case
without paragraphs, edits one passage at random, and counts the chunks whose text is new. The same
with cuts that fill every chunk as far as it goes, for comparison. Not answered: what the sizes and
cuts do to the quality of search.

    python benchmarks/chunk_edits.py [--edits 120] [--tokens 400]

Needs the real tokenizer and the retrieval sets (see CONTRIBUTING.md). Writes
benchmarks/results/chunk_edits.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma.chunks import Chunk, split_text
from egemma.units import Units
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EGEMMA_DATA", ROOT.parent / "shared" / "data"))
CORPORA = ("squad-dev", "jsquad-test", "cranfield")
PASSAGES = 150
PROMPT = Prompts(
    by_name={"query": "task: search result | query: ", "document": "title: none | text: "}
).document


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    tokenizer = Tokenizer(
        DATA / "tokenizer" / "gemma3.model",
        bos_id=2,
        eos_id=1,
        pad_id=0,
        vocab_size=262144,
        max_tokens=2048,
    )

    def cut(text: str, overlap: int) -> list[Chunk]:
        return split_text(
            text,
            title="T",
            count_tokens=lambda part: tokenizer.encode(part, overflow="truncate").num_tokens,
            max_tokens=args.tokens,
            overlap_tokens=overlap,
            prompt=PROMPT,
        )

    rows = []
    anchored = Units.cut
    for corpus in CORPORA:
        paragraphs = passages(corpus)
        for between in ("\n\n", " "):
            for overlap, cuts in ((0, anchored), (40, anchored), (0, fill_up)):
                Units.cut = cuts  # type: ignore[method-assign]
                row = {
                    "corpus": corpus,
                    "paragraphs": between != " ",
                    "overlap_tokens": overlap,
                    "cuts": "by content" if cuts is anchored else "as full as possible",
                }
                rows.append(
                    {
                        **row,
                        **edited(
                            paragraphs,
                            between,
                            lambda text, overlap=overlap: cut(text, overlap),
                            args.edits,
                        ),
                    }
                )
                print(rows[-1], flush=True)
    Units.cut = anchored  # type: ignore[method-assign]
    body = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "machine": machine(),
        "commit": commit(),
        "edits": args.edits,
        "max_tokens": args.tokens,
        "passages": PASSAGES,
        "rows": rows,
        "cutting": cutting(cut),
    }
    (ROOT / "benchmarks" / "results" / "chunk_edits.json").write_text(
        json.dumps(body, indent=1) + "\n"
    )
    return 0


def cutting(cut: Callable[[str, int], list[Chunk]]) -> dict[str, Any]:
    """Processor seconds for long texts, the tokenizer's included."""
    whole = "\n\n".join(passages("squad-dev"))
    texts = {"prose": whole * (10_000_000 // len(whole)), "without blanks": "x" * 1_000_000}
    times = {}
    for name, text in texts.items():
        started = time.process_time()
        cut(text, 40)
        times[name] = {
            "characters": len(text),
            "processor_s": round(time.process_time() - started, 2),
        }
        print(name, times[name], flush=True)
    return times


def passages(corpus: str) -> list[str]:
    with gzip.open(DATA / "retrieval" / corpus / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(PASSAGES), file, strict=False)]


def edited(
    paragraphs: Sequence[str], between: str, cut: Callable[[str], list[Chunk]], edits: int
) -> dict[str, Any]:
    """How many chunks are new after each edit."""
    chance = random.Random(1)
    known = {chunk.text for chunk in cut(between.join(paragraphs))}
    changed = sorted(
        sum(chunk.text not in known for chunk in cut(between.join(edit(paragraphs, chance))))
        for _ in range(edits)
    )
    return {
        "chunks": len(known),
        "median": statistics.median(changed),
        "mean": round(statistics.mean(changed), 1),
        "p95": changed[int(0.95 * len(changed))],
        "most": changed[-1],
    }


def edit(paragraphs: Sequence[str], chance: random.Random) -> list[str]:
    """A word, a sentence, a rewritten, an added or a deleted paragraph."""
    at = chance.randrange(len(paragraphs))
    old = paragraphs[at]
    place = chance.randrange(max(1, len(old)))
    new = chance.choice(
        (
            [f"{old[:place]} edited {old[place:]}"],
            [f"{old} A new sentence was added here by somebody."],
            [f"Rewritten from the ground up. {chance.choice(paragraphs)[:200]}"],
            [chance.choice(paragraphs)[::-1], old],
            [],
        )
    )
    return [*paragraphs[:at], *new, *paragraphs[at + 1 :]]


def fill_up(units: Units, first: int) -> int:
    """The last paragraph, or else sentence, that fits: what most splitters do."""
    filled, end = 0, first
    while end < len(units) and filled + units._costs[end] <= units._budget:
        filled += units._costs[end]
        end += 1
    if end == len(units):
        return end
    strong = max(units._levels[first:end], default=0)
    return max(
        (number + 1 for number in range(first, end) if units._levels[number] == strong),
        default=first + 1,
    )


if __name__ == "__main__":
    sys.exit(main())
