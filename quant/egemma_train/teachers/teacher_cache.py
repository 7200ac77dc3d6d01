"""A teacher's vectors on disk, by what they were made from, so that no text is embedded twice: not
by a second run, nor after a crash.

    FOLDER/16 hex digits of the teacher/teacher.json     what the teacher is
    FOLDER/16 hex digits of the teacher/*.vectors.npy    (n, dim) float32
    FOLDER/16 hex digits of the teacher/*.keys.npy       n hashes of what was embedded, whether it
                                                         was cut, checksums

A file is there whole or not at all, also after a kill or a power cut. Vectors count once their keys
are there, which are written last. Files are only ever added, under names of their own, so any
number of processes can share a folder; at worst both embed the same text. Each vector is checked
when it is read.
"""

from __future__ import annotations

import hashlib
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from egemma_core.checks import whole_number
from egemma_core.errors import CheckpointError
from egemma_core.files import replacing_file, write_json
from egemma_train.teachers.teacher import Embedded, Role, Teacher, Vectors

ROWS_PER_FILE = 4096
_STALE_S = 86_400  # scratch, or vectors without keys, that is older was left by a process that died
_MAPPED_FILES = 64
_DELETE = "Delete both files of that name; their texts are embedded again when they are needed."
_KEY = np.dtype([("key", "u1", (32,)), ("truncated", "u1"), ("checksum", "<u4")])


class CachedTeacher:
    """A teacher that looks on the disk first.

    Every call that has to embed leaves at least one file, so embed a dataset with one `fill` before
    a run that asks for 100 texts at a time.

    Args:
        folder: made if missing; teachers of any number can share it.
        rows_per_file: texts that are embedded, then saved, together: what a kill can lose.
    """

    def __init__(
        self, teacher: Teacher, folder: Path, *, rows_per_file: int = ROWS_PER_FILE
    ) -> None:
        self._rows_per_file = whole_number("rows_per_file", rows_per_file, 1)
        self._teacher, self.name, self.dim = teacher, teacher.name, teacher.dim
        self._prefixes: dict[Role, bytes] = {
            "query": _prefix(teacher.identity("query")),
            "document": _prefix(teacher.identity("document")),
        }
        self.folder = folder / hashlib.sha256(b"".join(self._prefixes.values())).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keys: dict[str, NDArray[Any]] = {}  # of each file, by its name
        self._places: dict[bytes, tuple[str, int]] = {}  # where the vector of a key is
        self._mapped: dict[str, Vectors] = {}  # the files that were used last
        self._remove_leftovers()
        if not (self.folder / "teacher.json").exists():
            write_json(self.folder / "teacher.json", teacher.described())
        self._find_new_files()

    def identity(self, role: Role) -> str:
        """Return all that the teacher's vectors depend on beside the text."""
        return self._teacher.identity(role)

    def described(self) -> dict[str, Any]:
        """Return the teacher's facts for a report."""
        return self._teacher.described()

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        """Return the vectors of all texts; those that are not on the disk are made and saved.

        Raises:
            CheckpointError: a file is damaged; the text names it. Deleting it is safe: its texts
                are embedded again.
        """
        self.fill(role, texts)
        vectors = np.empty((len(texts), self.dim), np.float32)
        truncated = np.empty(len(texts), np.bool_)
        keys = [self._key(role, text) for text in texts]
        # file by file
        for index in sorted(range(len(texts)), key=lambda index: self._places[keys[index]]):
            name, row = self._places[keys[index]]
            vector, about = self._vectors(name)[row], self._keys[name][row]
            if _checksum(keys[index], about["truncated"], vector) != about["checksum"]:
                raise CheckpointError(
                    f"{self.folder / name}.vectors.npy: row {row} is damaged.", hint=_DELETE
                )
            vectors[index], truncated[index] = vector, about["truncated"]
        return Embedded(vectors, truncated)

    def fill(self, role: Role, texts: Sequence[str]) -> int:
        """Embed and save what is not on the disk, and return how many texts that were.

        Texts of similar length go together.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        missing = self._missing(role, texts)
        if missing:
            self._find_new_files()  # another process may have made them
            missing = self._missing(role, texts)
        # the longest first: too little memory shows at once
        order = sorted(missing.items(), key=lambda item: len(item[1]), reverse=True)
        with tqdm(
            total=len(order), desc=f"{self.name}: {role} texts", unit="text", disable=None
        ) as progress:
            for start in range(0, len(order), self._rows_per_file):
                part = order[start : start + self._rows_per_file]
                embedded = self._teacher.embed(role, [text for _, text in part])
                self._save([key for key, _ in part], embedded)
                progress.update(len(part))
        return len(order)

    def _missing(self, role: Role, texts: Sequence[str]) -> dict[bytes, str]:
        return {key: text for text in texts if (key := self._key(role, text)) not in self._places}

    def _key(self, role: Role, text: str) -> bytes:
        # the teacher refuses lone surrogates, not the cache
        return hashlib.sha256(self._prefixes[role] + text.encode("utf-8", "surrogatepass")).digest()

    def _save(self, keys: Sequence[bytes], embedded: Embedded) -> None:
        vectors = np.ascontiguousarray(embedded.vectors, "<f4")
        rows = np.zeros(len(keys), _KEY)
        rows["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
        rows["truncated"] = embedded.truncated
        rows["checksum"] = [
            _checksum(key, cut, vector)
            for key, cut, vector in zip(keys, rows["truncated"], vectors, strict=True)
        ]
        name = uuid.uuid4().hex
        self._write(f"{name}.vectors.npy", vectors)
        self._write(f"{name}.keys.npy", rows)
        self._add(name)

    def _write(self, name: str, array: NDArray[Any]) -> None:
        with replacing_file(self.folder / name) as scratch, scratch.open("wb") as file:
            np.save(file, array)

    def _find_new_files(self) -> None:
        for path in sorted(self.folder.glob("*.keys.npy")):
            name = path.name.removesuffix(".keys.npy")
            if name not in self._keys:
                self._add(name)

    def _add(self, name: str) -> None:
        keys = self._load(f"{name}.keys.npy", None)
        if keys.dtype != _KEY or keys.ndim != 1:
            raise CheckpointError(
                f"{self.folder / name}.keys.npy is {keys.dtype} {keys.shape}, and must be {_KEY} "
                "(n,).",
                hint=_DELETE,
            )
        self._keys[name] = keys
        self._vectors(name)
        raw = keys["key"].tobytes()
        for row in range(len(keys)):
            self._places.setdefault(raw[32 * row : 32 * row + 32], (name, row))

    def _vectors(self, name: str) -> Vectors:
        """Return the (n, dim) vectors of a file, mapped.

        A mapped file takes a file descriptor, so only the last few stay.
        """
        if name not in self._mapped:
            vectors = self._load(f"{name}.vectors.npy", "r")
            shape = len(self._keys[name]), self.dim
            if vectors.dtype != np.dtype("<f4") or vectors.shape != shape:
                raise CheckpointError(
                    f"{self.folder / name}.vectors.npy is {vectors.dtype} {vectors.shape}, and "
                    f"must be float32 {shape}.",
                    hint=_DELETE,
                )
            while len(self._mapped) >= _MAPPED_FILES:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[name] = vectors
        return self._mapped[name]

    def _load(self, name: str, mode: Literal["r"] | None) -> NDArray[Any]:
        try:
            loaded: NDArray[Any] = np.load(self.folder / name, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{self.folder / name} is not readable ({error}).", hint=_DELETE
            ) from error
        return loaded

    def _remove_leftovers(self) -> None:
        """Remove what a process that died left behind; nothing reads it."""
        orphans = [
            path
            for path in self.folder.glob("*.vectors.npy")
            if not path.with_name(path.name.replace(".vectors.", ".keys.")).exists()
        ]
        for path in (*orphans, *self.folder.glob(".*.part")):
            try:
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
            except FileNotFoundError:  # its writer has just finished, or another process swept
                pass


def _prefix(identity: str) -> bytes:
    return hashlib.sha256(identity.encode()).digest()


def _checksum(key: bytes, truncated: int, vector: Vectors) -> int:
    return zlib.crc32(vector.tobytes(), zlib.crc32(key + bytes([truncated])))
