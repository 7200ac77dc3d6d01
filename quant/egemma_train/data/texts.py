"""Plain texts for stage 0: read, drawn by step, tokenized, cut to windows.

What a step sees is a pure function of (seed, step).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from egemma_core.config import EncoderConfig
from egemma_core.errors import ConfigError, InputError
from egemma_core.json_lines import BadRowError, checked_text, lines_of, parse_row
from egemma_core.nn.encode import Ids
from egemma_core.tokens import Tokenizer

SHORTEST_WINDOW = 6  # tokens
# characters; a longer text has four tokens, in every vocabulary whose pieces are shorter than 86
# characters
_MAYBE_SHORT = 256
_ORDER = 1  # keeps these random numbers apart from those of the same seed elsewhere


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which texts a step sees, and how they are computed."""

    batch_size: int = 256  # texts of a step, over all ranks
    max_tokens: int = 256  # that either side reads; of a longer text every draw sees another window
    chunk_tokens: int = 8192  # padded tokens, of both sides, that are computed together
    # layers through torch.compile: faster after half a minute of it, for a lot of steps
    compile: bool = False
    # of matrix products; norms, softmax, output scores and loss stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("max_tokens", SHORTEST_WINDOW),
            ("chunk_tokens", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r}: a whole number, at least {least}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(
                f"precision={self.precision!r}: 'float32' or 'bfloat16'; float16 overflows in this "
                "model."
            )


def read_texts(paths: Sequence[Path], fields: Sequence[str]) -> list[str]:
    """Every different text of these fields in files of JSON lines (.jsonl, .jsonl.gz), in the order
    in which they first occur.

    Args:
        fields: names such as "text", "query", "positive", "negative"; a row has at least one of
            them, a text or a list of texts each.

    Raises:
        InputError: a file cannot be read or is empty; a row has none of the fields, or a field that
            is no text. Names file, line and field.
    """
    if not paths or not fields:
        raise ConfigError(f"paths={list(paths)}, fields={list(fields)}: name at least one of each.")
    texts: dict[str, None] = {}
    for path in paths:
        for number, line in lines_of(path):
            try:
                row = parse_row(line, number)
                present = [field for field in fields if field in row]
                if not present:
                    raise BadRowError(
                        f"none of the fields {list(fields)}, only {list(row)}. Name the one that "
                        "holds the text."
                    )
                for field in present:
                    values = (
                        row[field] if isinstance(row[field], list) and row[field] else [row[field]]
                    )
                    texts |= dict.fromkeys(checked_text(value, field) for value in values)
            except BadRowError as bad:
                raise InputError(f"{path}, line {number}: {bad}") from bad
    return list(texts)


def hold_out_texts(texts: Sequence[str], one_in: int) -> tuple[list[str], list[str]]:
    """The texts without about one in `one_in`, and those: by hash, so the same ones in every
    run.
    """
    held = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % one_in == 0 for text in texts]
    return [text for text, out in zip(texts, held, strict=True) if not out], [
        text for text, out in zip(texts, held, strict=True) if out
    ]


class Texts:
    """Texts in an order drawn anew for every pass over them: all are seen once before one is seen
    twice.

    Args:
        texts: tokenized whole each time they are drawn, so cut books into pages.
        least: tokens; `too_short` is how many texts had fewer and were left out.
        reserved: ids that no text may hold.

    Raises:
        ConfigError: fewer usable texts than a batch.
        InputError: a text holds a reserved token.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        config: TextConfig,
        least: int,
        reserved: Iterable[int] = (),
    ) -> None:
        self.texts, self.too_short = usable(texts, tokenizer, least, reserved)
        self.tokenizer, self.config = tokenizer, config
        self._orders: dict[int, NDArray[np.int64]] = {}
        if len(self.texts) < config.batch_size:
            raise ConfigError(
                f"batch_size={config.batch_size}, but there are {len(self.texts)} texts "
                f"({self.too_short} more have fewer than {least} "
                "tokens). Lower it, or give more texts."
            )

    def at(self, step: int) -> list[Ids]:
        """Tokens of that step's texts, whole, without BOS and EOS."""
        first = step * self.config.batch_size
        return [
            tokenize(
                self.texts[self._order(place // len(self.texts))[place % len(self.texts)]],
                self.tokenizer,
            )
            for place in range(first, first + self.config.batch_size)
        ]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # a batch reaches over one border at most
            self._orders = {
                kept: order for kept, order in self._orders.items() if kept == epoch - 1
            }
            self._orders[epoch] = np.random.default_rng(
                (self.config.seed, _ORDER, epoch)
            ).permutation(len(self.texts))
        return self._orders[epoch]


def whole_texts(path: Path, model: EncoderConfig, config: TextConfig) -> Tokenizer:
    """The model's tokenizer without its limit: windows are cut out of whole texts."""
    if config.max_tokens > model.max_tokens:
        raise ConfigError(f"max_tokens={config.max_tokens}, the model reads {model.max_tokens}.")
    return Tokenizer(
        path,
        bos_id=model.bos_id,
        eos_id=model.eos_id,
        pad_id=model.pad_id,
        vocab_size=model.vocab_size,
        max_tokens=sys.maxsize,
    )


def tokenize(text: str, tokenizer: Tokenizer) -> Ids:
    return tokenizer.encode(text).ids[1:-1]


def usable(
    texts: Sequence[str], tokenizer: Tokenizer, least: int, reserved: Iterable[int] = ()
) -> tuple[list[str], int]:
    """The texts of at least that many tokens, and the number of the others.

    Raises:
        InputError: a text holds one of the `reserved` tokens, which only the name of an <unusedN>
            piece gives.
    """
    reserved = frozenset(reserved)
    for index, text in enumerate(texts):
        for name in re.findall(r"<unused\d+>", text) if reserved else ():
            if not reserved.isdisjoint(tokenize(name, tokenizer)):
                raise InputError(
                    f"text {index} holds {name}, which stands for a task or a span here: "
                    f"{text[:60]!r}. Leave such texts out."
                )
    kept = [
        text
        for text in texts
        if len(text) > _MAYBE_SHORT or len(tokenize(text, tokenizer)) >= least
    ]
    return kept, len(texts) - len(kept)


def window(ids: Ids, limit: int, draw: np.random.Generator) -> Ids:
    """All of a text that has at most `limit` tokens, else that many from anywhere in it."""
    start = int(draw.integers(len(ids) - limit + 1)) if len(ids) > limit else 0
    return ids[start : start + limit]
