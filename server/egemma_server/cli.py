"""The `egemma-server` command: what an operator types, and what a shell gets back.

Exit codes are those of `egemma`: 0 done; 1 it could not be done, and one line on stderr says why;
2 the command line is wrong; 130 Ctrl-C; 141 the reader of our output went away. Results go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence

from egemma.cli.parser import MODEL_VARIABLE
from egemma_core.errors import EgemmaError
from egemma_core.prompts import DEFAULT_TASK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, JSON is UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        _bulk(_parse(argv))
        sys.stdout.flush()
    except EgemmaError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted. Finished shards are kept: the same command goes on.")
        return 130
    # the reader has what it wanted; without this Python would complain once more at its exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _complain(f"{error}.")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return what the command line may hold."""
    top = argparse.ArgumentParser(
        prog="egemma-server", description="Embed many texts on the machines of an operator."
    )
    top.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bulk = commands.add_parser(
        "bulk",
        help="embed the texts of Parquet files into a folder of Parquet files",
        allow_abbrev=False,  # `--title` would be taken for `--title-column`
        usage="egemma-server bulk IN [IN ...] OUT [OPTION ...]",
        description="Embed the texts of Parquet files into a folder of Parquet files. Stopped at "
        "any moment, the same command goes on.",
    )
    bulk.add_argument(
        "paths",
        nargs="+",
        metavar="IN ... OUT",
        help="Parquet files, or one folder of them; the last is the folder to write",
    )
    bulk.add_argument(
        "--model",
        metavar="BUNDLE",
        help=f"a bundle folder, or 'builtin' (default: ${MODEL_VARIABLE}, else builtin)",
    )
    bulk.add_argument(
        "--as",
        dest="role",
        choices=("query", "document"),
        default="document",
        help="which of the model's prompts goes before the texts (default: document)",
    )
    bulk.add_argument("--task", help=f"what queries are for (default: {DEFAULT_TASK!r})")
    bulk.add_argument("--text-column", default="text", metavar="NAME", help="(default: text)")
    bulk.add_argument("--title-column", metavar="NAME", help="(default: no titles)")
    bulk.add_argument("--id-column", metavar="NAME", help="(default: ids are FILE:ROW)")
    bulk.add_argument(
        "--dim",
        type=int,
        metavar="D",
        help="a width that the model was trained for (default: the full one)",
    )
    bulk.add_argument(
        "--overflow",
        choices=("error", "truncate"),
        default="error",
        help="what to do with a text that is longer than the model reads (default: error)",
    )
    bulk.add_argument(
        "--on-error",
        choices=("fail", "null"),
        default="fail",
        help="a row that cannot be embedded ends the run, or stays without a vector and with the "
        "reason (default: fail)",
    )
    bulk.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="this process, or workers of Ray with a model each (default: local)",
    )
    bulk.add_argument("--workers", type=int, metavar="N", help="how many workers of Ray")
    bulk.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each worker (default: the CPUs that this process may use, shared out)",
    )
    bulk.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    args, late = top.parse_known_args(argv)
    # argparse ends the list of paths at the first option: what stands behind it arrives here.
    if any(word.startswith("-") for word in late):
        top.error(f"unrecognized arguments: {' '.join(late)}")
    args.paths += late
    if len(args.paths) < 2:
        top.error("bulk takes at least one IN, and OUT")
    if args.role == "document" and args.task is not None:
        top.error("--task is for queries, a document is embedded the same for all: leave it out")
    if args.engine == "local" and args.workers is not None:
        top.error("--workers is for Ray: give --engine ray as well, or leave it out")
    return args


def _bulk(args: argparse.Namespace) -> None:
    # not above: these load NumPy and the runtime, which `--help` can do without
    from egemma.cli.progress import Progress
    from egemma_server.bulk import embed_parquet

    *sources, out = args.paths
    with Progress("rows", None) as progress:
        report = embed_parquet(
            sources[0] if len(sources) == 1 else sources,
            out,
            bundle=args.model or os.environ.get(MODEL_VARIABLE) or "builtin",
            text_column=args.text_column,
            title_column=args.title_column,
            id_column=args.id_column,
            role=args.role,
            task=args.task,
            dim=args.dim,
            overflow=args.overflow,
            engine=args.engine,
            workers=args.workers,
            threads_per_worker=args.threads,
            on_error=args.on_error,
            progress=progress.at,
        )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else report.to_text())


class _ShowVersion(argparse.Action):
    """Look the version up only when it is asked for: that takes longer than all of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from egemma import __version__

        print(f"egemma-server {__version__}")
        parser.exit()


def _complain(text: str) -> int:
    print("egemma-server: " + " ".join(text.split("\n")), file=sys.stderr)
    return 1
