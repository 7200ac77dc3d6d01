"""A model that pools in a way that no graph computes is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from egemma_core.checkpoint.prompts import EMBEDDING_GEMMA
from egemma_core.errors import ExportError
from egemma_core.nn.save import save_checkpoint
from egemma_export.pipeline import ExportConfig, export
from egemma_export.targets import TARGETS
from egemma_train.start.decoder import random_encoder
from tests.core.test_save import CONFIG


@pytest.mark.parametrize("pooling", ["attention", "last"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_checkpoint_that_pools_otherwise_is_not_exported(
    tiny_spm: Path, tmp_path: Path, target: str, pooling: str
) -> None:
    save_checkpoint(
        random_encoder(replace(CONFIG, ffn_width=64, pooling=pooling), 3),
        tiny_spm,
        EMBEDDING_GEMMA,
        tmp_path / "model",
    )
    with pytest.raises(ExportError, match=f"pooling='{pooling}'"):
        export(ExportConfig(target=target, model=str(tmp_path / "model"), out=tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
