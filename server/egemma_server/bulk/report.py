"""What a bulk run says at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """What a folder holds after a run."""

    out: str
    model: str
    fingerprint: str
    dim: int
    engine: str
    workers: int
    threads_per_worker: int
    rows: int
    tokens: int
    truncated: int  # rows of which the model read only the beginning
    errors: int  # rows without a vector; their `error` says why
    shards: int
    embedded: int  # of the shards, by this run; the others were there
    repaired: int  # of those embedded, files that were there but damaged
    embedded_rows: int
    seconds: float  # that embedding took, start of the workers included

    @property
    def texts_per_s(self) -> float:
        """How many texts this run embedded in a second."""
        return self.embedded_rows / self.seconds if self.embedded_rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON takes it."""
        return asdict(self) | {"texts_per_s": round(self.texts_per_s, 1)}

    def to_text(self) -> str:
        """Return a few lines for people."""
        lines = [
            f"{self.out}: {self.rows} rows in {self.shards} files, vectors of {self.dim} float32, "
            f"{self.tokens} tokens"
        ]
        if self.embedded < self.shards:
            lines.append(f"{self.shards - self.embedded} of the files were finished before")
        if self.repaired:
            lines.append(f"{self.repaired} damaged files were made again")
        if self.truncated:
            lines.append(
                f"{self.truncated} texts were longer than the model reads, only their beginning "
                "was embedded"
            )
        if self.errors:
            lines.append(f'{self.errors} rows have no vector; column "error" says why')
        if self.embedded_rows:
            lines.append(
                f"{self.embedded_rows} texts in {self.seconds:.1f} s, {self.texts_per_s:.0f} a "
                "second, "
                f"{self.workers} workers of {self.threads_per_worker} threads ({self.engine})"
            )
        return "\n".join(lines)
