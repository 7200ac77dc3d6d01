"""What the name of a teacher means.

sentence-transformers   any of its models, a folder or a hub id
egemma:FOLDER           a checkpoint of ours, through our own encoder
FILE.safetensors        vectors that were made elsewhere, beside FILE.jsonl with their texts
"""

from __future__ import annotations

from pathlib import Path

from egemma_core.errors import ConfigError
from egemma_train.teachers.local import LocalTeacher
from egemma_train.teachers.sentence_transformer import SentenceTransformerTeacher
from egemma_train.teachers.teacher import Teacher
from egemma_train.teachers.vector_file import VectorFileTeacher

LOCAL = "egemma:"  # in front of a checkpoint that our own encoder is to read


def open_teacher(
    source: str | Path,
    *,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    query_prompt_name: str | None = None,
    document_prompt_name: str | None = None,
    device: str | None = None,
) -> Teacher:
    """Return the teacher of that name.

    It is "FILE.safetensors", or "egemma:MODEL" for a checkpoint through our own encoder, or else a
    sentence-transformers model.

    Raises:
        ConfigError: prompts were given for a file, or a text for "egemma:", whose prompts are the
            checkpoint's; `query_prompt_name` names its task.
    """
    prompts = (query_prompt, document_prompt, query_prompt_name, document_prompt_name)
    if Path(source).is_file() or Path(source).suffix == ".safetensors":
        if any(prompt is not None for prompt in prompts):
            raise ConfigError(
                f"{source} holds finished vectors, whose prompts cannot be chosen any more.",
                hint="Leave the prompts out.",
            )
        return VectorFileTeacher(Path(source))
    if str(source).startswith(LOCAL):
        if any(
            prompt is not None for prompt in (query_prompt, document_prompt, document_prompt_name)
        ):
            raise ConfigError(
                f"{source} reads with the checkpoint's own prompts; query_prompt_name may name "
                "its task.",
                hint=f"Leave {LOCAL!r} out to choose others.",
            )
        return LocalTeacher(
            str(source).removeprefix(LOCAL), task=query_prompt_name, device=device or "cpu"
        )
    return SentenceTransformerTeacher(
        source,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        query_prompt_name=query_prompt_name,
        document_prompt_name=document_prompt_name,
        device=device,
    )
