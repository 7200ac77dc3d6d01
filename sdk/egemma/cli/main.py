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
from collections.abc import Callable, Sequence

from egemma.cli.parser import parser
from egemma_core.errors import EgemmaError

# argparse ends a list at the first option; what stands behind it arrives as left over.
_LISTS = {"embed": "texts", "add": "files", "add-lines": "files", "remove": "ids"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, JSON is UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        args = _parse(argv)
        code = _command(args)(args)
        sys.stdout.flush()
    except EgemmaError as error:
        return _complain(str(error))
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
    args, rest = top.parse_known_args(argv)
    several = _LISTS.get(args.command)
    if rest and (several is None or any(word.startswith("-") and word != "-" for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if several is not None:
        setattr(args, several, getattr(args, several) + rest)
    if args.command == "add" and args.plan and args.files in ([], ["-"]):
        top.error("--plan needs files or folders")
    if args.command == "embed" and args.role == "query" and args.title is not None:
        top.error("--title is for documents: add --as document, or leave it out")
    if args.command == "embed" and args.role == "document" and args.task is not None:
        top.error("--task is for queries, a document is embedded the same for all: leave it out")
    return args


def _command(args: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    # Not above: these load NumPy and the runtime, which `--help` can do without.
    from egemma.cli import commands, upkeep

    if args.command == "index":
        return upkeep.COMMANDS[args.index_command]
    return commands.COMMANDS[args.command]


def _complain(text: str) -> int:
    print("egemma: " + " ".join(text.split("\n")), file=sys.stderr)
    return 1
