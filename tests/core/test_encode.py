"""Token rows through an encoder: in their order, in chunks of a bounded size, whatever stands
beside them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ConfigError
from egemma_core.nn.encode import by_length, encode_rows, pad
from egemma_train.start.decoder import random_encoder

CONFIG = EncoderConfig(
    vocab_size=60,
    width=32,
    ffn_width=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    query_scale=0.25,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=32,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((32, 64), (64, 32)),
    dims=(32, 16),
)
ROWS = [(2, *range(5, 5 + length), 1) for length in (7, 1, 20, 3, 3, 12, 1)]


def test_rows_are_padded_on_the_right_and_marked() -> None:
    ids, mask = pad([(2, 5, 1), (2, 1)], 9)
    assert ids.tolist() == [[2, 5, 1], [2, 1, 9]]
    assert ids.dtype == torch.int64
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_rows_of_similar_length_go_together_and_no_chunk_is_too_large() -> None:
    # Lengths 9 3 22 5 5 14 3: two of 3 and one of 5 pad to 15, a second of 5 would make 20; the row
    # of 22 is too long for any chunk.
    assert by_length(ROWS, 16) == [[1, 6, 3], [4], [0], [5], [2]]
    assert by_length(ROWS, 15) == by_length(ROWS, 16)
    assert by_length(ROWS, 14) == [[1, 6], [3, 4], [0], [5], [2]]
    assert by_length(ROWS, 10_000) == [[1, 6, 3, 4, 0, 5, 2]]
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        by_length(ROWS, 0)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 40, 10_000])
def test_vectors_come_back_in_the_order_of_the_rows(chunk_tokens: int) -> None:
    encoder = random_encoder(CONFIG, 3).eval()
    seen: list[int] = []

    def spy(ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(ids.numel())
        return encoder(ids, mask)  # type: ignore[no-any-return]

    with torch.no_grad():
        alone = torch.cat(
            [
                encoder(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
                for row in ROWS
            ]
        )
        found = encode_rows(spy, ROWS, 0, chunk_tokens)
    # Another length of padding changes the order of float32 sums, nothing else.
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert all(size <= max(chunk_tokens, 22) for size in seen)
    assert (alone[0] - alone[5]).norm() > 0.1, (
        "rows have vectors of their own, so a wrong order would show"
    )
