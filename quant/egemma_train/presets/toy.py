"""Data and recipe of the toy: sentences of a small world, in which a question uses other words than
its answer.

It shows whether every stage works, and what the files of a recipe look like.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from egemma_core.errors import ConfigError
from egemma_core.files import write_file

COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey", "yellow", "purple")
# How the answer calls it, and how the question does.
THINGS = (
    ("apple", "fruit"),
    ("river", "stream"),
    ("house", "home"),
    ("engine", "motor"),
    ("garden", "flowers"),
    ("window", "pane"),
    ("letter", "mail"),
    ("mountain", "peak"),
    ("boat", "ship"),
    ("coat", "jacket"),
    ("road", "street"),
    ("lamp", "light"),
)
DEEDS = (
    ("painted", "put colour on"),
    ("sold", "gave away for money"),
    ("found", "came across"),
    ("lost", "no longer has"),
    ("repaired", "mended"),
    ("washed", "cleaned"),
)
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
LISTS = ("prices", "lengths", "ages", "scores", "weights", "heights", "rows", "names")
FUNCTIONS = (
    ("add up all {0}", "def f({0}):\n    return sum({0})"),
    ("the largest of the {0}", "def f({0}):\n    return max({0})"),
    ("the smallest of the {0}", "def f({0}):\n    return min({0})"),
    ("how many {0} there are", "def f({0}):\n    return len({0})"),
    ("the {0} in rising order", "def f({0}):\n    return sorted({0})"),
    ("{0} from last to first", "def f({0}):\n    return {0}[::-1]"),
    ("the {0} without repeats", "def f({0}):\n    return set({0})"),
    ("the first of the {0}", "def f({0}):\n    return {0}[0]"),
)
RECIPE = "recipe.toml"


def write_toy(folder: Path, seed: int = 0) -> Path:
    """Write a folder with data and recipe, unless they are there, and return the recipe's path.

    Raises:
        ConfigError: `folder` holds something else.
    """
    recipe = folder / RECIPE
    if recipe.exists():
        return recipe
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no toy.", hint="Give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    facts = [
        (name, deed, colour, thing)
        for name in NAMES
        for deed in DEEDS
        for colour in COLOURS
        for thing in THINGS
    ]
    draw.shuffle(facts)
    asked, unseen = facts[:1500], facts[1500:1700]
    _lines(
        folder / "questions.train.jsonl", (_question(fact, draw.choice(facts)) for fact in asked)
    )
    _lines(
        folder / "sentences.train.jsonl",
        (
            {
                "query": f"{name} {deed[0]} a {colour} {thing[0]}.",
                "positive": f"A {colour} {thing[1]} is what {name} {deed[1]}.",
                "task": "sentence similarity",
                "lang": "en",
            }
            for name, deed, colour, thing in facts[2000:2600]
        ),
    )
    code = [
        {
            "query": words.format(values),
            "positive": text.format(values),
            "negative": draw.choice(FUNCTIONS)[1].format(draw.choice(LISTS)),
            "task": "code retrieval",
            "lang": "en-python",
        }
        for words, text in FUNCTIONS
        for values in LISTS
    ]
    _lines(folder / "code.train.jsonl", [row for row in code if row["negative"] != row["positive"]])
    dev = folder / "dev"
    dev.mkdir()
    rows = [
        (f"q{number}", f"d{number}", _question(fact, fact)) for number, fact in enumerate(unseen)
    ]
    _lines(dev / "queries.jsonl", ({"id": query, "text": row["query"]} for query, _, row in rows))
    _lines(
        dev / "corpus.jsonl",
        ({"id": document, "text": row["positive"]} for _, document, row in rows),
    )
    _lines(
        dev / "qrels.jsonl", ({"q": query, "d": document, "rel": 1} for query, document, _ in rows)
    )
    text = (resources.files("egemma_train") / "presets/toy.toml").read_text(encoding="utf-8")
    write_file(recipe, text.encode())  # last: with it the toy is whole
    return recipe


def _question(
    fact: tuple[str, tuple[str, str], str, tuple[str, str]],
    other: tuple[str, tuple[str, str], str, tuple[str, str]],
) -> dict[str, str]:
    name, deed, colour, thing = fact
    wrong = f"{name} {deed[0]} a {other[2]} {other[3][0]}."
    right = f"{name} {deed[0]} a {colour} {thing[0]}."
    row = {
        "query": f"what {colour} {thing[1]} is it that {name} {deed[1]}?",
        "positive": right,
        "task": "question answering",
        "lang": "en",
    }
    return row if wrong == right else {**row, "negative": wrong}


def _lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
