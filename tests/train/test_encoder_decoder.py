"""A decoder-only Gemma 3 taken apart and put together again: the decoder without cross-attention is
transformers' own, the encoder is the same weights with other masks, and cross-attention is what
T5Gemma's is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.errors import ShapeError
from egemma_core.nn.encoder import Encoder
from egemma_train.objectives.encoder_decoder import CrossAttention, adapt, causal_hidden_states
from egemma_train.objectives.token_loss import token_loss

transformers = pytest.importorskip(
    "transformers", reason="it is what we compare with; pip install 'egemma[dev]'"
)

CONFIG = EncoderConfig(
    vocab_size=200,
    width=64,
    ffn_width=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    query_scale=24**-0.5,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL, SLIDING),
    window=4,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=48,
    bos_id=2,
    eos_id=1,
    pad_id=0,
    pooling="mean",
    dense=((64, 128), (128, 64)),
    dims=(64, 32),
)


def make() -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(CONFIG)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.15)
    return encoder.eval()


def decoder_only(encoder: Encoder) -> torch.nn.Module:
    """transformers' causal Gemma 3 with the same weights."""
    config = transformers.Gemma3TextConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        rms_norm_eps=1e-6,
        sliding_window=8,
        layer_types=list(CONFIG.layer_types),
        max_position_embeddings=64,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        attn_implementation="eager",
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    names = {
        f"model.{name}": weight
        for name, weight in encoder.named_parameters()
        if not name.startswith(("dense", "pooler"))
    }
    missing, surplus = model.load_state_dict(names, strict=False)
    assert (missing, surplus) == (["lm_head.weight"], [])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model  # type: ignore[no-any-return]


def test_without_cross_attention_the_decoder_is_transformers_own_decoder() -> None:
    encoder = make()
    # longer than the window of 8
    ids = torch.randint(3, 200, (3, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = adapt(encoder).decoder(ids, encoder.embed_tokens.weight)
        theirs = decoder_only(encoder)(ids, use_cache=False).logits
        without = causal_hidden_states(encoder, ids) @ encoder.embed_tokens.weight.T
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(without, theirs, atol=2e-4, rtol=1e-4)


def test_the_encoder_brings_no_new_weights_and_the_table_is_shared() -> None:
    encoder = make()
    model = adapt(encoder)
    assert model.encoder is encoder
    assert [name for name, _ in model.named_parameters() if "embed_tokens" in name] == [
        "encoder.embed_tokens.weight"
    ]
    for layer, own in zip(model.decoder.layers, encoder.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, own.self_attn.q_proj.weight)
        assert layer.self_attn.q_proj.weight is not own.self_attn.q_proj.weight


def test_balanced_cross_attention_starts_as_the_layers_self_attention_and_fresh_does_not() -> None:
    encoder = make()
    for own, layer in zip(encoder.layers, adapt(encoder).decoder.layers, strict=True):
        for name, weight in own.self_attn.named_parameters():
            assert torch.equal(layer.cross_attn.get_parameter(name), weight), name
        assert torch.equal(layer.pre_cross_attn_layernorm.weight, own.input_layernorm.weight)
        assert torch.equal(
            layer.post_cross_attn_layernorm.weight, own.post_attention_layernorm.weight
        )
    fresh = adapt(make(), "fresh", seed=3)
    assert all(
        not torch.equal(layer.cross_attn.q_proj.weight, layer.self_attn.q_proj.weight)
        for layer in fresh.decoder.layers
    )
    again = adapt(make(), "fresh", seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True)
    )
    crossing = {id(weight) for weight in fresh.cross_parameters()}
    assert {name for name, weight in fresh.named_parameters() if id(weight) in crossing} == {
        name for name, _ in fresh.named_parameters() if "cross" in name
    }


def test_cross_attention_is_t5gemmas_with_gemma_3s_norms() -> None:
    """transformers' T5Gemma has no norms of queries and keys, so ours are set to do nothing that
    the reference cannot: weight 0 and inputs of root mean square 1 would be needed; instead the
    reference is computed here in the open, in float64, key by key.
    """
    torch.manual_seed(0)
    cross = CrossAttention(CONFIG).double()
    x, memory = (
        torch.randn(2, 5, 64, dtype=torch.float64),
        torch.randn(2, 7, 64, dtype=torch.float64),
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found = cross(x, memory, torch.where(mask[:, None, None, :], 0.0, -1e9).double())

    def normed(vector: torch.Tensor) -> torch.Tensor:
        return vector / (vector.square().mean() + 1e-6).sqrt()

    for text in range(2):
        for token in range(5):
            heads = []
            for head in range(4):
                query = normed((cross.q_proj.weight @ x[text, token])[32 * head : 32 * head + 32])
                shared = slice(32 * (head // 2), 32 * (head // 2) + 32)
                keys = [
                    normed((cross.k_proj.weight @ row)[shared]) for row in memory[text][mask[text]]
                ]
                values = torch.stack(
                    [(cross.v_proj.weight @ row)[shared] for row in memory[text][mask[text]]]
                )
                weights = torch.softmax(
                    torch.stack([query @ key for key in keys]) * CONFIG.query_scale, 0
                )
                heads.append(weights @ values)
            # norms round to float32
            torch.testing.assert_close(
                found[text, token], cross.o_proj.weight @ torch.cat(heads), atol=1e-6, rtol=1e-5
            )


def test_a_target_token_sees_nothing_behind_it_and_padding_of_the_source_changes_nothing() -> None:
    model = adapt(make())
    source = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(source, dtype=torch.bool)
    target = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores = model(source, mask, target)
        other = target.clone()
        other[:, 7:] = 5
        torch.testing.assert_close(model(source, mask, other)[:, :7], scores[:, :7])
        padded = torch.cat([source, torch.zeros(2, 3, dtype=torch.int64)], 1)
        torch.testing.assert_close(model(padded, padded != 0, target), scores, atol=1e-4, rtol=1e-4)
        moved = source.clone()
        moved[:, 0] = (moved[:, 0] + 1) % 190 + 3
        assert (model(moved, mask, target) - scores).abs().max() > 1e-3, "the source must matter"


@pytest.mark.parametrize("block_scores", [1, 3 * 200, 10**9])  # 1, 3 and all tokens at a time
def test_the_blockwise_loss_and_its_gradients_are_those_of_plain_cross_entropy(
    block_scores: int,
) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, table = (
        torch.randn(*shape, generator=random).requires_grad_() for shape in ((11, 64), (200, 64))
    )
    target = torch.randint(0, 200, (11,), generator=random)
    ours, plain = (
        token_loss(hidden, table, target, block_scores) / 7,
        F.cross_entropy(hidden @ table.T, target, reduction="sum") / 7,
    )
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, table)),
        torch.autograd.grad(plain, (hidden, table)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_loss_worked_by_hand() -> None:
    """Scores (2, 1, 0) for a token whose next is the first: ln(e^2 + e + 1) - 2 = 0.40760596."""
    table = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert token_loss(torch.tensor([[1.0, 0.0]]), table, torch.tensor([0])).item() == pytest.approx(
        0.40760596, abs=1e-6
    )


def test_a_frozen_table_gets_no_gradient_and_bfloat16_its_own() -> None:
    hidden, table, target = (
        torch.randn(5, 64, requires_grad=True),
        torch.randn(200, 64),
        torch.tensor([1, 2, 3, 4, 5]),
    )
    token_loss(hidden, table, target).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert table.grad is None
    narrow, wide = (
        hidden.detach().bfloat16().requires_grad_(),
        hidden.detach().bfloat16().float().requires_grad_(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        token_loss(narrow, table, target).backward()  # type: ignore[no-untyped-call]
    F.cross_entropy(wide @ table.T, target, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    # one rounding to 8 bits
    torch.testing.assert_close(narrow.grad.float(), wide.grad, atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        assert token_loss(hidden, table, target).requires_grad is False


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"hidden \(2, 4\)"):
        token_loss(torch.ones(2, 4), torch.ones(9, 4), torch.tensor([1]))


def test_gemmas_vocabulary_never_has_all_its_scores_in_memory() -> None:
    """1,024 tokens x 262,144 scores are 1.07 GB, and plain cross-entropy holds three such; ours
    holds those of 256 tokens.
    """
    script = """
import resource, torch
from egemma_train.objectives.token_loss import token_loss
torch.set_num_threads(1)
hidden, table = torch.randn(1024, 8, requires_grad=True), torch.randn(262144, 8, requires_grad=True)
target = torch.arange(1024)
token_loss(hidden[:1], table, target[:1]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_loss(hidden, table, target).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # Linux counts in KiB
    grown = (
        int(
            subprocess.run(
                [sys.executable, "-c", script], check=True, capture_output=True, text=True
            ).stdout
        )
        * 1024
    )
    assert grown < 0.4e9, f"{grown / 1e9:.2f} GB"


def test_it_learns_to_copy_from_the_source() -> None:
    """A few steps: the loss of a target that only the source tells falls far below that of
    guessing, and gradients reach the encoder.
    """
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    model = adapt(encoder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(150):
        source = torch.randint(10, 30, (32, 4), generator=random)
        bos = torch.full((32, 1), CONFIG.bos_id)
        hidden = model.hidden_states(
            source, torch.ones_like(source, dtype=torch.bool), torch.cat([bos, source[:, :-1]], 1)
        )
        loss = (
            token_loss(hidden.flatten(0, 1), encoder.embed_tokens.weight, source.flatten())
            / source.numel()
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert encoder.layers[0].self_attn.q_proj.weight.grad is not None
    assert losses[0] > 2.9  # guessing among 20 is ln 20 = 3.0
    assert losses[-1] < 1.0
