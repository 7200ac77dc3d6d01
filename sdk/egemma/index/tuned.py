"""What `tune` found: the report, and what of it is stored in the file for later searches."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from egemma.index.checksums import Damage


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tune` stores in the file."""

    scan_width: int
    shortlist: int
    k: int
    recall: float  # of the sample
    low: float  # of its confidence interval
    high: float
    confidence: float
    queries: int
    own_queries: bool  # stored chunks stood in for queries
    seed: int
    chunks: int  # in the index at that time

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        """Read what `to_json` wrote.

        Raises:
            Damage: it is something else.
        """
        try:
            found = json.loads(text)
            tuned = cls(**found)
            whole = [
                tuned.scan_width,
                tuned.shortlist,
                tuned.k,
                tuned.queries,
                tuned.seed,
                tuned.chunks,
            ]
        except (TypeError, ValueError, RecursionError) as error:
            raise Damage(f"what was tuned cannot be read ({error})") from error
        if (
            not all(type(number) is int and number >= 0 for number in whole)
            or min(tuned.shortlist, tuned.k) < 1
        ):
            raise Damage("what was tuned is impossible")
        return tuned

    def to_json(self) -> str:
        """Return this as the fact `tuned` of the file."""
        return json.dumps(asdict(self))

    def shortlist_for(self, k: int) -> int:
        """Return how long a shortlist k hits need.

        It grows in proportion for more hits, and stays for fewer, because the best hit is not found
        at a tenth of the work of ten.
        """
        return max(self.shortlist, -(-self.shortlist * k // self.k))


@dataclass(frozen=True, kw_only=True)
class TuneRow:
    """One scan width, with the shortest shortlist that reaches the recall, or the longest tried."""

    scan_width: int
    shortlist: int
    recall: float  # of the sample
    low: float  # of the confidence interval
    high: float
    reaches: bool  # `low` is at least the recall that was asked for
    ms: float  # of one query, median: the scan and the comparison at full width


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What `Index.tune` measured and did."""

    recall: float  # that was asked for
    k: int
    confidence: float
    queries: int
    own_queries: bool  # stored chunks stood in for queries, each without itself
    seed: int
    chunks: int
    floats: bool  # the truth is of float32 vectors; else of the codes that are stored
    rows: tuple[TuneRow, ...]
    chosen: TuneRow | None  # the fastest of those that reach it; None where none does
    rewritten: bool  # the heads were written anew at another width

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """Return the report as a table, with what was chosen."""
        asked = (
            f"{self.queries} stored chunks as queries, each without itself"
            if self.own_queries
            else f"{self.queries} queries"
        )
        lines = [
            f"recall@{self.k} of at least {self.recall:g} asked for, with {self.confidence:.0%} "
            f"confidence; {asked}, {self.chunks} chunks, seed {self.seed}.",
            "The truth is an exact search at full width of the stored "
            f"{'float32 vectors' if self.floats else 'codes'}.",
            "",
            "| scan width | shortlist | recall | interval | ms a query |",
            "|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            mark = "" if row.reaches else " (not reached)"
            lines.append(
                f"| {row.scan_width} | {row.shortlist} | {row.recall:.4f}{mark} | {row.low:.4f} to "
                f"{row.high:.4f} | {row.ms:.2f} |"
            )
        if self.chosen is None:
            best = max(self.rows, key=lambda row: row.low)
            lines += [
                "",
                f"Nothing was changed: no shortlist reaches it. The best is {best.low:.4f}, with "
                f"{best.shortlist} at {best.scan_width} channels. "
                "Ask for less, pass more queries, or search with exact=True.",
            ]
        else:
            lines += [
                "",
                f"Chosen and stored: a scan of {self.chosen.scan_width} channels and a shortlist "
                f"of {self.chosen.shortlist}"
                f"{', for which the heads were written anew' if self.rewritten else ''}.",
            ]
        return "\n".join(lines)

    def tuned(self) -> Tuned | None:
        """Return what is stored in the file, or None where nothing reaches the recall."""
        if self.chosen is None:
            return None
        return Tuned(
            scan_width=self.chosen.scan_width,
            shortlist=self.chosen.shortlist,
            k=self.k,
            recall=self.chosen.recall,
            low=self.chosen.low,
            high=self.chosen.high,
            confidence=self.confidence,
            queries=self.queries,
            own_queries=self.own_queries,
            seed=self.seed,
            chunks=self.chunks,
        )
