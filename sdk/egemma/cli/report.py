"""Results as lines for people."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from egemma.embeddings import Embedding
from egemma.index import Hit, IndexFacts
from egemma_core.bundle import Bundle
from egemma_core.prompts import DEFAULT_TASK


def print_result(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Print a result as one JSON object where `--json` was given, else as text."""
    print(json.dumps(facts, ensure_ascii=False) if args.json else text)


def embedding_row(args: argparse.Namespace, text: str, embedding: Embedding) -> dict[str, Any]:
    """Return what `egemma embed --json` prints of a text."""
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
    if args.out is None:  # else a file holds the vectors
        # The shortest decimals that read back as the same float32.
        row["vector"] = [float(str(value)) for value in embedding.vector]
    return row


def embedding_line(args: argparse.Namespace, text: str, embedding: Embedding) -> str:
    """Return what `egemma embed` prints of a text."""
    first = ", ".join(f"{value:.4f}" for value in embedding.vector[:4])
    cut = ", truncated" if embedding.truncated else ""
    return (
        f"{args.role}, {embedding.num_tokens} tokens{cut}, {embedding.dim} floats [{first}, "
        f"...]  {_shortened(text, 40)}"
    )


def hit_lines(rank: int, hit: Hit) -> str:
    """Return what `egemma search` prints of a hit."""
    name = f"{printable(hit.id)}  {printable(hit.title)}" if hit.title else printable(hit.id)
    if hit.position or hit.start:
        name += f"  [{hit.start}:{hit.stop}]"
    cut = "  (only its beginning was embedded)" if hit.truncated else ""
    width = max(20, shutil.get_terminal_size().columns - 13)
    return f"{rank:>3}  {hit.score:.3f}  {name}{cut}\n            {_shortened(hit.text, width)}"


def index_text(facts: IndexFacts) -> str:
    """Return what `egemma inspect` prints of an index."""
    some = f", {facts.truncated_chunks} of them only from their beginning"
    rows = [
        ("index", facts.path),
        ("documents", str(facts.documents)),
        ("chunks", f"{facts.chunks}{some if facts.truncated_chunks else ''}"),
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


def bundle_text(bundle: Bundle) -> str:
    """Return what `egemma inspect` prints of a bundle."""
    manifest = bundle.manifest
    source = f"{manifest.source.get('model')} {manifest.source.get('revision') or ''}"
    megabytes = sum(facts["bytes"] for facts in manifest.files.values()) / 1e6
    bounds = manifest.verification.get("bounds", {})
    at_once = "one text" if manifest.batch == "one" else "several texts"
    rows = [
        ("bundle", f"{bundle.folder}, every file as its SHA-256 says"),
        ("model", source.strip()),
        (
            "target",
            f"{manifest.target}, {manifest.runtime}, weights {manifest.scheme.get('name')}",
        ),
        ("reads", f"{manifest.tokenizer['max_tokens']} tokens, {at_once} at a time"),
        ("widths", ", ".join(map(str, manifest.dims))),
        ("tasks", ", ".join(bundle.prompts.tasks)),
        ("size", f"{megabytes:.1f} MB"),
        ("verified", ", ".join(f"{name} {bound}" for name, bound in bounds.items()) or "no bounds"),
        ("made by", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
        ("fingerprint", manifest.fingerprint),
    ]
    return _table(rows)


def printable(text: str) -> str:
    """Return a text without what would steer a terminal: a document may come from anywhere."""
    return "".join(character if character.isprintable() else " " for character in text)


def _shortened(text: str, width: int) -> str:
    words = " ".join(printable(text[: 4 * width]).split())
    return words if len(words) <= width else words[: width - 3] + "..."


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)
