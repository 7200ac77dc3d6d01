"""Teachers against sentence-transformers itself, their cache under kills, damage and company, and
the space they are compared in by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from egemma_core.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from egemma_train.teachers.local import LocalTeacher
from egemma_train.teachers.sentence_transformer import SentenceTransformerTeacher
from egemma_train.teachers.sources import open_teacher
from egemma_train.teachers.space import TeacherSpace
from egemma_train.teachers.teacher import Embedded, Role
from egemma_train.teachers.teacher_cache import CachedTeacher
from egemma_train.teachers.vector_file import VectorFileTeacher
from models.make_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
TEXTS = [
    "Water pumps should be greased twice a year.",
    "bread",
    "日本語の短い文です。",
    "How do I reset my password?",
]
LONG = "the pump and the hose and the slope " * 60  # more tokens than the tiny model reads


class HashTeacher:
    """Vectors from a hash of role and text; remembers what it was asked for."""

    def __init__(self, name: str = "hash", dim: int = 8, wait_s: float = 0.0) -> None:
        self.name, self.dim, self.wait_s = name, dim, wait_s
        self.asked: list[tuple[Role, list[str]]] = []

    def vector(self, role: Role, text: str) -> np.ndarray:
        seed = int.from_bytes(
            hashlib.sha256(f"{self.name} {role} {text}".encode()).digest()[:8], "big"
        )
        vector = np.random.default_rng(seed).standard_normal(self.dim).astype(np.float32)
        return vector / np.linalg.norm(vector)

    def embed(self, role: Role, texts: Sequence[str]) -> Embedded:
        time.sleep(self.wait_s)
        self.asked.append((role, list(texts)))
        return Embedded(
            np.stack([self.vector(role, text) for text in texts]),
            np.array([len(text) > 20 for text in texts]),
        )

    def identity(self, role: Role) -> str:
        return f"{self.name} {role}"

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "dim": self.dim}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_spm: Path) -> Path:
    """A tiny checkpoint that sentence-transformers opens too."""
    from egemma_core.checkpoint.folder import open_checkpoint
    from egemma_core.nn.load import load_encoder
    from egemma_core.nn.save import save_checkpoint

    checkpoint = open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("raw"), "tiny", tiny_spm))
    made = tmp_path_factory.mktemp("teacher") / "model"
    save_checkpoint(load_encoder(checkpoint), tiny_spm, checkpoint.prompts, made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def changed_prompts(folder: Path, to: Path, prompts: dict[str, str]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config_sentence_transformers.json").read_text())
    (to / "config_sentence_transformers.json").write_text(
        json.dumps({**config, "prompts": prompts})
    )
    return to


# ---- models


@pytest.mark.parametrize("kind", [SentenceTransformerTeacher, LocalTeacher])
def test_a_model_gives_the_vectors_of_sentence_transformers_with_the_models_own_prompts(
    kind: Any, folder: Path, reference: Any
) -> None:
    teacher = kind(folder)
    queries, documents = (
        teacher.embed("query", TEXTS).vectors,
        teacher.embed("document", TEXTS).vectors,
    )
    assert queries.dtype == documents.dtype == np.float32
    assert queries.shape == (4, teacher.dim)
    # different batching and kernels, float32
    np.testing.assert_allclose(queries, reference.encode_query(TEXTS), atol=2e-6)
    np.testing.assert_allclose(documents, reference.encode_document(TEXTS), atol=2e-6)
    assert np.abs(queries - documents).max() > 1e-3  # the prompts differ
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    assert teacher.embed("query", []).vectors.shape == (0, teacher.dim)


@pytest.mark.parametrize("kind", [SentenceTransformerTeacher, LocalTeacher])
def test_a_text_that_is_cut_is_said_to_be_and_has_the_vector_of_its_beginning(
    kind: Any, folder: Path, reference: Any
) -> None:
    teacher = kind(folder)
    embedded = teacher.embed("document", ["short", LONG, "bread"])
    assert embedded.truncated.tolist() == [False, True, False]
    np.testing.assert_allclose(embedded.vectors[1], reference.encode_document([LONG])[0], atol=2e-6)


def test_a_text_of_exactly_the_limit_is_not_cut(folder: Path) -> None:
    """Both teachers draw the line at the same token."""
    local, other = LocalTeacher(folder), SentenceTransformerTeacher(folder)
    tokenizer = local._tokenizer
    texts = ["1" * count for count in range(1, 2 * local.max_tokens)]  # a digit is a token
    lengths = [
        tokenizer.encode(local.prompts["query"] + text, overflow="truncate").num_tokens
        for text in texts
    ]
    at, above = (
        next(i for i, n in enumerate(lengths) if n == local.max_tokens),
        next(i for i, n in enumerate(lengths) if n > local.max_tokens),
    )
    for teacher in (local, other):
        assert teacher.embed("query", [texts[at], texts[above]]).truncated.tolist() == [False, True]


def test_prompts_are_a_text_or_a_name_and_a_name_given_as_text_is_refused(
    folder: Path, reference: Any, tmp_path: Path
) -> None:
    said = SentenceTransformerTeacher(folder, query_prompt="find: ", document_prompt="")
    np.testing.assert_allclose(
        said.embed("query", TEXTS).vectors, reference.encode(TEXTS, prompt="find: "), atol=2e-6
    )
    np.testing.assert_allclose(
        said.embed("document", TEXTS).vectors, reference.encode(TEXTS, prompt=""), atol=2e-6
    )
    known = reference.prompts
    name = next(
        name
        for name in known
        if known[name] and known[name] != known["query"] and name != "document"
    )
    np.testing.assert_allclose(
        SentenceTransformerTeacher(folder, query_prompt_name=name).embed("query", TEXTS).vectors,
        reference.encode(TEXTS, prompt_name=name),
        atol=2e-6,
    )
    for arguments, message in (
        ({"query_prompt": name}, "is the name of a prompt"),
        ({"query_prompt_name": "no such"}, "the teacher has the prompts"),
        ({"document_prompt": "a", "document_prompt_name": name}, "give one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            SentenceTransformerTeacher(folder, **arguments)
    passage = SentenceTransformerTeacher(
        changed_prompts(folder, tmp_path / "passage", {"query": "query: ", "passage": "passage: "})
    )
    assert passage.prompts == {"query": "query: ", "document": "passage: "}
    none = SentenceTransformerTeacher(changed_prompts(folder, tmp_path / "none", {}))
    assert (none.described()["query_prompt"], none.described()["document_prompt"]) == ("", "")
    np.testing.assert_allclose(
        none.embed("query", TEXTS).vectors, reference.encode(TEXTS, prompt=""), atol=2e-6
    )


def test_identity_follows_weights_prompt_and_role_and_not_the_place(
    folder: Path, tmp_path: Path
) -> None:
    for kind in (SentenceTransformerTeacher, LocalTeacher):
        teacher = kind(folder)
        moved = shutil.copytree(folder, tmp_path / kind.__name__ / "moved")
        (moved / "README.md").write_text("new")
        assert (
            kind(moved).identity("query")
            == teacher.identity("query")
            != teacher.identity("document")
        )
        weights = load_file(moved / "2_Dense/model.safetensors")
        save_file(
            {"linear.weight": weights["linear.weight"] * 1.01},
            moved / "2_Dense/model.safetensors",
            {"format": "pt"},
        )
        assert kind(moved).identity("query") != teacher.identity("query")
    assert SentenceTransformerTeacher(folder, query_prompt="x").identity(
        "query"
    ) != SentenceTransformerTeacher(folder).identity("query")
    assert LocalTeacher(folder, task="clustering").identity("query") != LocalTeacher(
        folder
    ).identity("query")


def test_a_hub_id_is_known_by_the_commit_that_it_means(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's own cache layout, offline."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--teacher"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    teacher = SentenceTransformerTeacher("owner/teacher")
    assert teacher.name == f"owner/teacher@{commit}"
    assert teacher.identity("query") == SentenceTransformerTeacher(folder).identity("query")
    with pytest.raises(CheckpointError, match="no such folder, and it cannot be fetched"):
        SentenceTransformerTeacher("owner/absent")


def test_a_model_that_gives_no_number_is_an_error(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    weight = load_file(broken / "2_Dense/model.safetensors")["linear.weight"]
    save_file(
        {"linear.weight": weight * float("nan")},
        broken / "2_Dense/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match=r"4 of 4 vectors are zero, NaN or infinite, such as that of 'Water"
    ):
        SentenceTransformerTeacher(broken).embed("query", TEXTS)


def test_without_sentence_transformers_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'egemma\[train\]'"):
        SentenceTransformerTeacher(folder)
    assert LocalTeacher(folder).embed("query", ["bread"]).vectors.shape[0] == 1


# ---- files of vectors


def write_vectors(path: Path, vectors: torch.Tensor, rows: Sequence[dict[str, str]]) -> Path:
    save_file({"vectors": vectors}, path)
    path.with_suffix(".jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


ROWS = [
    {"role": "query", "text": "a"},
    {"role": "document", "text": "a"},
    {"role": "document", "text": "line\u2028separator"},
]


def test_a_file_of_vectors_gives_them_back_by_role_and_text_at_length_one(tmp_path: Path) -> None:
    teacher = open_teacher(
        write_vectors(
            tmp_path / "v.safetensors", torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]), ROWS
        )
    )
    assert teacher.dim == 2
    assert (
        teacher.embed("query", ["a", "a"]).vectors.tolist()
        == [[np.float32(0.6), np.float32(0.8)]] * 2
    )
    assert teacher.embed("document", ["line\u2028separator", "a"]).vectors.tolist() == [
        [1, 0],
        [0, 1],
    ]
    with pytest.raises(
        InputError, match=r"2 of 3 query texts have no vector, such as \['b', 'c'\]"
    ):
        teacher.embed("query", ["b", "a", "c", "b"])


def test_what_is_wrong_with_a_file_of_vectors_is_named(tmp_path: Path) -> None:
    vectors = torch.eye(3)
    cases = [
        (vectors, ROWS[:2], "2 lines, v.safetensors has 3 vectors"),
        (vectors, [*ROWS[:2], ROWS[0]], r"line 3: the query 'a' is in line 1 already"),
        (vectors, [*ROWS[:2], {"role": "answer", "text": "b"}], "line 3: found dict .*: write "),
        (vectors.long(), ROWS, "int64"),
        (vectors[0], ROWS, r"must be floats of shape \(n, dim\)"),
    ]
    for number, (stored, rows, message) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        path = write_vectors(tmp_path / str(number) / "v.safetensors", stored, rows)
        with pytest.raises(InputError, match=message):
            VectorFileTeacher(path)
    path = write_vectors(tmp_path / "zero.safetensors", torch.zeros(3, 3), ROWS)
    with pytest.raises(InputError, match="1 of 1 vectors are zero"):
        VectorFileTeacher(path).embed("query", ["a"])
    path.with_suffix(".jsonl").write_text('{"role": "query", "text": "a"}\n{"role": ')
    with pytest.raises(InputError, match="line 2: not JSON"):
        VectorFileTeacher(path)
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(InputError, match="names the role and the text of each vector"):
        VectorFileTeacher(path)
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        open_teacher(tmp_path / "absent.safetensors")


def test_what_the_name_of_a_teacher_means(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_teacher(f"egemma:{folder}"), LocalTeacher)
    assert isinstance(open_teacher(str(folder)), SentenceTransformerTeacher)
    with pytest.raises(ConfigError, match="own prompts"):
        open_teacher(f"egemma:{folder}", query_prompt="x")
    with pytest.raises(ConfigError, match="finished vectors"):
        open_teacher(
            write_vectors(tmp_path / "v.safetensors", torch.eye(3), ROWS), document_prompt="x"
        )


# ---- the cache


def test_a_text_is_embedded_once_in_all_runs_whatever_the_order(tmp_path: Path) -> None:
    first = HashTeacher()
    texts = ["a", "a much longer text than others", "ccc", "a"]
    got = CachedTeacher(first, tmp_path, rows_per_file=2).embed("query", texts)
    assert first.asked == [("query", ["a much longer text than others", "ccc"]), ("query", ["a"])]
    np.testing.assert_array_equal(got.vectors, [first.vector("query", text) for text in texts])
    assert got.truncated.tolist() == [False, True, False, False]
    second = HashTeacher()
    again = CachedTeacher(second, tmp_path)
    np.testing.assert_array_equal(again.embed("query", texts[::-1]).vectors, got.vectors[::-1])
    assert again.embed("query", texts).truncated.tolist() == got.truncated.tolist()
    assert second.asked == []
    # another role is another vector
    np.testing.assert_array_equal(
        again.embed("document", ["a"]).vectors, [first.vector("document", "a")]
    )
    assert again.fill("query", ["a", "new"]) == 1
    assert second.asked == [("document", ["a"]), ("query", ["new"])]
    assert again.embed("query", []).vectors.shape == (0, 8)


def test_teachers_share_a_folder_and_no_vectors(tmp_path: Path) -> None:
    one, two = HashTeacher("one"), HashTeacher("two", dim=4)
    CachedTeacher(one, tmp_path).embed("query", ["a"])
    assert CachedTeacher(two, tmp_path).embed("query", ["a"]).vectors.shape == (1, 4)
    assert two.asked == [("query", ["a"])]
    assert sorted(
        json.loads(path.read_text())["name"] for path in tmp_path.glob("*/teacher.json")
    ) == ["one", "two"]


def test_a_real_teacher_behind_the_cache_gives_the_same_vectors(
    folder: Path, tmp_path: Path
) -> None:
    teacher = LocalTeacher(folder)
    np.testing.assert_allclose(
        CachedTeacher(teacher, tmp_path).embed("document", [*TEXTS, LONG]).vectors,
        teacher.embed("document", [*TEXTS, LONG]).vectors,
        atol=2e-6,
    )
    assert CachedTeacher(LocalTeacher(folder), tmp_path).fill("document", [*TEXTS, LONG]) == 0


def test_damage_is_seen_before_a_vector_is_given_out(tmp_path: Path) -> None:
    CachedTeacher(HashTeacher(), tmp_path).embed("query", ["a", "b"])
    vectors, keys = next(tmp_path.glob("*/*.vectors.npy")), next(tmp_path.glob("*/*.keys.npy"))
    good_vectors, good_keys = vectors.read_bytes(), keys.read_bytes()
    flipped = bytearray(good_vectors)
    flipped[-1] ^= 1
    vectors.write_bytes(flipped)
    cached = CachedTeacher(HashTeacher(), tmp_path)
    with pytest.raises(CheckpointError, match=f"{vectors.name}: row 1 is damaged"):
        cached.embed("query", ["a", "b"])
    for path, content in (
        (vectors, good_vectors[:-1]),
        (keys, good_keys[:-1]),
        (keys, good_keys[:20]),
        (vectors, good_keys),
    ):
        vectors.write_bytes(good_vectors)
        keys.write_bytes(good_keys)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="Delete both files of that name"):
            CachedTeacher(HashTeacher(), tmp_path)
    vectors.unlink()
    keys.unlink()
    again = HashTeacher()
    np.testing.assert_array_equal(
        CachedTeacher(again, tmp_path).embed("query", ["a"]).vectors, [again.vector("query", "a")]
    )


def test_what_a_dead_process_left_is_neither_read_nor_kept_for_ever(tmp_path: Path) -> None:
    cached = CachedTeacher(HashTeacher(), tmp_path)
    cached.embed("query", ["a"])
    fresh, old = (
        cached.folder / ".a.keys.npy.1.0a.part",
        cached.folder / ".b.keys.npy.1.0b.part",
    )
    orphan = cached.folder / "0.vectors.npy"  # its keys were never written
    for path in (fresh, old, orphan):
        path.write_bytes(b"half a f")
    for path in (old, orphan):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    complete = next(path for path in cached.folder.glob("*.vectors.npy") if path != orphan)
    os.utime(complete, (time.time() - 2 * 86_400,) * 2)
    again = HashTeacher()
    CachedTeacher(again, tmp_path).embed("query", ["a"])
    assert (fresh.exists(), old.exists(), orphan.exists(), again.asked) == (True, False, False, [])


FILL = """
import sys
from pathlib import Path
from egemma_train.teachers.teacher_cache import CachedTeacher
from tests.train.test_teacher import HashTeacher
cached = CachedTeacher(HashTeacher(dim=256, wait_s=0.002), Path(sys.argv[1]), rows_per_file=5)
print("ready", flush=True)
cached.fill("query", [f"text {i}" for i in range(int(sys.argv[2]))])
"""


def start(folder: Path, texts: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FILL, str(folder), str(texts)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_after_a_kill_all_that_is_there_is_right_and_the_next_run_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, 10_000)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while len(list(tmp_path.glob("*/*.keys.npy"))) < 4:
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stored = 5 * len(list(tmp_path.glob("*/*.keys.npy")))
    assert stored < 10_000
    teacher = HashTeacher(dim=256)
    # the order in which they are embedded
    texts = sorted((f"text {i}" for i in range(10_000)), key=len, reverse=True)[: stored + 7]
    got = CachedTeacher(teacher, tmp_path).embed("query", texts).vectors
    assert sum(len(asked) for _, asked in teacher.asked) == 7
    np.testing.assert_array_equal(got, [teacher.vector("query", text) for text in texts])


def test_two_processes_at_once_leave_one_good_cache(tmp_path: Path) -> None:
    processes = [start(tmp_path, 100), start(tmp_path, 100)]
    assert [process.wait(60) for process in processes] == [0, 0]
    teacher = HashTeacher(dim=256)
    texts = [f"text {i}" for i in range(100)]
    np.testing.assert_array_equal(
        CachedTeacher(teacher, tmp_path).embed("query", texts).vectors,
        [teacher.vector("query", text) for text in texts],
    )
    assert teacher.asked == []
    assert list(tmp_path.glob("*/.*.part")) == []


def test_thousands_of_calls_leave_files_that_one_process_can_open(tmp_path: Path) -> None:
    """A mapped file holds a descriptor, and a process may have 1,024 of them, or fewer."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    texts = [f"text {i}" for i in range(300)]
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors + 150, hard))
    try:
        writer, reader = HashTeacher(), HashTeacher()
        cached = CachedTeacher(writer, tmp_path, rows_per_file=1)
        cached.embed("query", texts)
        again = CachedTeacher(reader, tmp_path).embed("query", texts[::-1]).vectors
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(tmp_path.glob("*/*.keys.npy"))) == 300
    np.testing.assert_array_equal(again, [reader.vector("query", text) for text in reversed(texts)])
    assert reader.asked == []


def test_what_another_process_has_made_meanwhile_is_taken(tmp_path: Path) -> None:
    late = HashTeacher()
    opened_before = CachedTeacher(late, tmp_path)
    CachedTeacher(HashTeacher(), tmp_path).embed("query", ["a"])
    opened_before.embed("query", ["a"])
    assert late.asked == []


# ---- the space


def test_equal_widths_are_compared_as_they_are() -> None:
    space = TeacherSpace(2, 2)
    vectors = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(space.student(vectors), torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(space.teacher(vectors), torch.tensor([[0.6, 0.8]]))
    assert list(space.parameters()) == []


def test_different_widths_need_a_choice() -> None:
    with pytest.raises(
        ConfigError,
        match=r"student has 2 channels, the teacher 3\. Set match='prefix' .* or match='linear'",
    ):
        TeacherSpace(2, 3)
    with pytest.raises(ConfigError, match="student has 2"):
        TeacherSpace(2, 3, "same")
    with pytest.raises(ConfigError, match="fewer than the student's 3"):
        TeacherSpace(3, 2, "prefix")
    with pytest.raises(ConfigError, match="one of"):
        TeacherSpace(3, 3, "pca")  # type: ignore[arg-type]


def test_a_prefix_of_the_teacher_has_length_one() -> None:
    space = TeacherSpace(2, 4, "prefix")
    teacher = torch.tensor([[0.3, 0.4, 0.5, 0.7]], requires_grad=True)
    # 0.3 and 0.4 over 0.5
    assert torch.allclose(space.teacher(teacher), torch.tensor([[0.6, 0.8]]))
    assert not space.teacher(teacher).requires_grad
    assert torch.allclose(space.student(torch.tensor([[0.0, 2.0]])), torch.tensor([[0.0, 1.0]]))


def test_a_linear_map_is_trained_and_starts_with_the_students_cosines() -> None:
    space = TeacherSpace(3, 5, "linear", seed=1)
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    mapped = space.student(vectors)
    assert mapped.shape == (4, 5)
    assert torch.allclose(mapped @ mapped.T, vectors @ vectors.T, atol=1e-6)
    assert [name for name, _ in space.named_parameters()] == ["map.weight"]
    mapped.sum().backward()  # type: ignore[no-untyped-call]
    assert space.map is not None
    assert space.map.weight.grad is not None
    assert torch.equal(TeacherSpace(3, 5, "linear", seed=1).map.weight, space.map.weight)  # type: ignore[union-attr]
    with torch.no_grad():
        space.map.weight.copy_(
            torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
        )
    # (3, 4) over 5
    assert torch.allclose(
        space.student(torch.tensor([[3.0, 2.0, 9.0]])), torch.tensor([[0.6, 0.8, 0, 0, 0]])
    )
