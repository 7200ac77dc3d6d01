"""The plain language model, for those who have no decoder-only checkpoint to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from egemma_core.nn.encode import Ids, by_length, pad
from egemma_core.nn.encoder import Encoder
from egemma_train.compiled import compile_layers
from egemma_train.data.texts import (
    DEV,
    WINDOWS,
    TextConfig,
    Texts,
    tokenize,
    usable,
    whole_texts,
    window,
)
from egemma_train.loop import Outcome
from egemma_train.objectives.encoder_decoder import causal_hidden_states
from egemma_train.objectives.token_loss import backward_in_parts, flat, token_loss
from egemma_train.ranks import ALONE, Ranks
from egemma_train.start.decoder import save_decoder


class LanguageModelObjective:
    """The objective of a language-model stage; `egemma_train.loop` trains it.

    An encoder's layers under causal masks learn the next token of plain texts, which makes the
    decoder-only checkpoint that `save` writes.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        config: TextConfig,
        *,
        tokenizer_path: Path,
        dev: Sequence[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.encoder, self.config = encoder, config
        self.tokenizer_path, self.ranks = tokenizer_path, ranks
        if config.compile:
            compile_layers(encoder.layers, ranks.device)
        tokenizer = whole_texts(tokenizer_path, encoder.config, config)
        self.texts = Texts(texts, tokenizer, config, 1)
        draw = np.random.default_rng((config.seed, DEV))
        self.dev = [
            window((*tokenize(text, tokenizer), encoder.config.eos_id), config.max_tokens, draw)
            for text in usable(dev, tokenizer, 1)[0]
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the file that `save` writes."""
        return {
            f"model.{name}": weight
            for name, weight in self.encoder.named_parameters()
            if not name.startswith(("dense.", "pooler."))
        }

    def rows(self, step: int) -> list[Ids]:
        """Return what is to be written behind BOS: a text and EOS, or a window of that."""
        draw = np.random.default_rng((self.config.seed, WINDOWS, step))
        return [
            window((*ids, self.encoder.config.eos_id), self.config.max_tokens, draw)
            for ids in self.texts.at(step)
        ]

    def backward(self, step: int) -> Outcome:
        """Add the gradient of the loss of a step's rows to `.grad`; see `Objective`."""
        rows = self.rows(step)
        tokens = sum(map(len, rows))
        self.encoder.train()
        loss = self.ranks.sum(
            backward_in_parts(self._chunks(rows[self.ranks.share(len(rows))]), self._loss, tokens)
        )
        self.ranks.sum_gradients(self.parameters().values())
        return Outcome({"loss": float(loss)}, tokens, "language model")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the mean nats of a token, below zero so that higher is better."""
        if not self.dev:
            return {}
        nats = sum(float(self._loss(chunk)) for chunk in self._chunks(self.dev))
        return {"score": -nats / sum(map(len, self.dev))}

    def save(self, folder: Path) -> None:
        """Write the layers as a decoder-only checkpoint."""
        save_decoder(self.encoder, self.tokenizer_path, folder)

    def _chunks(self, rows: Sequence[Ids]) -> list[list[Ids]]:
        return [
            [rows[index] for index in chunk] for chunk in by_length(rows, self.config.chunk_tokens)
        ]

    def _loss(self, rows: Sequence[Ids]) -> Tensor:
        config, device = self.encoder.config, self.ranks.device
        # (b, S)
        ids, mask = pad([(config.bos_id, *row[:-1]) for row in rows], config.pad_id, device)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        ):
            hidden = causal_hidden_states(self.encoder, ids)  # (b, S, D)
        return token_loss(hidden[mask], self.encoder.embed_tokens.weight, flat(rows, device))
