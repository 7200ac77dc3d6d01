"""What mining did: counts, scores and examples to read by eye."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A query with its positive and its negatives, and how the teacher scores them."""

    query: str
    positive: str
    positive_score: float
    negatives: tuple[str, ...]
    negative_scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MiningReport:
    """What mining did.

    `removed` counts each examined candidate once, by the first filter that it failed.
    """

    rows: int
    queries: int  # distinct
    candidates: int  # distinct
    rows_with: dict[int, int]  # rows by how many negatives they got
    examined: int  # candidates at ranks below depth, over all queries
    removed: dict[str, int]
    # positives of the same query, and the query itself, that ranked as high as an examined
    # candidate
    right_answers: int
    # share of queries whose lowest positive no other candidate outscored: how good the teacher is
    # here
    positive_first: float
    mean_positive_score: float  # over rows
    mean_negative_score: float  # over the negatives of rows
    truncated: dict[str, int]  # texts that the teacher read only the beginning of
    dropped: dict[str, int] = field(default_factory=dict)  # rows that were left out when reading
    teacher: dict[str, Any]
    config: dict[str, Any]
    examples: tuple[Example, ...]

    def to_json(self) -> str:
        """Return the report as JSON."""
        examples = [example._asdict() for example in self.examples]
        return json.dumps({**asdict(self), "examples": examples}, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """Return the report as lines to read."""
        got = ", ".join(
            f"{rows:,} rows got {count}" for count, rows in sorted(self.rows_with.items())
        )
        removed = ", ".join(f"{count:,} by {name}" for name, count in self.removed.items())
        lines = [
            f"{self.rows:,} rows, {self.queries:,} queries, {self.candidates:,} candidates; "
            f"teacher {self.teacher['name']} ({self.teacher['dim']} channels)",
            f"negatives: {got}",
            f"examined {self.examined:,}; removed: {removed or 'none'}; {self.right_answers:,} "
            "right answers among them were left out",
            f"mean score of positives {self.mean_positive_score:.3f}, of negatives "
            f"{self.mean_negative_score:.3f}; "
            f"the positive comes first for {self.positive_first:.1%} of the queries",
            "cut by the teacher: "
            + ", ".join(f"{count:,} {role}" for role, count in self.truncated.items()),
        ]
        if self.dropped:
            lines.append(
                "rows left out: "
                + ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            )
        for example in self.examples:
            lines += [
                "",
                f"query     {_shortened(example.query)}",
                f"positive  {example.positive_score:.3f}  {_shortened(example.positive)}",
            ]
            lines += [
                f"negative  {score:.3f}  {_shortened(text)}"
                for text, score in zip(example.negatives, example.negative_scores, strict=True)
            ]
        return "\n".join(lines)


def without_extra_blanks(text: str) -> str:
    """Return a text with single blanks: texts that differ in blanks only say the same."""
    return " ".join(text.split())


def _shortened(text: str) -> str:
    flat = without_extra_blanks(text)
    return flat if len(flat) <= 140 else f"{flat[:140]}…"
