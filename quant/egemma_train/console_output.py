"""What a run prints: its progress while it trains, and a summary at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped]

from egemma_train.loop import Progress
from egemma_train.stage import StageResult


def summary(results: Sequence[StageResult]) -> str:
    """Return a line per stage, and per mixture of it."""
    lines = [f"{'stage':<28} {'score':>8} {'step':>8} {'tokens':>12} {'seconds':>9}  ended"]
    for result in results:
        for number, mixture in enumerate(result.mixtures, start=1):
            rates = ", ".join(f"{name} {rate:.2f}" for name, rate in mixture["rates"].items())
            lines.append(
                f"  mixture {number:<18} {mixture['scores']['score']:>8.4f}  "
                f"{'in the soup: ' if mixture['in_soup'] else ''}{rates}"
            )
        score = f"{result.scores['score']:>8.4f}" if "score" in result.scores else f"{'':>8}"
        lines.append(
            f"{result.stage:<28} {score} {result.step:>8,} {result.tokens:>12,} "
            f"{result.seconds:>9.1f}  {result.stopped}"
        )
    return "\n".join(lines)


@contextmanager
def progress(
    is_shown: bool,
) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """Give what prints a step and what prints a message while the block runs.

    On a terminal, steps are a bar with the time left; elsewhere a line per tenth of a stage, and
    per evaluation.
    """
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=0,
        disable=not (is_shown and on_terminal),
        leave=False,
        bar_format="{n}/{total} {bar:24} {desc}",
    ) as bar:

        def on_step(progress: Progress) -> None:
            score = (progress.scores or {}).get("score")
            if on_terminal:
                bar.total, bar.n = progress.steps, progress.step
                bar.set_description_str(_line(progress))
            elif score is not None or progress.step % max(1, progress.steps // 10) == 0:
                dev = "" if score is None else f", dev {score:.4f}"
                line = f"  step {progress.step} of {progress.steps}: {_line(progress)}{dev}"
                print(line, file=sys.stderr, flush=True)

        def on_message(line: str) -> None:
            if is_shown:
                tqdm.write(line, file=sys.stderr)

        yield on_step, on_message


def _line(progress: Progress) -> str:
    outcome = progress.outcome
    return (
        f"{outcome.source}: loss {outcome.losses['loss']:.3f}, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {_duration(progress.seconds_left)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
