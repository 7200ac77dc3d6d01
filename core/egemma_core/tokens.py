"""Text to token ids, exactly as the model was trained: [BOS] pieces [EOS], no blank in front, case
kept.

SentencePiece semantics: the literal text "<bos>" inside a document stays text. (Hugging Face's
tokenizer turns it into the control token, so a document could smuggle one in.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import sentencepiece

from egemma_core.config import EncoderConfig
from egemma_core.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    InputError,
    TokenLimitError,
)

Overflow = Literal["error", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One text as ids, and what had to be done to it."""

    ids: tuple[int, ...]  # BOS and EOS included; never longer than the model reads
    # tokens of the whole text, BOS and EOS included; more than len(ids) when truncated
    num_tokens: int

    @property
    def truncated(self) -> bool:
        return self.num_tokens > len(self.ids)


class Tokenizer:
    """The checkpoint's SentencePiece model.

    Args:
        path: `tokenizer.model`.
        bos_id, eos_id, pad_id: what the checkpoint's config says; the file must agree.
        vocab_size: rows of the embedding table; the file may have fewer pieces, never more.
        max_tokens: the model's limit, BOS and EOS included.

    Raises:
        CheckpointError: the file disagrees with the config.
        BundleError: the file cannot be read.
    """

    def __init__(
        self, path: Path, *, bos_id: int, eos_id: int, pad_id: int, vocab_size: int, max_tokens: int
    ) -> None:
        self.bos_id, self.eos_id, self.pad_id, self.max_tokens = bos_id, eos_id, pad_id, max_tokens
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise BundleError(
                f"{path}: not a readable SentencePiece model ({error}). Copy tokenizer.model from "
                "the checkpoint."
            ) from error
        found = {
            "bos": self._pieces.bos_id(),
            "eos": self._pieces.eos_id(),
            "pad": self._pieces.pad_id(),
        }
        wanted = {"bos": bos_id, "eos": eos_id, "pad": pad_id}
        if found != wanted:
            raise CheckpointError(
                f"{path}: its control ids are {found}, the config says {wanted}. This is another "
                "model's tokenizer."
            )
        if self._pieces.vocab_size() > vocab_size:
            raise CheckpointError(
                f"{path}: {self._pieces.vocab_size()} pieces, but the embedding table has "
                f"{vocab_size} rows. "
                "This is another model's tokenizer."
            )

    def encode(
        self, text: str, *, max_tokens: int | None = None, overflow: Overflow = "error"
    ) -> Tokens:
        """Ids of one text, its prompt already in front.

        Args:
            max_tokens: a limit below the model's own; None for the model's own.
            overflow: what to do with a longer text: refuse it, or cut it so that EOS stays last.

        Raises:
            InputError: `text` is not a str, or holds a lone surrogate, which no UTF-8 text can.
            TokenLimitError: the text is too long and `overflow` is "error".
        """
        limit = self._limit(max_tokens)
        if overflow not in get_args(Overflow):
            raise ConfigError(f"overflow={overflow!r}: one of {get_args(Overflow)}.")
        if not isinstance(text, str):
            raise InputError(f"a text is {type(text).__name__}: pass str; decode bytes first.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which is not Unicode text. "
                "Decode the source with errors='replace', or remove it."
            ) from error
        pieces: list[int] = self._pieces.encode(text)
        num_tokens = len(pieces) + 2
        if num_tokens > limit and overflow == "error":
            raise TokenLimitError(
                f"the text has {num_tokens} tokens, the limit is {limit}. Split it, or pass "
                "overflow='truncate' to embed its beginning."
            )
        return Tokens(ids=(self.bos_id, *pieces[: limit - 2], self.eos_id), num_tokens=num_tokens)

    def spare_ids(self) -> list[int]:
        """Ids of the `<unusedN>` pieces, by N: for uses that the vocabulary's makers did not
        foresee. No text gives them but their names.
        """
        pieces = (
            (re.fullmatch(r"<unused(\d+)>", self._pieces.id_to_piece(id_)), id_)
            for id_ in range(self._pieces.get_piece_size())
        )
        return [
            id_
            for _, id_ in sorted(
                (int(match.group(1)), id_) for match, id_ in pieces if match is not None
            )
        ]

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of these ids, control tokens left out."""
        control = (self.bos_id, self.eos_id, self.pad_id)
        text: str = self._pieces.decode([token for token in ids if token not in control])
        return text

    def _limit(self, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self.max_tokens
        if not isinstance(max_tokens, int) or not 3 <= max_tokens <= self.max_tokens:
            raise ConfigError(
                f"max_tokens={max_tokens!r}: a whole number from 3 to the model's own "
                f"{self.max_tokens}."
            )
        return max_tokens


def tokenizer_of(path: Path, config: EncoderConfig) -> Tokenizer:
    """The tokenizer of a model; see `Tokenizer` for what is refused."""
    return Tokenizer(
        path,
        bos_id=config.bos_id,
        eos_id=config.eos_id,
        pad_id=config.pad_id,
        vocab_size=config.vocab_size,
        max_tokens=config.max_tokens,
    )
