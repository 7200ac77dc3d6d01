"""golden.json: texts, their ids, and the vectors of the float and of the rounded model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from egemma_core.bundle import GOLDEN
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer, Tokens

_PARAGRAPH = (
    "A lighthouse keeper wrote down the weather every evening: the wind, the height of the waves "
    "and the ships that passed. "
    "In winter the lamp was lit before four o'clock, and the oil had to be carried up two hundred "
    "and seven steps. "
)


@dataclass(frozen=True, kw_only=True)
class GoldenText:
    """A text as the runtime will see it, prompt in front."""

    name: str
    text: str
    tokens: Tokens


def golden_texts(tokenizer: Tokenizer, prompts: Prompts) -> list[GoldenText]:
    """Return one text for each way in which embedding models are known to go wrong.

    They are cut to what the model reads.
    """
    document = prompts.document()
    texts = {
        "query": prompts.query() + "How do I grow tomatoes on a balcony?",
        "titled document": prompts.document("Balcony tomatoes")
        + "Give each plant ten litres of soil, sun and steady water."
        if "title: none |" in document
        else document + "Give each plant ten litres of soil, sun and steady water.",
        "no prompt": "tomato",
        "empty": "",
        "empty query": prompts.query(),
        "cjk": document
        + "東京タワーは1958年に完成した電波塔です。机器学习正在改变世界。서울의 봄은 따뜻하다.",
        "code": document
        + 'def add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b  # O(1)\n\n\tfor (;;) '
        "{ i++; }",
        "emoji": prompts.query() + "🎉👩‍🚀 naïve café — Ⅷ½ \u0000 <bos> <unused3> \U00010380",
        # Longer than any window, so that a wrong one shows; the next is cut, so that a lost EOS
        # shows.
        "past the window": document + _PARAGRAPH * 12,
        "cut at the limit": document + _PARAGRAPH * (tokenizer.max_tokens // 20),
    }
    return [
        GoldenText(name=name, text=text, tokens=tokenizer.encode(text, overflow="truncate"))
        for name, text in texts.items()
    ]


# Run together as one padded batch where the runtime takes batches: the vectors must not change.
BATCHES = (("query", "empty", "past the window", "cjk"),)


@torch.no_grad()
def reference_vectors(encoder: Encoder, texts: list[GoldenText]) -> dict[str, NDArray[np.float32]]:
    """Return the (dim,) float32 vector of each text by its name, each run alone and unpadded."""
    vectors = {}
    for text in texts:
        ids = torch.tensor([text.tokens.ids])
        vectors[text.name] = encoder(ids, torch.ones_like(ids))[0].numpy()
    return vectors


def golden_file(
    texts: list[GoldenText],
    exact: dict[str, NDArray[np.float32]],
    rounded: dict[str, NDArray[np.float32]],
    mistaken: dict[str, dict[str, NDArray[np.float32]]],
) -> dict[str, Any]:
    """Return the content of golden.json before anything was measured.

    Args:
        exact, rounded: vectors of the float and of the rounded model, by text.
        mistaken: vectors of the rounded model under each known mistake, by mistake and text.
    """
    return {
        "format_version": 1,
        "cases": [
            {
                "name": text.name,
                "text": text.text,
                "ids": list(text.tokens.ids),
                "num_tokens": text.tokens.num_tokens,
                "truncated": text.tokens.truncated,
                "vector": _floats(exact[text.name]),
                "quantized_vector": _floats(rounded[text.name]),
            }
            for text in texts
        ],
        "batches": [list(batch) for batch in BATCHES],
        "mistakes": [
            {"name": name, "vectors": {case: _floats(vector) for case, vector in vectors.items()}}
            for name, vectors in mistaken.items()
        ],
        "measured": {},  # the deviations by case, once the finished file was run
    }


def write_golden(folder: Path, content: dict[str, Any]) -> None:
    """Write golden.json."""
    text = json.dumps(content, ensure_ascii=True)
    (folder / GOLDEN).write_text(f"{text}\n", encoding="utf-8")


def _floats(vector: NDArray[np.float32]) -> list[float]:
    # The shortest decimal that reads back as the same float32.
    return [float(str(value)) for value in vector.astype(np.float32)]
