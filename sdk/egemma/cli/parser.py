"""Every command and option of `egemma`."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from egemma_core.prompts import DEFAULT_TASK

MODEL_VARIABLE = "EGEMMA_MODEL"
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="egemma", description="Embed text and search it, on this machine only."
    )
    top.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_embed(commands)
    _add_add(commands)
    _add_add_lines(commands)
    _add_remove(commands)
    _add_search(commands)
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
        help="a text; with '-' or without any, each line of stdin is one",
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
        "--out", metavar="FILE.npy", help="save all vectors, one per row, as float32"
    )
    _add_model(embed)
    _add_dim(embed)
    _add_overflow(embed)
    _add_json(embed, "print one JSON object per line")


def _add_add(commands: _Commands) -> None:
    add = commands.add_parser(
        "add",
        help="put files and folders into an index",
        description="Put files and folders into an index, which is made when there is none. Text, "
        "Markdown, HTML, PDF and code are read, cut into passages that the model reads whole, and "
        "embedded. Run it again to bring the index up to date: only what changed is embedded, what "
        "was deleted leaves. Press Ctrl-C at any time, and go on later.",
    )
    add.add_argument("index", metavar="INDEX", help="the index file")
    add.add_argument(
        "files",
        nargs="*",
        metavar="PATH",
        help="a file or folder, its id the full path; with '-' or without any, all of stdin is one "
        "document",
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
    _add_json(add)


def _add_add_lines(commands: _Commands) -> None:
    lines = commands.add_parser(
        "add-lines",
        help="put each line of a file into an index",
        description="Put each line of a file, or of stdin, into an index as a document.",
    )
    lines.add_argument("index", metavar="INDEX", help="the index file")
    lines.add_argument(
        "files", nargs="*", metavar="FILE", help="a file; with '-' or without any, stdin"
    )
    lines.add_argument(
        "--jsonl",
        action="store_true",
        help='each line is a JSON object with "text" and, if wanted, "id", "title" and "metadata"',
    )
    _add_model(lines)
    _add_overflow(lines, "error", "truncate", "chunk")
    _add_json(lines)


def _add_remove(commands: _Commands) -> None:
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


def _add_search(commands: _Commands) -> None:
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
        help="how many vectors the first pass leaves to be compared at full width "
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
    tune.add_argument(
        "-k", type=int, default=10, help="how many hits a search asks for (default: 10)"
    )
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
    _add_overflow(
        migrate, about="what to do with a passage that is longer than the new model reads"
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


def _add_overflow(
    command: argparse.ArgumentParser,
    *choices: str,
    about: str = "what to do with a text that is longer than the model reads",
) -> None:
    command.add_argument(
        "--overflow",
        choices=choices or ("error", "truncate"),
        default="error",
        help=f"{about} (default: error)",
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
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object such as {{"lang": "en"}}')
    return where


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole numbers with commas between them, such as 16,64"
        ) from error


class _ShowVersion(argparse.Action):
    """Print the version; argparse's own action would look it up for `--help` as well, slowly."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from egemma import __version__

        print(f"egemma {__version__}")
        parser.exit()
