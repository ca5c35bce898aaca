"""Paths as callers give them, and files that others may read as far as the umask lets them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ORDINARY = 0o666


def path_from(path: str | os.PathLike[str]) -> Path:
    """With a leading ~ as the home directory."""
    return Path(path).expanduser()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new empty file beside ``path`` that takes its place at the end, or goes on an error."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # so the rename is atomic
    try:
        part.touch(_ORDINARY, exist_ok=False)
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # some libraries write for the owner alone
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def share_files(folder: Path) -> None:
    """Gives files in a folder that was just made the rights that files there get by themselves.

    Some libraries write for the owner alone.
    """
    rights = folder.stat().st_mode & _ORDINARY
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)
