"""Command line: ``adaround-ext``, and what its commands read, write and show."""

from adaround_ext.cli.main import main

__all__ = ["main"]
