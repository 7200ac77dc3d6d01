"""Small models with the real ones' interfaces, made in seconds: a tokenizer like Gemma's, and
bundles for both runtimes.

The model of the bundles: rows of a table, one linear layer, mean over the tokens, unit length.
`tiny_vectors` computes it with NumPy, so tests have numbers that no runtime made.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.bundle import (
    GOLDEN,
    RUNTIMES,
    TOKENIZER,
    Manifest,
)
from egemma_export.bundle_folder import describe_files, fingerprint_of, write_manifest

if TYPE_CHECKING:  # at run time they would import torch, which the SDK's tests do without
    from egemma_core.nn.encoder import Encoder
    from egemma_quant.schemes import Quantized

VOCAB, WIDTH, DIMS, MAX_TOKENS = 512, 32, (32, 16, 8), 128
PAD, EOS, BOS = 0, 1, 2
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "STS": "task: sentence similarity | query: ",
}
CORPUS = """\
The forwarder lost its oil pressure on the way down the slope.
A recipe for bread: flour, water, salt and patience.
How do I reset my password when the phone is offline?
task: search result | query: where is the nearest water pump
title: none | text: Water pumps should be greased twice a year.
title: Maintenance | text: Check the hydraulic hose for cracks before every shift.
task: clustering | query: complaints about late deliveries
task: sentence similarity | query: the cat sleeps on the warm stone
Die Pumpe verliert Öl, wenn der Motor warm ist.
La lluvia cae despacio sobre el tejado de la casa.
日本語の短い文です。 水 と 油 は 混ざら ない。
def mean(values): return sum(values) / len(values)
In 2024 the yield was 1375 litres, in 2025 only 980.
Nobody answered the telephone, so she wrote a letter instead.
Search for the sentence that means the same, not the one with the same words.
"""


def tiny_tokenizer(path: Path) -> Path:
    """Train a SentencePiece model of VOCAB pieces with Gemma's settings; returns `path`."""
    import sentencepiece

    # Gemma's user-defined pieces: runs of newlines and blanks, HTML tags, chat turns, spare ones.
    own = ["\n" * count for count in range(1, 9)] + ["▁" * count for count in range(2, 9)]
    own += [
        "<start_of_turn>",
        "<end_of_turn>",
        "<table>",
        "<td>",
        "</td>",
        *[f"<unused{number}>" for number in range(6)],
    ]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "corpus.txt")
        text.write_text(CORPUS, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(scratch, "tiny")),
            model_type="bpe",
            vocab_size=VOCAB,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            user_defined_symbols=own,
            character_coverage=1.0,
            minloglevel=2,
            num_threads=1,
        )
        path.write_bytes(Path(scratch, "tiny.model").read_bytes())
    return path


def tiny_weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The table (VOCAB, WIDTH) and the linear layer (WIDTH, WIDTH), always the same."""
    random = np.random.default_rng(7)
    return random.standard_normal((VOCAB, WIDTH), np.float32), random.standard_normal(
        (WIDTH, WIDTH), np.float32
    )


def tiny_vectors(rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """What the tiny model gives for token ids, in float64."""
    table, linear = (weight.astype(np.float64) for weight in tiny_weights())
    means = np.stack([(table[list(row)] @ linear.T).mean(0) for row in rows])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def tiny_onnx(
    path: Path,
    *,
    factor: float = 1.0,
    mask: str = "attention_mask",
    output: str = "sentence_embedding",
) -> Path:
    """The tiny model as ONNX.

    Args:
        factor: multiplies the vectors after they were normalized; NaN is what a broken export would
            give.
        mask, output: other names than the ones that the SDK asks for.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table, linear = tiny_weights()
    constants = {
        "table": table,
        "linear": np.ascontiguousarray(linear.T),
        "last": np.array([2]),
        "tokens": np.array([1]),
        "factor": np.array(factor, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "linear"], ["hidden"]),
        helper.make_node("Cast", [mask], ["kept_tokens"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept_tokens", "last"], ["mask3"]),
        helper.make_node("Mul", ["hidden", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["unit"], axis=-1, p=2),
        helper.make_node("Mul", ["unit", "factor"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"])
            for name in ("input_ids", mask)
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        str(path),
    )
    return path


def tiny_pte(path: Path) -> Path:
    """The tiny model for ExecuTorch, its linear layer in XNNPACK; exported by a process of its own,
    as torch's ExecuTorch and egemma's must not share one. About 15 s.
    """
    script = """
import sys
import numpy as np, torch
from torch import nn
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from tests.tiny import MAX_TOKENS, tiny_weights

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        table, linear = tiny_weights()
        self.table = nn.Embedding.from_pretrained(torch.from_numpy(table))
        self.linear = nn.Linear(*linear.shape, bias=False)
        self.linear.weight.data = torch.from_numpy(linear)
    def forward(self, ids, mask):
        kept = self.linear(self.table(ids)) * mask.unsqueeze(-1).float()
        return nn.functional.normalize(kept.sum(1), dim=-1)

ids = torch.randint(0, 9, (1, 16))
tokens = torch.export.Dim("tokens", min=1, max=MAX_TOKENS)
program = torch.export.export(Tiny().eval(), (ids, torch.ones_like(ids)), dynamic_shapes=({1: tokens}, {1: tokens}))
with open(sys.argv[1], "wb") as file:
    file.write(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path


def tiny_bundle(
    folder: Path,
    *,
    runtime: str = "onnxruntime",
    tokenizer: Path | None = None,
    model: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A complete bundle folder around the tiny model; returns `folder`.

    Args:
        tokenizer, model: files to copy instead of making them again.
        changes: fields of the manifest to be other than they should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tiny_tokenizer(folder / TOKENIZER)
    else:
        (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
    destination = folder / RUNTIMES[runtime]
    if model is not None:
        destination.write_bytes(model.read_bytes())
    elif runtime == "onnxruntime":
        tiny_onnx(destination)
    else:
        tiny_pte(destination)
    (folder / GOLDEN).write_text("{}\n")
    files = describe_files(folder)
    architecture = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "ffn_width": WIDTH,
        "num_heads": 1,
        "num_layers": 1,
        "pooling": "mean",
    }
    scheme = {"name": "float32", "weights": {}}
    facts: dict[str, Any] = {
        "target": f"tiny-{runtime}",
        "runtime": runtime,
        "fingerprint": fingerprint_of(
            weights={"tiny": "7"},
            tokenizer_sha256=files[TOKENIZER]["sha256"],
            prompts=PROMPTS,
            architecture=architecture,
            scheme=scheme,
        ),
        "source": {"model": "tiny", "revision": None, "weights": {}},
        "architecture": architecture,
        "tokenizer": {
            "bos_id": BOS,
            "eos_id": EOS,
            "pad_id": PAD,
            "vocab_size": VOCAB,
            "max_tokens": MAX_TOKENS,
        },
        "prompts": PROMPTS,
        "dims": DIMS,
        "scheme": scheme,
        "batch": "one" if runtime == "executorch" else "dynamic",
        "verification": {},
        "tools": {},
        "files": files,
    }
    write_manifest(folder, Manifest(**facts | dict(changes or {})))
    return folder


def with_weights(encoder: Encoder, quantized: Mapping[str, Quantized]) -> Encoder:
    """Return a float32 copy of an encoder that computes with dequantized weights."""
    import copy

    import torch

    reference = copy.deepcopy(encoder).float()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in quantized:
                weight.copy_(quantized[name].dequantize())
    return reference
