"""Fixtures that several rooms share. Nothing here needs the network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.own_process import pytest_configure, pytest_runtestloop  # noqa: F401

# A shell that starts the tests in the background has them ignore Ctrl-C, and so all processes that
# they start, which tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(
    os.environ.get("EGEMMA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
GEMMA_TOKENIZER = SHARED_DATA / "tokenizer" / "gemma3.model"


@pytest.fixture(scope="session")
def gemma_tokenizer() -> Path:
    """The real Gemma 3 SentencePiece model; not committed."""
    if not GEMMA_TOKENIZER.is_file():
        pytest.skip(
            f"{GEMMA_TOKENIZER} is absent; set EGEMMA_DATA to the folder that holds "
            "tokenizer/gemma3.model"
        )
    return GEMMA_TOKENIZER


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model with Gemma's settings."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="session")
def full_size_checkpoint(tmp_path_factory: pytest.TempPathFactory, gemma_tokenizer: Path) -> Path:
    """24 layers, 262,144 rows, random; made once and kept in the cache folder (1.2 GB)."""
    from models.make_checkpoint import write_checkpoint

    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "egemma"
        / "random-full-size"
    )
    if not (cache / "tokenizer.model").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        write_checkpoint(cache, "full", gemma_tokenizer)
    return cache
