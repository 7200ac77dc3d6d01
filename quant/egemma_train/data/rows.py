"""One row of a training file, as a pair of texts.

A row that cannot be used is a BadRowError; a good row that teaches nothing (both sides equal, too
low a score, another language) is left out, with its reason.

| kind         | a row's fields                 | becomes                                          |
| ------------ | ------------------------------ | ------------------------------------------------ |
| pairs        | query, positive; where there   | itself; `negative` is one text or a list         |
|              | are any: negative, title,      |                                                  |
|              | negative_title, task, lang     |                                                  |
| labels       | text, label                    | the text, and its label in words or another text |
|              |                                | of that label                                    |
| similarity   | a, b, score from 0 to 5        | a, b, if the score is high enough                |
| translations | a, b                           | a, b                                             |
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from egemma_core.json_lines import BadRowError, checked_text, shortened
from egemma_train.data.datasets import MAX_SCORE, MIN_SCORE, DatasetConfig, Row

_FIELDS = {
    "pairs": ("query", "positive"),
    "labels": ("text", "label"),
    "similarity": ("a", "b", "score"),
    "translations": ("a", "b"),
}
_OPTIONAL = {"pairs": ("negative", "title", "negative_title")}


def read_row(fields: Mapping[str, Any], config: DatasetConfig, languages: set[str]) -> Row | str:
    """Return the pair that a row's fields make, or the reason why it is left out.

    Args:
        languages: the row's language is added to it where languages are filtered.

    Raises:
        BadRowError: a field is missing, or is no text or score.
    """
    if config.languages is not None:
        language = _text(fields, "lang", config.kind)
        languages.add(language)
        if language not in config.languages:
            return "other language"
    if config.only_task is not None and _text(fields, "task", config.kind) != config.only_task:
        return "other task"
    _check_names(config.kind, tuple(fields))
    first, second = _FIELDS[config.kind][:2]
    query, positive = _text(fields, first, config.kind), _text(fields, second, config.kind)
    if config.kind == "similarity":
        score = fields.get("score")
        # NaN is in no range
        if (
            not isinstance(score, int | float)
            or isinstance(score, bool)
            or not 0 <= score <= MAX_SCORE
        ):
            raise BadRowError(
                f"field 'score': found {shortened(score)}, want a number from 0 to {MAX_SCORE:g}."
            )
        lowest = MIN_SCORE if config.min_score is None else config.min_score
        if score < lowest:
            return f"score below {lowest:g}"
    if config.positive == "same":
        return Row(query, positive)  # the label, until the row has a partner
    if config.kind == "labels":
        positive = positive.replace("_", " ")
    if query == positive:
        if config.kind == "pairs" and not config.is_symmetric:
            raise BadRowError(
                f"query and positive are both {shortened(query)}: such a row teaches nothing. Is a "
                "column given twice?"
            )
        return "both sides equal"
    return (
        Row(query, positive, *_beside(fields, config, query, positive))
        if config.kind == "pairs"
        else Row(query, positive)
    )


def _beside(
    fields: Mapping[str, Any], config: DatasetConfig, query: str, positive: str
) -> tuple[tuple[str, ...], str | None, tuple[str | None, ...]]:
    """Return the negatives, the title and the negatives' titles of a row of `pairs`."""
    negatives = tuple(checked_text(text, "negative") for text in _listed(fields.get("negative")))
    title = _title(fields.get("title"), "title")
    titles = tuple(_title(text, "negative_title") for text in _listed(fields.get("negative_title")))
    for right, name in ((positive, "positive"), (query, "query")):
        if right in negatives and (name == "positive" or config.is_symmetric):
            raise BadRowError(
                f"field 'negative': equals the {name}, {shortened(right)}. Leave it out."
            )
    if titles and len(titles) != len(negatives):
        raise BadRowError(
            f"field 'negative_title': {len(titles)} titles for {len(negatives)} negatives."
        )
    if config.is_symmetric and (title or any(titles)):
        raise BadRowError(
            "field 'title': both sides of a symmetric dataset are queries, which have none. Put it "
            "into the text."
        )
    if title and negatives and not titles:
        raise BadRowError(
            "field 'negative_title': absent, but the positive has a title: the model would learn "
            "to look for titles. Add the negatives' titles too."
        )
    return negatives, title, titles


def _text(fields: Mapping[str, Any], field: str, kind: str) -> str:
    if field not in fields:
        raise BadRowError(
            f"no field {field!r}, only {list(fields)}; a row of kind {kind!r} has "
            f"{list(_FIELDS[kind])}."
        )
    return checked_text(fields[field], field)


def _listed(value: object) -> Sequence[object]:
    return () if value is None else value if isinstance(value, list) else (value,)


def _title(value: object, field: str) -> str | None:
    return None if value is None or value == "" else checked_text(value, field)


@functools.lru_cache(maxsize=1024)
def _check_names(kind: str, names: tuple[str, ...]) -> None:
    """Refuse a field whose name looks like a misspelled optional one, which would be ignored."""
    known = (*_FIELDS[kind], *_OPTIONAL.get(kind, ()), "task", "lang", "id")
    for name in set(names) - set(known):
        near = difflib.get_close_matches(
            name.lower(),
            [field for field in _OPTIONAL.get(kind, ()) if field not in names],
            1,
            0.75,
        )
        if near:
            raise BadRowError(
                f"field {name!r} is not read; is it {near[0]!r}? Rename it, or remove it."
            )
