"""`egemma index ...`: what keeps an index well. Each opens, calls one function, and prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

from egemma import upkeep
from egemma.cli.models import location_of, model_for
from egemma.cli.progress import Progress
from egemma.cli.reading import read_lines
from egemma.cli.report import print_result
from egemma.embedder import Embedder
from egemma.index import Index, describe_index, is_new
from egemma.index.jsonl_lines import read_header
from egemma_core.errors import InputError

_MB = 1e6


def check(args: argparse.Namespace) -> int:
    """Compare an index with its checksums."""
    findings = upkeep.check(args.index)
    print_result(
        args,
        {"index": args.index, "findings": findings},
        "\n".join(findings) or f"{args.index}: every checksum fits, nothing is missing",
    )
    return 1 if findings else 0


def compact(args: argparse.Namespace) -> int:
    """Give back the space of deleted documents."""
    report = upkeep.compact(args.index)
    print_result(
        args,
        asdict(report),
        f"{args.index}: {report.bytes_before / _MB:.1f} MB, now {report.bytes_after / _MB:.1f} MB",
    )
    return 0


def backup(args: argparse.Namespace) -> int:
    """Copy an index, and check the copy."""
    facts = upkeep.backup(args.index, args.to, force=args.force)
    print_result(
        args,
        asdict(facts),
        f"{args.to}: {facts.documents} documents, {facts.file_bytes / _MB:.1f} MB, checked",
    )
    return 0


def export(args: argparse.Namespace) -> int:
    """Write all documents as JSON lines."""
    documents = upkeep.export_jsonl(
        args.index, args.to, vectors=not args.no_vectors, force=args.force
    )
    print_result(
        args,
        {"file": args.to, "documents": documents},
        f"{args.to}: {documents} documents{', without vectors' if args.no_vectors else ''}",
    )
    return 0


def import_(args: argparse.Namespace) -> int:
    """Put the documents of an export into an index."""
    header = read_header(args.file)
    new = is_new(args.index)
    if new and not args.embed:
        with (
            Index.open(args.index, header.identity, keep_floats=header.floats) as index,
            Progress("documents", header.documents) as progress,
        ):
            report = index.import_jsonl(args.file, progress=progress.at)
    else:
        model = model_for(args.model, None if new else describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder) as index,
            Progress("documents", header.documents) as progress,
        ):
            report = index.import_jsonl(args.file, reembed=args.embed, progress=progress.at)
            if new:
                index.remember_model_path(location_of(model))
    print_result(
        args,
        asdict(report),
        f"{args.index}: took in {report.documents} documents, {report.chunks} passages, "
        f"{report.embedded} of them embedded",
    )
    return 0


def tune(args: argparse.Namespace) -> int:
    """Find the shortest shortlist that reaches a recall, and store it."""
    if args.queries is None:
        with Index.open(args.index, create=False, threads=args.threads) as index:
            report = index.tune(recall=args.recall, k=args.k, sample=args.sample)
    else:
        queries = [line.text for line in read_lines([args.queries])]
        model = model_for(args.model, describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder, create=False, threads=args.threads) as index,
        ):
            report = index.tune(recall=args.recall, k=args.k, queries=queries)
    print_result(args, asdict(report), report.to_text())
    return 0 if report.chosen is not None else 1


def migrate(args: argparse.Namespace) -> int:
    """Embed everything anew with another model."""
    with (
        Embedder.open(args.to, threads=args.threads) as embedder,
        Progress("passages", None) as progress,
    ):
        report = upkeep.migrate(args.index, embedder, overflow=args.overflow, progress=progress.at)
    with Index.open(args.index, create=False) as index:
        index.remember_model_path(location_of(args.to))
    earlier = f", {report.resumed} were there from before" if report.resumed else ""
    cut = (
        f"; of {report.truncated} the new model reads only the beginning"
        if report.truncated
        else ""
    )
    print_result(
        args,
        asdict(report),
        f"{args.index} is now of {report.to_model}: {report.embedded} of {report.chunks} passages "
        f"embedded{earlier}{cut}",
    )
    return 0


def abandon(args: argparse.Namespace) -> int:
    """Give up a migration that is half way."""
    if not upkeep.abandon(args.index):
        raise InputError(
            f"{args.index} is not on its way to another model: there is nothing to give up."
        )
    print_result(
        args,
        {"index": args.index, "abandoned": True},
        f"{args.index}: the migration is given up, its model stays",
    )
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": check,
    "compact": compact,
    "backup": backup,
    "export": export,
    "import": import_,
    "tune": tune,
    "migrate": migrate,
    "abandon": abandon,
}
