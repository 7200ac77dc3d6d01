"""What each command does: open, call one function of the package, print."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from egemma.bench import bench
from egemma.cli import MODEL_VARIABLE, upkeep
from egemma.cli.progress import Progress
from egemma.cli.reading import STDIN, Incoming, check_files, read_documents, read_lines
from egemma.embedder import BUILTIN, BUILTIN_FOLDER, Embedder, Embedding, Embeddings
from egemma.index import Document, Hit, Index, IndexFacts, IndexOverflow, describe_index, is_new
from egemma.verify import verify_bundle
from egemma_core.bundle import read_bundle
from egemma_core.errors import EgemmaError, IndexFileError, InputError, PromptError, TokenLimitError
from egemma_core.prompts import DEFAULT_TASK

# Texts that are embedded and stored together: what Ctrl-C in the middle of a long run costs.
GROUP = 64
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; returns its exit code."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "embed": _embed,
        "add": _add,
        "remove": _remove,
        "search": _search,
        "index": lambda args: upkeep.run(args, _model),
        "inspect": _inspect,
        "verify": _verify,
        "bench": _bench,
    }
    return commands[args.command](args)


def _embed_parquet(args: argparse.Namespace) -> int:
    from egemma_server.bulk import embed_parquet

    with Progress("rows", None) as progress:
        report = embed_parquet(
            args.parquet[0] if len(args.parquet) == 1 else args.parquet,
            args.out,
            bundle=_model(args.model, None),
            text_column=args.text_column or "text",
            title_column=args.title_column,
            id_column=args.id_column,
            role=args.role,
            task=args.task,
            dim=args.dim,
            overflow=args.overflow,
            engine=args.engine or "local",
            workers=args.workers,
            threads_per_worker=args.threads,
            on_error=args.on_error or "fail",
            progress=progress.at,
        )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else report.to_text())
    return 0


def _embed(args: argparse.Namespace) -> int:
    if args.parquet is not None:
        return _embed_parquet(args)
    from_stdin = args.texts in ([], [STDIN])
    typed = (
        Incoming(where=f"TEXT {number}", text=text)
        for number, text in enumerate(args.texts, start=1)
    )
    kept = []
    with (
        Embedder.open(_model(args.model, None), threads=args.threads) as embedder,
        Progress("texts", None if from_stdin else len(args.texts)) as progress,
    ):

        def embed(group: list[Incoming]) -> Embeddings:
            texts = [incoming.text for incoming in group]
            if args.role == "query":
                return embedder.embed_queries(
                    texts, task=args.task or DEFAULT_TASK, dim=args.dim, overflow=args.overflow
                )
            return embedder.embed_documents(
                texts, titles=[args.title] * len(texts), dim=args.dim, overflow=args.overflow
            )

        for group in _groups(read_lines([STDIN]) if from_stdin else typed):
            found = _blaming(embed, group)
            progress.advance(len(group))
            if args.out is not None:
                kept.append(found.vectors)
            for incoming, embedding in zip(group, found, strict=True):
                if args.json:
                    print(
                        json.dumps(
                            _embedding_row(args, incoming.text, embedding), ensure_ascii=False
                        )
                    )
                elif args.out is None:
                    print(_embedding_line(args, incoming.text, embedding))
            sys.stdout.flush()
        width = args.dim or embedder.dim
    if args.out is not None:
        vectors = np.concatenate(kept) if kept else np.empty((0, width), np.float32)
        _save(Path(args.out), vectors)
        if not args.json:
            print(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} float32")
    return 0


def _add(args: argparse.Namespace) -> int:
    names = args.files or [STDIN]
    paths = [name for name in names if name != STDIN] if args.form == "file" else []
    if args.form != "file":
        check_files(names)
    if paths:
        from egemma.ingest.walk import resolve_roots

        resolve_roots(paths)  # a mistyped name is found before anything is made
    known = None if is_new(args.index) else describe_index(args.index)
    model = _model(args.model, known)
    if args.plan and known is None:  # a plan leaves nothing behind
        with (
            tempfile.TemporaryDirectory() as scratch,
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(Path(scratch, "index.db"), embedder) as index,
        ):
            return _sync(args, index, paths)
    with (
        Embedder.open(model, threads=args.threads) as embedder,
        Index.open(args.index, embedder) as index,
    ):
        location = model if model == BUILTIN else str(Path(model).resolve())
        if known is None or known.model_path != location:
            index.remember_model_path(location)
        try:
            code = _sync(args, index, paths) if paths else 0
            given = [name for name in names if name not in paths]
            return _add_texts(args, index, given) if given and not args.plan else code
        except (EgemmaError, KeyboardInterrupt):
            # asked of the file: Ctrl-C may come between storing and counting
            if documents := len(index):
                print(f"egemma: {args.index} now holds {documents} documents.", file=sys.stderr)
            raise


def _sync(args: argparse.Namespace, index: Index, paths: list[str]) -> int:
    """Files and folders: what is new or changed is embedded, what is gone is removed."""
    from egemma.ingest import IngestConfig, plan_folder, render, sync
    from egemma.ingest.config import DEFAULT_EXCLUDE

    config = IngestConfig(
        exclude=(*DEFAULT_EXCLUDE, *args.exclude),
        hidden=args.hidden,
        chunk_tokens=args.chunk_tokens,
        allow_empty=args.allow_empty,
    )
    if args.plan:
        with Progress("files", None) as progress:
            plan = plan_folder(
                index, paths, config, progress=lambda _path, done, total: progress.at(done, total)
            )
        print(
            json.dumps(
                {
                    **asdict(plan),
                    "chunks": plan.chunks,
                    "embed_chunks": plan.embed_chunks,
                    "embed_tokens": plan.embed_tokens,
                },
                ensure_ascii=False,
            )
            if args.json
            else "\n".join(render(plan))
        )
        return 0
    with Progress("bytes", None) as progress:
        report = sync(
            index, paths, config, progress=lambda now: progress.at(now.bytes_done, now.bytes)
        )
    print(
        json.dumps(
            {"index": args.index, **asdict(report), "documents": len(index)}, ensure_ascii=False
        )
        if args.json
        else "\n".join([*report.to_lines(), f"{args.index} now holds {len(index)} documents"])
    )
    return 0


def _add_texts(args: argparse.Namespace, index: Index, names: list[str]) -> int:
    """Each line, JSON line, or all of stdin, as a document."""
    stored: list[Document] = []  # without their texts
    overflow: IndexOverflow = args.overflow or "error"

    def add(group: list[Incoming]) -> None:
        for part in (
            [incoming for incoming in group if incoming.id is not None],
            [incoming for incoming in group if incoming.id is None],
        ):
            ids = index.add(
                [incoming.text for incoming in part],
                titles=[incoming.title for incoming in part],
                ids=[incoming.id for incoming in part if incoming.id is not None] or None,
                metadata=[incoming.metadata for incoming in part],
                overflow=overflow,
            )
            stored.extend(replace(document, text="") for document in index.get(ids))

    with Progress("documents", None) as progress:
        for group in _groups(_once_each(read_documents(names, args.form))):
            _blaming(add, group)
            progress.advance(len(group))
    documents = len(index)
    tokens, cut = (
        sum(document.num_tokens for document in stored),
        [document.id for document in stored if document.truncated],
    )
    if args.json:
        print(
            json.dumps(
                {
                    "index": args.index,
                    "added": len(stored),
                    "tokens": tokens,
                    "truncated": len(cut),
                    "truncated_ids": cut,
                    "documents": documents,
                },
                ensure_ascii=False,
            )
        )
        return 0
    print(f"{args.index}: added {len(stored)} documents, {tokens} tokens; it now holds {documents}")
    if cut:
        print(
            f"{len(cut)} were longer than the model reads, only the beginning of each can be "
            "found: "
            f"{', '.join(_printable(id_) for id_ in cut[:5])}{', ...' if len(cut) > 5 else ''}"
        )
    return 0


def _remove(args: argparse.Namespace) -> int:
    with Index.open(args.index, create=False) as index:
        index.get(args.ids)  # a mistyped id deletes nothing, and says so
        removed, documents = index.remove(args.ids), len(index)
    print(
        json.dumps({"index": args.index, "removed": removed, "documents": documents})
        if args.json
        else f"{args.index}: deleted {removed}; it now holds {documents}"
    )
    return 0


def _search(args: argparse.Namespace) -> int:
    options = {
        "where": args.where,
        "mode": args.mode,
        "dim": args.dim,
        "task": args.task,
        "shortlist": args.shortlist,
        "exact": args.exact,
    }
    if args.mode == "text":  # words need no model
        with Index.open(args.index, create=False) as index:
            hits = index.search(args.query, args.k, **options)
    else:
        model = _model(args.model, describe_index(args.index))
        with (
            Embedder.open(model, threads=args.threads) as embedder,
            Index.open(args.index, embedder, create=False, threads=args.threads) as index,
        ):
            hits = index.search(args.query, args.k, **options)
    if args.json:
        print(
            json.dumps(
                {
                    "query": args.query,
                    "task": args.task,
                    "how": asdict(hits.how),
                    "hits": [asdict(hit) for hit in hits],
                },
                ensure_ascii=False,
            )
        )
        return 0
    for rank, hit in enumerate(hits, start=1):
        print(_hit_lines(rank, hit))
    if not hits:
        print(f"nothing found in {args.index}", file=sys.stderr)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if args.path != BUILTIN and path.is_file():
        facts = describe_index(path, check=True)
        print(
            json.dumps({"kind": "index", **asdict(facts)}, ensure_ascii=False)
            if args.json
            else _index_text(facts)
        )
        return 0 if facts.damage is None else 1
    bundle = read_bundle(BUILTIN_FOLDER if args.path == BUILTIN else path)
    manifest = asdict(bundle.manifest)
    if args.json:
        print(
            json.dumps(
                {"kind": "bundle", "path": str(bundle.folder), **manifest}, ensure_ascii=False
            )
        )
        return 0
    megabytes = sum(facts["bytes"] for facts in manifest["files"].values()) / 1e6
    bounds = manifest["verification"].get("bounds", {})
    _print_table(
        [
            ("bundle", f"{bundle.folder}, every file as its SHA-256 says"),
            (
                "model",
                f"{manifest['source'].get('model')} "
                f"{manifest['source'].get('revision') or ''}".strip(),
            ),
            (
                "target",
                f"{manifest['target']}, {manifest['runtime']}, weights "
                f"{manifest['scheme'].get('name')}",
            ),
            (
                "reads",
                f"{manifest['tokenizer']['max_tokens']} tokens, "
                f"{'one text' if manifest['batch'] == 'one' else 'several texts'} at a time",
            ),
            ("widths", ", ".join(map(str, manifest["dims"]))),
            ("tasks", ", ".join(bundle.prompts.tasks)),
            ("size", f"{megabytes:.1f} MB"),
            (
                "verified",
                ", ".join(f"{name} {bound}" for name, bound in bounds.items()) or "no bounds",
            ),
            (
                "made by",
                ", ".join(f"{tool} {version}" for tool, version in manifest["tools"].items()),
            ),
            ("fingerprint", manifest["fingerprint"]),
        ]
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    result = verify_bundle(
        args.bundle,
        threads=args.threads,
        min_cosine_float=args.min_cosine_float,
        min_cosine_quantized=args.min_cosine_quantized,
        max_batch_difference=args.max_batch_difference,
    )
    print(json.dumps(result.to_dict(), ensure_ascii=False) if args.json else result.to_text())
    return 0 if result.passed else 1


def _bench(args: argparse.Namespace) -> int:
    report = bench(args.bundle, tokens=args.tokens, runs=args.runs, threads=args.threads)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else report.to_text())
    return 0


def _model(asked: str | None, index: IndexFacts | None) -> str:
    """Which bundle to open: the one asked for, else the one that the index was made with, else the
    environment's, else builtin.
    """
    if asked is not None:
        return asked
    named = os.environ.get(MODEL_VARIABLE)
    if index is not None and index.model_path is not None:
        if index.model_path == BUILTIN or Path(index.model_path).is_dir():
            return index.model_path
        if not named:
            raise IndexFileError(
                f"{index.path} was made with {index.model} in {index.model_path}, which is gone. "
                "Say where that model is now with --model."
            )
    return named or BUILTIN


def _groups(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, GROUP)):
        yield group


def _blaming(call: Callable[[list[Incoming]], _Result], group: list[Incoming]) -> _Result:
    """`call(group)`; when that fails, one text at a time, so that the error can say where the
    culprit came from.
    """
    try:
        return call(group)
    except (InputError, TokenLimitError, PromptError):
        for incoming in group:
            try:
                call([incoming])
            except EgemmaError as error:
                raise type(error)(
                    f"{incoming.where}: "
                    f"{str(error).removeprefix('text 0: ').removeprefix('text 0 ')}"
                ) from error
        raise


def _once_each(documents: Iterable[Incoming]) -> Iterator[Incoming]:
    """The same documents; refuses an id that comes twice in one run, as the later would replace the
    earlier.
    """
    seen: dict[str, str] = {}
    for document in documents:
        if (
            document.id is not None
            and seen.setdefault(document.id, document.where) != document.where
        ):
            raise InputError(
                f"{document.where}: id {document.id!r} was given to {seen[document.id]} already. "
                "Give each its own."
            )
        yield document


def _embedding_row(args: argparse.Namespace, text: str, embedding: Embedding) -> dict[str, Any]:
    prompt = {"task": args.task or DEFAULT_TASK} if args.role == "query" else {"title": args.title}
    row = {
        "text": text,
        "as": args.role,
        **prompt,
        "dim": embedding.dim,
        "num_tokens": embedding.num_tokens,
        "truncated": embedding.truncated,
        "fingerprint": embedding.fingerprint,
    }
    # The shortest decimals that read back as the same float32; left out where a file holds them.
    return (
        row
        if args.out is not None
        else {**row, "vector": [float(str(value)) for value in embedding.vector]}
    )


def _embedding_line(args: argparse.Namespace, text: str, embedding: Embedding) -> str:
    first = ", ".join(f"{value:.4f}" for value in embedding.vector[:4])
    cut = ", truncated" if embedding.truncated else ""
    return (
        f"{args.role}, {embedding.num_tokens} tokens{cut}, {embedding.dim} floats [{first}, "
        f"...]  {_shortened(text, 40)}"
    )


def _hit_lines(rank: int, hit: Hit) -> str:
    name = f"{_printable(hit.id)}  {_printable(hit.title)}" if hit.title else _printable(hit.id)
    if hit.position or hit.start:
        name += f"  [{hit.start}:{hit.stop}]"
    cut = "  (only its beginning was embedded)" if hit.truncated else ""
    return (
        f"{rank:>3}  {hit.score:.3f}  {name}{cut}\n            "
        f"{_shortened(hit.text, max(20, shutil.get_terminal_size().columns - 13))}"
    )


def _shortened(text: str, width: int) -> str:
    words = " ".join(_printable(text[: 4 * width]).split())
    return words if len(words) <= width else words[: width - 3] + "..."


def _printable(text: str) -> str:
    """Without what would steer a terminal: a document may come from anywhere."""
    return "".join(character if character.isprintable() else " " for character in text)


def _index_text(facts: IndexFacts) -> str:
    cut = (
        f", {facts.truncated_chunks} of them only from their beginning"
        if facts.truncated_chunks
        else ""
    )
    rows = [
        ("index", facts.path),
        ("documents", str(facts.documents)),
        ("chunks", f"{facts.chunks}{cut}"),
        ("model", facts.model),
        ("model was in", facts.model_path or "not known"),
        ("widths", f"{', '.join(map(str, facts.dims))}; the first pass scans {facts.scan_width}"),
        ("vectors", "codes and float32" if facts.floats else "codes"),
        *([("migrating to", facts.migrating_to)] if facts.migrating_to else []),
        ("size", f"{facts.file_bytes / 1e6:.1f} MB, format version {facts.format_version}"),
        ("damage", facts.damage or "none found"),
        ("fingerprint", facts.fingerprint),
    ]
    return _table(rows)


def _print_table(rows: list[tuple[str, str]]) -> None:
    print(_table(rows))


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_printable(value)}" for name, value in rows)


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    """All or nothing: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        try:
            with partial.open("wb") as file:
                np.lib.format.write_array(file, vectors, allow_pickle=False)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
