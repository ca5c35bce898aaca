"""Paths as callers give them, and files that others may read as far as the umask lets them."""

from __future__ import annotations

import os
import secrets
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_value(hint: Any, value: Any, where: str) -> Any:
    """``value``, as JSON has it, as what the annotation ``hint`` says; ValueError if it is not."""
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # with None: there are no others here
        return None if value is None else read_value(inner[0], value, where)
    if origin is tuple:
        check_type(value, (list, tuple), where, "a list")
        return tuple(read_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        check_type(value, Mapping, where, "a dict")
        return {
            str(key): read_value(inner[1], item, f"{where}.{key}") for key, item in value.items()
        }
    fields: Any = getattr(hint, "__dataclass_fields__", None)
    if fields is None:
        check_type(value, (int, float) if hint is float else hint, where, hint.__name__)
        return value
    check_type(value, Mapping, where, "a dict")
    # What is computed is written for readers, and not read.
    computed = {name for name in value if isinstance(getattr(hint, str(name), None), property)}
    value = {name: item for name, item in value.items() if name not in computed}
    hints = typing.get_type_hints(hint, hint.__init__.__globals__)
    check_keys(value, set(hints), where)
    if hasattr(hint, "check_plain"):
        hint.check_plain(value, where)
    return hint(
        **{name: read_value(h, value[name], f"{where}.{name}") for name, h in hints.items()}
    )


def check_type(value: Any, kinds: Any, where: str, rule: str) -> None:
    """ValueError unless ``value`` is of these kinds."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f"{where} must be {rule}, got {type(value).__name__}")


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """ValueError unless the keys are exactly ``known``."""
    for title, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            rule = f"{where} must have the keys {', '.join(sorted(known))}"
            raise ValueError(f"{rule}, got {title} {', '.join(map(repr, sorted(names, key=str)))}")
