"""What it means that the text of a file cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from egemma_core.errors import InputError

Reason = Literal[
    "binary",
    "charset",
    "damaged",
    "encrypted",
    "memory",
    "no text",
    "not a file",
    "too large",
    "too slow",
    "unreadable",
]


class UnreadableFileError(InputError):
    """The text of a file cannot be had.

    Args:
        path: the file.
        reason: one or two words, for programs that count them; an attribute of the error.
        problem: what is wrong with the file, without a period at its end.
        hint: the next step, as a sentence, where there is one.
    """

    def __init__(self, path: str | Path, reason: Reason, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {problem}.", hint=hint)
        self.path = str(path)
        self.reason = reason
        self.problem = problem

    @property
    def detail(self) -> str:
        """Problem and hint as a list of skipped files shows them, without the last period."""
        return f"{self.problem}. {self.hint}".removesuffix(".") if self.hint else self.problem
