"""What the package shows of itself."""

from __future__ import annotations

import importlib
import inspect

import adaround_ext


def test_dir_shows_what_is_public() -> None:
    names = dir(adaround_ext)
    assert [name for name in names if not name.startswith("__")] == sorted(adaround_ext.__all__)
    assert {"__version__", "__doc__", "__all__"} <= set(names)
    assert all(hasattr(adaround_ext, name) for name in names)


def test_modules_are_there_all_the_same() -> None:
    for name in ("config", "attachment", "export", "ops"):
        assert inspect.ismodule(importlib.import_module(f"adaround_ext.{name}"))
        assert inspect.ismodule(getattr(adaround_ext, name))
