"""A recipe from its file to its model: what cannot work is said before anything runs, what was done
is not done again, and every verb of `egemma-train`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from egemma_core.checkpoint.folder import open_checkpoint
from egemma_core.errors import ConfigError
from egemma_core.nn.load import load_encoder
from egemma_quant.qat import rounded
from egemma_quant.schemes import INT4, INT8, Scheme
from egemma_train import loop
from egemma_train.cli import main
from egemma_train.evaluate import DevSets
from egemma_train.presets.toy import write_toy
from egemma_train.recipe import read_recipe

ROOT = Path(__file__).parents[2]
STAGES = ["decoder", "adaptation", "pre-finetuning", "finetuning", "int4"]
SHORTER = {
    "{ steps = 150, learning_rate = 3e-3, warmup_steps = 10, save_every = 50 }": "{ steps = 4, "
    "learning_rate = 3e-3 }",
    "{ steps = 150, learning_rate = 2e-3, warmup_steps = 10, save_every = 50 }": "{ steps = 4, "
    "learning_rate = 2e-3 }",
    "steps = 200, learning_rate = 2e-3, warmup_steps = 10, save_every = 50, evaluate_every = 50": "steps "
    "= 6, learning_rate = 2e-3, evaluate_every = 3, save_every = 3",
    "steps = 60, learning_rate = 1e-3, warmup_steps = 5, save_every = 30": "steps = 9, "
    "learning_rate = 1e-3, save_every = 5",
    "steps = 60, learning_rate = 5e-4, warmup_steps = 5, save_every = 30": "steps = 4, "
    "learning_rate = 5e-4, save_every = 2",
    "trials = 4, random = 2, best = 2": "trials = 3, random = 1, best = 2",
    'path = "dev"\n': 'path = "dev"\nmax_queries = 30\nmax_documents = 60\n',
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    # as in the processes that tests start, so that they give the same bits
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(folder: Path, changes: dict[str, str]) -> Path:
    recipe = write_toy(folder)
    text = recipe.read_text()
    for old, new in changes.items():
        assert old in text, f"the toy has no {old!r} any more"
        text = text.replace(old, new)
    recipe.write_text(text)
    return recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A shortened toy's recipe, and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = written(folder / "data", SHORTER)
    assert main(["run", str(recipe), "--out", str(folder / "run"), "--threads", "1"]) == 0
    return recipe, folder / "run"


def report(out: Path) -> list[dict[str, Any]]:
    read = json.loads((out / "report.json").read_text())
    assert read["recipe"] == "recipe"
    stages: list[dict[str, Any]] = read["stages"]
    return stages


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def score(recipe: Path, model: Path, scheme: Scheme | None = None) -> dict[str, float]:
    read, checkpoint = read_recipe(recipe), open_checkpoint(str(model))
    encoder = load_encoder(checkpoint)
    dev = DevSets(read.dev, read.folder, checkpoint.tokenizer(), checkpoint.prompts)
    if scheme is None:
        return dev.score(encoder)
    with rounded(encoder, scheme):
        return dev.score(encoder)


def test_all_stages_run_each_on_the_model_before_and_the_report_is_true(
    done: tuple[Path, Path],
) -> None:
    recipe, out = done
    stages = report(out)
    assert [stage["stage"] for stage in stages] == STAGES
    assert [Path(stage["model"]).relative_to(out).as_posix() for stage in stages] == [
        f"{number}-{name}/model" for number, name in enumerate(STAGES, start=1)
    ]
    assert [stage["step"] for stage in stages] == [4, 4, 6, 9, 4]
    befores = [
        json.loads(path.read_text())["asked"]["before"] for path in sorted(out.glob("*/run.json"))
    ]
    assert befores == [None, "1-decoder/model", "2-adaptation/model", "4-finetuning/model"]
    assert {
        json.loads(path.read_text())["asked"]["before"] for path in out.glob("4-*/*/run.json")
    } == {"3-pre-finetuning/model"}
    for stage in stages[2:]:
        found = score(recipe, Path(stage["model"]), INT4 if stage["stage"] == "int4" else None)
        assert found == pytest.approx(stage["scores"], abs=1e-6), stage["stage"]
    assert files(out / "model") == files(out / "5-int4/model")
    assert load_encoder(open_checkpoint(str(out / "model"))).config.dims == (64, 32)


def test_the_best_mixtures_are_averaged_and_scored(done: tuple[Path, Path]) -> None:
    recipe, out = done
    mixtures = report(out)[3]["mixtures"]
    told = [
        json.loads(line) for line in (out / "4-finetuning/mixtures.jsonl").read_text().splitlines()
    ]
    assert [(mixture["rates"], mixture["scores"]["score"]) for mixture in mixtures] == [
        (line["rates"], line["score"]) for line in told
    ]
    assert mixtures[0]["rates"] == pytest.approx(
        dict.fromkeys(("questions", "sentences", "code"), 1 / 3)
    )
    assert len({json.dumps(mixture["rates"]) for mixture in mixtures}) == 3
    taken: list[dict[str, float]] = []
    for mixture in sorted(mixtures, key=lambda mixture: -mixture["scores"]["score"]):
        apart = all(
            sum(abs(mixture["rates"][name] - other[name]) for name in other) / 2 >= 0.05
            for other in taken
        )
        taken += [mixture["rates"]] if apart and len(taken) < 2 else []
    assert [mixture["in_soup"] for mixture in mixtures] == [
        mixture["rates"] in taken for mixture in mixtures
    ]
    assert len(taken) == 2
    for mixture in mixtures:
        assert score(recipe, Path(mixture["model"])) == pytest.approx(mixture["scores"], abs=1e-6)
    good = [
        dict(load_encoder(open_checkpoint(mixture["model"])).named_parameters())
        for mixture in mixtures
        if mixture["in_soup"]
    ]
    for name, weight in load_encoder(
        open_checkpoint(str(out / "4-finetuning/model"))
    ).named_parameters():
        torch.testing.assert_close(
            weight, (good[0][name] + good[1][name]) / 2, rtol=1e-6, atol=1e-7
        )


def test_a_finished_run_is_not_trained_again(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = done
    before = files(out)
    monkeypatch.setattr(loop, "make_optimizer", lambda *_: pytest.fail("it trains"))
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    assert files(out) == before
    assert f"model: {out / 'model'}" in capsys.readouterr().out


def test_another_recipe_and_a_foreign_folder_are_refused_in_one_line(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = done
    changed = recipe.with_name("changed.toml")
    changed.write_text(recipe.read_text().replace("learning_rate = 5e-4", "learning_rate = 6e-4"))
    (tmp_path / "letter.txt").write_text("dear")
    before = files(out)
    for arguments, message in (
        ((changed, "--out", out), "holds a run of another recipe"),
        ((recipe, "--out", tmp_path), "is not empty and holds no run"),
        (
            (tmp_path / "none.toml", "--out", tmp_path / "new"),
            "none.toml: this is not a readable TOML file",
        ),
        (
            (recipe, "--out", tmp_path / "new", "--data", tmp_path),
            "no file matches ['questions.train.jsonl'",
        ),
        (
            (recipe, "--out", tmp_path / "newer", "--threads", "0"),
            "--threads=0 must be a whole number of at least 1",
        ),
    ):
        capsys.readouterr()
        assert main(["run", *map(str, arguments)]) == 1
        said = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith("egemma-train: ")
        ]
        assert len(said) == 1
        assert message in said[0]
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["letter.txt"]


def test_a_kill_among_the_mixtures_changes_nothing(done: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = done
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("4-*", "5-*", "report.json"))
    shutil.rmtree(out / "model")
    command = [
        sys.executable,
        "-m",
        "egemma_train",
        "run",
        str(recipe),
        "--out",
        str(out),
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if any("mixture 2 of 3" in earlier for earlier in said) and "step 7 of 9" in line:
                os.kill(child.pid, signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL, "".join(said)
    assert not any("1 of 5" in line and "step" in line for line in said)
    assert len((out / "4-finetuning/mixtures.jsonl").read_text().splitlines()) == 1
    assert main(["run", str(recipe), "--out", str(out), "--threads", "1"]) == 0
    assert (out / "4-finetuning/mixtures.jsonl").read_bytes() == (
        whole / "4-finetuning/mixtures.jsonl"
    ).read_bytes()
    for model in ("4-finetuning/mixture-02/model", "4-finetuning/mixture-03/model", "5-int4/model"):
        ours, theirs = files(out / model), files(whole / model)
        assert ours == theirs, [name for name in theirs if ours.get(name) != theirs[name]]
    for ours, theirs in zip(report(out), report(whole), strict=True):
        assert (
            ours["scores"],
            ours["tokens"],
            [mixture["rates"] for mixture in ours["mixtures"]],
        ) == (
            theirs["scores"],
            theirs["tokens"],
            [mixture["rates"] for mixture in theirs["mixtures"]],
        )


def test_the_other_verbs(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = done

    def say(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    checked = say("check", recipe)
    assert all(
        name in checked
        for name in ("questions", "sentences", "code", *(f"stage {stage}" for stage in STAGES))
    )
    assert " 1,500 " in checked
    assert "toy" in say("preset").split()
    assert say("preset", "toy") == (ROOT / "quant/egemma_train/presets/toy.toml").read_text()
    model = out / "4-finetuning/model"
    scores = report(out)[3]["scores"]
    assert json.loads(say("evaluate", recipe, "--model", model, "--json")) == pytest.approx(
        scores, abs=1e-6
    )
    after = score(recipe, model, INT8)
    both = json.loads(say("evaluate", recipe, "--model", model, "--scheme", "int8", "--json"))
    assert list(both) == ["float", "int8"]
    assert both["float"] == pytest.approx(scores, abs=1e-6)
    assert both["int8"] == pytest.approx(after, abs=1e-6)
    table = say("evaluate", recipe, "--model", model, "--scheme", "int8").splitlines()
    assert table[0].split() == ["float", "int8", "change"]
    change = after["score"] - scores["score"]
    assert table[1].split() == [
        "score",
        f"{scores['score']:.4f}",
        f"{after['score']:.4f}",
        f"{change:+.4f}",
    ]
    assert main(["evaluate", str(recipe), "--model", str(model), "--scheme", "int5"]) == 1
    assert "scheme='int5' must be one of ['int4', " in capsys.readouterr().err
    runs = [out / f"4-finetuning/mixture-{number:02d}/model" for number in (1, 2)]
    say("soup", *runs, "--out", tmp_path / "soup")
    mean = (
        sum(load_encoder(open_checkpoint(str(folder))).norm.weight.double() for folder in runs) / 2
    )
    torch.testing.assert_close(
        load_encoder(open_checkpoint(str(tmp_path / "soup"))).norm.weight.double(),
        mean,
        rtol=1e-6,
        atol=1e-7,
    )
    rows = (recipe.parent / "sentences.train.jsonl").read_text().splitlines()[:60]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    say(
        "mine",
        tmp_path / "rows.jsonl",
        "--teacher",
        f"egemma:{model}",
        "--symmetric",
        "--out",
        tmp_path / "mined.jsonl",
        "--max-share-of-positive",
        "0",
    )
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert len(mined) == 60
    assert sum("negative" in row or "negatives" in row for row in mined) > 30
    assert main(["preset", "toyy"]) == 1
    assert capsys.readouterr().err.startswith(
        "egemma-train: no preset is named 'toyy'; there are ["
    )


def test_two_processes_with_a_share_of_the_model_each_train_the_same_model(
    done: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, whole = done
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("5-*", "report.json"))
    shutil.rmtree(out / "model")
    arguments = [
        "run",
        str(recipe),
        "--out",
        str(out),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--shard",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "egemma_train",
        *arguments,
    ]
    two = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("5 of 5: int4") == 1, "each process speaks"
    assert "1 of 5: decoder, whole in each process" in two.stderr
    start, one, ours = (
        dict(load_encoder(open_checkpoint(str(folder))).named_parameters())
        for folder in (whole / "4-finetuning/model", whole / "model", out / "model")
    )
    for name, weight in one.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(
            ours[name], weight, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert report(out)[4]["scores"] == pytest.approx(report(whole)[4]["scores"], abs=0.02)


def test_one_process_cannot_share_a_model(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(done[0]), "--out", str(tmp_path / "run"), "--shard"]) == 1
    assert (
        "egemma-train: --shard divides a model among processes, and there is one. Start several "
        "with torchrun" in capsys.readouterr().err
    )


def test_help_needs_no_torch() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['egemma-train', '--help']\n"
        "try: runpy.run_module('egemma_train', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "evaluate" in found.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[start.shape]",
            "[strat.shape]",
            r"the recipe: 'strat' is not known; did you mean 'start'\?",
        ),
        (
            "pieces = 900",
            "peices = 900",
            r"\[start\.shape\]: 'peices' is not known; did you mean 'pieces'\?",
        ),
        ("pieces = 900", "", r"\[start\.shape\]: .*give one"),
        ("width = 64", 'width = "64"', r"\[start\.shape\] width='64' is str, not int"),
        ("dims = [64, 32]", "dims = 64", r"\[start\.head\] dims=64 is int, not a list"),
        (
            "[start.head]\ndims = [64, 32]               # trained widths; the first is the full "
            "one\nmax_tokens = 64",
            "",
            r"\[start\]: a \[start\.head\] belongs to",
        ),
        (
            "[start.shape]                 #",
            'start.model = "a"\n[start.shape] #',
            r"\[start\]: it has \['model', 'shape'\]",
        ),
        (
            'task = "code retrieval"',
            'tusk = "code retrieval"',
            r"\[data\.code\]: 'tusk' is not known; did you mean 'task'\?",
        ),
        ('kind = "retrieval"', 'kind = "retrieve"', r"\[dev\.unseen\].*kind='retrieve'"),
        (
            'path = "dev"',
            'pth = "dev"',
            r"\[dev\.unseen\]: 'pth' is not known; did you mean 'path'\?",
        ),
        (
            'kind = "denoise"',
            'kind = "denoising"',
            r"\[\[stages\]\] 2 \(adaptation\) kind='denoising' must be one of",
        ),
        ('name = "adaptation"', 'name = "decoder"', r"The stages are named \['decoder', 'decoder'"),
        ('name = "adaptation"', "", r"\[\[stages\]\] 2 \(without a name\): name is missing"),
        (
            'name = "int4"',
            'name = "int4"\ndatasets = ["cod"]',
            r"stage 'int4': no \[data\] table is named \['cod'\]; there are \['questions'",
        ),
        (
            'scheme = "int4"',
            'shceme = "int4"',
            r"\[\[stages\]\] 5 \(int4\): 'shceme' is not known; did you mean 'scheme'\?",
        ),
        (
            'scheme = "int4"',
            'scheme = "int4"\nloss = { precision = "bfloat16" }',
            r"\[\[stages\]\] 5 \(int4\): scheme='int4' with precision='bfloat16'",
        ),
        (
            'scheme = "int4"',
            'scheme = "int4"\nactivations = true\nloss = { compile = true }',
            r"\[\[stages\]\] 5 \(int4\): activations=true with compile=true",
        ),
        (
            'scheme = "int4"',
            'scheme = "int3"',
            r"5 \(int4\): scheme='int3' must be one of \['int4', ",
        ),
        (
            'scheme = "int4"',
            "activations = true",
            r"\[\[stages\]\] 5 \(int4\): activations=true without a scheme",
        ),
        (
            "hard_negatives = true }\nloop = { steps = 60, learning_rate = 5e-4",
            "hard_negative = true }\nloop = { steps = 60, learning_rate = 5e-4",
            r"\[\[stages\]\] 5 \(int4\) batches: 'hard_negative' is not known; did you mean "
            r"'hard_negatives'\?",
        ),
        (
            "steps = 150, learning_rate = 2e-3",
            "step = 150, learning_rate = 2e-3",
            r"\[\[stages\]\] 2 \(adaptation\) loop: 'step' is not known; did you mean 'steps'\?",
        ),
        (
            "steps = 150, learning_rate = 2e-3",
            "steps = 5, learning_rate = 2e-3",
            r"\[\[stages\]\] 2 \(adaptation\) loop: warmup_steps=10 .*steps=5",
        ),
        (
            "loss = { recompute = true",
            "loss = { temperature = 0.0, recompute = true",
            r"\[\[stages\]\] 3 \(pre-finetuning\) loss: temperature=0\.0",
        ),
        (
            "trials = 4",
            "trials = 1",
            r"\[\[stages\]\] 4 \(finetuning\) mixtures: best=2 must be a whole number from 1 to 1",
        ),
        (
            "batches = { batch_size = 60, max_query_tokens = 48, max_document_tokens = 48 }",
            "",
            r"\[\[stages\]\] 3 \(pre-finetuning\): a contrast stage needs a table batches",
        ),
        (
            'kind = "denoise"',
            'kind = "denoise"\nscheme = "int4"',
            r"\[\[stages\]\] 2 \(adaptation\): a denoise stage has texts, and no \['scheme'\]",
        ),
        ("[start.shape]", "[start.shape", "this is not a readable TOML file"),
        ("pieces = 900", "pieces = 900\npieces = 901", "this is not a readable TOML file"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_by_table_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (ROOT / "quant/egemma_train/presets/toy.toml").read_text()
    assert old in text
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message) as found:
        read_recipe(recipe)
    assert str(found.value).startswith(f"{recipe}: ")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"it needs a table \[start\]"),
        ("start = 3", r"it needs a table \[start\]"),
        ('[start]\nmodel = "a"', r"it needs a table \[data\]"),
        (
            '[start]\nmodel = "a"\n[data.a]\npath = "a"\nkind = "pairs"\ntask = "t"',
            r"it needs tables \[\[stages\]\]",
        ),
        (
            'stages = [1]\n[start]\nmodel = "a"\n[data.a]\npath = "a"\nkind = "pairs"\ntask = "t"',
            r"\[\[stages\]\] 1 is not a table",
        ),
        (
            'stages = [{name = "a", kind = "contrast"}]\n[start]\nmodel = "a"\n[data.a]\npath = '
            '"a"\nkind = "pairs"\ntask = "t"',
            r"\[\[stages\]\] 1 \(a\): it needs a table loop",
        ),
        (
            'folder = 3\nstages = [1]\n[start]\nmodel = "a"\n[data.a]\npath = "a"',
            r"folder=3 is int, not the path of a folder",
        ),
        (
            'data = {a = 1}\nstages = [{name = "a"}]\n[start]\nmodel = "a"',
            r"\[data\.a\]: 1 is int, not a table",
        ),
        (
            'dev = 1\nstages = [{name = "a", kind = "contrast", batches = {batch_size = 2}, loop = '
            '{steps = 1}}]\n[start]\nmodel = "a"\n[data.a]\npath = "a"\nkind = "pairs"\ntask = "t"',
            r"\[dev\] is not a table",
        ),
    ],
)
def test_a_recipe_without_a_table_it_needs_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "recipe.toml")


@pytest.mark.timeout(600)
def test_the_whole_toy_learns(tmp_path: Path) -> None:
    assert main(["toy", "--out", str(tmp_path / "toy")]) == 0
    stages = report(tmp_path / "toy/run")
    assert [stage["stage"] for stage in stages] == STAGES
    assert stages[0]["scores"]["score"] > -2, "nats per token of a language model of toy sentences"
    adapted = score(tmp_path / "toy/recipe.toml", Path(stages[1]["model"]))["score"]
    assert adapted < 0.7, "nothing is left to learn from pairs"
    assert min(stage["scores"]["score"] for stage in stages[2:]) > 0.9
    assert main(["toy", "--out", str(tmp_path / "toy")]) == 0
    assert report(tmp_path / "toy/run") == stages
