"""A teacher that is a model of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egemma_core.errors import CheckpointError, ConfigError, MissingDependencyError
from egemma_core.files import sha256_of
from egemma_train.teachers.teacher import Embedded, Role, no_vectors, unit_vectors

# what a sentence-transformers model is computed from
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
_NOT_FETCHED = ("onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot")
# the names that sentence-transformers looks for, in its order
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class SentenceTransformerTeacher:
    """Any sentence-transformers model.

    Args:
        model: a folder, or a hub id "owner/name" or "owner/name@revision". Code inside a model is
            not run.
        query_prompt, document_prompt: the text itself; "" for none.
        query_prompt_name, document_prompt_name: a prompt of the model by its name. Where neither is
            given, the model's "query" and "document" (or "passage", "corpus") prompts are taken; a
            model that has none gets none, which `described` shows.

    Raises:
        MissingDependencyError: sentence-transformers is missing.
        ConfigError: a prompt is given twice, or is unknown.
        CheckpointError: there is no such model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        query_prompt_name: str | None = None,
        document_prompt_name: str | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError(
                f"The teacher {model} needs sentence-transformers.",
                hint="pip install 'egemma[train]'; or put 'egemma:' in front of a checkpoint that "
                "our own encoder can read.",
            ) from error
        folder, self.name = _model_folder(model)
        try:
            self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"teacher {model}: sentence-transformers cannot open {folder}: {error}"
            ) from error
        self._weights = _folder_hash(folder)
        self._batch_size = batch_size
        known: dict[str, str] = {name: text for name, text in self._model.prompts.items() if text}
        self.prompts: dict[Role, str] = {
            "query": _choose_prompt("query", query_prompt, query_prompt_name, known, ("query",)),
            "document": _choose_prompt(
                "document", document_prompt, document_prompt_name, known, _DOCUMENT_PROMPTS
            ),
        }
        limit = self._model.max_seq_length
        # transformers writes "no limit" as 1e30
        self.max_tokens = int(limit) if limit is not None and limit < 10**9 else None
        self.dim = self._model.encode_query(["dim"], prompt="").shape[1]

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts in one role, and which texts the model cut."""
        if not texts:
            return no_vectors(self.dim)
        prompt = self.prompts[role]
        # they differ in models with two towers
        encode = self._model.encode_query if role == "query" else self._model.encode_document
        vectors = encode(
            list(texts),
            prompt=prompt,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        truncated = np.zeros(len(texts), np.bool_)
        if self.max_tokens is not None:
            rows = self._model.tokenizer(
                [prompt + text for text in texts], truncation=False, verbose=False
            )["input_ids"]
            truncated[:] = [len(row) > self.max_tokens for row in rows]
        return Embedded(unit_vectors(np.asarray(vectors, np.float32), texts, self.name), truncated)

    def identity(self, role: Role) -> str:
        """Return all that the vectors depend on beside the text."""
        return json.dumps(
            ["sentence-transformers", self._weights, self.max_tokens, role, self.prompts[role]]
        )

    def described(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "kind": "sentence-transformers",
            "name": self.name,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "weights": self._weights,
            **{f"{role}_prompt": prompt for role, prompt in self.prompts.items()},
        }


def _choose_prompt(
    role: Role, text: str | None, name: str | None, known: dict[str, str], usual: Sequence[str]
) -> str:
    """Return the prompt of a role: the text, or the one of that name, or the first usual one."""
    if text is not None and name is not None:
        raise ConfigError(
            f"{role}_prompt={text!r} and {role}_prompt_name={name!r} are two prompts; give one of "
            "the two."
        )
    if name is not None:
        if name not in known:
            raise ConfigError(
                f"{role}_prompt_name={name!r} is none of the teacher's: the teacher has the "
                f"prompts {sorted(known)}.",
                hint=f"{role}_prompt takes a text.",
            )
        return known[name]
    if text in known:
        raise ConfigError(
            f"{role}_prompt={text!r} is the name of a prompt of the teacher.",
            hint=f"Write {role}_prompt_name={text!r}.",
        )
    if text is not None:
        return text
    return next((known[usual_name] for usual_name in usual if usual_name in known), "")


def _model_folder(model: str | Path) -> tuple[Path, str]:
    """Return where a model's files are, and its name, with the commit that a hub id means."""
    if Path(model).is_dir():
        return Path(model), str(model)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"teacher {model}: there is no such folder, and a hub id needs huggingface_hub.",
            hint="pip install 'egemma[train]'",
        ) from error
    name, _, revision = str(model).partition("@")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, ignore_patterns=list(_NOT_FETCHED))
        )
    except (
        LocalEntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OSError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"teacher {model}: there is no such folder, and it cannot be fetched as a hub id: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return folder, f"{name}@{folder.name}"


def _folder_hash(folder: Path) -> str:
    """Return the SHA-256 over names and contents of all files that a model's vectors depend on."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in _MODEL_FILES
    )
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise CheckpointError(f"teacher {folder}: holds no weights (*.safetensors or *.bin).")
    return hashlib.sha256(
        json.dumps(
            [[path.relative_to(folder).as_posix(), sha256_of(path)] for path in files]
        ).encode()
    ).hexdigest()
