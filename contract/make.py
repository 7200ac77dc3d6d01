"""Write the contract: the cases, the index and the bundles that every language reads.

    python contract/make.py                       write what is not as this code makes it
    python contract/make.py --check               say what is not, and write nothing
    python contract/make.py --only index queries  these parts alone
    python contract/make.py --tokenizer gemma3.model --out tokens-gemma3.json

Everything comes from this repository: texts and numbers are written out in contract/, the tokenizer is
the built-in model's (sdk/egemma/builtin/tokenizer.model). The bundles need the export extra, the rest
does not. What is made is the same on every machine but for the last bits of a model's vectors.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile, copytree, rmtree
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contract.cases_chunks import chunks
from contract.cases_filters import filters
from contract.cases_numbers import codes, vectors
from contract.cases_queries import queries
from contract.cases_tokens import prompts, tokens
from contract.cases_words import words
from contract.cases_writes import writes
from contract.damages import damaged
from contract.make_bundle import BUNDLES, differences, make_bundle
from contract.make_index import INDEX, make_index, tables_of
from contract.notation import CASES, to_json

# In this order: the last two read what the first three wrote.
PARTS = ("index", "bundle", "bundle-executorch", "tokens", "prompts", "vectors", "codes", "chunks", "filters", "words", "writes", "queries", "damaged")  # fmt: skip
_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "tokens": tokens,
    "prompts": prompts,
    "vectors": vectors,
    "codes": codes,
    "chunks": chunks,
    "filters": filters,
    "words": words,
    "writes": writes,
    "queries": queries,
    "damaged": damaged,
}
_TARGETS = {folder.name: target for target, folder in BUNDLES.items()}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if (args.tokenizer is None) != (args.out is None):
        print("contract: --tokenizer and --out go together.", file=sys.stderr)
        return 2
    if args.tokenizer is not None:
        args.out.write_text(to_json(tokens(args.tokenizer, args.max_tokens)), encoding="utf-8")
        return 0
    found = [what for name in PARTS if name in args.only for what in part(name, args.check)]
    for what in found:
        print(what)
    return int(args.check and bool(found))


def part(name: str, check: bool) -> Iterator[str]:
    """What of this part is not as the code makes it; written anew unless `check`."""
    if name in _CASES:
        yield from _cases(name, check)
    elif name == "index":
        yield from _index(check)
    else:
        yield from _bundle(name, check)


def _cases(name: str, check: bool) -> Iterator[str]:
    path = CASES / f"{name}.json"
    text = to_json(_CASES[name]())
    new = json.loads(text)
    found = (
        next(_unlike(json.loads(path.read_text("utf-8")), new, name), None)
        if path.exists()
        else f"{name}: not there yet"
    )
    if found is not None:
        yield found
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")


def _index(check: bool) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "index.db")
        make_index(path)
        found = "index: not there yet"
        if INDEX.exists():
            old, new = tables_of(INDEX), tables_of(path)
            found = ", ".join(name for name in new if old[name] != new[name])
            if not found:
                return
            found = f"index: other {found}"
        yield found
        if not check:
            copyfile(path, INDEX)


def _bundle(name: str, check: bool) -> Iterator[str]:
    target = _TARGETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "bundle")
        make_bundle(target, folder, Path(scratch, "checkpoint"))
        committed = BUNDLES[target]
        found = (
            differences(target, committed, folder)
            if committed.exists()
            else [f"{name}: not there yet"]
        )
        yield from found
        if found and not check:
            rmtree(committed, ignore_errors=True)
            copytree(folder, committed)


def _unlike(old: Any, new: Any, place: str) -> Iterator[str]:
    """Places that differ: texts and whole numbers exactly, others within what machines may."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if key not in old or key not in new:
                yield f"{place}: {key} is only in one"
            else:
                yield from _unlike(old[key], new[key], f"{place}.{key}")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}: {len(old)} entries, now {len(new)}"
        for number, pair in enumerate(zip(old, new, strict=False)):
            yield from _unlike(*pair, f"{place}[{number}]")
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{place}: {old}, now {new}"
    elif place.endswith(".expected") and isinstance(old, str) and isinstance(new, str):
        # shortened vectors, whose lengths are sums that a machine may add in another order
        one, other = (np.frombuffer(base64.b64decode(text), "<f4") for text in (old, new))
        if one.shape != other.shape or np.abs(one - other).max(initial=0) > 1.2e-7:
            yield f"{place}: other vectors"
    elif type(old) is not type(new) or old != new:
        yield f"{place}: {str(old)[:80]}, now {str(new)[:80]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="contract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--tokenizer", type=Path, help="tokens of another SentencePiece model")
    parser.add_argument("--out", type=Path, help="where these go")
    parser.add_argument("--max-tokens", type=int, default=2048, help="that model's limit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
