"""UL2 denoising: what an encoder-decoder learns before its encoder becomes an embedding model.

Spans of a text are taken out; the encoder reads what is left, with a sentinel for each span, behind
a token that names the task; the decoder writes the spans, each behind its sentinel. Five tasks,
drawn 1:1:1:1:4.

Source: T5Gemma 2, arXiv:2512.14856 (the tasks and their mixture); UL2, arXiv:2205.05131; span
drawing of T5, arXiv:1910.10683. Not published: which tokens Gemma uses as sentinels and task names,
and where the single long span of the fifth task lies. Ours are `<unusedN>` pieces, which the
vocabulary has for such uses, and the end of the text, as in UL2's sequential task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import ConfigError, InputError
from egemma_core.tokens import Tokenizer


@dataclass(frozen=True)
class Denoising:
    """One task: how much of a text is taken out, in spans of which mean length."""

    name: str
    rate: float  # of the tokens that are taken out
    span: float | None  # mean length in tokens; None for a single span at the end
    weight: int  # how often it is drawn, against the others


TASKS = (
    Denoising("short", 0.15, 3, 1),
    Denoising("half", 0.50, 12, 1),
    Denoising("long", 0.15, 32, 1),
    Denoising("half long", 0.50, 32, 1),
    Denoising("suffix", 0.75, None, 4),
)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that stand for tasks and spans. None of them can come from a text."""

    tasks: tuple[int, ...]  # one for each of TASKS
    sentinels: tuple[int, ...]  # for the first span, the second, ...
    eos_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sentinels: int = 100) -> SpecialTokens:
        """Take the first `<unusedN>` pieces of a vocabulary: tasks, then up to `sentinels` spans.

        Raises:
            ConfigError: the vocabulary has fewer than one sentinel to spare.
        """
        spare = tokenizer.spare_ids()
        if len(spare) <= len(TASKS):
            raise ConfigError(
                f"the vocabulary has {len(spare)} <unusedN> pieces, denoising needs {len(TASKS)} "
                "for its tasks and at least one for a span."
            )
        return cls(
            tasks=tuple(spare[: len(TASKS)]),
            sentinels=tuple(spare[len(TASKS) : len(TASKS) + sentinels]),
            eos_id=tokenizer.eos_id,
        )


@dataclass(frozen=True)
class Denoised:
    """One training example."""

    task: int  # index into TASKS
    source: tuple[int, ...]  # what the encoder reads: task token, text with sentinels, EOS
    target: tuple[int, ...]  # what the decoder writes: sentinel, span, sentinel, span, ..., EOS


def denoise(
    ids: Sequence[int], special: SpecialTokens, draw: np.random.Generator, task: int | None = None
) -> Denoised:
    """Return a text with spans taken out, as a training example.

    Args:
        ids: at least 4 token ids, without BOS and EOS.
        draw: where spans, and the task where it is None, come from.
        task: index into TASKS; None draws one by their weights.

    Raises:
        InputError: a text of fewer than 4 tokens, or one that holds a task token or sentinel.
    """
    if len(ids) < 4:
        raise InputError(
            f"A text has {len(ids)} tokens: there is nothing to take out of fewer than 4."
        )
    if not {*special.tasks, *special.sentinels}.isdisjoint(ids):
        raise InputError(
            "A text holds a task token or a sentinel (an <unusedN> piece).",
            hint="Leave such texts out.",
        )
    if task is None:
        weights = np.array([task.weight for task in TASKS], np.float64)
        task = int(draw.choice(len(TASKS), p=weights / weights.sum()))
    chosen = TASKS[task]
    removed = min(len(ids) - 1, max(1, round(len(ids) * chosen.rate)))
    if chosen.span is None:
        taken = np.arange(len(ids)) >= len(ids) - removed
    else:
        spans = min(
            max(1, round(removed / chosen.span)),
            removed,
            len(ids) - removed,
            len(special.sentinels),
        )
        taken = draw_spans(len(ids), removed, spans, draw)
    source, target = [special.tasks[task]], []
    span = -1
    for position, (token, out) in enumerate(zip(ids, taken.tolist(), strict=True)):
        if out:
            if position == 0 or not taken[position - 1]:
                span += 1
                source.append(special.sentinels[span])
                target.append(special.sentinels[span])
            target.append(token)
        else:
            source.append(token)
    return Denoised(task, (*source, special.eos_id), (*target, special.eos_id))


def draw_spans(
    length: int, removed: int, spans: int, draw: np.random.Generator
) -> NDArray[np.bool_]:
    """Return (length,) bool, true where a token is taken out.

    `removed` tokens are taken out in `spans` runs; kept and taken runs take turns, a kept one
    first. Every way to cut both into that many parts is as likely as any other (T5's
    random_spans_noise_mask).
    """

    def parts(total: int) -> NDArray[np.int64]:
        cuts = np.sort(draw.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(np.concatenate(([0], cuts, [total])))

    lengths = np.stack([parts(length - removed), parts(removed)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def restore(example: Denoised, special: SpecialTokens) -> tuple[int, ...]:
    """Return the text of an example: its source with the target's spans put back."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in example.target[:-1]:
        if token in special.sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return tuple(token for place in example.source[1:-1] for token in spans.get(place, [place]))
