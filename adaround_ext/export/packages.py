"""Packages that only some formats need."""

from __future__ import annotations

import importlib.util


def need(what: str, extra: str, *packages: str) -> None:
    """ImportError saying that ``what`` needs a package, and which extra of ours brings it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            hint = f'pip install "adaround_ext[{extra}]"'
            raise ImportError(f"{what} needs the package {package}: {hint}")
