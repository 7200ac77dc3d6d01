"""The house: which room may import which, what the SDK may load, how much there is to read, and
what every room promises to strangers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.house import (
    MOST_LINES,
    MOST_LINES_OF_THE_PATH,
    MOST_TOKENS_A_LINE,
    ROOMS,
    ROOT,
    WORKSHOPS,
    arrows,
    circles,
    imported,
    library,
    lines_of,
    modules,
    path_of_a_stranger,
    rooms_of,
    size_of,
    tokens_of,
)

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
# Tests and benchmarks stand side by side on the library, on `models`, which makes the models that
# both need, and on what `contract` pins.
WORKSHOPS_MAY_IMPORT = {
    "tests": {"models", "contract", "tests"},
    "benchmarks": {"models", "benchmarks"},
    "models": {"models"},
    "contract": {"contract"},
}
# The circles that imports at call time close, each with its reason.
LATE_CIRCLES = {
    # `open_runtime` loads the one module that the bundle asks for; both keep its Protocol
    ("egemma.runtimes", "egemma.runtimes.executorch", "egemma.runtimes.onnx"),
}
# beside the standard library; the last only for a hub id
TORCH_FREE = {"numpy", "sentencepiece", "huggingface_hub"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_look_back(room: str) -> None:
    for path in modules(room):
        ours = rooms_of(imported(path))
        assert ours <= MAY_IMPORT[room], (
            f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[room]}"
        )


@pytest.mark.parametrize("workshop", WORKSHOPS)
def test_tests_and_benchmarks_import_each_other_nowhere(workshop: str) -> None:
    allowed = ROOMS.keys() | WORKSHOPS_MAY_IMPORT[workshop]
    for path in sorted(WORKSHOPS[workshop].rglob("*.py")):
        ours = rooms_of(imported(path))
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


def test_the_page_of_the_architecture_draws_every_room_and_arrow() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = {
        room: set(re.findall(r"\w+", others))
        for room, others in re.findall(r"^    (\w+) +→(.*)$", page, re.MULTILINE)
    }
    assert drawn == {room: others for room, others in arrows().items() if others}
    for room in ROOMS:
        assert f"`{room}`" in page, f"docs/architecture.md does not name {room}"
    for workshop in WORKSHOPS:
        assert f"`{workshop}/`" in page, f"docs/architecture.md does not name {workshop}/"


def test_the_page_of_the_architecture_names_modules_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if not (found := re.match(r"    (egemma\w*(?:\.\w+)+)((?:, \w+(?:\.\w+)*)*) ", line)):
            continue
        first, more = found.groups()
        for name in [
            first,
            *(f"{first.rpartition('.')[0]}.{last}" for last in more.split(", ")[1:]),
        ]:
            path = ROOMS[name.split(".")[0]] / name.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), (
                f"docs/architecture.md names {name}, which is not there: {line.strip()}"
            )


def test_no_module_is_longer_than_one_sitting() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines_of(path)
        for path in library()
        if lines_of(path) > MOST_LINES
    }
    assert not long, f"longer than {MOST_LINES} lines: {long}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []
    assert {tuple(circle) for circle in circles(at_load=False)} <= LATE_CIRCLES


def test_circles_are_seen_at_load_and_at_call(tmp_path: Path) -> None:
    lines = {
        "one": "import two",
        "two": "from three import name",
        "three": "def late():\n    import one",
        "four": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import four_too",
        "four_too": "class Body:\n    import four",
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = list(tmp_path.iterdir())
    assert circles(files) == []
    assert circles(files, at_load=False) == [["four", "four_too"], ["one", "three", "two"]]
    (tmp_path / "three.py").write_text("try:\n    import one\nexcept ImportError:\n    pass")
    assert circles(files) == [["one", "three", "two"]]


def test_the_library_is_written_as_loosely_as_it_reads() -> None:
    assert size_of(library()).tokens_a_line <= MOST_TOKENS_A_LINE


def test_the_path_of_a_stranger_can_be_read_in_a_day() -> None:
    size = size_of(path_of_a_stranger())
    assert size.lines <= MOST_LINES_OF_THE_PATH
    assert size.tokens_a_line <= MOST_TOKENS_A_LINE


def test_code_tokens_are_counted_without_comments_and_an_f_string_as_one(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        '"""Docstring."""\n\n# comment\nx = f"{y!r:>{width}} {z}" + "a" "b"\nprint(x)\n'
    )
    # docstring; x = f + "a" "b"; print ( x )
    assert tokens_of(file) == 1 + 6 + 4
    assert lines_of(file) == 5


@pytest.mark.parametrize("floor", [".", "checkpoint"])
def test_the_floors_below_nn_need_numpy_and_sentencepiece_only(floor: str) -> None:
    for path in sorted((ROOMS["egemma_core"] / "egemma_core" / floor).glob("*.py")):
        outside = (
            {name.split(".")[0] for name in imported(path)}
            - set(sys.stdlib_module_names)
            - TORCH_FREE
            - {"egemma_core"}
        )
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"


# The floors of core, from the ground; each imports only those before it.
FLOORS = ("", "checkpoint", "nn")


@pytest.mark.parametrize("floor", FLOORS)
def test_the_floors_of_core_import_only_downwards(floor: str) -> None:
    folder = ROOMS["egemma_core"] / "egemma_core" / floor
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in sorted(folder.rglob("*.py") if floor else folder.glob("*.py")):
        found = {
            name
            for name in imported(path)
            if any(f"{name}.".startswith(f"egemma_core.{upper}.") for upper in above)
        }
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


# What an extra brings may be imported where it is used, never by loading a module.
OPTIONAL = {
    # `resource` is not on Windows; typing_extensions is for type checkers alone
    "egemma": {"numkong", "pypdf", "selectolax", "resource", "typing_extensions"},
    "egemma_server": {
        *("numkong", "pyarrow", "ray", "psycopg", "qdrant_client", "resource"),
        "typing_extensions",
    },
}


def upstairs(names: set[str]) -> set[str]:
    """Which imported names lie above the ground floor of core."""
    floors = tuple(f"egemma_core.{floor}" for floor in FLOORS[1:])
    return {name for name in names if name.startswith(floors)}


def test_the_sdk_reads_only_the_ground_floor_and_never_torch() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "onnxruntime", "pathspec"}
    allowed |= {"egemma", "egemma_core"} | OPTIONAL["egemma"]
    for path in modules("egemma"):
        names = imported(path)
        outside = {name.split(".")[0] for name in names} - allowed
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"
        assert not upstairs(names), f"{path.relative_to(ROOT)} imports {upstairs(names)}"


def test_the_server_reads_only_the_sdk_and_never_torch() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "egemma", "egemma_core", "egemma_server"}
    allowed |= OPTIONAL["egemma_server"]
    for path in modules("egemma_server"):
        names = imported(path)
        outside = {name.split(".")[0] for name in names} - allowed
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"
        assert not upstairs(names), f"{path.relative_to(ROOT)} imports {upstairs(names)}"


@pytest.mark.parametrize("room", OPTIONAL)
def test_what_an_extra_brings_is_loaded_only_where_it_is_used(room: str) -> None:
    for path in modules(room):
        found = {name.split(".")[0] for name in imported(path, at_load=True)} & OPTIONAL[room]
        assert not found, f"{path.relative_to(ROOT)} loads {found} with the module"


# Modules that open sockets or serve them. `server` alone may import one; the hub is asked only for
# a checkpoint that was given by its id there.
SOCKETS = {
    *("socket", "socketserver", "ssl", "asyncio", "selectors", "http", "urllib.request"),
    *("ftplib", "smtplib", "imaplib", "poplib", "nntplib", "telnetlib", "xmlrpc", "wsgiref"),
    *("asyncore", "asynchat", "smtpd", "webbrowser", "multiprocessing"),
    *("requests", "urllib3", "httpx", "aiohttp", "websockets", "grpc", "fsspec", "huggingface_hub"),
    *("psycopg", "qdrant_client", "ray", "fastapi", "starlette", "uvicorn", "flask"),
}
ASKS_THE_HUB = {
    "core/egemma_core/checkpoint/folder.py": {"huggingface_hub"},
    "quant/egemma_train/teachers/sentence_transformer.py": {"huggingface_hub"},
}


def sockets_of(names: set[str]) -> set[str]:
    """Which modules that open sockets are loaded by these imports."""
    return {socket for socket in SOCKETS for name in names if f"{name}.".startswith(f"{socket}.")}


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "egemma_server"])
def test_only_the_server_room_imports_what_opens_sockets(room: str) -> None:
    for path in modules(room):
        where = path.relative_to(ROOT).as_posix()
        found = sockets_of(imported(path)) - ASKS_THE_HUB.get(where, set())
        assert not found, f"{where} imports {found}"


def test_imports_of_sockets_are_recognized() -> None:
    assert sockets_of({"socket", "http.client", "urllib.request", "ray.data"}) == {
        *("socket", "http", "urllib.request", "ray")
    }
    assert sockets_of({"urllib.parse", "rayon", "json", "egemma_core.files"}) == set()
