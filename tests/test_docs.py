"""What the pages for users show runs as it stands: every Python snippet and every command, but for
those of `NOT_RUN`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)
# What users follow; the map of the house and the decisions show code of before and after.
SHOWN = [page for page in PAGES if page != "docs/architecture.md" and "decisions" not in page]
CONTRACT = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "contract").glob("*.md"))
COMMAND = re.compile(r"(egemma|egemma-\w+|python|pip|make|less|torchrun) .*")
# The beginning of a command or snippet -> why it is not run here.
NOT_RUN = {
    r"make ": "the repository's own commands; CI runs them",
    r"pip install": "it installs from the network",
    r"less ": "it shows a file to a person",
    r"python benchmarks/": "it measures for minutes to hours, on data that is not in the repository",
    r"python models/": "it trains or writes 1.2 GB; tests/test_builtin.py and test-full run both scripts",
    r"egemma-train toy": "it takes minutes on a busy machine; tests/train/test_recipe.py runs it",
    r"egemma-train (check|run|evaluate) mine.toml": "it needs the reader's pairs; tests/train run recipes",
    r"egemma-train run .*--shard|torchrun": "it needs several processes; tests/train/test_ranks.py",
    r"egemma-export .*build/search-vectors": "it exports what a benchmark trained",
    r"egemma embed --engine ray|egemma-server bulk .*ray": "it starts Ray; tests/server/test_bulk_ray.py",
    r"from egemma_server.stores": "it needs a server; tests/server/test_stores.py starts one",
}
# What a page takes from the hub or from a long run -> what stands in here.
STAND_INS = {
    "google/embeddinggemma-300m": "models/egemma-small",
    "runs/mine/model": "models/egemma-small",
    "toy/run/model": "models/egemma-small",
}
# What the snippets of a page must print, beside what their comments promise.
PRINTED = {"docs/search.md": ("git 0.", "mode='vector'"), "docs/bulk.md": ("\ngit\n",)}


def shown(page: str) -> Iterator[tuple[str, str]]:
    """Yield what a page shows to be run, in order: ("python", code) or ("command", line)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for fence, code, indented in re.findall(
        r"^```(\w*)\n([\s\S]*?)^```|((?:^    .*\n)+)", text, re.MULTILINE
    ):
        lines = [line[4:] for line in indented.splitlines()]
        if fence == "python":
            yield "python", code
        elif lines and re.match(r"(from|import) ", lines[0]):
            yield "python", "\n".join(lines)
        else:
            yield from (("command", line) for line in lines if COMMAND.match(line))


def reason_not_to_run(text: str) -> str | None:
    """Return why a command or a snippet is not run, or None where it is."""
    return next((why for start, why in NOT_RUN.items() if re.match(start, text)), None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A reader's folders: notes, papers, pairs to train on, and the models of the repository."""
    for name, texts in {
        "notes": [f"Note {number}: water the tomatoes in row {number}." for number in range(60)],
        "papers": ["# Formats\n\nPhones read a .pte file.\n"],
    }.items():
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.md").write_text(text)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/log.txt").write_text("the pump was changed\nthe filter was washed\n")
    (tmp_path / "work/models").symlink_to(ROOT / "models")
    rows = [{"query": f"row {number}?", "positive": f"Tomatoes {number}."} for number in range(40)]
    (tmp_path / "work/pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def run(arguments: list[str], home: Path) -> str:
    """Run a command in the reader's folder, without the network; returns what it printed."""
    done = subprocess.run(
        arguments,
        cwd=home / "work",
        env=os.environ
        | {
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "EGEMMA_MODEL": "builtin",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", [page for page in SHOWN if any(shown(page))])
@pytest.mark.timeout(900)  # README: an export, which is a minute on a busy machine
def test_the_commands_of_a_page_run_one_after_the_other(page: str, home: Path) -> None:
    for kind, line in shown(page):
        if kind == "command" and reason_not_to_run(line) is None:
            for theirs, ours in STAND_INS.items():
                line = line.replace(theirs, ours)  # noqa: PLW2901
            run(["bash", "-c", line], home)


@pytest.mark.parametrize(
    "page", [page for page in SHOWN if any(kind == "python" for kind, _ in shown(page))]
)
def test_the_snippets_of_a_page_run_one_after_the_other(page: str, home: Path) -> None:
    snippets = [
        text for kind, text in shown(page) if kind == "python" and reason_not_to_run(text) is None
    ]
    printed = run([sys.executable, "-c", "\n".join(snippets)], home)
    for part in PRINTED.get(page, ()):
        assert part in printed
    if page == "README.md":
        # on the line on which a print ends
        promised = re.findall(r"print\(.*?\)  # (.*)", "\n".join(snippets), re.DOTALL)
        assert promised
        assert printed.splitlines() == [promise.splitlines()[0] for promise in promised]


def test_every_reason_not_to_run_something_is_still_needed() -> None:
    texts = [text for page in SHOWN for _, text in shown(page)]
    for start in NOT_RUN:
        assert any(re.match(start, text) for text in texts), f"no page shows {start} any more"


@pytest.mark.parametrize("page", [*PAGES, *CONTRACT])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
