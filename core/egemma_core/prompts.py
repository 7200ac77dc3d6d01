"""The prompts of a checkpoint: what goes before every query and document, byte for byte.

Without its prompt a text still gets 768 plausible floats, only in the wrong place; so nothing here
has a default of "".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from egemma_core.errors import CheckpointError, PromptError

DEFAULT_TASK = "search result"
# The model card names these tasks without giving them a key in config_sentence_transformers.json.
CARD_TASKS = ("question answering", "fact checking", "code retrieval")

_QUERY = re.compile(r"task: (?P<task>.+) \| query: ")
_NO_TITLE = "none"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompt strings by name, byte for byte as in the checkpoint; trailing blanks matter."""

    by_name: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("query", "document"):
            if not self.by_name.get(name):
                raise CheckpointError(
                    f"the checkpoint has no {name!r} prompt, only {sorted(self.by_name)}.",
                    hint="List one in its config_sentence_transformers.json; EmbeddingGemma's are "
                    "'task: search result | query: ' and 'title: none | text: '.",
                )
        object.__setattr__(self, "by_name", MappingProxyType(dict(self.by_name)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names that `query` accepts, sorted."""
        matches = map(_QUERY.fullmatch, self.by_name.values())
        named = {match["task"] for match in matches if match}
        return tuple(sorted(named | set(CARD_TASKS))) if named else ()

    def query(self, task: str = DEFAULT_TASK) -> str:
        """Return the text before a query.

        Args:
            task: a task such as "search result" or "clustering", or the name of a prompt in the
                checkpoint such as "STS".

        Raises:
            PromptError: the checkpoint was not trained for that task.
        """
        if task in self.tasks:
            return f"task: {task} | query: "
        if task in self.by_name:
            return self.by_name[task]
        # a checkpoint whose prompts have another form still has its default query prompt
        if task == DEFAULT_TASK:
            return self.by_name["query"]
        raise PromptError(
            f"task={task!r}: this model knows {list(self.tasks)} and the prompt names "
            f"{sorted(self.by_name)}."
        )

    def document(self, title: str | None = None) -> str:
        """Return the text before a document.

        Args:
            title: one that is None or blank is written as the checkpoint writes it ("none").

        Raises:
            PromptError: there is a title, and the checkpoint's document prompt has no place for it.
        """
        prompt = self.by_name["document"]
        if title is None or not title.strip():
            return prompt
        before, slot, after = prompt.partition(f"title: {_NO_TITLE} |")
        if not slot:
            found = f"the document prompt {prompt!r} has no place for a title."
            raise PromptError(found, hint="Put it into the text instead.")
        return f"{before}title: {title.strip()} |{after}"
