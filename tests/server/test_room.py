"""The server's room is the only one that imports what opens sockets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    *("core/egemma_core", "quant/egemma_quant", "quant/egemma_train", "export/egemma_export"),
    "sdk/egemma",
)
SOCKETS = {
    *("socket", "socketserver", "ssl", "asyncio", "selectors", "http", "urllib.request"),
    *("ftplib", "smtplib", "imaplib", "poplib", "nntplib", "telnetlib", "xmlrpc", "wsgiref"),
    *("asyncore", "asynchat", "smtpd", "webbrowser", "multiprocessing"),
    *("requests", "urllib3", "httpx", "aiohttp", "websockets", "grpc", "fsspec", "huggingface_hub"),
    *("psycopg", "qdrant_client", "ray", "fastapi", "starlette", "uvicorn", "flask"),
}
# The hub is asked for a checkpoint that somebody named by its id there, and for nothing else.
ASKS_THE_HUB = {
    "core/egemma_core/checkpoint/folder.py",
    "quant/egemma_train/teachers/sentence_transformer.py",
}


def imported(path: Path) -> set[str]:
    """Everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sockets_of(names: set[str]) -> set[str]:
    """Which modules that open sockets these imports load."""
    return {socket for socket in SOCKETS for name in names if f"{name}.".startswith(f"{socket}.")}


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_room_imports_what_opens_sockets(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths
    for path in paths:
        where = path.relative_to(ROOT).as_posix()
        allowed = {"huggingface_hub"} if where in ASKS_THE_HUB else set()
        assert not sockets_of(imported(path)) - allowed, f"{where} imports {imported(path)}"


def test_the_sdk_imports_nothing_of_the_server_room() -> None:
    for path in sorted((ROOT / "sdk").rglob("*.py")):
        ours = {name for name in imported(path) if name.split(".")[0] == "egemma_server"}
        assert not ours, f"{path.relative_to(ROOT)} imports {ours}"


def test_imports_of_sockets_are_recognized(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        "import socket, json\nfrom urllib import request, parse\n\n"
        "def ask():\n    from http.client import HTTPConnection\n    import ray.data\n"
    )
    assert sockets_of(imported(path)) == {"socket", "urllib.request", "http", "ray"}
    path.write_text("import rayon, urllib.parse\nfrom egemma_core.files import flush\n")
    assert sockets_of(imported(path)) == set()
