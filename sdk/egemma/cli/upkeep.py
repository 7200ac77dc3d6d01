"""`egemma index ...`: what keeps an index well.

Each opens, calls one function of the package, and prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from egemma import upkeep
from egemma.cli.progress import Progress
from egemma.cli.reading import read_lines
from egemma.embedder import BUILTIN, Embedder
from egemma.index import Index, describe_index, is_new
from egemma.index.jsonl_lines import read_header
from egemma_core.errors import InputError

_MB = 1e6


def run(args: argparse.Namespace, model_of: Callable[..., str]) -> int:
    """Run the command that was parsed; returns its exit code.

    Args:
        model_of: which bundle, of what was typed and of what an index says.
    """
    commands: dict[str, Callable[[argparse.Namespace, Callable[..., str]], int]] = {
        "check": _check,
        "compact": _compact,
        "backup": _backup,
        "export": _export,
        "import": _import,
        "tune": _tune,
        "migrate": _migrate,
        "abandon": _abandon,
    }
    return commands[args.index_command](args, model_of)


def _check(args: argparse.Namespace, _: Callable[..., str]) -> int:
    findings = upkeep.check(args.index)
    if args.json:
        print(json.dumps({"index": args.index, "findings": findings}, ensure_ascii=False))
    else:
        print(
            "\n".join(findings)
            if findings
            else f"{args.index}: every checksum fits, nothing is missing"
        )
    return 1 if findings else 0


def _compact(args: argparse.Namespace, _: Callable[..., str]) -> int:
    report = upkeep.compact(args.index)
    _print(
        args,
        asdict(report),
        f"{args.index}: {report.bytes_before / _MB:.1f} MB, now {report.bytes_after / _MB:.1f} MB",
    )
    return 0


def _backup(args: argparse.Namespace, _: Callable[..., str]) -> int:
    facts = upkeep.backup(args.index, args.to, force=args.force)
    _print(
        args,
        asdict(facts),
        f"{args.to}: {facts.documents} documents, {facts.file_bytes / _MB:.1f} MB, checked",
    )
    return 0


def _export(args: argparse.Namespace, _: Callable[..., str]) -> int:
    documents = upkeep.export_jsonl(
        args.index, args.to, vectors=not args.no_vectors, force=args.force
    )
    _print(
        args,
        {"file": args.to, "documents": documents},
        f"{args.to}: {documents} documents{', without vectors' if args.no_vectors else ''}",
    )
    return 0


def _import(args: argparse.Namespace, model_of: Callable[..., str]) -> int:
    header = read_header(args.file)
    new = is_new(args.index)
    if new and not args.embed:
        with (
            Index.open(args.index, header.identity, keep_floats=header.floats) as index,
            Progress("documents", header.documents) as progress,
        ):
            report = index.import_jsonl(args.file, progress=progress.at)
    else:
        model = model_of(args.model, None if new else describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder) as index,
            Progress("documents", header.documents) as progress,
        ):
            report = index.import_jsonl(args.file, reembed=args.embed, progress=progress.at)
            if new:
                index.remember_model_path(model if model == BUILTIN else str(Path(model).resolve()))
    _print(
        args,
        asdict(report),
        f"{args.index}: took in {report.documents} documents, {report.chunks} passages, "
        f"{report.embedded} of them embedded",
    )
    return 0


def _tune(args: argparse.Namespace, model_of: Callable[..., str]) -> int:
    if args.queries is None:
        with Index.open(args.index, create=False, threads=args.threads) as index:
            report = index.tune(recall=args.recall, k=args.k, sample=args.sample)
    else:
        queries = [line.text for line in read_lines([args.queries])]
        model = model_of(args.model, describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder, create=False, threads=args.threads) as index,
        ):
            report = index.tune(recall=args.recall, k=args.k, queries=queries)
    _print(args, asdict(report), report.to_text())
    return 0 if report.chosen is not None else 1


def _migrate(args: argparse.Namespace, _: Callable[..., str]) -> int:
    with (
        Embedder.open(args.to, threads=args.threads) as embedder,
        Progress("passages", None) as progress,
    ):
        report = upkeep.migrate(args.index, embedder, overflow=args.overflow, progress=progress.at)
    with Index.open(args.index, create=False) as index:
        index.remember_model_path(args.to if args.to == BUILTIN else str(Path(args.to).resolve()))
    earlier = f", {report.resumed} were there from before" if report.resumed else ""
    cut = (
        f"; of {report.truncated} the new model reads only the beginning"
        if report.truncated
        else ""
    )
    _print(
        args,
        asdict(report),
        f"{args.index} is now of {report.to_model}: {report.embedded} of {report.chunks} passages "
        f"embedded{earlier}{cut}",
    )
    return 0


def _abandon(args: argparse.Namespace, _: Callable[..., str]) -> int:
    if not upkeep.abandon(args.index):
        raise InputError(
            f"{args.index} is not on its way to another model: there is nothing to give up."
        )
    _print(
        args,
        {"index": args.index, "abandoned": True},
        f"{args.index}: the migration is given up, its model stays",
    )
    return 0


def _print(args: argparse.Namespace, facts: dict[str, object], text: str) -> None:
    print(json.dumps(facts, ensure_ascii=False) if args.json else text)
