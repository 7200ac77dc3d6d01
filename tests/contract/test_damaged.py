"""The library says of every damaged file what every language must say."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import pytest

from contract import damages
from contract.notation import CASES, FOLDER

DAMAGED = json.loads((CASES / "damaged.json").read_text("utf-8"))


def by_name(part: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in DAMAGED[part]]


@pytest.mark.parametrize("case", by_name("index"))
def test_a_damaged_index(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    copyfile(FOLDER / "index.db", path)
    damages.apply(case["edits"], path)
    assert damages.index_answers(path) == case["expect"]


@pytest.mark.parametrize("case", by_name("bundle"))
def test_a_damaged_bundle(case: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    copytree(FOLDER / "bundle", folder)
    damages.apply(case["edits"], folder)
    assert damages.bundle_answers(folder) == case["expect"]


@pytest.mark.parametrize("part", ["index", "bundle"])
def test_every_damage_is_noticed_and_nothing_else(part: str) -> None:
    cases = DAMAGED[part]
    assert len(cases) > 25
    for case in cases:
        noticed = set(case["expect"].values()) - {"ok", "sound", "other answer"}
        assert bool(noticed) is bool(case["edits"]), case["name"]
