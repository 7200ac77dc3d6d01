"""Stage 0: a decoder-only model's weights learn to see both sides, as the encoder of an
encoder-decoder that restores damaged texts (UL2).

Also the plain language model, for those who have no decoder-only checkpoint to begin with. Both are
objectives of `egemma_train.loop`.

Source: arXiv:2509.20354 section 2.3; T5Gemma, arXiv:2504.06225 (K = 1,000 steps of cross-attention
alone where it starts fresh); T5Gemma 2, arXiv:2512.14856. Texts are drawn one by one, each as often
as any other; neither paper says how theirs are cut and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from egemma_core.errors import ConfigError
from egemma_core.nn.encode import Ids, by_length, pad
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
from egemma_train.compiled import compile_layers
from egemma_train.data.texts import TextConfig, Texts, tokenize, usable, whole_texts, window
from egemma_train.loop import Outcome
from egemma_train.objectives.encoder_decoder import (
    CrossInit,
    adapt,
    causal_hidden_states,
    token_loss,
)
from egemma_train.objectives.ul2 import TASKS, Denoised, SpecialTokens, denoise
from egemma_train.ranks import ALONE, Ranks
from egemma_train.start.decoder import save_decoder

SHORTEST = 4  # tokens of a text from which spans can be taken out
# the mixture, as a row of tasks
_TASK_SLOTS = tuple(index for index, task in enumerate(TASKS) for _ in range(task.weight))
# keep the random numbers of different uses apart; egemma_train.data.texts has 1
_WINDOWS, _DEV = 2, 3
Chunk = TypeVar("Chunk")


class DenoisingObjective:
    """The encoder reads a damaged text, a decoder that is thrown away afterwards writes what is
    missing.

    Args:
        encoder: a decoder's weights (`read_decoder`), float32, on the device of `ranks`. It is
            trained in place; its head is not.
        dev: texts for `evaluate`, each damaged once and for all, the tasks in the shares of their
            mixture.
        cross, cross_steps: how cross-attention starts, and for how many steps it is trained alone
            where it starts "fresh".
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        config: TextConfig,
        *,
        tokenizer_path: Path,
        prompts: Prompts,
        dev: Sequence[str] = (),
        cross: CrossInit = "balanced",
        cross_steps: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        if cross_steps < 0 or (cross_steps and cross == "balanced"):
            raise ConfigError(
                f"cross_steps={cross_steps} with cross={cross!r}: only cross-attention that starts "
                "'fresh' is trained alone at first."
            )
        self.encoder, self.config, self.cross_steps, self.ranks = (
            encoder,
            config,
            cross_steps,
            ranks,
        )
        self.tokenizer_path, self.prompts = tokenizer_path, prompts
        tokenizer = whole_texts(tokenizer_path, encoder.config, config)
        self.special = SpecialTokens.of(tokenizer)
        reserved = (*self.special.tasks, *self.special.sentinels)
        self.texts = Texts(texts, tokenizer, config, SHORTEST, reserved)
        self.model = adapt(encoder, cross, config.seed).to(ranks.device)
        if config.compile:
            compile_layers((*encoder.layers, *self.model.decoder.layers), ranks.device)
        draw = np.random.default_rng((config.seed, _DEV))
        self.dev = [
            denoise(
                window(tokenize(text, tokenizer), config.max_tokens - 2, draw),
                self.special,
                draw,
                _TASK_SLOTS[index % len(_TASK_SLOTS)],
            )
            for index, text in enumerate(usable(dev, tokenizer, SHORTEST, reserved)[0])
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            **dict(self.encoder.named_parameters()),
            **{f"decoder.{name}": weight for name, weight in self.model.decoder.named_parameters()},
        }

    def examples(self, step: int) -> list[Denoised]:
        """That step's batch.

        Neither side of an example is longer than `max_tokens`: a span is no shorter than its
        sentinel.
        """
        draw = np.random.default_rng((self.config.seed, _WINDOWS, step))
        return [
            denoise(window(ids, self.config.max_tokens - 2, draw), self.special, draw)
            for ids in self.texts.at(step)
        ]

    def backward(self, step: int) -> Outcome:
        examples = self.examples(step)
        targets = sum(len(example.target) for example in examples)
        mine = examples[self.ranks.share(len(examples))]
        trained = (
            self.model.cross_parameters()
            if step < self.cross_steps
            else list(self.model.parameters())
        )
        self.model.train()
        with only(trained, self.model.parameters()):
            loss = self.ranks.sum(
                backward_in_parts(in_chunks(mine, self.config.chunk_tokens), self._loss, targets)
            )
        self.ranks.sum_gradients(trained)
        return Outcome(
            {"loss": float(loss)},
            targets + sum(len(example.source) for example in examples),
            "denoising",
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean nats of a token that is to be written, below zero so that higher is better: "score"
        over all, and for each task by its name.
        """
        if not self.dev:
            return {}
        scores: dict[str, float] = {}
        total = 0.0
        for index, task in enumerate(TASKS):
            own = [example for example in self.dev if example.task == index]
            if own:
                nats = sum(
                    float(self._loss(chunk)) for chunk in in_chunks(own, self.config.chunk_tokens)
                )
                scores[task.name] = -nats / sum(len(example.target) for example in own)
                total += nats
        return {"score": -total / sum(len(example.target) for example in self.dev), **scores}

    def save(self, folder: Path) -> None:
        save_checkpoint(self.encoder, self.tokenizer_path, self.prompts, folder)

    def _loss(self, chunk: Sequence[Denoised]) -> Tensor:
        """Nats of all target tokens of the chunk, summed."""
        config, device = self.encoder.config, self.ranks.device
        # (b, T)
        source, source_mask = pad([example.source for example in chunk], config.pad_id, device)
        # (b, S)
        target, target_mask = pad(
            [(config.bos_id, *example.target[:-1]) for example in chunk], config.pad_id, device
        )
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        ):
            hidden = self.model.hidden_states(source, source_mask, target)  # (b, S, D)
        return token_loss(
            hidden[target_mask],
            self.encoder.embed_tokens.weight,
            flat([example.target for example in chunk], device),
        )


class LanguageModelObjective:
    """The next token of plain texts: makes a decoder-only checkpoint, which `save` writes, out of
    an encoder's layers under causal masks.
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
        self.encoder, self.config, self.tokenizer_path, self.ranks = (
            encoder,
            config,
            tokenizer_path,
            ranks,
        )
        if config.compile:
            compile_layers(encoder.layers, ranks.device)
        tokenizer = whole_texts(tokenizer_path, encoder.config, config)
        self.texts = Texts(texts, tokenizer, config, 1)
        draw = np.random.default_rng((config.seed, _DEV))
        self.dev = [
            window((*tokenize(text, tokenizer), encoder.config.eos_id), config.max_tokens, draw)
            for text in usable(dev, tokenizer, 1)[0]
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the file that `save` writes."""
        return {
            f"model.{name}": weight
            for name, weight in self.encoder.named_parameters()
            if not name.startswith(("dense.", "pooler."))
        }

    def rows(self, step: int) -> list[Ids]:
        """What is to be written behind BOS: a text and EOS, or a window of that."""
        draw = np.random.default_rng((self.config.seed, _WINDOWS, step))
        return [
            window((*ids, self.encoder.config.eos_id), self.config.max_tokens, draw)
            for ids in self.texts.at(step)
        ]

    def backward(self, step: int) -> Outcome:
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
        """Mean nats of a token, below zero so that higher is better."""
        if not self.dev:
            return {}
        return {
            "score": -sum(float(self._loss(chunk)) for chunk in self._chunks(self.dev))
            / sum(map(len, self.dev))
        }

    def save(self, folder: Path) -> None:
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


def in_chunks(examples: Sequence[Denoised], chunk_tokens: int) -> list[list[Denoised]]:
    """Examples that go together: of like shares of target and source, then of like length; both
    sides padded make at most `chunk_tokens`.

    An example that is longer than that goes alone.
    """
    chunks: list[list[Denoised]] = []
    longest = (0, 0)
    for example in sorted(
        examples,
        key=lambda example: (TASKS[example.task].rate, len(example.source) + len(example.target)),
    ):
        together = max(longest[0], len(example.source)), max(longest[1], len(example.target))
        if chunks and (len(chunks[-1]) + 1) * sum(together) <= chunk_tokens:
            chunks[-1].append(example)
            longest = together
        else:
            chunks.append([example])
            longest = len(example.source), len(example.target)
    return chunks


def backward_in_parts(
    chunks: Sequence[Chunk], loss_of: Callable[[Chunk], Tensor], total: int
) -> Tensor:
    """The chunks' summed losses over `total`, detached, with its gradient added to every `.grad`:
    the same for every way to cut chunks.
    """
    parts = []
    for chunk in chunks:
        part = loss_of(chunk) / total
        torch.autograd.backward(part)
        parts.append(part.detach())
    return torch.stack(parts).sum()


@contextmanager
def only(trained: Sequence[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, no other parameter takes a gradient; nothing is computed for it either."""
    kept = set(map(id, trained))
    frozen = [weight for weight in parameters if weight.requires_grad and id(weight) not in kept]
    try:
        for weight in frozen:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)


def flat(rows: Sequence[Ids], device: torch.device) -> Tensor:
    """All rows' tokens, one row after the other."""
    return torch.tensor([token for row in rows for token in row], device=device)
