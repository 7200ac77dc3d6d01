"""Which modules of the index may read and write its tables, and that none imports in a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import egemma.index

FOLDER = Path(egemma.index.__file__).parent
TABLE = "(documents|chunks|vectors|blocks|heads|next_vectors|next_heads|next_tokens)"
IN_SQL = re.compile(rf"\b(FROM|JOIN|INTO|UPDATE|TABLE) {TABLE}\b")
# What reads rows and checks them, what writes them, and what looks after a whole file.
OWNERS = {
    "records.py",
    "vectors.py",
    "bulk_reads.py",
    "rows.py",
    "facts.py",
    "migration_tables.py",
}


def modules() -> dict[str, ast.Module]:
    return {
        path.relative_to(FOLDER).as_posix(): ast.parse(path.read_text())
        for path in FOLDER.rglob("*.py")
    }


def test_only_the_reader_the_writer_and_upkeep_name_tables_of_content() -> None:
    for name, tree in modules().items():
        if name in OWNERS or name.startswith("upkeep/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not IN_SQL.search(node.value), f"{name}:{node.lineno} {node.value!r}"


def test_no_module_of_the_index_imports_itself_through_others() -> None:
    imports: dict[str, set[str]] = {}
    for name, tree in modules().items():
        module = "egemma.index." + name.removesuffix(".py").replace("/", ".")
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("egemma.index"):
                parent = node.module or ""
                found |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
        imports[module.removesuffix(".__init__")] = found
    del imports["egemma.index"]  # the face, which imports all

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in imports[waiting.pop()] & imports.keys():
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    assert [module for module in imports if module in reached(module)] == []
