"""The full run, and the short one."""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests import stress
from tests.stress.clocks import clock_jumps
from tests.stress.damage import damage_rounds, log_rounds
from tests.stress.disks import full_disk, read_only_media
from tests.stress.kills import kill_rounds, writer_rounds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "durability.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress", description=(stress.__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few of each, and no results file")
    parser.add_argument("--kills", type=int, help="default 1200, quick 40")
    parser.add_argument("--writer-kills", type=int, help="default 200, quick 16")
    parser.add_argument(
        "--damages", type=int, help="of each kind of file and of damage; default 600, quick 12"
    )
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files are made (default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--out", type=Path, help="results file (default benchmarks/results/durability.json)"
    )
    args = parser.parse_args(argv)
    kills = args.kills or (40 if args.quick else 1200)
    writer_kills = args.writer_kills or (16 if args.quick else 200)
    damages = args.damages or (12 if args.quick else 600)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        result = {
            "seed": args.seed,
            "killed": kill_rounds(kills, args.seed, work).to_json(),
            "two_writers_killed": writer_rounds(writer_kills, args.seed, work).to_json(),
            "damaged": damage_rounds(damages, args.seed, work),
            "damaged_log": log_rounds(damages, args.seed, work),
            "full_disk": full_disk(work, args.seed, steps=40 if args.quick else 400),
            "read_only_media": read_only_media(work),
            "clock_jumps": clock_jumps(15 if args.quick else 100, args.seed, work),
            "not_shown": "power cuts: a kill keeps what the kernel has",
            "seconds": round(time.monotonic() - started),
            "sqlite": sqlite3.sqlite_version,
            "python": sys.version.split()[0],
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip(),
        }
    report = json.dumps(result, indent=1)
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        out.write_text(report + "\n")
    print(report)
    return int("problem" in report.replace('"problems": []', ""))


if __name__ == "__main__":
    sys.exit(main())
