"""Which model made a vector: what is compared before vectors of two places are mixed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from egemma.exported import exported
from egemma_core.bundle import TOKENIZER, Manifest
from egemma_core.errors import ConfigError, IndexMismatchError

PARTS = ("weights", "tokenizer", "prompts", "architecture", "scheme")


@exported
@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """A model as a store knows it.

    Equal fingerprints mean vectors that may be compared, whatever the names say.
    """

    fingerprint: str  # 64 hexadecimal digits; see `egemma_core.bundle.Manifest`
    name: str  # for people; not compared
    dims: tuple[int, ...]  # trained widths, falling; the first is a vector's full width
    # PARTS -> the first 12 hexadecimal digits of each part's SHA-256, to say what differs
    parts: Mapping[str, str]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.fingerprint):
            raise ConfigError(
                f"fingerprint={self.fingerprint!r} must be 64 hexadecimal digits, as `egemma "
                "inspect` prints them."
            )
        falling = sorted(set(self.dims), reverse=True)
        if not self.dims or list(self.dims) != falling or falling[-1] < 1:
            raise ConfigError(
                f"dims={self.dims} must be the trained widths, from the full one down, such as "
                "(768, 512, 256, 128)."
            )

    @classmethod
    def of(cls, manifest: Manifest) -> ModelIdentity:
        """Return the identity of the model in a bundle, which need not be loaded for that."""
        contents = {
            "weights": manifest.source.get("weights"),
            "tokenizer": manifest.files[TOKENIZER]["sha256"],
            "prompts": manifest.prompts,
            "architecture": manifest.architecture,
            "scheme": manifest.scheme,
        }
        model = manifest.source.get("model", "an unnamed model")
        return cls(
            fingerprint=manifest.fingerprint,
            name=f"{model} {manifest.target} ({manifest.fingerprint[:12]})",
            dims=tuple(manifest.dims),
            parts={part: _digest(content) for part, content in contents.items()},
        )

    @property
    def dim(self) -> int:
        """The full width of the model's vectors."""
        return self.dims[0]

    def to_json(self) -> str:
        """Return the identity as a JSON object."""
        return json.dumps(
            {
                "fingerprint": self.fingerprint,
                "name": self.name,
                "dims": list(self.dims),
                "parts": dict(self.parts),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ModelIdentity:
        """Read an identity that `to_json` wrote.

        Raises:
            ValueError: `text` is not what `to_json` writes.
        """
        try:
            body = json.loads(text)
            strings = [body["fingerprint"], body["name"], *body["parts"], *body["parts"].values()]
            if not all(isinstance(value, str) for value in strings) or not all(
                type(dim) is int for dim in body["dims"]
            ):
                raise ValueError("a field has another type")
            return cls(
                fingerprint=body["fingerprint"],
                name=body["name"],
                dims=tuple(body["dims"]),
                parts=body["parts"],
            )
        except (KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
            raise ValueError(f"no model identity: {error}") from error


def check_same_model(
    where: object, stored: ModelIdentity, mine: ModelIdentity, way_out: str
) -> None:
    """Check that vectors of two places may be compared.

    Args:
        where: holds the vectors of `stored`, for the message.
        way_out: what to do about a difference, for the message.

    Raises:
        IndexMismatchError: the fingerprints differ; says which parts do.
    """
    if stored.fingerprint != mine.fingerprint:
        differs = [part for part in PARTS if stored.parts.get(part) != mine.parts.get(part)]
        what = f" They differ in {', '.join(differs)}." if differs and stored.parts else ""
        raise IndexMismatchError(
            f"{where} holds vectors of {stored.name}, this is {mine.name}.{what}", hint=way_out
        )


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
