"""Teachers: models, or files of vectors, whose embedding of a text the student is to match, and
whose ranking finds hard negatives.

    sentence-transformers   any of its models, a folder or a hub id
    egemma:FOLDER           a checkpoint of ours, through our own encoder: mining with the model
                            itself
    FILE.safetensors        vectors that were made elsewhere, beside FILE.jsonl with their texts

The report's teacher is Gemini Embedding, which is a service: its vectors come in as a file.
Source: arXiv:2509.20354, section 2.2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from egemma_core.checkpoint import open_checkpoint
from egemma_core.errors import CheckpointError, ConfigError, InputError
from egemma_core.files import sha256_of
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.load import load_encoder
from egemma_core.vectors import normalize

Role = Literal["query", "document"]
Match = Literal["same", "prefix", "linear"]
Vectors = NDArray[np.float32]

LOCAL = "egemma:"  # in front of a checkpoint that our own encoder is to read
# what a sentence-transformers model is computed from
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
_NOT_FETCHED = ("onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot")
# the names that sentence-transformers looks for, in its order
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Embedded(NamedTuple):
    vectors: Vectors  # (n, dim) unit vectors
    truncated: NDArray[np.bool_]  # (n,) true where the model read only the beginning of the text


class Teacher(Protocol):
    """What turns texts into unit vectors in a space of its own."""

    name: str
    dim: int

    def queries(self, texts: Sequence[str]) -> Vectors: ...  # (n, dim) float32 unit vectors
    def documents(self, texts: Sequence[str]) -> Vectors: ...
    # the same, and which texts were cut
    def embed(self, role: Role, texts: Sequence[str]) -> Embedded: ...
    # all that its vectors depend on, beside the text: weights, prompt
    def identity(self, role: Role) -> str: ...
    def described(self) -> dict[str, Any]: ...  # for reports


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
        ConfigError: sentence-transformers is missing, or a prompt is said twice or is unknown.
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
            raise ConfigError(
                f"teacher {model}: needs sentence-transformers: pip install 'egemma[train]'. "
                f"A checkpoint of ours is read without it as '{LOCAL}{model}'."
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

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self.embed("query", texts).vectors

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self.embed("document", texts).vectors

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        if not texts:
            return _nothing(self.dim)
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
        return Embedded(_unit(np.asarray(vectors, np.float32), texts, self.name), truncated)

    def identity(self, role: Role) -> str:
        return json.dumps(
            ["sentence-transformers", self._weights, self.max_tokens, role, self.prompts[role]]
        )

    def described(self) -> dict[str, Any]:
        return {
            "kind": "sentence-transformers",
            "name": self.name,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "weights": self._weights,
            **{f"{role}_prompt": prompt for role, prompt in self.prompts.items()},
        }


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
        self.name, self.dim, self.max_tokens = (
            checkpoint.source,
            checkpoint.config.dim,
            checkpoint.config.max_tokens,
        )
        self.prompts: dict[Role, str] = {
            "query": checkpoint.prompts.query() if task is None else checkpoint.prompts.query(task),
            "document": checkpoint.prompts.document(),
        }
        self._encoder, self._tokenizer = load_encoder(checkpoint).to(device), checkpoint.tokenizer()
        self._device, self._chunk_tokens = device, chunk_tokens
        self._weights = hashlib.sha256(
            json.dumps(
                [
                    sorted(checkpoint.weight_hashes().items()),
                    sha256_of(checkpoint.tokenizer_path),
                    repr(checkpoint.config),
                ]
            ).encode()
        ).hexdigest()

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self.embed("query", texts).vectors

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self.embed("document", texts).vectors

    @torch.inference_mode()
    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        if not texts:
            return _nothing(self.dim)
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
            _unit(vectors.cpu().numpy(), texts, self.name),
            np.array([row.truncated for row in tokens], np.bool_),
        )

    def identity(self, role: Role) -> str:
        return json.dumps(["egemma", self._weights, role, self.prompts[role]])

    def described(self) -> dict[str, Any]:
        return {
            "kind": "egemma",
            "name": self.name,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "weights": self._weights,
            **{f"{role}_prompt": prompt for role, prompt in self.prompts.items()},
        }


class VectorFileTeacher:
    """Vectors that were made elsewhere: NAME.safetensors with a float tensor `vectors` (n, dim),
    and beside it NAME.jsonl with n lines {"role": "query" | "document", "text": ...} in the same
    order, texts as in the training rows, without prompts.

    Vectors may have any length but 0; they are given length 1. They are mapped, not read as a
    whole.

    Raises:
        InputError: a file is missing, a line is not as above, or a text is there twice. `embed`
            raises it for texts that are not in the file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.name, texts = path, str(path), path.with_suffix(".jsonl")
        try:
            with safe_open(path, framework="pt") as file:
                if "vectors" not in file.keys():  # noqa: SIM118  # not a dict
                    raise InputError(
                        f"{path}: holds {sorted(file.keys())}; wanted a tensor named 'vectors', "
                        "(n, dim)."
                    )
                stored: Tensor = file.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file: {error}") from error
        if stored.ndim != 2 or not stored.is_floating_point() or 0 in stored.shape:
            raise InputError(
                f"{path}: vectors is {stored.dtype} {tuple(stored.shape)}; wanted floats of shape "
                "(n, dim)."
            )
        self._vectors, self.dim = stored, stored.shape[1]
        self._rows: dict[tuple[str, str], int] = {}
        try:
            with texts.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    key = _role_and_text(line, f"{texts}, line {number}")
                    if key in self._rows:
                        raise InputError(
                            f"{texts}, line {number}: the {key[0]} {key[1][:60]!r} is in line "
                            f"{self._rows[key] + 1} already. Write each text once."
                        )
                    self._rows[key] = number - 1
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{texts}: not readable ({error}). It names the role and the text of each vector "
                f"of {path.name}."
            ) from error
        if len(self._rows) != len(stored):
            raise InputError(
                f"{texts} has {len(self._rows)} lines, {path.name} has {len(stored)} vectors: one "
                "line for each vector, in the same order."
            )
        self._hash = hashlib.sha256(f"{sha256_of(path)} {sha256_of(texts)}".encode()).hexdigest()

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self.embed("query", texts).vectors

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self.embed("document", texts).vectors

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        missing = list(dict.fromkeys(text for text in texts if (role, text) not in self._rows))
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of {len(set(texts))} {role} texts have no vector, "
                f"such as {[text[:60] for text in missing[:3]]}. "
                "Embed them too, with the same model, and write the file again."
            )
        if not texts:
            return _nothing(self.dim)
        chosen = (
            self._vectors[torch.tensor([self._rows[role, text] for text in texts])].float().numpy()
        )
        return Embedded(_unit(chosen, texts, self.name), np.zeros(len(texts), np.bool_))

    def identity(self, role: Role) -> str:
        return json.dumps(["vectors", self._hash, role])

    def described(self) -> dict[str, Any]:
        return {
            "kind": "vectors",
            "name": self.name,
            "dim": self.dim,
            "vectors": len(self._rows),
            "weights": self._hash,
        }


class TeacherSpace(nn.Module):
    """Where student and teacher are compared when their widths differ; the report does not say.

    "same": the widths are equal. "prefix": the teacher's first channels, at unit length again;
    right for a teacher that was trained for short prefixes, as Gemini Embedding was. "linear": a
    map from the student's width to the teacher's, without bias, trained with the student and thrown
    away; it starts with orthonormal columns or rows, so that a narrower student starts with its own
    cosines. Source: "linear" is the projection of EmbedDistill, arXiv:2301.12005.

    Args:
        dim: D, the student's width.
        teacher_dim: the teacher's.
        match: None for "same".
        seed: of the map.

    Raises:
        ConfigError: the widths differ and nothing is said about it, or "prefix" of a teacher that
            is narrower than the student.
    """

    def __init__(
        self, dim: int, teacher_dim: int, match: Match | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if match is not None and match not in get_args(Match):
            raise ConfigError(f"match={match!r}: one of {get_args(Match)}.")
        if match in (None, "same") and dim != teacher_dim:
            raise ConfigError(
                f"the student has {dim} channels, the teacher {teacher_dim}: say match='prefix' if "
                f"the teacher's first {dim} channels are "
                "an embedding by themselves (it was trained so), or match='linear' to learn a map "
                "that is thrown away after training."
            )
        if match == "prefix" and teacher_dim < dim:
            raise ConfigError(
                f"match='prefix': the teacher has {teacher_dim} channels, fewer than the student's "
                f"{dim}. Say match='linear'."
            )
        self.dim, self.teacher_dim = dim, teacher_dim
        self.match: Match = match or "same"
        self.map = nn.Linear(dim, teacher_dim, bias=False) if match == "linear" else None
        if self.map is not None:
            nn.init.orthogonal_(self.map.weight, generator=torch.Generator().manual_seed(seed))

    def student(self, vectors: Tensor) -> Tensor:
        """(B, D) to (B, width in common) unit vectors, with a gradient."""
        return F.normalize((vectors if self.map is None else self.map(vectors)).float(), dim=1)

    def teacher(self, vectors: Tensor) -> Tensor:
        """(B, teacher_dim) to (B, width in common) unit vectors, without one."""
        return F.normalize(
            (vectors[:, : self.dim] if self.match == "prefix" else vectors).detach().float(), dim=1
        )


def open_teacher(
    source: str | Path,
    *,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    query_prompt_name: str | None = None,
    document_prompt_name: str | None = None,
    device: str | None = None,
) -> Teacher:
    """The teacher of that name: "FILE.safetensors", "egemma:MODEL" for a checkpoint through our own
    encoder, else a sentence-transformers model.

    Raises:
        ConfigError: prompts were given for a file, or a text for "egemma:", whose prompts are the
            checkpoint's; `query_prompt_name` names its task.
    """
    prompts = (query_prompt, document_prompt, query_prompt_name, document_prompt_name)
    if Path(source).is_file() or Path(source).suffix == ".safetensors":
        if any(prompt is not None for prompt in prompts):
            raise ConfigError(
                f"{source} holds finished vectors: their prompts cannot be chosen any more."
            )
        return VectorFileTeacher(Path(source))
    if str(source).startswith(LOCAL):
        if any(
            prompt is not None for prompt in (query_prompt, document_prompt, document_prompt_name)
        ):
            raise ConfigError(
                f"{source}: reads with the checkpoint's own prompts; query_prompt_name may name "
                f"its task. Leave {LOCAL!r} out to choose others."
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


def _choose_prompt(
    role: Role, text: str | None, name: str | None, known: dict[str, str], usual: Sequence[str]
) -> str:
    if text is not None and name is not None:
        raise ConfigError(
            f"{role}_prompt={text!r} and {role}_prompt_name={name!r}: give one of the two."
        )
    if name is not None:
        if name not in known:
            raise ConfigError(
                f"{role}_prompt_name={name!r}: the teacher has the prompts {sorted(known)}. "
                f"{role}_prompt takes a text."
            )
        return known[name]
    if text in known:
        raise ConfigError(
            f"{role}_prompt={text!r} is the name of a prompt of the teacher: say "
            f"{role}_prompt_name={text!r}."
        )
    return (
        next((known[usual_name] for usual_name in usual if usual_name in known), "")
        if text is None
        else text
    )


def _model_folder(model: str | Path) -> tuple[Path, str]:
    """Where a model's files are, and its name, with the commit that a hub id means."""
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
        raise ConfigError(
            f"teacher {model}: there is no such folder, and a hub id needs huggingface_hub: pip "
            "install 'egemma[train]'."
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
    """SHA-256 over names and contents of all files that a model's vectors depend on."""
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


def _role_and_text(line: str, place: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}).") from error
    if (
        not isinstance(row, dict)
        or row.get("role") not in get_args(Role)
        or not isinstance(row.get("text"), str)
    ):
        raise InputError(
            f'{place}: {line.strip()[:80]!r}; wanted {{"role": "query" or "document", "text": '
            f'"..."}}.'
        )
    return row["role"], row["text"]


def _unit(vectors: Vectors, texts: Sequence[str], name: str) -> Vectors:
    usable = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    if not usable.all():
        first = texts[int(np.argmin(usable))]
        raise InputError(
            f"teacher {name}: {int((~usable).sum())} of {len(texts)} vectors are zero, NaN or "
            f"infinite, such as that of {first[:60]!r}."
        )
    return normalize(vectors)


def _nothing(dim: int) -> Embedded:
    return Embedded(np.zeros((0, dim), np.float32), np.zeros(0, np.bool_))
