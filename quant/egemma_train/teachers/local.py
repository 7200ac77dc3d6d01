"""A teacher that is a checkpoint of ours: mining with the model itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.files import sha256_of
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.load import load_encoder
from egemma_train.teachers.teacher import Embedded, Role, no_vectors, unit_vectors


class LocalTeacher:
    """A checkpoint of ours, with its own prompts, through our own encoder in float32.

    Args:
        model: a folder, or a hub id.
        task: of the query prompt; None for the checkpoint's default.
        chunk_tokens: tokens that go through the encoder together.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        task: str | None = None,
        device: str = "cpu",
        chunk_tokens: int = 8192,
    ) -> None:
        checkpoint = open_checkpoint(model)
        self.name, self.dim = checkpoint.source, checkpoint.config.dim
        self.max_tokens = checkpoint.config.max_tokens
        self.prompts: dict[Role, str] = {
            "query": checkpoint.prompts.query() if task is None else checkpoint.prompts.query(task),
            "document": checkpoint.prompts.document(),
        }
        self._encoder, self._tokenizer = load_encoder(checkpoint).to(device), checkpoint.tokenizer()
        self._device, self._chunk_tokens = device, chunk_tokens
        depends_on = [
            sorted(checkpoint.weight_hashes().items()),
            sha256_of(checkpoint.tokenizer_path),
            repr(checkpoint.config),
        ]
        self._weights = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

    @torch.inference_mode()
    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts in one role, and which texts the model cut."""
        if not texts:
            return no_vectors(self.dim)
        tokens = [
            self._tokenizer.encode(self.prompts[role] + text, overflow="truncate") for text in texts
        ]
        vectors = encode_rows(
            self._encoder,
            [row.ids for row in tokens],
            self._tokenizer.pad_id,
            self._chunk_tokens,
            self._device,
        )
        return Embedded(
            unit_vectors(vectors.cpu().numpy(), texts, self.name),
            np.array([row.truncated for row in tokens], np.bool_),
        )

    def identity(self, role: Role) -> str:
        """Return all that the vectors depend on beside the text."""
        return json.dumps(["egemma", self._weights, role, self.prompts[role]])

    def described(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "kind": "egemma",
            "name": self.name,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "weights": self._weights,
            **{f"{role}_prompt": prompt for role, prompt in self.prompts.items()},
        }
