"""Plain texts for stage 0: read, drawn by step, tokenized, cut to windows.

What a step sees is a pure function of (seed, step).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from egemma_core.checkpoint.config import EncoderConfig
from egemma_core.checks import one_of, whole_number
from egemma_core.errors import ConfigError, InputError
from egemma_core.json_lines import BadRowError, checked_text
from egemma_core.nn.encode import Ids
from egemma_core.tokens import Tokenizer
from egemma_train.data.json_rows import checking_row, rows_of

SHORTEST_WINDOW = 6  # tokens
# characters; a longer text has four tokens, in every vocabulary whose pieces are shorter than 86
# characters
_NEVER_SHORT = 256
# keep the random numbers of different uses of one seed apart
ORDER, WINDOWS, DEV = 1, 2, 3


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
        whole_number("batch_size", self.batch_size, 1)
        whole_number("max_tokens", self.max_tokens, SHORTEST_WINDOW)
        whole_number("chunk_tokens", self.chunk_tokens, 1)
        whole_number("seed", self.seed, 0)
        one_of(
            "precision",
            self.precision,
            ("float32", "bfloat16"),
            hint="In this model float16 overflows.",
        )


def read_texts(paths: Sequence[Path], fields: Sequence[str]) -> list[str]:
    """Return every different text of some fields of JSON-lines files, in the order of the files.

    Args:
        paths: .jsonl or .jsonl.gz files.
        fields: names such as "text", "query", "positive", "negative"; a row has at least one of
            them, a text or a list of texts each.

    Raises:
        InputError: a file cannot be read or is empty; a row has none of the fields, or a field that
            is no text. Names file, line and field.
    """
    if not paths or not fields:
        raise ConfigError(
            f"paths={list(paths)} and fields={list(fields)}: name at least one of each."
        )
    texts: dict[str, None] = {}
    for path in paths:
        for number, row in rows_of(path):
            with checking_row(path, number):
                texts |= dict.fromkeys(_texts_in(row, fields))
    return list(texts)


def _texts_in(row: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    present = [field for field in fields if field in row]
    if not present:
        raise BadRowError(
            f"none of the fields {list(fields)}, only {list(row)}. Name the one that holds the "
            "text."
        )
    for field in present:
        values = row[field] if isinstance(row[field], list) and row[field] else [row[field]]
        for value in values:
            yield checked_text(value, field)


def hold_out_texts(texts: Sequence[str], one_in: int) -> tuple[list[str], list[str]]:
    """Return the texts without about one in `one_in`, and those that are held out.

    They are chosen by hash, so every run holds out the same ones.
    """
    kept: list[str] = []
    held: list[str] = []
    for text in texts:
        is_held = int(hashlib.sha256(text.encode()).hexdigest(), 16) % one_in == 0
        (held if is_held else kept).append(text)
    return kept, held


class Texts:
    """Texts in an order that is drawn anew for every pass over them.

    All are seen once before one is seen twice.

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
                f"({self.too_short} more have fewer than {least} tokens).",
                hint="Lower it, or give more texts.",
            )

    def at(self, step: int) -> list[Ids]:
        """Return the tokens of a step's texts, whole, without BOS and EOS."""
        first = step * self.config.batch_size
        rows = []
        for place in range(first, first + self.config.batch_size):
            epoch, row = divmod(place, len(self.texts))
            rows.append(tokenize(self.texts[self._order(epoch)[row]], self.tokenizer))
        return rows

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # a batch reaches over one border at most
            self._orders = {
                kept: order for kept, order in self._orders.items() if kept == epoch - 1
            }
            self._orders[epoch] = np.random.default_rng(
                (self.config.seed, ORDER, epoch)
            ).permutation(len(self.texts))
        return self._orders[epoch]


def whole_texts(path: Path, model: EncoderConfig, config: TextConfig) -> Tokenizer:
    """Return the model's tokenizer without its limit, because windows are cut out of whole texts.

    Raises:
        ConfigError: a window is longer than the model reads.
    """
    if config.max_tokens > model.max_tokens:
        raise ConfigError(
            f"max_tokens={config.max_tokens} is more than the {model.max_tokens} that the model "
            "reads."
        )
    return Tokenizer(
        path,
        bos_id=model.bos_id,
        eos_id=model.eos_id,
        pad_id=model.pad_id,
        vocab_size=model.vocab_size,
        max_tokens=sys.maxsize,
    )


def tokenize(text: str, tokenizer: Tokenizer) -> Ids:
    """Return the tokens of a text without BOS and EOS."""
    return tokenizer.encode(text).ids[1:-1]


def usable(
    texts: Sequence[str], tokenizer: Tokenizer, least: int, reserved: Iterable[int] = ()
) -> tuple[list[str], int]:
    """Return the texts of at least `least` tokens, and the number of the others.

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
        if len(text) > _NEVER_SHORT or len(tokenize(text, tokenizer)) >= least
    ]
    return kept, len(texts) - len(kept)


def window(ids: Ids, limit: int, draw: np.random.Generator) -> Ids:
    """Return a text of at most `limit` tokens whole, or that many tokens from anywhere in it."""
    start = int(draw.integers(len(ids) - limit + 1)) if len(ids) > limit else 0
    return ids[start : start + limit]
