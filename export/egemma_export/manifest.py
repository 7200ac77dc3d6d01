"""manifest.json of a bundle, made from the checkpoint, the target and the files beside it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from egemma_core.bundle import GOLDEN, TOKENIZER, Bounds, Manifest
from egemma_core.checkpoint.config import EncoderConfig
from egemma_core.checkpoint.folder import Checkpoint
from egemma_export.bundle_folder import describe_files, fingerprint_of
from egemma_export.targets import Target
from egemma_quant.schemes import ROLES, Scheme


def make_manifest(checkpoint: Checkpoint, target: Target, folder: Path, bounds: Bounds) -> Manifest:
    """Return the manifest of a bundle that was not measured yet.

    It reads every weight file of the checkpoint and every file of the bundle for its hash.

    Args:
        folder: the bundle, with the model, the tokenizer and golden.json in it.
        bounds: what the finished file has to keep.
    """
    config, weights = checkpoint.config, checkpoint.weight_hashes()
    files = describe_files(folder)
    architecture, scheme = _architecture(config), _scheme(target.scheme)
    prompts = dict(checkpoint.prompts.by_name)
    return Manifest(
        target=target.name,
        runtime=target.runtime,
        fingerprint=fingerprint_of(
            weights=weights,
            tokenizer_sha256=files[TOKENIZER]["sha256"],
            prompts=prompts,
            architecture=architecture,
            scheme=scheme,
        ),
        # The folder's name, not its path: a bundle is handed to strangers.
        source={
            "model": checkpoint.source if checkpoint.revision else checkpoint.folder.name,
            "revision": checkpoint.revision,
            "weights": weights,
        },
        architecture=architecture,
        tokenizer=_tokenizer(config),
        prompts=prompts,
        dims=config.dims,
        scheme=scheme | {"activations": target.activations, "instead": target.instead},
        batch="one" if target.runtime == "executorch" else "dynamic",
        verification={"bounds": asdict(bounds)},
        tools=_tools(target.runtime),
        files=files,
    )


def measured_manifest(manifest: Manifest, folder: Path, measured: Mapping[str, Any]) -> Manifest:
    """Return the manifest with what was measured; of the files, golden.json alone is read again."""
    known = {name: entry for name, entry in manifest.files.items() if name != GOLDEN}
    return replace(
        manifest,
        verification={**manifest.verification, "measured": dict(measured)},
        files=describe_files(folder, known=known),
    )


def _architecture(config: EncoderConfig) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "width": config.width,
        "ffn_width": config.ffn_width,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_scale": config.query_scale,
        "norm_eps": config.norm_eps,
        "layer_types": list(config.layer_types),
        "window": config.window,
        "rope_theta_full": config.rope_theta_full,
        "rope_theta_sliding": config.rope_theta_sliding,
        "pooling": config.pooling,
        "dense": [list(pair) for pair in config.dense],
    }


def _tokenizer(config: EncoderConfig) -> dict[str, int]:
    return {
        "bos_id": config.bos_id,
        "eos_id": config.eos_id,
        "pad_id": config.pad_id,
        "vocab_size": config.vocab_size,
        "max_tokens": config.max_tokens,
    }


def _scheme(scheme: Scheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"name": "float32", "weights": dict.fromkeys(ROLES)}
    weights = {role: asdict(scheme.format_of(role)) for role in ROLES}
    return {"name": scheme.name, "weights": weights}


def _tools(runtime: str) -> dict[str, str]:
    """Return the versions of what made the file."""
    writers = ("executorch", "torchao") if runtime == "executorch" else ("onnx", "onnxruntime")
    found = {"python": platform.python_version()}
    for name in ("egemma", "torch", *writers):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
