"""Pre-finetuning and finetuning: queries and documents to vectors, and the report's losses on them.

Source: arXiv:2509.20354, sections 2.2 and 2.3. Not published, so chosen here and written into every
run: temperature, the weights of the three losses, batch sizes, learning rates.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from egemma_core.checks import number, one_of, whole_number
from egemma_core.errors import ConfigError
from egemma_core.nn.encode import Chunk, by_length, pad
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.prompts import Prompts
from egemma_quant.qat import rounded
from egemma_quant.schemes import Scheme
from egemma_train.compiled import compile_layers
from egemma_train.data.batches import Batch, Batches, BatchesAhead
from egemma_train.loop import Outcome
from egemma_train.objectives.cache import backward_in_chunks
from egemma_train.objectives.losses import (
    DISTANCES,
    HARDNESS,
    Distance,
    false_negatives,
    matching_loss,
    matryoshka,
    nce_loss,
    right_negatives,
    spread_out_loss,
)
from egemma_train.ranks import ALONE, Ranks, gathered, is_shard
from egemma_train.teachers.space import TeacherSpace
from egemma_train.teachers.teacher import Role, Teacher

if TYPE_CHECKING:
    from egemma_train.evaluate import DevSets

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The loss of a stage, and how a batch is computed."""

    temperature: float = 0.05
    hardness: float = HARDNESS
    share_negatives: bool = False  # hard negatives of all rows are wrong answers to every query
    literal_mask: bool = False  # leave the positive out of the denominator, as the report prints it
    spread_out: float = 1.0  # weight of that loss; the contrastive one has 1
    matching: float = 0.0  # weight of the teacher's
    distance: Distance = "l2"  # to the teacher
    # prefixes that are trained; None for all that the model is to have
    dims: tuple[int, ...] | None = None
    precision: Precision = "float32"  # of matrix products; norms, softmax and losses stay float32
    chunk_tokens: int = 8192  # padded tokens that go through the encoder together
    # layers through torch.compile: faster after half a minute of it, for a lot of steps
    compile: bool = False
    # keep one chunk's activations instead of all, at the price of a second forward pass
    recompute: bool = False

    def __post_init__(self) -> None:
        number("temperature", self.temperature, above=0)
        number("hardness", self.hardness, 0)
        number("spread_out", self.spread_out, 0)
        number("matching", self.matching, 0)
        whole_number("chunk_tokens", self.chunk_tokens, 1)
        one_of(
            "precision",
            self.precision,
            get_args(Precision),
            hint="In this model float16 overflows.",
        )
        one_of("distance", self.distance, DISTANCES)
        if self.dims is not None:
            object.__setattr__(self, "dims", tuple(self.dims))


class Matching:
    """A teacher's vectors, and the space in which the student's are compared with them."""

    def __init__(self, teacher: Teacher, space: TeacherSpace) -> None:
        self.teacher, self.space = teacher, space

    def pair(self, student: Tensor, role: Role, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return student vectors and their texts' teacher vectors in the space of both.

        Args:
            student: (B, D).
            texts: B of them.

        Returns:
            Two (B, width in common) tensors of unit rows.
        """
        vectors = torch.from_numpy(self.teacher.embed(role, texts).vectors).to(student.device)
        return self.space.student(student), self.space.teacher(vectors)


class Contrast:
    """The objective of stages over pairs; `egemma_train.loop` trains it.

    Args:
        encoder: float32; on the device of `ranks`.
        tokenizer_path, prompts: go into the checkpoints.
        dev: scored by `evaluate`.
        matching: a teacher; needed where its loss has a weight.
        scheme: every forward and backward pass and every evaluation computes with weights rounded
            to it, as they will ship; None for the float weights.
        activations: with `scheme`, what goes into each product is rounded as well.
    """

    def __init__(
        self,
        encoder: Encoder,
        batches: Batches | BatchesAhead,
        config: ContrastConfig,
        *,
        tokenizer_path: Path,
        prompts: Prompts,
        dev: DevSets | None = None,
        matching: Matching | None = None,
        scheme: Scheme | None = None,
        activations: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if (config.matching > 0) != (matching is not None):
            raise ConfigError(
                f"matching={config.matching}, and {'a' if matching else 'no'} teacher is given.",
                hint="Give both or neither.",
            )
        self.dims = config.dims or encoder.config.dims
        if not set(self.dims) <= set(encoder.config.dims):
            raise ConfigError(
                f"dims={list(self.dims)} must be among the widths that the model is to have, "
                f"{list(encoder.config.dims)}."
            )
        if config.compile:
            compile_layers(encoder.layers, ranks.device)
        self.encoder, self.batches, self.config = encoder, batches, config
        self.dev, self.matching = dev, matching
        self.scheme, self.activations = scheme, activations
        self.tokenizer_path, self.prompts, self.ranks = tokenizer_path, prompts, ranks

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the encoder's parameters, and those of the map to a teacher's space."""
        found = dict(self.encoder.named_parameters())
        if self.matching is not None:
            for name, weight in self.matching.space.named_parameters():
                found[f"teacher_space.{name}"] = weight
        return found

    def rounding(self) -> AbstractContextManager[None]:
        """Return the context in which the encoder computes with the weights that will ship."""
        if self.scheme is None:
            return nullcontext()
        return rounded(self.encoder, self.scheme, activations=self.activations)

    def backward(self, step: int) -> Outcome:
        """Add the gradient of the loss of a step's batch to `.grad`; see `Objective`."""
        batch = self.batches.at(step)
        mine = self.ranks.share(len(batch.queries))
        # rows of the batch's negatives
        numbers = [index for index, has in enumerate(batch.has_negative) if has]
        # which of them are ours
        own_negatives = [
            place for place, row in enumerate(numbers) if mine.start <= row < mine.stop
        ]
        rows = [
            *batch.queries[mine],
            *batch.positives[mine],
            *(batch.negatives[place] for place in own_negatives),
        ]
        order = by_length(rows, self.config.chunk_tokens)
        device = self.ranks.device
        chunks = [
            pad([rows[index] for index in chunk], self.encoder.config.pad_id, device)
            for chunk in order
        ]
        # all processes gather a layer's weights together: those with fewer chunks repeat one, whose
        # vectors nobody reads
        if any(map(is_shard, self.encoder.parameters())):
            chunks += chunks[:1] * (self.ranks.most(len(chunks)) - len(chunks))
        position = torch.tensor([index for chunk in order for index in chunk]).argsort().to(device)
        parts: dict[str, Tensor] = {}

        def embed(chunk: Chunk) -> Tensor:
            with torch.autocast(
                device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
            ):
                return self.encoder(*chunk)  # type: ignore[no-any-return]

        def loss_of(vectors: Tensor) -> Tensor:
            parts.update(self._losses(vectors[position], batch, mine, own_negatives))
            return torch.stack(list(parts.values())).sum()

        self.encoder.train()
        with self.rounding():
            backward_in_chunks(embed, chunks, loss_of, recompute=self.config.recompute)
        self.ranks.sum_gradients(self.parameters().values())
        if "matching" in parts:  # each process compared its own rows
            parts["matching"] = self.ranks.sum(parts["matching"])
        values = {name: part.detach().item() for name, part in parts.items()}
        tokens = sum(map(len, [*batch.queries, *batch.positives, *batch.negatives]))
        return Outcome({"loss": sum(values.values()), **values}, tokens, batch.dataset)

    def _losses(
        self, vectors: Tensor, batch: Batch, mine: slice, own_negatives: list[int]
    ) -> dict[str, Tensor]:
        """Return the weighted parts of the loss.

        They are of the whole batch, though `matching` is of this process's rows only.
        """
        each = mine.stop - mine.start
        # (b, D), (b, D), (n, D)
        queries, positives, negatives = torch.split(vectors, [each, each, len(own_negatives)])
        has = torch.tensor(batch.has_negative, device=vectors.device)  # (B,)
        blocks = [queries, positives]
        if batch.negatives:
            blocks.append(
                torch.zeros_like(queries).index_put((has[mine].nonzero().squeeze(1),), negatives)
            )
        everyone = self.ranks.gather(torch.stack(blocks))  # (R, 2 or 3, b, D)
        all_queries, all_positives, *rest = everyone.transpose(0, 1).flatten(1, 2)  # (B, D) each
        all_negatives = rest[0] if rest else None
        # (B, B)
        duplicates = false_negatives(batch.query_texts, batch.positive_texts).to(vectors.device)
        right = None
        if all_negatives is not None and self.config.share_negatives:
            texts = iter(batch.negative_texts)
            right = right_negatives(
                batch.query_texts,
                batch.positive_texts,
                [next(texts) if given else None for given in batch.has_negative],
            ).to(vectors.device)

        def nce(queries: Tensor, positives: Tensor, negatives: Tensor | None) -> Tensor:
            return nce_loss(
                queries,
                positives,
                negatives,
                duplicates=duplicates,
                has_negative=has,
                temperature=self.config.temperature,
                hardness=self.config.hardness,
                share_negatives=self.config.share_negatives,
                shared_duplicates=right,
                literal_mask=self.config.literal_mask,
            )

        parts = {"contrast": matryoshka(nce, self.dims, all_queries, all_positives, all_negatives)}
        if self.config.spread_out:
            spread = matryoshka(spread_out_loss, self.dims, all_queries) + matryoshka(
                spread_out_loss, self.dims, all_positives
            )
            parts["spread_out"] = self.config.spread_out * spread
        if self.matching is not None:
            parts["matching"] = self.config.matching * self._match(
                batch, mine, own_negatives, queries, positives, negatives
            )
        return parts

    def _match(
        self,
        batch: Batch,
        mine: slice,
        own_negatives: list[int],
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor,
    ) -> Tensor:
        """Return equation 5 over this process's rows, as its share of the mean over the batch."""
        assert self.matching is not None
        document: Role = "query" if batch.symmetric else "document"
        sides: list[tuple[Tensor, Role, list[str], int]] = [
            (queries, "query", batch.query_texts[mine], len(batch.queries)),
            (positives, document, batch.positive_texts[mine], len(batch.positives)),
            (
                negatives,
                document,
                [batch.negative_texts[place] for place in own_negatives],
                len(batch.negatives),
            ),
        ]
        return torch.stack(
            [
                matching_loss(*self.matching.pair(vectors, role, texts), self.config.distance)
                * (len(vectors) / total)
                for vectors, role, texts, total in sides
                if len(vectors)
            ]
        ).sum()

    def evaluate(self) -> dict[str, float]:
        """Return the scores on the dev sets; none without dev sets."""
        if self.dev is None:
            return {}
        with self.rounding():
            return self.dev.score(self.encoder)

    def save(self, folder: Path) -> None:
        """Write the float weights as a checkpoint; of shards every process must call it."""
        with gathered(self.encoder):
            if self.ranks.first:
                save_checkpoint(self.encoder, self.tokenizer_path, self.prompts, folder)
