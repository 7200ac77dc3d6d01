"""What each command does: open, call one function of the package, print."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma.batches import windows
from egemma.bench import bench
from egemma.cli.models import location_of, model_for
from egemma.cli.progress import Progress
from egemma.cli.reading import (
    STDIN,
    Incoming,
    check_files,
    locating,
    once_each,
    read_documents,
    read_lines,
    read_stdin,
)
from egemma.cli.report import (
    bundle_text,
    embedding_line,
    embedding_row,
    hit_lines,
    index_text,
    print_result,
    printable,
)
from egemma.embedder import BUILTIN, Embedder, folder_of
from egemma.index import Document, Index, IndexOverflow, content_id, describe_index, is_new
from egemma.verify import verify_bundle
from egemma_core.bundle import read_bundle
from egemma_core.errors import EgemmaError
from egemma_core.files import replacing_file
from egemma_core.prompts import DEFAULT_TASK

# Texts that are embedded and stored together: what Ctrl-C in the middle of a long run costs.
GROUP = 64


def embed(args: argparse.Namespace) -> int:
    """Print or save the vectors of texts."""
    from_stdin = args.texts in ([], [STDIN])
    typed = (
        Incoming(where=f"TEXT {number}", text=text)
        for number, text in enumerate(args.texts, start=1)
    )
    kept = []
    with (
        Embedder.open(model_for(args.model, None), threads=args.threads) as embedder,
        Progress("texts", None if from_stdin else len(args.texts)) as progress,
    ):
        for group in windows(read_lines([STDIN]) if from_stdin else typed, GROUP):
            texts = [incoming.text for incoming in group]
            with locating(group):
                if args.role == "query":
                    task = args.task or DEFAULT_TASK
                    found = embedder.embed_query(
                        texts, task=task, dim=args.dim, overflow=args.overflow
                    )
                else:
                    titles = [args.title] * len(texts)
                    found = embedder.embed_documents(
                        texts, titles=titles, dim=args.dim, overflow=args.overflow
                    )
            progress.advance(len(group))
            if args.out is not None:
                kept.append(found.vectors)
            for text, embedding in zip(texts, found, strict=True):
                if args.json:
                    print(json.dumps(embedding_row(args, text, embedding), ensure_ascii=False))
                elif args.out is None:
                    print(embedding_line(args, text, embedding))
            sys.stdout.flush()
        width = args.dim or embedder.dim
    if args.out is not None:
        vectors = np.concatenate(kept) if kept else np.empty((0, width), np.float32)
        _save(Path(args.out), vectors)
        if not args.json:
            print(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} float32")
    return 0


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    with replacing_file(path) as scratch, scratch.open("wb") as file:
        np.lib.format.write_array(file, vectors, allow_pickle=False)


def add(args: argparse.Namespace) -> int:
    """Put files and folders into an index; stdin is a document as well."""
    names = args.files or [STDIN]
    paths = [name for name in names if name != STDIN]
    if paths:
        from egemma.ingest.walk import resolve_roots

        resolve_roots(paths)  # a mistyped name is found before anything is made
    if args.plan:
        return _plan(args, paths)
    with _adding(args) as index:
        if paths:
            _sync(args, index, paths)
        if STDIN in names:
            _add_texts(args, index, iter([read_stdin()]), "chunk")
    return 0


def add_lines(args: argparse.Namespace) -> int:
    """Put each line of files or stdin into an index as a document."""
    names = args.files or [STDIN]
    check_files(names)
    with _adding(args) as index:
        documents = read_documents(names, "jsonl" if args.jsonl else "lines")
        _add_texts(args, index, once_each(documents), args.overflow)
    return 0


@contextmanager
def _adding(args: argparse.Namespace) -> Iterator[Index]:
    """Give the index, made where there is none; after an error say what it holds by then."""
    known = None if is_new(args.index) else describe_index(args.index)
    model = model_for(args.model, known)
    with (
        Embedder.open(model, threads=args.threads) as embedder,
        Index.open(args.index, embedder) as index,
    ):
        if known is None or known.model_path != location_of(model):
            index.remember_model_path(location_of(model))
        try:
            yield index
        except (EgemmaError, KeyboardInterrupt):
            # asked of the file: Ctrl-C may come between storing and counting
            if documents := len(index):
                print(f"egemma: {args.index} now holds {documents} documents.", file=sys.stderr)
            raise


def _plan(args: argparse.Namespace, paths: list[str]) -> int:
    from egemma.ingest import plan_folder, render

    known = None if is_new(args.index) else describe_index(args.index)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Embedder.open(model_for(args.model, known), threads=args.threads) as embedder,
        # a plan makes no index
        Index.open(Path(scratch, "index.db") if known is None else args.index, embedder) as index,
        Progress("files", None) as progress,
    ):
        plan = plan_folder(
            index,
            paths,
            _ingest_config(args),
            progress=lambda _path, done, total: progress.at(done, total),
        )
    facts = {
        **asdict(plan),
        "chunks": plan.chunks,
        "embed_chunks": plan.embed_chunks,
        "embed_tokens": plan.embed_tokens,
    }
    print_result(args, facts, "\n".join(render(plan)))
    return 0


def _sync(args: argparse.Namespace, index: Index, paths: list[str]) -> None:
    """Embed what is new or changed of files and folders, and remove what is gone."""
    from egemma.ingest import sync

    with Progress("bytes", None) as progress:
        report = sync(
            index,
            paths,
            _ingest_config(args),
            progress=lambda now: progress.at(now.bytes_done, now.bytes),
        )
    documents = len(index)
    print_result(
        args,
        {"index": args.index, **asdict(report), "documents": documents},
        "\n".join([*report.to_lines(), f"{args.index} now holds {documents} documents"]),
    )


def _ingest_config(args: argparse.Namespace) -> Any:
    from egemma.ingest import IngestConfig
    from egemma.ingest.plan import DEFAULT_EXCLUDE

    return IngestConfig(
        exclude=(*DEFAULT_EXCLUDE, *args.exclude),
        hidden=args.hidden,
        chunk_tokens=args.chunk_tokens,
        allow_empty=args.allow_empty,
    )


def _add_texts(
    args: argparse.Namespace, index: Index, documents: Iterator[Incoming], overflow: IndexOverflow
) -> None:
    stored: list[Document] = []  # without their texts
    with Progress("documents", None) as progress:
        for group in windows(documents, GROUP):
            with locating(group):
                ids = index.add(
                    [incoming.text for incoming in group],
                    titles=[incoming.title for incoming in group],
                    ids=[
                        content_id(incoming.text, incoming.title or None)
                        if incoming.id is None
                        else incoming.id
                        for incoming in group
                    ],
                    metadata=[incoming.metadata for incoming in group],
                    overflow=overflow,
                )
            stored.extend(replace(document, text="") for document in index.get(ids))
            progress.advance(len(group))
    tokens = sum(document.num_tokens for document in stored)
    cut = [document.id for document in stored if document.truncated]
    facts = {
        "index": args.index,
        "added": len(stored),
        "tokens": tokens,
        "truncated": len(cut),
        "truncated_ids": cut,
        "documents": len(index),
    }
    lines = [
        f"{args.index}: added {len(stored)} documents, {tokens} tokens; it now holds {len(index)}"
    ]
    if cut:
        first = ", ".join(printable(id_) for id_ in cut[:5]) + (", ..." if len(cut) > 5 else "")
        lines.append(
            f"{len(cut)} were longer than the model reads, only the beginning of each can be "
            f"found: {first}"
        )
    print_result(args, facts, "\n".join(lines))


def remove(args: argparse.Namespace) -> int:
    """Delete documents from an index."""
    with Index.open(args.index, create=False) as index:
        index.get(args.ids)  # a mistyped id deletes nothing, and says so
        removed, documents = index.remove(args.ids), len(index)
    print_result(
        args,
        {"index": args.index, "removed": removed, "documents": documents},
        f"{args.index}: deleted {removed}; it now holds {documents}",
    )
    return 0


def search(args: argparse.Namespace) -> int:
    """Print the hits of a query."""
    options = {
        name: getattr(args, name) for name in ("where", "mode", "dim", "task", "shortlist", "exact")
    }
    if args.mode == "text":  # words need no model
        with Index.open(args.index, create=False) as index:
            hits = index.search(args.query, args.k, **options)
    else:
        model = model_for(args.model, describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder, create=False, threads=args.threads) as index,
        ):
            hits = index.search(args.query, args.k, **options)
    if args.json:
        found = {
            "query": args.query,
            "task": args.task,
            "how": asdict(hits.how),
            "hits": [asdict(hit) for hit in hits],
        }
        print(json.dumps(found, ensure_ascii=False))
        return 0
    for rank, hit in enumerate(hits, start=1):
        print(hit_lines(rank, hit))
    if not hits:
        print(f"nothing found in {args.index}", file=sys.stderr)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Say what a bundle or an index is, and check it."""
    path = Path(args.path)
    if args.path != BUILTIN and path.is_file():
        facts = describe_index(path, check=True)
        print_result(args, {"kind": "index", **asdict(facts)}, index_text(facts))
        return 0 if facts.damage is None else 1
    bundle = read_bundle(folder_of(args.path))
    manifest = {"kind": "bundle", "path": str(bundle.folder), **asdict(bundle.manifest)}
    print_result(args, manifest, bundle_text(bundle))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Run a bundle's golden texts and compare."""
    result = verify_bundle(
        args.bundle,
        threads=args.threads,
        min_cosine_float=args.min_cosine_float,
        min_cosine_quantized=args.min_cosine_quantized,
        max_batch_difference=args.max_batch_difference,
    )
    print_result(args, result.to_dict(), result.to_text())
    return 0 if result.passed else 1


def measure(args: argparse.Namespace) -> int:
    """Measure a bundle on this machine."""
    report = bench(args.bundle, tokens=args.tokens, runs=args.runs, threads=args.threads)
    print_result(args, report.to_dict(), report.to_text())
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "embed": embed,
    "add": add,
    "add-lines": add_lines,
    "remove": remove,
    "search": search,
    "inspect": inspect,
    "verify": verify,
    "bench": measure,
}
