"""The command line."""

from adaround_ext.cli.main import main

__all__ = ["main"]
