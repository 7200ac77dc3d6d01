"""Prompts: byte for byte what the checkpoint says, and impossible to forget."""

from __future__ import annotations

import pytest

from egemma_core.checkpoint.prompts import read_prompts
from egemma_core.errors import CheckpointError, PromptError
from egemma_core.prompts import Prompts
from models.make_checkpoint import PROMPTS

prompts = Prompts(by_name=PROMPTS)


def test_the_published_strings_keep_their_trailing_blank() -> None:
    # Source: config_sentence_transformers.json, printed by Google's inference notebook.
    assert prompts.query() == "task: search result | query: "
    assert prompts.document() == "title: none | text: "


def test_every_task_of_the_model_card_has_its_prompt() -> None:
    for task in (
        "search result",
        "question answering",
        "fact checking",
        "classification",
        "clustering",
        "sentence similarity",
        "code retrieval",
        "summarization",
    ):
        assert prompts.query(task) == f"task: {task} | query: "


def test_a_prompt_can_be_asked_for_by_its_name_in_the_checkpoint() -> None:
    assert prompts.query("STS") == "task: sentence similarity | query: "


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PromptError, match="clustering"):
        prompts.query("poetry")


@pytest.mark.parametrize("title", [None, "", "  \n"])
def test_a_blank_title_is_the_checkpoints_none(title: str | None) -> None:
    assert prompts.document(title) == "title: none | text: "


def test_a_title_takes_the_place_of_none() -> None:
    assert prompts.document(" Balcony ") == "title: Balcony | text: "


def test_a_checkpoint_with_other_prompts_is_taken_at_its_word() -> None:
    other = Prompts(by_name={"query": "search: ", "document": "passage: "})
    assert (other.query(), other.document(), other.tasks) == ("search: ", "passage: ", ())
    with pytest.raises(PromptError, match="no place for a title"):
        other.document("T")
    with pytest.raises(PromptError, match="clustering"):
        other.query("clustering")


def test_a_checkpoint_without_prompts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'query'"):
        Prompts(by_name={})
    with pytest.raises(CheckpointError, match="'document'"):
        Prompts(by_name={"query": "q: ", "document": ""})
    with pytest.raises(CheckpointError, match="map prompt names"):
        read_prompts({"prompts": {"query": 3}})


def test_prompts_cannot_be_changed_after_reading() -> None:
    with pytest.raises(TypeError):
        prompts.by_name["query"] = ""  # type: ignore[index]
