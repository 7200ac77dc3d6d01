"""The `egemma` command: what may be typed, and what a shell gets back.

Exit codes: 0 done; 1 it could not be done, and one line on stderr says why; 2 the command line is
wrong; 130 Ctrl-C; 141 the reader of our output went away. Results go to stdout, everything else to
stderr.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

from egemma_core.errors import EgemmaError
from egemma_core.prompts import DEFAULT_TASK

MODEL_VARIABLE = "EGEMMA_MODEL"
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, JSON is UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        args = _parse(argv)
        # not above: it loads NumPy and the runtime, which `--help` can do without
        from egemma.cli import commands

        code = commands.run(args)
        sys.stdout.flush()
    except EgemmaError as error:
        return _complain(_as_typed(str(error)))
    except KeyboardInterrupt:
        _complain("interrupted.")
        return 130
    # the reader has what it wanted; without this Python would complain once more at its exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _complain(f"{error}.")
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    args, late = top.parse_known_args(argv)
    # argparse ends a list of files at the first option: what stands behind it arrives here.
    several = {"embed": "texts", "add": "files", "remove": "ids"}.get(args.command)
    if late and (several is None or any(word.startswith("-") and word != "-" for word in late)):
        top.error(f"unrecognized arguments: {' '.join(late)}")
    if several is not None:
        setattr(args, several, getattr(args, several) + late)
    _check_together(top, args)
    return args


def _check_together(top: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse cannot say: options that only make sense with, or without, others."""
    if args.command == "add":
        of_files = [
            name
            for name in ("plan", "exclude", "hidden", "chunk_tokens", "allow_empty")
            if getattr(args, name)
        ]
        if args.form != "file" and of_files:
            top.error(
                f"--{of_files[0].replace('_', '-')} is for files and folders: leave out "
                f"--{args.form}"
            )
        if args.plan and args.files in ([], ["-"]):
            top.error("--plan wants files or folders")
        if args.form == "file" and args.overflow is not None and args.files not in ([], ["-"]):
            top.error(
                "--overflow is for --lines, --jsonl and stdin: files are cut into passages that "
                "the model reads whole"
            )
    if args.command == "embed" and args.parquet is None:
        of_bulk = [
            name
            for name in (
                "engine",
                "workers",
                "text_column",
                "title_column",
                "id_column",
                "on_error",
            )
            if getattr(args, name) is not None
        ]
        if of_bulk:
            top.error(f"--{of_bulk[0].replace('_', '-')} is for Parquet files: give --in as well")
    if (
        args.command == "embed"
        and args.parquet is not None
        and (args.texts or args.out is None or args.title is not None)
    ):
        top.error(
            "--in takes --out FOLDER, and neither texts nor --title: titles come from "
            "--title-column"
        )
    if args.command == "embed" and args.role == "query" and args.title is not None:
        top.error("--title is for documents: add --as document, or leave it out")
    if args.command == "embed" and args.role == "document" and args.task is not None:
        top.error("--task is for queries, a document is embedded the same for all: leave it out")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="egemma", description="Embed text and search it, on this machine only."
    )
    top.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_embed(commands)
    _add_add(commands)
    _add_remove_and_search(commands)
    _add_index_commands(
        commands.add_parser("index", help="look after an index", description="Look after an index.")
    )
    _add_bundle_commands(commands)
    return top


def _add_embed(commands: _Commands) -> None:
    embed = commands.add_parser(
        "embed",
        help="print or save vectors of texts",
        description="Print or save vectors of texts, one per line of stdin when no TEXT is given.",
    )
    embed.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="a text; '-' or none at all: each line of stdin is one",
    )
    embed.add_argument(
        "--as",
        dest="role",
        choices=("query", "document"),
        default="query",
        help="which of the model's prompts goes before the text (default: query)",
    )
    embed.add_argument("--task", help=f"what a query is for (default: {DEFAULT_TASK!r})")
    embed.add_argument("--title", help="the title of a document")
    embed.add_argument(
        "--out",
        metavar="FILE.npy|FOLDER",
        help="save all vectors, one per row, as float32; with --in, the folder for Parquet files",
    )
    bulk = embed.add_argument_group(
        "many texts", "Parquet to Parquet; stopped at any moment, the same command goes on"
    )
    bulk.add_argument(
        "--in",
        dest="parquet",
        action="append",
        metavar="PARQUET",
        help="a Parquet file or a folder of them; may be repeated",
    )
    bulk.add_argument(
        "--engine",
        choices=("local", "ray"),
        help="this process, or workers of Ray with a model each (default: local)",
    )
    bulk.add_argument("--workers", type=int, metavar="N", help="of Ray; --threads is then of each")
    bulk.add_argument("--text-column", metavar="NAME", help="(default: text)")
    bulk.add_argument("--title-column", metavar="NAME", help="(default: no titles)")
    bulk.add_argument("--id-column", metavar="NAME", help="(default: ids are FILE:ROW)")
    bulk.add_argument(
        "--on-error",
        choices=("fail", "null"),
        help="a row that cannot be embedded ends the run, or stays without a vector "
        "and with the reason (default: fail)",
    )
    _add_model(embed)
    _add_dim(embed)
    _add_overflow(embed)
    _add_json(embed, "print one JSON object per line")


def _add_add(commands: _Commands) -> None:
    add = commands.add_parser(
        "add",
        help="put files, folders or texts into an index",
        description="Put files and folders into an index, which is made when there is none. Text, "
        "Markdown, HTML, PDF and "
        "code are read, cut into passages that the model reads whole, and embedded. Run it again "
        "to bring the "
        "index up to date: only what changed is embedded, what was deleted leaves. Ctrl-C at any "
        "time, and go on.",
    )
    add.add_argument("index", metavar="INDEX", help="the index file")
    add.add_argument(
        "files",
        nargs="*",
        metavar="PATH",
        help="a file or folder, its id the full path; '-' or none: stdin as one document",
    )
    form = add.add_mutually_exclusive_group()
    form.add_argument(
        "--lines",
        dest="form",
        action="store_const",
        const="lines",
        default="file",
        help="each line of PATH or stdin is a document",
    )
    form.add_argument(
        "--jsonl",
        dest="form",
        action="store_const",
        const="jsonl",
        help='each line is a JSON object with "text" and, if wanted, "id", "title" and "metadata"',
    )
    add.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be embedded and how long it would take",
    )
    add.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave such files out, as in .gitignore; may be repeated",
    )
    add.add_argument(
        "--hidden", action="store_true", help="read files and folders that begin with a dot too"
    )
    add.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="longest passage (default: 400, or what the model reads)",
    )
    add.add_argument(
        "--allow-empty",
        action="store_true",
        help="a folder that became empty takes its documents out of the index",
    )
    _add_model(add)
    add.add_argument(
        "--overflow",
        choices=("error", "truncate", "chunk"),
        help="for --lines, --jsonl and stdin: what to do with a text that is longer than the model "
        "reads (default: error)",
    )
    _add_json(add)


def _add_remove_and_search(commands: _Commands) -> None:
    remove = commands.add_parser(
        "remove",
        help="delete documents from an index",
        description="Delete documents from an index.",
    )
    remove.add_argument("index", metavar="INDEX", help="the index file")
    remove.add_argument(
        "ids",
        nargs="+",
        metavar="ID",
        help="ids as `egemma search` prints them; one that is not stored is an error",
    )
    _add_json(remove)

    search = commands.add_parser(
        "search",
        help="find what answers a query best",
        description="Find what answers a query best: by meaning, by words, or by both.",
    )
    search.add_argument("index", metavar="INDEX", help="the index file")
    search.add_argument("query", metavar="QUERY")
    search.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    search.add_argument(
        "--mode",
        choices=("vector", "text", "hybrid"),
        default="vector",
        help="by meaning, by words (BM25), or both joined by rank (default: vector)",
    )
    search.add_argument(
        "--where",
        type=_filter,
        metavar="JSON",
        help="only documents whose metadata pass, such as "
        """'{"lang": "en", "year": {"$gte": 2020}}'""",
    )
    search.add_argument(
        "--task", default=DEFAULT_TASK, help=f"what the query is for (default: {DEFAULT_TASK!r})"
    )
    search.add_argument(
        "--shortlist",
        type=int,
        metavar="N",
        help="vectors that the first pass leaves to be compared at full width "
        "(default: what `egemma index tune` found, else the larger of 300 and 10 k)",
    )
    search.add_argument(
        "--exact",
        action="store_true",
        help="compare every vector at full width, without a first pass",
    )
    _add_model(search)
    _add_dim(search)
    _add_json(search)


def _add_bundle_commands(commands: _Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a bundle or an index is",
        description="Say what a bundle or an index is, and check it for damage.",
    )
    inspect.add_argument(
        "path", metavar="BUNDLE|INDEX", help="a bundle folder, 'builtin', or an index file"
    )
    _add_json(inspect)

    verify = commands.add_parser(
        "verify",
        help="check that a bundle gives the vectors its model gave at export",
        description="Run a bundle's golden texts on this machine and compare. Exit code 1 when one "
        "fails.",
    )
    verify.add_argument("bundle", metavar="BUNDLE", help="a bundle folder, or 'builtin'")
    for name, about in (
        ("--min-cosine-float", "worst cosine to the float model"),
        ("--min-cosine-quantized", "worst cosine to float arithmetic on the rounded weights"),
        ("--max-batch-difference", "largest difference of a channel between alone and in a batch"),
    ):
        verify.add_argument(
            name, type=float, metavar="X", help=f"{about} (default: the bundle's own bound)"
        )
    _add_threads(verify)
    _add_json(verify)

    bench = commands.add_parser(
        "bench",
        help="measure load time, latency and memory",
        description="Measure load time, latency by length and peak memory of a bundle on this "
        "machine.",
    )
    bench.add_argument("bundle", metavar="BUNDLE", help="a bundle folder, or 'builtin'")
    bench.add_argument(
        "--tokens",
        type=_lengths,
        metavar="N,N,...",
        help="lengths, BOS and EOS included (default: 16,64,256)",
    )
    bench.add_argument("--runs", type=int, default=20, help="of each length (default: 20)")
    _add_threads(bench)
    _add_json(bench)


def _add_index_commands(top: argparse.ArgumentParser) -> None:
    commands = top.add_subparsers(dest="index_command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        made.add_argument("index", metavar="INDEX", help="the index file")
        _add_json(made)
        return made

    command(
        "check",
        "read everything and compare it with its checksums; exit code 1 when something is damaged",
    )
    command("compact", "give back the space of deleted documents")
    backup = command("backup", "copy the index, also while others write to it")
    backup.add_argument("to", metavar="FILE", help="a file that does not exist yet")
    backup.add_argument("--force", action="store_true", help="replace FILE")
    export = command("export", "write all documents as JSON lines")
    export.add_argument("to", metavar="FILE.jsonl")
    export.add_argument(
        "--no-vectors", action="store_true", help="texts alone; an import then has to embed them"
    )
    export.add_argument("--force", action="store_true", help="replace FILE.jsonl")
    imported = command(
        "import", "put the documents of an export into the index, which is made when there is none"
    )
    imported.add_argument("file", metavar="FILE.jsonl")
    imported.add_argument(
        "--embed",
        action="store_true",
        help="embed the texts anew, for a file without vectors or of another model",
    )
    _add_model(imported)
    tune = command("tune", "find the shortest shortlist that reaches a recall on this index")
    tune.add_argument(
        "--recall",
        type=float,
        default=0.99,
        help="share of the true best hits, at the lower end of the interval (default: 0.99)",
    )
    tune.add_argument("-k", type=int, default=10, help="hits that are wanted (default: 10)")
    tune.add_argument(
        "--queries",
        metavar="FILE",
        help="a query per line (default: stored passages stand in for queries)",
    )
    tune.add_argument(
        "--sample", type=int, default=200, help="how many queries to try (default: 200)"
    )
    _add_model(tune)
    migrate = command(
        "migrate",
        "embed everything anew with another model; "
        "searches go on with the old one until the switch",
    )
    migrate.add_argument(
        "--to", required=True, metavar="BUNDLE", help="the new model: a bundle folder, or 'builtin'"
    )
    migrate.add_argument(
        "--overflow",
        choices=("error", "truncate"),
        default="error",
        help="what to do with a passage that is longer than the new model reads (default: error)",
    )
    _add_threads(migrate)
    command("abandon", "give up a migration that is half way; the old model stays")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        metavar="BUNDLE",
        help="a bundle folder, or 'builtin' (default: the one that the index was made with, "
        f"else ${MODEL_VARIABLE}, else builtin)",
    )
    _add_threads(command)


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="to compute with (default: the CPUs that this process may use)",
    )


def _add_dim(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dim",
        type=int,
        metavar="D",
        help="a width that the model was trained for (default: the full one)",
    )


def _add_overflow(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overflow",
        choices=("error", "truncate"),
        default="error",
        help="what to do with a text that is longer than the model reads (default: error)",
    )


def _add_json(command: argparse.ArgumentParser, about: str = "print one JSON object") -> None:
    command.add_argument("--json", action="store_true", help=about)


def _filter(text: str) -> object:
    import json

    try:
        where = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(where, dict):
        raise argparse.ArgumentTypeError(f'{text!r}: a JSON object such as {{"lang": "en"}}')
    return where


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: whole numbers with commas between them, such as 16,64"
        ) from error


class _ShowVersion(argparse.Action):
    """argparse's own wants the version beforehand, and looking it up takes longer than all of
    `--help`.
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from egemma import __version__

        print(f"egemma {__version__}")
        parser.exit()


def _as_typed(text: str) -> str:
    """An error's next step as a shell takes it, not as Python does."""
    for python, shell in (
        ("overflow='truncate'", "--overflow truncate"),
        ("force=True", "--force"),
        ("allow_empty=True", "--allow-empty"),
        ("reembed=True (`--embed`)", "--embed"),
        ("exact=True", "--exact"),
        ("mode='vector'", "--mode vector"),
    ):
        text = text.replace(python, shell)
    return text


def _complain(text: str) -> int:
    print("egemma: " + " ".join(text.split("\n")), file=sys.stderr)
    return 1
