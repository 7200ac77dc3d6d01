"""Two processes on one batch compute what one does: losses, gradients, whole runs.

They speak gloo on one machine, as torchrun would have them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import ConfigError
from egemma_core.nn.encode import by_length
from egemma_core.nn.load import load_encoder
from egemma_quant.schemes import INT4
from egemma_train import checkpoints
from egemma_train.loop import Objective, run
from egemma_train.loop_config import LoopConfig
from egemma_train.objectives.contrast import Contrast
from egemma_train.objectives.denoise import DenoisingObjective
from egemma_train.objectives.language_model import LanguageModelObjective
from egemma_train.ranks import ALONE, Ranks, is_shard, join, whole
from tests.train.test_contrast import LOSS, ROWS, dataset, objective, two_sets
from tests.train.test_denoise import denoising, language_model

ROOT = Path(__file__).parents[2]
# so one process has none
ONE_NEGATIVE = [
    replace(row, negatives=row.negatives if number == 0 else ()) for number, row in enumerate(ROWS)
]
TEACHER = replace(LOSS, matching=2.0, spread_out=0.5)
STEPS = (0, 1)  # each in another order of rows
RUN = LoopConfig(
    steps=5, learning_rate=2e-4, warmup_steps=1, save_every=2, log_every=1, evaluate_every=2
)
OBJECTIVES: dict[str, Callable[[Path, Ranks], Any]] = {
    "pairs": lambda spm, ranks: objective(spm, LOSS, hard_negatives=False, ranks=ranks),
    "a single negative": lambda spm, ranks: objective(
        spm, LOSS, dataset(rows=ONE_NEGATIVE), ranks=ranks
    ),
    "a single negative, recomputed": lambda spm, ranks: objective(
        spm, replace(LOSS, recompute=True, chunk_tokens=90), dataset(rows=ONE_NEGATIVE), ranks=ranks
    ),
    "shared negatives": lambda spm, ranks: objective(
        spm, replace(LOSS, share_negatives=True), ranks=ranks
    ),
    "teacher": lambda spm, ranks: objective(spm, TEACHER, ranks=ranks),
    "teacher, a single negative": lambda spm, ranks: objective(
        spm, TEACHER, dataset(rows=ONE_NEGATIVE), ranks=ranks
    ),
    "teacher, two sets": lambda spm, ranks: objective(
        spm, replace(TEACHER, recompute=True), *two_sets(), ranks=ranks
    ),
    "denoising": lambda spm, ranks: denoising(spm, ranks=ranks),
    "language model": lambda spm, ranks: language_model(spm, ranks=ranks),
}
SHARDED: dict[str, Callable[[Path, Ranks], Any]] = {
    "shards": lambda spm, ranks: objective(
        spm, replace(TEACHER, chunk_tokens=60), *two_sets(), ranks=ranks, shard=True
    ),
    "shards, recomputed": lambda spm, ranks: objective(
        spm, replace(TEACHER, chunk_tokens=60, recompute=True), *two_sets(), ranks=ranks, shard=True
    ),
    "shards, rounded": lambda spm, ranks: objective(
        spm,
        replace(TEACHER, chunk_tokens=60, recompute=True),
        *two_sets(),
        ranks=ranks,
        shard=True,
        scheme=INT4,
    ),
}
OBJECTIVES |= SHARDED
RUNS = ("teacher, two sets", "denoising", "shards", "shards, rounded")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scored:
    """An objective whose dev score is another one on each process: what counts is the first
    one's.
    """

    def __init__(
        self, of: Contrast | DenoisingObjective | LanguageModelObjective, rank: int
    ) -> None:
        self.parameters, self.backward, self.save, self.encoder, self.rank = (
            of.parameters,
            of.backward,
            of.save,
            of.encoder,
            rank,
        )
        self.rounding = of.rounding if isinstance(of, Contrast) else nullcontext

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        with self.rounding():  # a save comes next: it must not find what this left
            return {
                "score": self.rank
                + self.encoder(torch.tensor([[2, 5, 6, 7, 1]]), torch.ones(1, 5, dtype=torch.bool))[
                    0, 0
                ].item()
            }


def computed(made: Any, step: int) -> tuple[dict[str, float], int, str, dict[str, Tensor]]:
    for weight in made.parameters().values():
        weight.grad = None
    outcome = made.backward(step)
    return (
        outcome.losses,
        outcome.tokens,
        outcome.source,
        {
            name: whole(weight.grad).clone()
            for name, weight in made.parameters().items()
            if weight.grad is not None
        },
    )


def trained(made: Any, folder: Path, ranks: Ranks) -> tuple[dict[str, Tensor], Any]:
    scored: Objective = Scored(made, ranks.rank)
    finished = run(scored, RUN, folder, ranks=ranks)
    return {
        name: whole(weight.detach()).clone() for name, weight in made.parameters().items()
    }, finished


def worker(spm: Path, folder: Path) -> None:
    """What each of two processes does; the results lie in files by rank."""
    torch.set_num_threads(1)
    with join("cpu") as ranks:
        made = {name: make(spm, ranks) for name, make in OBJECTIVES.items()}
        results: dict[str, Any] = {
            "gradients": {
                name: [computed(made[name], step) for step in STEPS] for name in OBJECTIVES
            },
            "norms": {
                name: ranks.clip(made[name].parameters().values(), 0.5) for name in OBJECTIVES
            },
            "clipped": {
                name: ranks.clip(made[name].parameters().values(), 9.0) for name in OBJECTIVES
            },
            "is shard": {
                name: all(map(is_shard, made[name].encoder.parameters())) for name in OBJECTIVES
            },
            "sum": ranks.sum(torch.tensor([1.0 + ranks.rank])),
            "gather": ranks.gather(torch.tensor([1.0 + ranks.rank])),
            "agree": ranks.agree(f"from {ranks.rank}"),
        }
        for refuse in (
            lambda: ranks.share(7),
            lambda: ranks.of_first(lambda: Ranks(count=2).share(3)),
        ):
            try:
                refuse()
            except ConfigError as error:
                results.setdefault("refused", []).append(str(error))
        for name in RUNS:
            results[name] = trained(
                OBJECTIVES[name](spm, ranks),
                folder / name / ("run" if ranks.first else "nobody writes here"),
                ranks,
            )
            dist.barrier()
            again = folder / name / "again"
            if ranks.first:  # as a kill behind step 4 would leave it
                shutil.copytree(folder / name / "run", again)
                (again / "result.json").unlink()
                shutil.rmtree(again / "model")
                shutil.rmtree(checkpoints.step_folder(again / "checkpoints", 5))
            dist.barrier()
            results[f"{name} again"] = trained(OBJECTIVES[name](spm, ranks), again, ranks)
        torch.save(results, folder / f"rank-{ranks.rank}.pt")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def pair(
    tiny_spm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pair")
    command = (
        "from pathlib import Path; from tests.train.test_ranks import worker; "
        f"worker(Path({str(tiny_spm)!r}), Path({str(folder)!r}))"
    )
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [child.wait(timeout=150) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(
    tiny_spm: Path, pair: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    alone = OBJECTIVES[name](tiny_spm, ALONE)
    for step in STEPS:
        losses, tokens, source, gradients = computed(alone, step)
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for results in pair[1]:
            their_losses, their_tokens, their_source, theirs = results["gradients"][name][step]
            assert their_losses == pytest.approx(losses, rel=1e-6)
            assert (their_tokens, their_source) == (tokens, source)
            assert theirs.keys() == gradients.keys()
            for weight, gradient in gradients.items():
                torch.testing.assert_close(
                    theirs[weight],
                    gradient,
                    rtol=1e-5,
                    atol=2e-6 * largest,
                    msg=lambda text, where=f"step {step}, {weight}": f"{where}: {text}",
                )
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert [results["norms"][name] for results in pair[1]] == pytest.approx([norm, norm], rel=1e-5)


def test_shards_are_shards_and_their_processes_have_unlike_numbers_of_chunks(
    tiny_spm: Path, pair: tuple[Path, list[dict[str, Any]]]
) -> None:
    for results in pair[1]:
        assert results["is shard"] == {name: name in SHARDED for name in OBJECTIVES}
    numbers = []
    for rank in range(2):
        made = objective(tiny_spm, replace(TEACHER, chunk_tokens=60), *two_sets())
        batch = made.batches.at(0)
        rows = slice(4 * rank, 4 * rank + 4)
        before = sum(batch.has_negative[: rows.start])
        negatives = batch.negatives[before : before + sum(batch.has_negative[rows])]
        numbers.append(
            len(by_length([*batch.queries[rows], *batch.positives[rows], *negatives], 60))
        )
    assert numbers[0] != numbers[1]


def test_processes_tell_each_other_what_they_have(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    for results in pair[1]:
        assert results["clipped"] == pytest.approx(dict.fromkeys(OBJECTIVES, 0.5), rel=1e-4)
        assert results["sum"].tolist() == [3.0]
        assert results["gather"].tolist() == [[1.0], [2.0]]
        assert results["agree"] == "from 0"
        assert results["refused"] == [
            "A batch of 7 does not divide among 2 processes. Choose a multiple.",
            "A batch of 3 does not divide among 2 processes. Choose a multiple.",
        ]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_is_that_of_one_and_the_first_writes(
    tiny_spm: Path, tmp_path: Path, pair: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    start = {
        weight: value.detach().clone()
        for weight, value in OBJECTIVES[name](tiny_spm, ALONE).parameters().items()
    }
    weights, finished = trained(OBJECTIVES[name](tiny_spm, ALONE), tmp_path / "run", ALONE)
    folder, results = pair
    assert sorted(path.name for path in (folder / name).iterdir()) == ["again", "run"]
    written = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")}
    assert {
        path.relative_to(folder / name / "run") for path in (folder / name / "run").rglob("*")
    } == written
    for result in results:
        for key in (name, f"{name} again"):
            theirs, their_finished = result[key]
            assert (their_finished.step, their_finished.tokens) == (5, finished.tokens)
            assert their_finished.scores == pytest.approx(finished.scores, abs=1e-5)
            for weight, value in weights.items():
                # Adam divides a gradient by its own size, so where that is near 0 its rounding
                # shows: up to a twentieth of one step, in one number of thousands.
                torch.testing.assert_close(
                    theirs[weight],
                    value,
                    rtol=0,
                    atol=1e-5,
                    msg=lambda text, weight=weight: f"{weight}: {text}",
                )
                assert (theirs[weight] - value).norm() <= 2e-3 * (value - start[weight]).norm(), (
                    weight
                )
                # on each process, and gone on from step 4
                assert torch.equal(theirs[weight], results[0][name][0][weight]), f"{key}: {weight}"
    if name != "denoising":
        opened = load_encoder(open_checkpoint(str(folder / name / "run/model")))
        assert all(
            torch.equal(weight, results[0][name][0][parameter])
            for parameter, weight in opened.named_parameters()
        )
    assert (folder / name / "again/model/model.safetensors").read_bytes() == (
        folder / name / "run/model/model.safetensors"
    ).read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_ranks import RUN, OBJECTIVES, run
from egemma_train.ranks import join
with join("cpu") as ranks:
    made = OBJECTIVES["pairs"](Path(sys.argv[1]), ranks)
    if ranks.rank == int(sys.argv[3]):
        made.evaluate = lambda: sys.exit("this process has had enough")
    run(made, RUN, Path(sys.argv[2]), ranks=ranks)
"""


@pytest.mark.parametrize("rank", [1])
def test_an_error_in_one_process_ends_the_other(tiny_spm: Path, tmp_path: Path, rank: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(tiny_spm),
            str(tmp_path / "run"),
            str(rank),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "this process has had enough" in done.stderr
    assert not (tmp_path / "run/result.json").exists()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='tpu'"), join("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"), join("cuda"):
            pass
