"""Stage 0: a decoder-only model's weights learn to see both sides, as the encoder of an
encoder-decoder that restores damaged texts (UL2).

Source: arXiv:2509.20354 section 2.3; T5Gemma, arXiv:2504.06225 (K = 1,000 steps of cross-attention
alone where it starts fresh); T5Gemma 2, arXiv:2512.14856. Texts are drawn one by one, each as often
as any other; neither paper says how theirs are cut and packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from egemma_core.checks import whole_number
from egemma_core.errors import ConfigError
from egemma_core.nn.encode import pad
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
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
from egemma_train.objectives.encoder_decoder import CrossInit, adapt
from egemma_train.objectives.token_loss import backward_in_parts, flat, token_loss
from egemma_train.objectives.ul2 import TASKS, Denoised, SpecialTokens, denoise
from egemma_train.ranks import ALONE, Ranks

SHORTEST = 4  # tokens of a text from which spans can be taken out
# the mixture, as a row of tasks
_TASK_SLOTS = tuple(index for index, task in enumerate(TASKS) for _ in range(task.weight))


class DenoisingObjective:
    """The objective of stage 0; `egemma_train.loop` trains it.

    The encoder reads a damaged text, and a decoder, which is thrown away afterwards, writes what is
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
        whole_number("cross_steps", cross_steps, 0)
        if cross_steps and cross == "balanced":
            raise ConfigError(
                f"cross_steps={cross_steps} with cross={cross!r}: only cross-attention that starts "
                "'fresh' is trained alone at first."
            )
        self.encoder, self.config, self.cross_steps = encoder, config, cross_steps
        self.tokenizer_path, self.prompts, self.ranks = tokenizer_path, prompts, ranks
        tokenizer = whole_texts(tokenizer_path, encoder.config, config)
        self.special = SpecialTokens.of(tokenizer)
        reserved = (*self.special.tasks, *self.special.sentinels)
        self.texts = Texts(texts, tokenizer, config, SHORTEST, reserved)
        self.model = adapt(encoder, cross, config.seed).to(ranks.device)
        if config.compile:
            compile_layers((*encoder.layers, *self.model.decoder.layers), ranks.device)
        draw = np.random.default_rng((config.seed, DEV))
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
        """Return the parameters of the encoder and of the decoder."""
        return {
            **dict(self.encoder.named_parameters()),
            **{f"decoder.{name}": weight for name, weight in self.model.decoder.named_parameters()},
        }

    def examples(self, step: int) -> list[Denoised]:
        """Return the batch of a step.

        Neither side of an example is longer than `max_tokens`: a span is no shorter than its
        sentinel.
        """
        draw = np.random.default_rng((self.config.seed, WINDOWS, step))
        return [
            denoise(window(ids, self.config.max_tokens - 2, draw), self.special, draw)
            for ids in self.texts.at(step)
        ]

    def backward(self, step: int) -> Outcome:
        """Add the gradient of the loss of a step's examples to `.grad`; see `Objective`."""
        examples = self.examples(step)
        targets = sum(len(example.target) for example in examples)
        mine = examples[self.ranks.share(len(examples))]
        trained = (
            self.model.cross_parameters()
            if step < self.cross_steps
            else list(self.model.parameters())
        )
        self.model.train()
        with training_only(trained, self.model.parameters()):
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
        """Return the mean nats of a token that is to be written, below zero: higher is better.

        "score" is over all, and each task has its own by its name.
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
        """Write the encoder as a checkpoint."""
        save_checkpoint(self.encoder, self.tokenizer_path, self.prompts, folder)

    def _loss(self, chunk: Sequence[Denoised]) -> Tensor:
        """Return the nats of all target tokens of a chunk, summed."""
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


def in_chunks(examples: Sequence[Denoised], chunk_tokens: int) -> list[list[Denoised]]:
    """Return the examples in groups that are computed together.

    A group is of like shares of target and source, then of like length; both sides padded make at
    most `chunk_tokens`. An example that is longer than that goes alone.
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


@contextmanager
def training_only(
    trained: Sequence[nn.Parameter], parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Let only `trained` take a gradient in the block; nothing is computed for the others."""
    kept = set(map(id, trained))
    frozen = [weight for weight in parameters if weight.requires_grad and id(weight) not in kept]
    try:
        for weight in frozen:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)
