"""Plans and lists of skipped files as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from egemma.ingest.walk import Skipped

if TYPE_CHECKING:
    from egemma.ingest.plan import Plan

_EXPECTED = ("hidden", "excluded", "index", "link")  # reasons that take one line together
_MAX_LINES = 10  # for each other reason
_MAX_NAMES = 3


def render(plan: Plan) -> list[str]:
    """Return a plan as lines of text."""
    lines = [
        f"{len(plan.new)} new, {len(plan.changed)} changed, {plan.unchanged} unchanged, "
        f"{len(plan.deleted)} deleted, {len(plan.skipped)} skipped, "
        f"in {', '.join(map(printable, plan.roots))}"
    ]
    if plan.embed_s is not None:
        lines.append(
            f"to embed: {plan.embed_chunks} chunks, {plan.embed_tokens} tokens, "
            f"{duration(plan.embed_s + (plan.read_s or 0))}; "
            f"{plan.chunks - plan.embed_chunks} chunks keep their vectors"
        )
    if plan.deleted:
        lines.append(f"to remove, their files are gone: {_count_and_names(plan.deleted)}")
    if plan.kept:
        names = _count_and_names(plan.kept)
        lines.append(f"stay although they are not read any more: {names}")
    return lines + render_skipped(plan.skipped)


def render_skipped(skipped: Sequence[Skipped]) -> list[str]:
    """Return skipped files as lines, by reason.

    Those that are skipped on purpose take one line for each reason; the others are listed with what
    is wrong with them.
    """
    by_reason: dict[str, list[Skipped]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(item)
    lines = []
    for reason, items in sorted(by_reason.items()):
        if reason in _EXPECTED:
            names = _count_and_names([item.path for item in items])
            lines.append(f"skipped, {reason}: {names}")
            continue
        for item in items[:_MAX_LINES]:
            lines.append(f"skipped, {reason}: {printable(item.path)}: {printable(item.detail)}")
        if len(items) > _MAX_LINES:
            lines.append(f"skipped, {reason}: {len(items) - _MAX_LINES} more")
    return lines


def duration(seconds: float) -> str:
    """Return a time span as people say it: "about 5 min"."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def printable(text: str) -> str:
    """Return text with all that could move a terminal's cursor escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _count_and_names(paths: Sequence[str]) -> str:
    names = ", ".join(printable(path) for path in paths[:_MAX_NAMES])
    return f"{len(paths)} ({names}{', ...' if len(paths) > _MAX_NAMES else ''})"
