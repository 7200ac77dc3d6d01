"""A small vocabulary of our own: Gemma's kind of SentencePiece model, and token vectors to start
training from.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.files import write_file
from egemma_core.nn.encoder import Encoder

# Channels of a token vector that only make it longer: one group of the 4-bit formats, so that they
# share no scale with others.
FILLER = 32


def train_vocabulary(texts: Iterable[str], num_pieces: int, path: Path, spare: int = 0) -> None:
    """Write a SentencePiece BPE model with Gemma 3's settings and `num_pieces` pieces, durably.

    Identity normalizer, no blank in front, byte fallback, single digits, runs of newlines and
    blanks as pieces; pad 0, eos 1, bos 2, unk 3, `<mask>` 4. Merges stop at blanks, unlike Gemma's:
    8,000 pieces are too few for phrases.

    Args:
        spare: how many `<unusedN>` pieces it gets, which no text gives; UL2 denoising takes its
            task tokens and sentinels from these.

    Source: the trainer and normalizer specification inside Gemma 3's tokenizer.model.
    """
    runs = ["\n" * n for n in range(1, 32)] + ["\u2581" * n for n in range(2, 32)]
    model = io.BytesIO()  # a model written to a file holds that file's name
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["<mask>", *runs, *(f"<unused{number}>" for number in range(spare))],
        character_coverage=0.9995,
        max_sentence_length=4096,
        num_threads=2,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, model.getvalue())


def token_vectors(
    rows: Sequence[Sequence[int]],
    vocab_size: int,
    width: int,
    *,
    window: int = 5,
    rare: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """Return vectors to start an embedding table from.

    They follow from how often tokens occur and stand near each other. A short contrastive run sees
    too few texts to learn this from nothing. All channels but the last FILLER hold what a token
    means: the leading singular vectors of the positive pointwise mutual information, times the
    square roots of their singular values. The last ones hold what it does not say: a token of
    frequency f keeps the share rare / (rare + f) of its length in the others and the rest goes
    there, where `initialize` lets nothing through.

    Args:
        rows: token ids of many texts, without prompts.
        window: tokens at most this far apart count as neighbours.
        rare: the frequency at which half of a token's length is meaning.

    Returns:
        (vocab_size, width) float32, each of unit length.

    Source: Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity" (context smoothing
    0.75); Arora, Liang and Ma 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"
    (weights by frequency).
    """
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float32)
    gap = [-1] * window  # keeps neighbours inside their text
    flat = np.concatenate([np.asarray([*row, *gap], dtype=np.int64) for row in rows])
    for distance in range(1, window + 1):
        left, right = flat[:-distance], flat[distance:]
        inside = (left >= 0) & (right >= 0)
        counts += (
            np.bincount(left[inside] * vocab_size + right[inside], minlength=vocab_size**2).astype(
                np.float32
            )
            / distance
        )
    near = torch.from_numpy(counts).view(vocab_size, vocab_size)
    near = near + near.T  # (V, V)
    context = near.sum(0) ** 0.75
    expected = near.sum(1, keepdim=True) * (context / context.sum())  # (V, V)
    information = torch.where(
        near > 0, (near / expected.clamp(min=1e-12)).clamp(min=1.0).log(), 0.0
    )
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(vocab_size, width - FILLER, generator=generator)
    for _ in range(4):  # subspace iteration; the matrix is nearly symmetric
        sketch = torch.linalg.qr(information @ (information.T @ sketch)).Q
    inner, strength, _ = torch.linalg.svd(sketch.T @ information, full_matrices=False)
    meaning = (sketch @ inner) * strength.sqrt()  # (V, D - FILLER)
    unseen = meaning.norm(dim=1) < 1e-6
    meaning[unseen] = torch.randn(int(unseen.sum()), width - FILLER, generator=generator)
    frequency = torch.from_numpy(
        np.bincount(flat[flat >= 0], minlength=vocab_size).astype(np.float32)
    )
    share = (rare / (rare + frequency / frequency.sum()))[:, None]  # (V, 1)
    filler = ((1 - share.square()) / FILLER).sqrt().expand(-1, FILLER)
    return torch.cat((F.normalize(meaning, dim=-1) * share, filler), dim=-1)


@torch.no_grad()
def initialize(encoder: Encoder, vectors: Tensor, seed: int) -> None:
    """Fill an encoder so that a text's vector is at first nearly the mean of its tokens' meanings.

    Every block starts at a fifth of the residual stream and the
    dense head as a rotation and back. The filler channels lengthen a frequent token, so that the
    norms shrink the rest of it, and no norm hands them on.

    Args:
        vectors: (V, D), from `token_vectors`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in encoder.named_parameters():
        if name == "embed_tokens.weight":
            weight.copy_(vectors)
        elif ".post_" in name:
            weight.fill_(-0.8)  # the norm multiplies by 1 + weight
        elif name.startswith("dense."):
            continue
        elif weight.ndim == 2:
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.zero_()
            if len(weight) == vectors.shape[1]:  # not the norms of queries and keys
                weight[-FILLER:] = -1.0
    first, second = (dense.weight for dense in encoder.dense)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    nn.init.orthogonal_(first, generator=generator)
    second.copy_(first.T)
