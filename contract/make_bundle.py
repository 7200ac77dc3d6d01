"""contract/bundle and contract/bundle-executorch: a tiny model that really runs, exported like any other.

Two layers of width 64 with weights from SHA-256 and the first pieces of the built-in vocabulary: a
checkpoint of its own, in the published layout, which `egemma-export` reads. Needs the export extra.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from contract.library import EMBEDDING_GEMMA, read_bundle
from contract.notation import BUILTIN, FOLDER, spread

BUNDLES = {"onnx-int4": FOLDER / "bundle", "android-int4": FOLDER / "bundle-executorch"}
PIECES = 512
# Of the manifest: what depends on the machine and the versions that exported.
VARIES = ("tools", "files", "verification")


def make_bundle(target: str, folder: Path, scratch: Path) -> None:
    """Export the tiny checkpoint for a target; `folder` and `scratch` must not exist."""
    from egemma_export.pipeline import ExportConfig, export

    checkpoint = scratch / "tiny-contract"
    if not checkpoint.exists():
        _write_checkpoint(checkpoint, scratch)
    export(ExportConfig(target=target, model=str(checkpoint), out=folder, threads=1))


def differences(target: str, committed: Path, made: Path) -> list[str]:
    """What a bundle made now has other than the committed one; versions and last bits aside."""
    found = []
    old, new = (
        json.loads((path / "manifest.json").read_text("utf-8")) for path in (committed, made)
    )
    for name in sorted((old.keys() | new.keys()) - set(VARIES)):
        if old.get(name) != new.get(name):
            found.append(f"{target}: manifest, {name}: {old.get(name)!r}, now {new.get(name)!r}")
    if sorted(old["files"]) != sorted(new["files"]):
        found.append(f"{target}: files {sorted(old['files'])}, now {sorted(new['files'])}")
    if (committed / "tokenizer.model").read_bytes() != (made / "tokenizer.model").read_bytes():
        found.append(f"{target}: tokenizer.model differs")
    found += [f"{target}: golden.json, {what}" for what in _golden_differences(committed, made)]
    if target.startswith("onnx"):
        from egemma_export.read_onnx import read_onnx_weights

        weights, again = (read_onnx_weights(path / "model.onnx") for path in (committed, made))
    else:
        from egemma_export.read_executorch import read_pte_weights

        weights, again = (read_pte_weights(path / "model.pte") for path in (committed, made))
    if sorted(weights) != sorted(again):
        found.append(f"{target}: quantized weights {sorted(weights)}, now {sorted(again)}")
        return found
    for name, weight in weights.items():
        same = np.array_equal(weight.codes, again[name].codes)
        if not same or not np.array_equal(weight.scales, again[name].scales):
            found.append(f"{target}: {name} has other codes or scales")
    return found


def _golden_differences(committed: Path, made: Path) -> Iterator[str]:
    old, new = (read_bundle(path, check_hashes=False).golden() for path in (committed, made))
    if [case["name"] for case in old["cases"]] != [case["name"] for case in new["cases"]]:
        yield "other cases"
        return
    for case, again in zip(old["cases"], new["cases"], strict=True):
        for name in ("text", "ids", "num_tokens", "truncated"):
            if case[name] != again[name]:
                yield f"{case['name']}: other {name}"
        for name in ("vector", "quantized_vector"):
            if np.abs(np.subtract(case[name], again[name])).max() > 1e-5:
                yield f"{case['name']}: other {name}"


def _write_checkpoint(folder: Path, scratch: Path) -> None:
    """A checkpoint in the published layout, with weights that every machine makes alike."""
    import torch

    from egemma_core.checkpoint.config import FULL, SLIDING, EncoderConfig
    from egemma_core.nn.encoder import Encoder
    from egemma_core.nn.save import save_checkpoint

    config = EncoderConfig(
        vocab_size=PIECES, width=64, ffn_width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, query_scale=32**-0.5,
        norm_eps=1e-6, layer_types=(SLIDING, FULL), window=8, rope_theta_full=1e6, rope_theta_sliding=1e4, max_tokens=96, bos_id=2,
        eos_id=1, pad_id=0, pooling="mean", dense=((64, 96), (96, 64)), dims=(64, 32, 16),
    )  # fmt: skip
    encoder = Encoder(config)
    with torch.no_grad():
        for name, weight in sorted(encoder.named_parameters()):
            values = spread(f"weight {name}", weight.numel()).reshape(tuple(weight.shape))
            # norms move a little around 1, a row of any matrix keeps the size of what it reads
            scale = 0.25 if weight.dim() == 1 else 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(torch.from_numpy(values * np.float32(scale)))
    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = scratch / "tokenizer.model"
    tokenizer.write_bytes(
        first_pieces((BUILTIN / "tokenizer.model").read_bytes(), PIECES, "".join(_LETTERS))
    )
    save_checkpoint(encoder, tokenizer, EMBEDDING_GEMMA, folder)


_LETTERS = [chr(code) for code in range(0x21, 0x7F)]
_PIECE, _TRAINER = 1, 2  # fields of SentencePiece's ModelProto
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of a piece that are none of text


def first_pieces(model: bytes, count: int, letters: str) -> bytes:
    """A SentencePiece model with so many pieces: the special ones, these letters, the first merges.

    The pieces of a BPE model stand in the order of their merges, so a beginning of them is a
    vocabulary of its own; letters stand at the end and are all kept by name.
    """
    pieces = [(start, body) for field, start, body in _fields(model) if field == _PIECE]
    kinds = {start: _piece(body) for start, body in pieces}
    special = [
        start
        for start, _ in pieces
        if kinds[start][1] in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    ]
    single = [
        start for start, _ in pieces if kinds[start][1] == 1 and kinds[start][0] in {*letters, "▁"}
    ]
    known = {*letters, "▁"}
    merges = [
        start
        for start, _ in pieces
        if kinds[start][1] == 1 and len(kinds[start][0]) > 1 and set(kinds[start][0]) <= known
    ]
    kept = {*special, *single, *merges[: count - len(special) - len(single)]}
    assert len(kept) == count
    out = b""
    for field, start, body in _fields(model):
        if field != _PIECE or start in kept:
            out += _varint(field << 3 | 2) + _varint(len(body)) + body
    return out


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each field of a Protocol Buffers message; all have a length here."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        assert key & 7 == 2, "a field without a length"
        size, at = _read_varint(message, at)
        yield key >> 3, start, message[at : at + size]
        at += size


def _piece(body: bytes) -> tuple[str, int]:
    """Text and type of a piece: field 1 is a text, 2 a float32, 3 the type, 1 where it is missing."""
    at, text, kind = 0, "", 1
    while at < len(body):
        key, at = _read_varint(body, at)
        if key == 1 << 3 | 2:
            size, at = _read_varint(body, at)
            text, at = body[at : at + size].decode(), at + size
        elif key == 2 << 3 | 5:
            struct.unpack_from("<f", body, at)
            at += 4
        else:
            kind, at = _read_varint(body, at)
    return text, kind


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
