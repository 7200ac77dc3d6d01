"""Contrastive training: its loss and gradient are those of the report's equations written out, and
its states open elsewhere.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import ConfigError
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.tokens import Tokenizer
from egemma_quant.schemes import INT4, Scheme
from egemma_train.data.batches import Batch, BatchConfig, Batches
from egemma_train.data.datasets import Dataset, DatasetConfig, Row
from egemma_train.loop import run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives import contrast
from egemma_train.objectives.contrast import Contrast, ContrastConfig, Matching
from egemma_train.start.decoder import random_encoder
from egemma_train.teachers.space import TeacherSpace
from egemma_train.teachers.teacher import Embedded, Role
from tests.tiny import BOS, EOS, PAD, VOCAB

CONFIG = EncoderConfig(
    vocab_size=VOCAB,
    width=32,
    ffn_width=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    query_scale=0.25,
    norm_eps=1e-6,
    layer_types=(SLIDING, FULL),
    window=8,
    rope_theta_full=1e6,
    rope_theta_sliding=1e4,
    max_tokens=64,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    pooling="mean",
    dense=((32, 64), (64, 32)),
    dims=(32, 16),
)
ROWS = (
    Row("where does the oil leak", "The pump leaks at the hose.", ("The roof leaks.",)),
    Row("who wrote", "She wrote a letter to the owner of the mill, who never answered.", ()),
    # the query of row 0
    Row(
        "where does the oil leak",
        "Oil drips from the motor.",
        ("A letter about oil.", "Bread and oil."),
    ),
    # its negative answers rows 0 and 2
    Row("bread", "Flour, water, salt and patience.", ("The pump leaks at the hose.",)),
    Row("how is bread made", "Flour, water, salt and patience.", ()),  # the positive of row 3
    Row("what sleeps", "The cat sleeps on the warm stone.", ("The cat answers.",)),
    Row("reset my password", "Call us when the phone is offline.", (), "Passwords"),
    Row("litres in 2024", "In 2024 the yield was 1375 litres.", ("In 2025 only 980.",)),
)
LOSS = ContrastConfig(temperature=0.1, chunk_tokens=150)


def dataset(
    name: str = "toy", rows: Sequence[Row] = ROWS, task: str = "question answering"
) -> Dataset:
    return Dataset(
        DatasetConfig(name=name, path=("x.jsonl",), kind="pairs", task=task), tuple(rows), {}
    )


def batches(
    tokenizer_path: Path, *datasets: Dataset, hard_negatives: bool = True, batch_size: int = 8
) -> Batches:
    tokenizer = Tokenizer(
        tokenizer_path, bos_id=BOS, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, max_tokens=64
    )
    config = BatchConfig(
        batch_size=batch_size,
        max_query_tokens=48,
        max_document_tokens=48,
        hard_negatives=hard_negatives,
    )
    return Batches(datasets or (dataset(),), tokenizer, EMBEDDING_GEMMA, config)


class Oracle:
    """A teacher whose vectors follow from role and text."""

    name, dim = "oracle", 24

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        drawn = np.array(
            [
                np.random.default_rng(zlib.crc32(f"{role}{text}".encode())).standard_normal(
                    self.dim
                )
                for text in texts
            ],
            np.float32,
        ).reshape(-1, self.dim)
        return Embedded(
            drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.zeros(len(texts), np.bool_)
        )


def matching() -> Matching:
    return Matching(Oracle(), TeacherSpace(32, 24, "linear"))  # type: ignore[arg-type]


def objective(
    tokenizer_path: Path,
    config: ContrastConfig = LOSS,
    *datasets: Dataset,
    hard_negatives: bool = True,
    shard: bool = False,
    **options: Any,
) -> Contrast:
    given: dict[str, Any] = {"matching": matching() if config.matching else None, **options}
    encoder = random_encoder(CONFIG, 1).requires_grad_()
    if shard:
        given["ranks"].shard(encoder)
    return Contrast(
        encoder,
        batches(tokenizer_path, *datasets, hard_negatives=hard_negatives),
        config,
        tokenizer_path=tokenizer_path,
        prompts=EMBEDDING_GEMMA,
        **given,
    )


def gradients(objective: Contrast, step: int = 0) -> tuple[dict[str, float], dict[str, Tensor]]:
    for weight in objective.parameters().values():
        weight.grad = None
    losses = objective.backward(step).losses
    return losses, {
        name: weight.grad.clone()
        for name, weight in objective.parameters().items()
        if weight.grad is not None
    }


# the equations, in their order
def by_hand(objective: Contrast, batch: Batch) -> dict[str, Tensor]:  # noqa: PLR0912
    """Equations 2 to 5 as they are printed, a text at a time and a pair at a time."""
    config = objective.config
    B = len(batch.queries)

    def embed(ids: Sequence[int]) -> Tensor:
        return objective.encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]  # type: ignore[no-any-return]

    q, p = [embed(ids) for ids in batch.queries], [embed(ids) for ids in batch.positives]
    given = iter(zip(batch.negatives, batch.negative_texts, strict=True))
    n: list[tuple[Tensor, str] | None] = []
    for has in batch.has_negative:
        ids, text = next(given) if has else ((), "")
        n.append((embed(ids), text) if has else None)
    parts = {"contrast": torch.zeros(()), "spread_out": torch.zeros(())}
    for dim in objective.dims:

        def cosine(one: Tensor, other: Tensor, dim: int = dim) -> Tensor:
            return (one[:dim] @ other[:dim]) / (one[:dim].norm() * other[:dim].norm())

        for i in range(B):
            above = torch.exp(cosine(q[i], p[i]) / config.temperature)
            below = above * (0 if config.literal_mask else 1)
            for j in range(B):
                if (
                    j != i
                    and batch.query_texts[i] != batch.query_texts[j]
                    and batch.positive_texts[i] != batch.positive_texts[j]
                ):
                    below = below + torch.exp(cosine(q[i], p[j]) / config.temperature)
                if j == i and (own := n[i]) is not None:
                    similarity = cosine(q[i], own[0])
                    below = below + math.exp(config.hardness * similarity.item()) * torch.exp(
                        similarity / config.temperature
                    )
                elif config.share_negatives and (other := n[j]) is not None:
                    answers = {
                        batch.positive_texts[k]
                        for k in range(B)
                        if batch.query_texts[k] == batch.query_texts[i]
                    }
                    if other[1] not in answers:
                        below = below + torch.exp(cosine(q[i], other[0]) / config.temperature)
            parts["contrast"] = parts["contrast"] - torch.log(above / below) / B
            for side in (q, p):
                parts["spread_out"] = parts["spread_out"] + config.spread_out * sum(
                    cosine(side[i], side[j]) ** 2 for j in range(B) if j != i
                ) / (B * (B - 1))
    if not config.spread_out:
        del parts["spread_out"]
    if objective.matching is not None:
        linear, role = objective.matching.space.map, "query" if batch.symmetric else "document"
        assert linear is not None
        found = [pair for pair in n if pair is not None]
        sides: list[tuple[list[Tensor], str, list[str]]] = [
            (q, "query", batch.query_texts),
            (p, role, batch.positive_texts),
            ([pair[0] for pair in found], role, [pair[1] for pair in found]),
        ]
        parts["matching"] = torch.zeros(())
        for vectors, side_role, texts in sides:
            for vector, text in zip(vectors, texts, strict=True):
                student = linear.weight @ vector
                theirs = torch.from_numpy(Oracle().embed(side_role, [text]).vectors[0])  # type: ignore[arg-type]
                parts["matching"] = parts["matching"] + config.matching * (
                    student / student.norm() - theirs
                ).norm() / len(texts)
    return parts


CASES = {
    "pairs": (LOSS, False, "question answering"),
    "hard negatives": (LOSS, True, "question answering"),
    "hardness 0, no spread-out": (
        replace(LOSS, hardness=0, spread_out=0),
        True,
        "question answering",
    ),
    "shared negatives": (replace(LOSS, share_negatives=True), True, "question answering"),
    "literal mask": (replace(LOSS, literal_mask=True, spread_out=0.3), True, "question answering"),
    "teacher": (replace(LOSS, matching=2.5, spread_out=0.5), True, "question answering"),
    "teacher, pairs": (replace(LOSS, matching=2.5), False, "question answering"),
    "teacher, both sides alike": (
        replace(LOSS, matching=2.5, share_negatives=True),
        True,
        "sentence similarity",
    ),
    "one width": (replace(LOSS, dims=(16,)), True, "question answering"),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_equations(
    tiny_spm: Path, case: str, recompute: bool
) -> None:
    config, hard_negatives, task = CASES[case]
    made = objective(
        tiny_spm,
        replace(config, recompute=recompute),
        dataset(task=task),
        hard_negatives=hard_negatives,
    )
    batch = made.batches.at(0)
    assert (batch.symmetric, sum(batch.has_negative)) == (
        task == "sentence similarity",
        5 if hard_negatives else 0,
    )
    losses, found = gradients(made)
    parts = by_hand(made, batch)
    assert losses == pytest.approx(
        {
            "loss": sum(part.item() for part in parts.values()),
            **{name: part.item() for name, part in parts.items()},
        },
        rel=1e-5,
    )
    named = made.parameters()
    assert found.keys() == named.keys()
    wanted = torch.autograd.grad(torch.stack(list(parts.values())).sum(), list(named.values()))
    scale = max(gradient.abs().max().item() for gradient in wanted)
    for name, gradient in zip(named, wanted, strict=True):
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=1e-3,
            atol=2e-6 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_it_does_not_matter_how_the_batch_is_cut(
    tiny_spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = contrast.backward_in_chunks
    monkeypatch.setattr(
        contrast,
        "backward_in_chunks",
        lambda embed, chunks, loss_of, recompute: (
            seen.append(len(chunks)),
            real(embed, chunks, loss_of, recompute=recompute),
        )[1],
    )
    results = [
        gradients(objective(tiny_spm, replace(LOSS, matching=1.0, chunk_tokens=size)))
        for size in (1, 100, 10**6)
    ]
    assert (seen[0], seen[2]) == (21, 1)
    assert 1 < seen[1] < 21
    for losses, found in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_bfloat16_is_close_and_its_vectors_and_gradients_are_float32(tiny_spm: Path) -> None:
    exact, exact_gradients = gradients(objective(tiny_spm))
    for recompute in (False, True):
        made = objective(tiny_spm, replace(LOSS, precision="bfloat16", recompute=recompute))
        close, found = gradients(made)
        assert close["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert close["loss"] != exact["loss"], "computed in float32"
        assert found.keys() == exact_gradients.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            similarity = torch.nn.functional.cosine_similarity(
                gradient.flatten(), exact_gradients[name].flatten(), dim=0
            )
            assert similarity > 0.95, f"{name}: {similarity}"


def test_tokens_are_those_of_the_global_batch_and_the_source_is_its_dataset(tiny_spm: Path) -> None:
    made = objective(tiny_spm)
    batch = made.batches.at(0)
    outcome = made.backward(0)
    assert (outcome.tokens, outcome.source) == (
        sum(len(ids) for side in (batch.queries, batch.positives, batch.negatives) for ids in side),
        "toy",
    )


@pytest.mark.parametrize("activations", [False, True])
def test_every_pass_of_a_scheme_runs_inside_its_rounding(
    tiny_spm: Path, monkeypatch: pytest.MonkeyPatch, activations: bool
) -> None:
    inside = [False]

    @contextmanager
    def rounding(encoder: Encoder, scheme: Scheme, **options: bool) -> Iterator[None]:
        assert (scheme, options) == (INT4, {"activations": activations})
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(contrast, "rounded", rounding)

    class Dev:
        def score(self, encoder: Encoder) -> dict[str, float]:
            assert inside[0]
            return {"score": 0.25}

    for recompute in (False, True):
        made = objective(
            tiny_spm,
            replace(LOSS, recompute=recompute),
            scheme=INT4,
            activations=activations,
            dev=Dev(),
        )
        passes: list[bool] = []
        made.encoder.register_forward_hook(lambda *_, passes=passes: passes.append(inside[0]))
        made.encoder.embed_tokens.weight.register_hook(
            lambda gradient, passes=passes: passes.append(inside[0])
        )
        made.backward(0)
        assert len(passes) > 2
        assert all(passes)
        assert made.evaluate() == {"score": 0.25}
        assert not inside[0]
    assert objective(tiny_spm).evaluate() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"hardness": -1.0}, "hardness=-1"),
        ({"spread_out": -1.0}, "spread_out=-1"),
        ({"matching": -1.0}, "matching=-1"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"precision": "float16"}, "float16 overflows"),
        ({"distance": "l1"}, "distance='l1'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContrastConfig(**changes)


def test_a_teacher_and_its_weight_come_together_and_widths_are_the_models(tiny_spm: Path) -> None:
    with pytest.raises(ConfigError, match=r"matching=1\.0, and no teacher is given"):
        objective(tiny_spm, replace(LOSS, matching=1.0), matching=None)
    with pytest.raises(ConfigError, match=r"matching=0\.0, and a teacher is given"):
        objective(tiny_spm, matching=matching())
    with pytest.raises(ConfigError, match=r"dims=\[32, 8\].*\[32, 16\]"):
        objective(tiny_spm, replace(LOSS, dims=(32, 8)))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RUN = LoopConfig(steps=6, learning_rate=1e-2, warmup_steps=1, save_every=2, log_every=1, keep=3)
TRAINED = replace(LOSS, matching=1.0)


def two_sets() -> tuple[Dataset, Dataset]:
    other = [
        Row(
            f"Question {number} of the mill",
            f"The answer is {number * 7}.",
            (f"The answer is {number}.",) if number % 3 else (),
        )
        for number in range(20)
    ]
    return dataset(), dataset("mill", other, "sentence similarity")


SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.train.test_contrast import RUN, TRAINED, objective, two_sets
from egemma_train.loop import run
torch.set_num_threads(1)
run(objective(Path(sys.argv[1]), TRAINED, *two_sets()), RUN, Path(sys.argv[2]), on_step=lambda progress: print(progress.step, progress.outcome.source, flush=True))
"""


def script(tokenizer_path: Path, folder: Path, kill_at: int | None = None) -> list[str]:
    sources = []
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tokenizer_path), str(folder)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            step, source = line.split()
            sources.append(source)
            if int(step) == kill_at:
                os.kill(child.pid, signal.SIGKILL)
                break
    assert child.returncode == (-signal.SIGKILL if kill_at else 0)
    return sources


def test_a_run_that_was_killed_ends_with_the_same_bits_and_opens_elsewhere(
    tiny_spm: Path, tmp_path: Path
) -> None:
    whole = objective(tiny_spm, TRAINED, *two_sets())
    finished = run(whole, RUN, tmp_path / "whole")
    before = random_encoder(CONFIG, 1)
    assert all(
        not torch.equal(weight, old)
        for weight, old in zip(whole.encoder.parameters(), before.parameters(), strict=True)
    )
    sources = script(tiny_spm, tmp_path / "killed", kill_at=5)
    assert set(sources) == {"toy", "mill"}
    script(tiny_spm, tmp_path / "killed")
    for name in (
        "model/model.safetensors",
        "model/2_Dense/model.safetensors",
        *(
            f"checkpoints/step-00000006/training/{file}.safetensors"
            for file in ("optimizer", "extra")
        ),
    ):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name

    opened = load_encoder(open_checkpoint(str(finished.model)))
    for (name, weight), (other, loaded) in zip(
        whole.encoder.named_parameters(), opened.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, loaded), name
    transformers = pytest.importorskip("sentence_transformers")
    batch = whole.batches.at(0)
    # a result, and a state with what training needs beside it
    for folder in (finished.model, tmp_path / "killed/checkpoints/step-00000004"):
        ours = load_encoder(open_checkpoint(str(folder)))
        theirs = transformers.SentenceTransformer(str(folder), device="cpu")
        texts = (
            [EMBEDDING_GEMMA.query("question answering") + text for text in batch.query_texts]
            if not batch.symmetric
            else list(batch.query_texts)
        )
        tokenizer = open_checkpoint(str(folder)).tokenizer()
        rows = [tokenizer.encode(text).ids for text in texts]
        with torch.no_grad():
            vectors = torch.cat(
                [
                    ours(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
                    for ids in rows
                ]
            )
        np.testing.assert_allclose(theirs.encode(texts), vectors.numpy(), atol=1e-5)
