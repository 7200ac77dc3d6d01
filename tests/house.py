"""How large is the house, how much must a stranger read, and which room imports which?

    python -m tests.house    # prints the budget and writes benchmarks/results/house.json

Counted are lines of files and code tokens (NAME, OP, NUMBER and STRING of `tokenize`; an f-string is
one), of what is shipped. Not said: how good any of it is. `tests/test_house.py` keeps the limits.
"""

from __future__ import annotations

import ast
import json
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "house.json"
ROOMS = {
    "egemma_core": ROOT / "core",
    "egemma_quant": ROOT / "quant",
    "egemma_train": ROOT / "quant",
    "egemma_export": ROOT / "export",
    "egemma": ROOT / "sdk",
    "egemma_server": ROOT / "server",
}
# Not shipped. They import the library; `models` makes models that tests and benchmarks both need.
WORKSHOPS = {name: ROOT / name for name in ("tests", "benchmarks", "models", "contract")}

MOST_LINES = 400  # of a module
MOST_TOKENS_A_LINE = 6.0  # on average, of the library and of the path
MOST_LINES_OF_THE_PATH = 6000
# What a stranger who wants to understand search on a device has to read.
PATH = (
    "core/egemma_core/*.py",
    "sdk/egemma/embedder.py",
    "sdk/egemma/embeddings.py",
    "sdk/egemma/texts.py",
    "sdk/egemma/runtimes/*.py",
    "sdk/egemma/chunks.py",
    "sdk/egemma/units.py",
    "sdk/egemma/where*.py",
    "sdk/egemma/metadata.py",
    "sdk/egemma/index/*.py",
)
# Upkeep, migration, exchange and tuning: read when needed.
NOT_ON_THE_PATH = (
    *("upkeep", "bulk_reads", "migration", "migration_tables"),
    *("jsonl", "jsonl_lines", "json_lines"),
    *("tune", "tuned"),
)
_STRING_STARTS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
_STRING_ENDS = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}


@dataclass(frozen=True)
class Size:
    """How much there is to read in some modules."""

    modules: int
    lines: int
    tokens: int
    tokens_a_line: float
    longest: str
    longest_lines: int


def modules(room: str) -> list[Path]:
    """Return the files of a room of the library, in order."""
    return sorted((ROOMS[room] / room).rglob("*.py"))


def library() -> list[Path]:
    """Return the files of all rooms of the library."""
    return [path for room in ROOMS for path in modules(room)]


def path_of_a_stranger() -> list[Path]:
    """Return the files that explain search on a device, from the tokens to the hits."""
    found = {path for pattern in PATH for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.stem not in NOT_ON_THE_PATH)


def lines_of(path: Path) -> int:
    """Return how many lines a file has."""
    return len(path.read_text(encoding="utf-8").splitlines())


def tokens_of(path: Path) -> int:
    """Return how many code tokens a file has; the same on every version of Python."""
    count = depth = 0
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in _STRING_STARTS:
                count, depth = count + (depth == 0), depth + 1
            elif token.type in _STRING_ENDS:
                depth -= 1
            elif depth == 0:
                count += token.type in (
                    tokenize.NAME,
                    tokenize.OP,
                    tokenize.NUMBER,
                    tokenize.STRING,
                )
    return count


def size_of(paths: list[Path]) -> Size:
    """Return the size of some modules together."""
    lines = {path: lines_of(path) for path in paths}
    longest = max(lines, key=lines.__getitem__)
    tokens = sum(tokens_of(path) for path in paths)
    return Size(
        modules=len(paths),
        lines=sum(lines.values()),
        tokens=tokens,
        tokens_a_line=round(tokens / sum(lines.values()), 2),
        longest=longest.relative_to(ROOT).as_posix(),
        longest_lines=lines[longest],
    )


def module_name(path: Path) -> str:
    """Return the dotted name under which a file of the library or of a workshop is imported."""
    base = next(
        (folder for room, folder in ROOMS.items() if (folder / room) in path.parents),
        ROOT if ROOT in path.parents else path.parent,
    )
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, at_load: bool = False) -> set[str]:
    """Return the names that a file imports; `from a import b` gives `a` and `a.b`.

    Args:
        at_load: only what loading the module imports: neither what a function imports when it is
            called nor what stands under TYPE_CHECKING.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in _at_load(tree) if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _at_load(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _at_load(child)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _at_load(child)


def rooms_of(names: set[str]) -> set[str]:
    """Return which rooms and workshops some imported names belong to."""
    return {name.split(".")[0] for name in names} & (ROOMS.keys() | WORKSHOPS.keys())


def arrows() -> dict[str, set[str]]:
    """Return which other rooms each room of the library imports."""
    return {
        room: set().union(*(rooms_of(imported(path)) for path in modules(room))) - {room}
        for room in ROOMS
    }


def circles(files: list[Path] | None = None, *, at_load: bool = True) -> list[list[str]]:
    """Return the circles of modules that import each other, of the library unless files are given.

    The package that a module lies in counts only where it is imported by name.
    """
    by_name = {module_name(path): path for path in (library() if files is None else files)}
    edges: dict[str, set[str]] = {}
    for name, path in by_name.items():
        found = imported(path, at_load=at_load) & by_name.keys()
        # `from package import module` needs the module, and of the package no more than a name
        parents = {other for other in found if any(more.startswith(f"{other}.") for more in found)}
        own = {parent for parent in parents if name.startswith(f"{parent}.")}
        edges[name] = found - own - {name}
    reach = {name: _reachable(name, edges) for name in edges}
    found_circles = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(found_circles)]


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges[name]
    return seen


def sizes() -> dict[str, Size]:
    """Return the size of every room, of the library, and of the path of a stranger."""
    return {
        **{room: size_of(modules(room)) for room in ROOMS},
        "library": size_of(library()),
        "path of a stranger": size_of(path_of_a_stranger()),
    }


def main() -> int:
    found, drawn, turning = sizes(), arrows(), circles()
    head = ("", "modules", "lines", "tokens", "tokens a line", "longest module", "its lines")
    for row in [head, *((name, *asdict(size).values()) for name, size in found.items())]:
        print("{:20}{:>8}{:>8}{:>9}{:>15}  {:46}{:>9}".format(*row))
    print()
    for room, others in drawn.items():
        print(f"{room:20}imports {', '.join(sorted(others)) or 'no other room'}")
    print(f"\ncircles: {'; '.join(' - '.join(circle) for circle in turning) or 'none'}")
    result = {
        "rooms": {name: asdict(size) for name, size in found.items()},
        "arrows": {room: sorted(others) for room, others in drawn.items()},
        "circles": turning,
        "path": [path.relative_to(ROOT).as_posix() for path in path_of_a_stranger()],
        "limits": {
            "lines_of_a_module": MOST_LINES,
            "tokens_a_line": MOST_TOKENS_A_LINE,
            "lines_of_the_path": MOST_LINES_OF_THE_PATH,
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
