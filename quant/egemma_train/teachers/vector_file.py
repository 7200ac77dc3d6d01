"""A teacher that is a file of vectors, made elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from egemma_core.checks import unicode_text
from egemma_core.errors import InputError
from egemma_core.files import sha256_of
from egemma_core.json_lines import BadRowError, shortened
from egemma_train.data.json_rows import checking_row, rows_of
from egemma_train.teachers.teacher import Embedded, Role, no_vectors, unit_vectors

Key = tuple[str, str]  # role and text


class VectorFileTeacher:
    """Vectors that were made elsewhere.

    NAME.safetensors holds a float tensor `vectors` (n, dim), and NAME.jsonl beside it n lines
    {"role": "query" | "document", "text": ...} in the same order, with texts as in the training
    rows, without prompts. Vectors may have any length but 0; they are given length 1. They are
    mapped, not read as a whole.

    Raises:
        InputError: a file is missing, a line is not as above, or a text is there twice.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.name, texts = path, str(path), path.with_suffix(".jsonl")
        try:
            with safe_open(path, framework="pt") as file:
                if "vectors" not in file.keys():  # noqa: SIM118  # not a dict
                    raise InputError(
                        f"{path} holds {sorted(file.keys())}, and must hold a tensor named "
                        "'vectors', (n, dim)."
                    )
                stored: Tensor = file.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}") from error
        if stored.ndim != 2 or not stored.is_floating_point() or 0 in stored.shape:
            raise InputError(
                f"{path}: vectors is {stored.dtype} {tuple(stored.shape)}, and must be floats of "
                "shape (n, dim)."
            )
        self._vectors, self.dim = stored, stored.shape[1]
        self._rows = _places(texts)
        if len(self._rows) != len(stored):
            raise InputError(
                f"{texts} has {len(self._rows)} lines, {path.name} has {len(stored)} vectors: one "
                "line for each vector, in the same order."
            )
        self._hash = hashlib.sha256(f"{sha256_of(path)} {sha256_of(texts)}".encode()).hexdigest()

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts in one role.

        Raises:
            InputError: a text has no vector in the file.
        """
        missing = list(dict.fromkeys(text for text in texts if (role, text) not in self._rows))
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of {len(set(texts))} {role} texts have no vector, "
                f"such as {[text[:60] for text in missing[:3]]}.",
                hint="Embed them too, with the same model, and write the file again.",
            )
        if not texts:
            return no_vectors(self.dim)
        rows = torch.tensor([self._rows[role, text] for text in texts])
        chosen = self._vectors[rows].float().numpy()
        return Embedded(unit_vectors(chosen, texts, self.name), np.zeros(len(texts), np.bool_))

    def identity(self, role: Role) -> str:
        """Return all that the vectors depend on beside the text."""
        return json.dumps(["vectors", self._hash, role])

    def described(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "kind": "vectors",
            "name": self.name,
            "dim": self.dim,
            "vectors": len(self._rows),
            "weights": self._hash,
        }


def _places(path: Path) -> dict[Key, int]:
    """Return which vector each role and text has.

    Raises:
        InputError: the file cannot be read, a line is no role and text, or a text is there twice.
    """
    places: dict[Key, int] = {}
    try:
        for number, row in rows_of(path):
            with checking_row(path, number):
                key = _key(row)
                if key in places:
                    raise BadRowError(
                        f"the {key[0]} {key[1][:60]!r} is in line {places[key] + 1} already. Write "
                        "each text once."
                    )
            places[key] = number - 1
    except InputError as error:
        about = "The file names the role and the text of each vector."
        raise InputError(error.found, hint=f"{error.hint} {about}".strip()) from error
    return places


def _key(row: dict[str, Any]) -> Key:
    role, text = row.get("role"), row.get("text")
    if not isinstance(role, str) or role not in get_args(Role) or not isinstance(text, str):
        raise BadRowError(
            f'found {shortened(row)}: write {{"role": "query" or "document", "text": "..."}}.'
        )
    return role, unicode_text("field 'text'", text)
