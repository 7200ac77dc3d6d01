"""A log becomes a picture of what it says; a log that says something else is refused with its
line.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egemma_core.errors import InputError, MissingDependencyError
from egemma_train.curves import draw, smooth


def line(step: int, **changes: Any) -> str:
    facts = {
        "step": step,
        "source": ("titles", "code")[step % 2],
        "loss": 3 / (1 + step),
        "contrast": 2 / (1 + step),
        "spread_out": 1 / (1 + step),
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 100 * step,
        "seconds": 0.1 * step,
    }
    return json.dumps(facts | changes) + "\n"


def dev(step: int, score: float) -> str:
    return json.dumps({"step": step, "dev": {"score": score, "titles/ndcg@10": score}}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(
            line(step) + (dev(step, 0.5 - (step - 20) ** 2 / 1e4) if step % 10 == 0 else "")
            for step in range(1, 41)
        )
    )
    return path


def test_the_picture_holds_losses_parts_datasets_and_the_best_dev_score(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kwargs: (drawn.append(figure), save(figure, *args, **kwargs)),
    )
    draw(log, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]
    loss, score, rate, norm = drawn[0].axes
    lines = {str(curve.get_label()): curve for curve in loss.get_lines()}
    assert set(lines) == {"titles", "code", "loss, median", "contrast", "spread out"}
    assert lines["code"].get_xdata().tolist() == list(range(1, 41, 2))  # type: ignore[union-attr]
    np.testing.assert_allclose(
        lines["titles"].get_ydata(), [3 / (1 + step) for step in range(2, 41, 2)]
    )  # type: ignore[arg-type]
    # the middle of falling values
    assert lines["loss, median"].get_ydata()[10] == pytest.approx(3 / 12)  # type: ignore[index]
    best = score.get_lines()[1]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (20, 0.5)  # type: ignore[index]
    assert best.get_label() == "best: 0.5000\nat step 20"
    assert rate.get_lines()[0].get_ydata().tolist() == [1e-3] * 40  # type: ignore[union-attr]
    assert norm.get_lines()[0].get_ydata().tolist() == [1.0] * 40  # type: ignore[union-attr]


def test_a_log_without_dev_scores_and_with_a_cut_off_end_is_drawn(
    log: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    log.write_text("".join(line(step) for step in range(1, 6)))
    draw(log, whole)
    log.write_text(log.read_text() + line(6)[:20])
    draw(log, cut)
    assert cut.read_bytes() == whole.read_bytes()
    log.write_text("".join(line(step) for step in range(1, 7)))
    draw(log, cut)
    assert cut.read_bytes() != whole.read_bytes()


def test_smoothing_is_the_median_of_neighbours() -> None:
    values = [5.0, 1.0, 4.0, 9.0, 2.0]
    assert smooth(values, 3) == [
        statistics.median(values[:2]),
        4.0,
        4.0,
        4.0,
        statistics.median(values[3:]),
    ]
    assert smooth(values, 1) == values


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("no json\n", "line 2: not JSON"),
        ('{"step": 3}\n', "line 2: found dict .*: a line has a step and its loss"),
        ('{"loss": 3}\n', "line 2: found dict .*: a line has a step and its loss"),
        ('{"step": 3, "dev": {"a": 1}}\n', "line 2: found dict .*: a line has a step and its loss"),
        ('{"step": 3, "dev": 4, "loss": 3}\n', "line 2: found dict .*: a line has a step"),
        ("[3]\n", r"line 2: found list \[3\]: write one object"),
    ],
)
def test_a_line_that_is_none_is_named(second: str, message: str, log: Path, tmp_path: Path) -> None:
    log.write_text(line(1) + second + line(4))
    with pytest.raises(InputError, match=message):
        draw(log, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_nothing_to_draw_and_no_matplotlib_are_said(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: not readable"):
        draw(tmp_path / "absent.jsonl", tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"egemma\[train\]"):
        draw(log, tmp_path / "curves.png")
    log.write_text("")
    with pytest.raises(InputError, match="no step"):
        draw(log, tmp_path / "curves.png")
