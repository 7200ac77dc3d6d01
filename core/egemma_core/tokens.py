"""Text to token ids as the model was trained: [BOS] pieces [EOS], no blank in front, case kept.

SentencePiece semantics: the literal text "<bos>" inside a document stays text. (Hugging Face's
tokenizer turns it into the control token, so a document could smuggle one in.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import sentencepiece

from egemma_core.checks import one_of, unicode_text, whole_number
from egemma_core.errors import BundleError, CheckpointError, TokenLimitError

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
                f"{path} is not a readable SentencePiece model: {error}.",
                hint="Copy tokenizer.model from the checkpoint.",
            ) from error
        found = {
            "bos": self._pieces.bos_id(),
            "eos": self._pieces.eos_id(),
            "pad": self._pieces.pad_id(),
        }
        wanted = {"bos": bos_id, "eos": eos_id, "pad": pad_id}
        if found != wanted:
            raise CheckpointError(
                f"{path} has the control ids {found}, the config says {wanted}: it is another "
                "model's tokenizer."
            )
        if self._pieces.vocab_size() > vocab_size:
            raise CheckpointError(
                f"{path} has {self._pieces.vocab_size()} pieces, but the embedding table has "
                f"{vocab_size} rows: it is another model's tokenizer."
            )

    def encode(
        self, text: str, *, max_tokens: int | None = None, overflow: Overflow = "error"
    ) -> Tokens:
        """Return the ids of one text, its prompt already in front.

        Args:
            max_tokens: a limit below the model's own; None for the model's own.
            overflow: what to do with a longer text: refuse it, or cut it so that EOS stays last.

        Raises:
            InputError: `text` is not a str, or holds a lone surrogate, which no UTF-8 text can.
            TokenLimitError: the text is too long and `overflow` is "error".
            ConfigError: `max_tokens` or `overflow` cannot work.
        """
        most = self.max_tokens
        limit = most if max_tokens is None else whole_number("max_tokens", max_tokens, 3, most)
        one_of("overflow", overflow, get_args(Overflow))
        unicode_text("the text", text)
        pieces: list[int] = self._pieces.encode(text)
        num_tokens = len(pieces) + 2
        if num_tokens > limit and overflow == "error":
            raise TokenLimitError(
                f"the text has {num_tokens} tokens, the limit is {limit}.",
                hint='Split it, or read only its beginning (overflow="truncate", on the command '
                "line --overflow truncate).",
            )
        return Tokens(ids=(self.bos_id, *pieces[: limit - 2], self.eos_id), num_tokens=num_tokens)

    def spare_ids(self) -> list[int]:
        """Return the ids of the `<unusedN>` pieces, by N; no text gives them but their names."""
        names = ((id_, self._pieces.id_to_piece(id_)) for id_ in range(self._pieces.vocab_size()))
        found = ((re.fullmatch(r"<unused(\d+)>", name), id_) for id_, name in names)
        return [id_ for _, id_ in sorted((int(match[1]), id_) for match, id_ in found if match)]

    def decode(self, ids: tuple[int, ...]) -> str:
        """Return the text of these ids, control tokens left out."""
        control = (self.bos_id, self.eos_id, self.pad_id)
        text: str = self._pieces.decode([token for token in ids if token not in control])
        return text
