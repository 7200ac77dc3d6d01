"""The `egemma` command."""

from egemma.cli.main import main

__all__ = ["main"]
