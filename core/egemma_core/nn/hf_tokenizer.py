"""SentencePiece's model as the tokenizer.json that Hugging Face's `tokenizers` reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import sentencepiece


def tokenizer_json(path: Path) -> dict[str, Any]:
    """Return a SentencePiece BPE model in the `tokenizers` format.

    Ids are the same, and a text is [BOS] pieces [EOS].

    Args:
        path: the SentencePiece model.

    Source: transformers, convert_slow_tokenizer.generate_merges and GemmaTokenizer.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    pieces = [model.id_to_piece(token) for token in range(model.vocab_size())]
    controls = [
        token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)
    ]
    others = [
        token for token in range(len(pieces)) if token not in controls and not model.is_byte(token)
    ]
    # SentencePiece scores what it merged -0, -1, -2, ... and pieces that a user defined +0; its
    # Python class tells no more.
    normal = [token for token in others if math.copysign(1, model.get_score(token)) < 0]
    user_defined = sorted(set(others) - set(normal))
    by_merge = sorted(normal, key=model.get_score, reverse=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(_added(token, pieces[token], special=True) for token in controls),
            *(_added(token, pieces[token], special=False) for token in user_defined),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": _template(pieces, model.bos_id(), model.eos_id()),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": _merges(pieces, by_merge),
        },
    }


def _merges(pieces: list[str], by_merge: list[int]) -> list[tuple[str, str]]:
    """Return every merge of two pieces, in the order in which they are made.

    SentencePiece stores pieces in merge order and not what was merged. Every split of a piece into
    two pieces is a merge, in the order of the piece it makes and, for several splits of one, of its
    parts.

    Args:
        by_merge: the tokens that merging made or started from, first made first.
    """
    ids = {piece: token for token, piece in enumerate(pieces)}
    mergeable = {pieces[token] for token in by_merge}
    merges = []
    for token in by_merge:
        piece = pieces[token]
        splits = [
            (piece[:at], piece[at:])
            for at in range(1, len(piece))
            if piece[:at] in mergeable and piece[at:] in mergeable
        ]
        merges += sorted(splits, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _added(token: int, piece: str, *, special: bool) -> dict[str, Any]:
    """Return the entry of a piece that no merge makes."""
    return {
        "id": token,
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,  # runs of blanks are found after they became "▁"
        "special": special,
    }


def _template(pieces: list[str], bos_id: int, eos_id: int) -> dict[str, Any]:
    """Return what puts BOS before and EOS behind a text, or a pair of texts."""
    bos, eos = pieces[bos_id], pieces[eos_id]
    before = {"SpecialToken": {"id": bos, "type_id": 0}}
    behind = {"SpecialToken": {"id": eos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "special_tokens": {
            bos: {"id": bos, "ids": [bos_id], "tokens": [bos]},
            eos: {"id": eos, "ids": [eos_id], "tokens": [eos]},
        },
        "single": [before, first, behind],
        "pair": [before, first, second, behind],
    }
