"""A run's log as one picture: the losses, the dev scores, and how the steps were taken."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egemma_core.errors import InputError, MissingDependencyError
from egemma_core.files import replacing_file
from egemma_core.json_lines import BadRowError, lines_of, parse_row, shortened
from egemma_train.data.json_rows import bad_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# whatever else a line has is a part of the loss
FACTS = ("step", "source", "loss", "gradient_norm", "learning_rate", "tokens", "seconds", "dev")
MOST_COLOURS = 10
Line = dict[str, Any]


def draw(log: Path, png: Path) -> None:
    """Draw `log` into `png`, whole or not at all.

    Args:
        log: JSON lines of a run: {"step", "source", "loss", its parts, "gradient_norm",
            "learning_rate", ...} and {"step", "dev": {"score", ...}}. A last line without its end,
            as a killed run leaves it, is not drawn.

    Raises:
        InputError: the log is absent, a line is none of these, or there is no step in it.
        MissingDependencyError: matplotlib is missing.
        OutputError: `png` cannot be written.
    """
    steps, dev = _read(log)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Drawing curves needs matplotlib.", hint="pip install 'egemma[train]'"
        ) from error
    figure = Figure(figsize=(9, 8 if dev else 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        3 if dev else 2,
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[4, 2.4, 1.3] if dev else [4, 1.3],
    )[:, 0]
    _draw_loss(axes[0], steps)
    if dev:
        _draw_dev(axes[1], dev)
    _draw_rate(axes[-1], steps)
    for axis in axes:
        axis.grid(True, color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(left=0)
    png.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(png) as scratch:
        figure.savefig(scratch, format="png")


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the median of each value and its neighbours, `width` in all, fewer at the ends.

    Batches of several datasets jump; their median does not.
    """
    return [
        statistics.median(values[max(0, index - width // 2) : index + width // 2 + 1])
        for index in range(len(values))
    ]


def _draw_loss(axis: Axes, steps: Sequence[Line]) -> None:
    """Draw the losses: points by dataset, smoothed lines of the total and of its parts."""
    numbers = [line["step"] for line in steps]
    width, size = max(5, len(steps) // 15), min(8.0, max(3.5, 200 / len(steps)))
    sources = sorted(
        {str(line["source"]) for line in steps if "source" in line},
        key=lambda source: (-sum(line.get("source") == source for line in steps), source),
    )
    for index, source in enumerate(sources):
        own = [line for line in steps if line.get("source") == source]
        named = index < MOST_COLOURS
        label = (
            source
            if named
            else f"{len(sources) - MOST_COLOURS} more"
            if index == MOST_COLOURS
            else None
        )
        axis.plot(
            [line["step"] for line in own],
            [line["loss"] for line in own],
            ".",
            markersize=size,
            alpha=0.55,
            color=f"C{index}" if named else "0.75",
            label=label,
            zorder=2,
        )
    axis.plot(
        numbers,
        smooth([line["loss"] for line in steps], width),
        color="black",
        linewidth=1.8,
        label="loss, median",
        zorder=4,
    )
    parts = sorted(
        {
            name
            for line in steps
            for name, value in line.items()
            if name not in FACTS and isinstance(value, int | float)
        }
    )
    if len(parts) > 1:
        for part, style in zip(
            parts, ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))), strict=False
        ):
            own = [line for line in steps if part in line]
            axis.plot(
                [line["step"] for line in own],
                smooth([line[part] for line in own], width),
                color="0.35",
                linestyle=style,
                linewidth=1.2,
                label=part.replace("_", " "),
                zorder=3,
            )
    axis.set_ylabel("loss")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_dev(axis: Axes, dev: Sequence[Line]) -> None:
    """Draw the dev scores, the best of them marked."""
    numbers, scores = [line["step"] for line in dev], [line["dev"]["score"] for line in dev]
    best = max(range(len(scores)), key=lambda index: scores[index])
    axis.plot(numbers, scores, "o-", color="black", markersize=3, linewidth=1.4)
    axis.plot(
        numbers[best],
        scores[best],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor="C3",
        markeredgewidth=1.6,
        label=f"best: {scores[best]:.4f}\nat step {numbers[best]:,}",
    )
    axis.set_ylabel("dev score")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_rate(axis: Axes, steps: Sequence[Line]) -> None:
    """Draw the learning rate, and the gradient's norm on an axis of its own."""
    own = [line for line in steps if "learning_rate" in line]
    axis.plot(
        [line["step"] for line in own],
        [line["learning_rate"] for line in own],
        color="C0",
        linewidth=1.2,
    )
    axis.set_ylabel("learning\nrate", color="C0")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.set_ylim(bottom=0)
    normed = [line for line in steps if "gradient_norm" in line]
    if normed:
        other = axis.twinx()
        other.plot(
            [line["step"] for line in normed],
            [line["gradient_norm"] for line in normed],
            color="C1",
            linewidth=0.7,
            alpha=0.8,
        )
        other.set_ylabel("gradient\nnorm", color="C1")
        other.set_ylim(bottom=0)
        other.spines[["top"]].set_visible(False)


def _read(log: Path) -> tuple[list[Line], list[Line]]:
    """Return the lines of steps and the lines of dev scores; one that was cut off is left out."""
    steps: list[Line] = []
    dev: list[Line] = []
    is_empty = log.is_file() and log.stat().st_size == 0
    for number, text in () if is_empty else lines_of(log):
        if not text.endswith(b"\n"):
            break
        try:
            line = parse_row(text, number)
            (dev if "dev" in line else steps).append(_checked(line))
        except BadRowError as error:
            raise bad_row(log, number, error) from error
    if not steps:
        raise InputError(f"{log} holds no step yet.", hint="Draw when the run has logged one.")
    return steps, dev


def _checked(line: Line) -> Line:
    """Return a line that has a step, and a loss or a dev score."""
    value = line.get("loss")
    if "dev" in line:
        value = line["dev"].get("score") if isinstance(line["dev"], dict) else None
    if isinstance(line.get("step"), int) and isinstance(value, int | float):
        return line
    raise BadRowError(
        f"found {shortened(line)}: a line has a step and its loss, or a step and dev with a score."
    )
