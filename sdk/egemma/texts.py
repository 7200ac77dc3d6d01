"""What comes in to be embedded: an ordered collection of str, each put behind its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from egemma_core.errors import InputError, PromptError, ShapeError
from egemma_core.prompts import Prompts


def each_text(texts: Iterable[str]) -> Iterator[str]:
    """Give the same texts; refuse what is no list at once, and what is no text in passing."""
    if isinstance(texts, (str, bytes)):
        raise InputError(
            "one string was passed where a list of texts is needed; its characters would be "
            "embedded one by one.",
            hint="Pass [text].",
        )
    if isinstance(texts, (Mapping, set, frozenset)) or not isinstance(texts, Iterable):
        found = f"texts is {type(texts).__name__}, and must be a list of str."
        raise InputError(found, hint="Pass one, in the order that the vectors should have.")
    return _only_str(iter(texts))


def _only_str(texts: Iterator[str]) -> Iterator[str]:
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            found, place = (
                f"the text is {type(text).__name__}, and must be str.",
                f"text {position}",
            )
            raise InputError(found, hint="Decode bytes first.", position=position, place=place)
        yield text


def behind_prompts(
    texts: Iterable[str], titles: Iterable[str | None] | None, prompts: Prompts
) -> Iterator[str]:
    """Give each document's text behind its prompt; check at once what needs no text."""
    checked = each_text(texts)
    if titles is None:
        prompt = prompts.document()
        return (prompt + text for text in checked)
    if isinstance(titles, (str, bytes)):
        raise InputError("titles is one string, not a list with a title for each text.")
    return _titled(checked, iter(titles), prompts)


def _titled(texts: Iterator[str], titles: Iterator[str | None], prompts: Prompts) -> Iterator[str]:
    end = object()
    hint = "Give one title, or None, for each text."
    position = -1
    for position, text in enumerate(texts):
        title = next(titles, end)
        if title is end:
            raise ShapeError(f"there are {position} titles, but more texts.", hint=hint)
        place = f"text {position}"
        if title is not None and not isinstance(title, str):
            found = f"its title is {type(title).__name__}, and must be str or None."
            raise InputError(found, position=position, place=place)
        try:
            yield prompts.document(title) + text
        except PromptError as error:
            raise error.at(place, position=position) from error
    if next(titles, end) is not end:
        raise ShapeError(f"there are more titles than the {position + 1} texts.", hint=hint)
