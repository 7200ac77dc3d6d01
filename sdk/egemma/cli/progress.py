"""A progress bar on stderr, only where somebody is watching."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 30
_EVERY_S = 0.1


class Progress:
    """Counts documents; draws at most ten times a second, and wipes itself off at the end."""

    def __init__(self, unit: str, total: int | None) -> None:
        self._unit, self.total, self._done = unit, total, 0
        self._drawn_at = 0.0
        self._watched = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self._done += count
        if self._watched and time.monotonic() - self._drawn_at >= _EVERY_S:
            self._drawn_at = time.monotonic()
            bar = ""
            if self.total:
                filled = _WIDTH * self._done // self.total
                bar = "[" + "#" * filled + "." * (_WIDTH - filled) + f"] of {self.total} "
            print(f"\r\x1b[K{self._done} {self._unit} {bar}", end="", file=sys.stderr, flush=True)

    def at(self, done: int, total: int) -> None:
        """Show how far a function is that says it."""
        self.total = total
        self.advance(done - self._done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
