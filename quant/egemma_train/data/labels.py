"""Rows of texts with labels: checked as a whole, and paired with other texts of their label."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from egemma_core.errors import InputError
from egemma_train.data.datasets import Dataset, DatasetConfig, Row


def check_labels(rows: Sequence[Row], where: Sequence[str], config: DatasetConfig) -> None:
    """Refuse labels that cannot be told apart, or that have no second text where one is needed.

    Args:
        rows: (text, label) each.
        where: file and line of each row.

    Raises:
        InputError: there is only one label, or a label of `positive='same'` has one text.
    """
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row.positive, set()).add(row.query)
    if len(texts) < 2:
        raise InputError(
            f"dataset {config.name!r}: all {len(rows):,} rows have the label "
            f"{next(iter(texts))!r}: there is nothing to tell apart."
        )
    alone = (
        [place for row, place in zip(rows, where, strict=True) if len(texts[row.positive]) == 1]
        if config.positive == "same"
        else []
    )
    if alone:
        raise InputError(
            f"dataset {config.name!r}: {len(alone):,} rows have a label that no other text has "
            f"(first: {alone[0]}), so positive='same' has no "
            "partner for them. Add texts, remove the rows, or take positive='label'."
        )


def with_partners(config: DatasetConfig, rows: Sequence[Row], dropped: Counter[str]) -> Dataset:
    """Return rows (text, label) as (text, another text of the label, a text of another label).

    The texts of a label stand in a circle by hash, and each one's partner is the next; the negative
    is drawn by hash as well. So the rows depend on nothing but the texts. A text left alone with
    its label, by a limit or a split, is dropped.
    """
    by_label: dict[str, list[str]] = {}
    for label, text in sorted(
        {(row.positive, row.query) for row in rows},
        key=lambda pair: (pair[0], hash_of(pair[1]), pair[1]),
    ):
        by_label.setdefault(label, []).append(text)
    texts = sorted(
        {text for group in by_label.values() for text in group},
        key=lambda text: (hash_of(text), text),
    )
    partner = {
        (label, text): group[(i + 1) % len(group)]
        for label, group in by_label.items()
        for i, text in enumerate(group)
    }
    labels_of: dict[str, set[str]] = {}
    for label, text in partner:
        labels_of.setdefault(text, set()).add(label)
    made, labels = [], []
    for row in rows:
        positive = partner[row.positive, row.query]
        start = hash_of(row.query + "\0" + row.positive)
        after = (
            texts[(start + i) % len(texts)]
            for i in range(len(texts) if len(by_label[row.positive]) < len(texts) else 0)
        )
        wrong = next((text for text in after if row.positive not in labels_of[text]), None)
        if positive == row.query or wrong is None:
            dropped["no other text of its label, or none of another"] += 1
        else:
            made.append(Row(row.query, positive, (wrong,)))
            labels.append(row.positive)
    if not made:
        raise InputError(
            f"dataset {config.name!r}: no row is left of {len(rows):,}: none has both another text "
            "of its label and one of another label."
        )
    return Dataset(config, tuple(made), dict(dropped), tuple(labels))


def hash_of(text: str) -> int:
    """Return the 256 bits by which texts are chosen: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
