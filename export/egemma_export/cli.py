"""`egemma-export`: parse, build a config, call `export`, print."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from egemma_core.errors import EgemmaError

if TYPE_CHECKING:  # at run time it would import torch for --help
    from egemma_quant.schemes import Scheme


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="egemma-export",
        description="Turn an EmbeddingGemma checkpoint into a bundle for a device, verified on the "
        "file that ships.",
    )
    parser.add_argument("--target", help="what to make; see --list-targets")
    parser.add_argument(
        "--list-targets",
        action="store_true",
        help="show every target, what its numbers are stored as, and what is done instead",
    )
    parser.add_argument(
        "--model", help="checkpoint folder, or hub id such as google/embeddinggemma-300m[@revision]"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--out", type=Path, help="folder of the bundle (default: ./MODEL-TARGET)")
    parser.add_argument(
        "--force", action="store_true", help="replace a bundle that is already there"
    )
    parser.add_argument(
        "--min-cosine-float",
        type=float,
        metavar="C",
        help="refuse the file below this cosine to the float model",
    )
    parser.add_argument(
        "--min-cosine-quantized",
        type=float,
        metavar="C",
        help="refuse the file below this cosine to float arithmetic on the same rounded weights",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="threads of the verification run (default: what this process may use)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report, or the list of targets, as JSON"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.list_targets:
        print(_targets_json() if args.json else _targets_text())
        return 0
    if not args.target or not args.model:
        arguments.error("give --target and --model, or --list-targets")
    _quiet_libraries()
    try:
        from egemma_export.pipeline import ExportConfig, export

        out = args.out or Path(f"{Path(args.model.partition('@')[0]).name}-{args.target}")
        config = ExportConfig(
            target=args.target,
            model=args.model,
            out=out,
            revision=args.revision,
            replace=args.force,
            min_cosine_float=args.min_cosine_float,
            min_cosine_quantized=args.min_cosine_quantized,
            threads=args.threads,
        )
        with _progress() as progress:
            report = export(config, progress)
    except EgemmaError as error:
        print(f"egemma-export: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"egemma-export: {error.name} is not installed: pip install 'egemma[export]'.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(
            f"egemma-export: {error.strerror or error} ({error.filename or 'writing the bundle'}); "
            "nothing was written.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("egemma-export: stopped; nothing was written.", file=sys.stderr)
        return 130
    print(report.to_json() if args.json else report.to_text())
    return 0


def _quiet_libraries() -> None:
    """Keep what torch and torchao say of their own insides out of the output."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


@contextmanager
def _progress() -> Iterator[Callable[[str, str], None]]:
    """Show a bar over the stages on a terminal, and nothing elsewhere."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from egemma_export.pipeline import STAGES

    with tqdm(
        total=len(STAGES),
        disable=None,
        bar_format="{desc:<44} {bar:20} {n}/{total} {elapsed}",
        leave=False,
    ) as bar:

        def show(stage: str, detail: str) -> None:
            bar.n = STAGES.index(stage)
            bar.set_description_str(f"{stage}: {detail}" if detail else stage)

        yield show


def _targets_text() -> str:
    from egemma_export.targets import TARGETS

    lines = []
    for target in TARGETS.values():
        lines.append(
            f"{target.name:<14} {target.runtime:<12} {_weights_text(target.scheme)}; activations "
            f"{target.activations}"
        )
        if target.instead:
            lines.append(f"{'':<14} {'':<12} instead: {target.instead}")
    return "\n".join(lines)


def _weights_text(scheme: Scheme | None) -> str:
    if scheme is None:
        return "float32 weights"
    by_format: dict[str, list[str]] = {}
    for role in ("embedding", "attention", "feed_forward", "projection"):
        found = scheme.format_of(role)
        per = f"block of {found.group_size}" if found.group_size else "channel"
        by_format.setdefault(f"int{found.bits} per {per}", []).append(role.replace("_", "-"))
    if len(by_format) == 1:
        return f"{next(iter(by_format))} weights"
    return ", ".join(f"{name} {' and '.join(roles)}" for name, roles in by_format.items())


def _targets_json() -> str:
    from egemma_export.targets import TARGETS

    return json.dumps([asdict(target) for target in TARGETS.values()], indent=1)


if __name__ == "__main__":
    sys.exit(main())
