"""The loop: AdamW and its schedule against torch, states from which a killed run goes on exactly,
early stopping, and what it refuses.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from egemma_core.errors import CheckpointError, ConfigError
from egemma_train import checkpoints
from egemma_train.loop import DivergedError, Outcome, Progress, run
from egemma_train.loop_config import LoopConfig
from egemma_train.optimizer import learning_rate, make_optimizer

CONFIG = LoopConfig(
    steps=12, learning_rate=0.1, warmup_steps=3, log_every=2, save_every=4, evaluate_every=4
)


class Points:
    """Fit a line to points that depend on the step.

    `norm` stays where it is in odd steps, `head` always.
    """

    def __init__(
        self,
        *,
        scores: dict[int, float] | None = None,
        broken_at: int | None = None,
        pause_s: float = 0,
    ) -> None:
        torch.manual_seed(0)
        self.layer, self.norm, self.head = (
            nn.Linear(4, 4),
            nn.Parameter(torch.ones(4)),
            nn.Parameter(torch.ones(4)),
        )
        self.scores, self.broken_at, self.pause_s, self.step = scores, broken_at, pause_s, 0

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            "layer.weight": self.layer.weight,
            "layer.bias": self.layer.bias,
            "norm.weight": self.norm,
            "head.weight": self.head,
        }

    def backward(self, step: int) -> Outcome:
        time.sleep(self.pause_s)
        self.step = step + 1
        points = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        scale = self.norm if step % 2 == 0 else self.norm.detach()
        loss = (self.layer(points) * scale - 2 * points).square().mean()
        if step == self.broken_at:
            loss = loss * float("nan")
        loss.backward()  # type: ignore[no-untyped-call]
        return Outcome({"loss": loss.item()}, tokens=16, source="points")

    def evaluate(self) -> dict[str, float]:
        return {} if self.scores is None else {"score": self.scores[self.step]}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        # the rest has no place there
        save_file(
            {"layer.weight": self.layer.weight.detach().clone()}, folder / "model.safetensors"
        )


def weights(objective: Points) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in objective.parameters().values()]


def test_the_loop_is_torch_adamw_with_clipping_and_a_warm_cosine(tmp_path: Path) -> None:
    ours, theirs = Points(), Points()
    finished = run(ours, CONFIG, tmp_path / "run")
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs.layer.weight], "weight_decay": 0.01},
            {"params": [theirs.layer.bias, theirs.norm], "weight_decay": 0},
        ],
        lr=0.1,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / 3
            if step < 3
            else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        ),
    )
    for step in range(12):
        optimizer.zero_grad()
        theirs.backward(step)
        nn.utils.clip_grad_norm_(theirs.parameters().values(), 1.0)
        optimizer.step()
        schedule.step()
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert (finished.step, finished.last_step, finished.stopped, finished.tokens) == (
        12,
        12,
        "all steps were trained",
        12 * 16,
    )
    torch.testing.assert_close(
        load_file(finished.model / "model.safetensors")["layer.weight"], ours.layer.weight.detach()
    )
    assert not (finished.model / "training").exists()


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.01 + 0.99 * 0.5}),
        ("linear", {2: 1.0, 6: 0.01 + 0.99 * 0.5}),
        ("constant", {2: 1.0, 9: 1.0}),
    ],
)
def test_learning_rates_by_hand(schedule: str, at: dict[int, float]) -> None:
    config = LoopConfig(steps=10, learning_rate=1.0, warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
    for step, rate in at.items():
        assert learning_rate(step, config) == pytest.approx(rate), step


def test_embeddings_and_norms_are_not_decayed() -> None:
    named = {
        "embed_tokens.weight": nn.Parameter(torch.ones(2, 2)),
        "norm.weight": nn.Parameter(torch.ones(2)),
        "q_proj.weight": nn.Parameter(torch.ones(2, 2)),
    }
    decays = {
        id(weight): group["weight_decay"]
        for group in make_optimizer(named, CONFIG).param_groups
        for weight in group["params"]
    }
    assert [decays[id(weight)] for weight in named.values()] == [0.0, 0.0, 0.01]


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 8, 11])
def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = Points(scores=dict.fromkeys(range(13), 0.5))
    expected = run(whole, CONFIG, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == stop_at:
            raise StopError

    with pytest.raises(StopError):
        run(Points(scores=dict.fromkeys(range(13), 0.5)), CONFIG, tmp_path / "broken", on_step=stop)
    resumed = Points(scores=dict.fromkeys(range(13), 0.5))
    steps: list[int] = []
    finished = run(
        resumed, CONFIG, tmp_path / "broken", on_step=lambda progress: steps.append(progress.step)
    )
    assert steps[0] == stop_at // 4 * 4 + 1 if stop_at % 4 else stop_at - 3
    for mine, other in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(mine, other)
    assert replace(finished, seconds=0, model=Path()) == replace(expected, seconds=0, model=Path())

    def lines(folder: Path) -> list[dict[str, object]]:
        read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in read]

    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_loop import CONFIG, Points
from egemma_train.loop import run
run(Points(pause_s=0.02), CONFIG, Path(sys.argv[1]), on_step=lambda progress: print(progress.step, flush=True))
"""


def test_kill_9_again_and_again_changes_nothing(tmp_path: Path) -> None:
    whole = Points()
    run(whole, CONFIG, tmp_path / "whole")
    root = Path(__file__).parents[2]
    for at in ("2", "6", "9"):
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.strip() == at:
                    os.kill(child.pid, signal.SIGKILL)
                    break
        assert child.returncode == -signal.SIGKILL
    run(Points(), CONFIG, tmp_path / "killed")
    for name in (
        "model/model.safetensors",
        "checkpoints/step-00000012/training/optimizer.safetensors",
        "checkpoints/step-00000012/training/extra.safetensors",
    ):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name


def test_what_a_kill_left_half_written_is_removed_and_never_read(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise StopError

    with pytest.raises(StopError):
        run(Points(), CONFIG, tmp_path / "run", on_step=stop)
    half = tmp_path / "run/checkpoints/.new-step-00000008"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    run(Points(), CONFIG, tmp_path / "run")
    assert not half.exists()
    assert checkpoints.steps_in(tmp_path / "run/checkpoints") == [8, 12]


def test_a_finished_run_is_returned_as_it_stands(tmp_path: Path) -> None:
    first = run(Points(), CONFIG, tmp_path / "run")
    again = Points()
    before = weights(again)
    assert run(again, CONFIG, tmp_path / "run") == first
    assert all(torch.equal(mine, other) for mine, other in zip(weights(again), before, strict=True))


def test_early_stopping_keeps_the_best_state(tmp_path: Path) -> None:
    config = LoopConfig(
        steps=20, learning_rate=0.1, save_every=100, evaluate_every=2, patience=2, keep=1
    )
    scores = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.9}  # equal is not better
    objective = Points(scores=scores)
    kept: dict[int, torch.Tensor] = {}
    finished = run(
        objective,
        config,
        tmp_path / "run",
        on_step=lambda progress: kept.update(
            {progress.step: objective.layer.weight.detach().clone()}
        ),
    )
    assert (finished.step, finished.last_step, finished.scores, finished.stopped) == (
        4,
        8,
        {"score": 0.3},
        "no better score in 2 evaluations",
    )
    assert torch.equal(load_file(finished.model / "model.safetensors")["layer.weight"], kept[4])
    # The run that has given up does not go on when its end was not written down.
    (tmp_path / "run/result.json").unlink()
    assert replace(run(Points(scores=scores), config, tmp_path / "run"), seconds=0) == replace(
        finished, seconds=0
    )


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_state(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        DivergedError, match=r"step 6 \(points\).*state of step 4 .* is intact.*learning_rate=0\.1"
    ):
        run(Points(broken_at=6), CONFIG, tmp_path / "run")
    assert checkpoints.steps_in(tmp_path / "run/checkpoints") == [4]
    healed = Points()
    run(healed, CONFIG, tmp_path / "run")
    whole = Points()
    run(whole, CONFIG, tmp_path / "whole")
    assert torch.equal(healed.layer.weight, whole.layer.weight)


def test_another_configuration_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    run(Points(), CONFIG, tmp_path / "run", {"data": {"name": "points"}})
    with pytest.raises(ConfigError, match=r"data\.name was 'points' and is 'lines'"):
        run(Points(), CONFIG, tmp_path / "run", {"data": {"name": "lines"}})
    with pytest.raises(ConfigError, match=r"loop\.steps was 12 and is 13"):
        run(Points(), replace(CONFIG, steps=13), tmp_path / "run", {"data": {"name": "points"}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds no run"):
        run(Points(), CONFIG, tmp_path / "mine")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_a_kill_before_the_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    # as egemma_core.files leaves it; no process has this number
    leftover = tmp_path / "run/.run.json.999999999.0a.part"
    leftover.write_text('{"asked')
    assert run(Points(), CONFIG, tmp_path / "run").step == 12
    assert not leftover.exists()


def test_the_log_is_drawn_with_every_state_once_a_step_is_in_it(tmp_path: Path) -> None:
    drawn: list[list[str]] = []
    config = replace(CONFIG, save_every=1, log_every=4, evaluate_every=2)
    run(
        Points(scores=dict.fromkeys(range(13), 0.5)),
        config,
        tmp_path / "run",
        draw=lambda log, picture: drawn.append(log.read_text().splitlines()),
    )
    assert len(drawn) == 9
    assert all(any("learning_rate" in line for line in lines) for lines in drawn)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up open files in /proc")
def test_a_state_appears_after_all_that_it_speaks_of_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps renames and loses what was not synced; here every rename is checked against
    that.
    """
    synced: dict[str, int] = {}  # path to its size when it was last synced
    names: set[Path] = set()  # that were in a folder when it was last synced
    seen: list[str] = []
    fsync, rename, replaced = os.fsync, os.rename, os.replace

    def sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[str(path.relative_to(tmp_path))] = path.stat().st_size
        if path.is_dir():
            names.update(path.iterdir())
        fsync(handle)

    def name(old: Path, new: Path) -> None:
        content = [old, *old.rglob("*")] if old.is_dir() else [old]
        if ".old-" not in str(new):
            assert {str(path.relative_to(tmp_path)) for path in content} <= synced.keys()
        if new.name.startswith("step-"):
            counted = json.loads((old / "training/state.json").read_text())["log_bytes"]
            assert synced.get("run/log.jsonl") == counted > 0  # the lines that the state counts
            # their folder was synced since they are in it
            assert {tmp_path / "run/log.jsonl", tmp_path / "run/checkpoints"} <= names
        seen.append(new.name)
        (rename if old.is_dir() else replaced)(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", name)
    monkeypatch.setattr(os, "replace", name)
    run(Points(), CONFIG, tmp_path / "run")
    assert [new for new in seen if not new.startswith(".old-")] == [
        "run.json",
        "step-00000004",
        "step-00000008",
        "step-00000012",
        "model",
        "result.json",
    ]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 9:
            raise StopError

    with pytest.raises(StopError):
        run(Points(), CONFIG, tmp_path / "run", on_step=stop)
    moments = tmp_path / "run/checkpoints/step-00000008/training/optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"step-00000008 is not a whole state"):
        run(Points(), CONFIG, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"warmup_steps": 12}, "warmup_steps=12"),
        ({"schedule": "step"}, "cosine"),
        ({"patience": 2, "evaluate_every": None}, "evaluate_every"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"keep": 0}, "keep=0"),
        ({"save_every": 0}, "save_every=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]
