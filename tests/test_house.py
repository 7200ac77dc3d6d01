"""The house: which room may import which, what the SDK may load, and what every room promises to
strangers.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "egemma_core": ROOT / "core",
    "egemma_quant": ROOT / "quant",
    "egemma_train": ROOT / "quant",
    "egemma_export": ROOT / "export",
    "egemma": ROOT / "sdk",
    "egemma_server": ROOT / "server",
}
# Data flows down this list; imports only look up it. Export also opens its finished bundle, through
# the command line.
MAY_IMPORT = {
    "egemma_core": {"egemma_core"},
    "egemma_quant": {"egemma_core", "egemma_quant"},
    "egemma_train": {"egemma_core", "egemma_quant", "egemma_train"},
    "egemma_export": {"egemma_core", "egemma_quant", "egemma_export"},
    "egemma": {"egemma_core", "egemma"},
    "egemma_server": {"egemma_core", "egemma", "egemma_server"},
}
# beside the standard library; the last only for a hub id
TORCH_FREE = {"numpy", "sentencepiece", "huggingface_hub"}


def modules(room: str) -> list[Path]:
    return sorted((ROOMS[room] / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_look_back(room: str) -> None:
    for path in modules(room):
        ours = {name.split(".")[0] for name in imported(path)} & set(ROOMS)
        assert ours <= MAY_IMPORT[room], (
            f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[room]}"
        )


def test_the_ground_floor_needs_numpy_and_sentencepiece_only() -> None:
    import sys

    for path in sorted((ROOMS["egemma_core"] / "egemma_core").glob("*.py")):
        outside = (
            {name.split(".")[0] for name in imported(path)}
            - set(sys.stdlib_module_names)
            - TORCH_FREE
            - {"egemma_core"}
        )
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"


# What an extra of the SDK brings may be imported where it is used, never by loading a module.
OPTIONAL = {
    "numkong",
    "typing_extensions",  # for type checkers alone, which bring it
    "pypdf",
    "selectolax",
    "pyarrow",
    "ray",
    "psycopg",
    "qdrant_client",
    "resource",
}


def test_the_sdk_reads_only_the_ground_floor_and_never_torch() -> None:
    import sys

    allowed = set(sys.stdlib_module_names) | {"numpy", "onnxruntime", "egemma", "egemma_core"}
    for path in modules("egemma"):
        names = imported(path)
        assert not {name.split(".")[0] for name in names} - allowed - OPTIONAL, (
            f"{path.relative_to(ROOT)} imports {names}"
        )
        upstairs = {name for name in names if name.startswith("egemma_core.nn")}
        assert not upstairs, f"{path.relative_to(ROOT)} imports {upstairs}"


def test_what_an_extra_brings_is_loaded_only_where_it_is_used() -> None:
    for path in modules("egemma"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = [
            node
            for node in tree.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        at_load = [node for node in tree.body if node not in for_types]
        for node in at_load:
            names = (
                {alias.name for alias in node.names}
                if isinstance(node, ast.Import)
                else {node.module}
                if isinstance(node, ast.ImportFrom)
                else set()
            )
            assert not {str(name).split(".")[0] for name in names} & OPTIONAL, (
                f"{path.relative_to(ROOT)} loads {names} with the module"
            )
